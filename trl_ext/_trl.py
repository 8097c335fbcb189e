"""Every private name of TRL that this package leans on, read at TRL 1.16.

Nothing else in the package imports a name that TRL does not document. `BORROWED` lists what is called, replaced and
overridden, with the parameters each was read with; `tests/upstream/test_trl_canary.py` compares the list with the
installed TRL, and `check_borrowed_names` refuses to start when one of them is gone. The names that are called can be
imported from here (`from ._trl import pad`); they are looked up on first use, so that importing this module costs
nothing.
"""

import contextlib
import inspect
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

OLDEST_TRL = "1.16"

# "module:qualified name" -> parameters at TRL 1.16. The comment says what it is for.
BORROWED = {
    # called: import them from this module
    "trl.data_utils:_tokenize": ("processing_class", "input", "apply_chat_template_kwargs"),
    "trl.data_utils:common_prefix_length": ("ids", "other_ids"),
    "trl.trainer.utils:global_then_local_main_first": (),
    "trl.trainer.utils:FusedCausalLMOutput": (),
    "trl.trainer.utils:add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    "trl.trainer.utils:pad": ("tensors", "padding_value", "padding_side", "pad_to_multiple_of"),
    "trl.trainer.utils:use_adapter": ("model", "adapter_name"),
    "trl.trainer.utils:get_config_model_id": ("config",),
    "trl.models.utils:disable_gradient_checkpointing": ("model", "gradient_checkpointing_kwargs"),
    "trl.models.utils:prepare_deepspeed": ("model", "accelerator"),
    "trl.kernels.chunked_divergence:ChunkedDivergenceFunction": (),
    "trl.kernels.chunked_divergence:ChunkedDivergenceFunction.forward": (
        "ctx",
        "student_hidden",
        "student_weight",
        "student_bias",
        "teacher_hidden",
        "teacher_weight",
        "teacher_bias",
        "beta",
        "temperature",
        "student_logit_scale",
        "student_final_logit_softcapping",
        "teacher_logit_scale",
        "teacher_final_logit_softcapping",
    ),
    # replaced while a trainer without a reference model is being built (see `without_reference_model`)
    "trl.trainer.dpo_trainer:create_model_from_path": ("model_id", "architecture", "kwargs"),
    # wrapped while a trainer is being constructed (see `after_fused_lm_head`)
    "trl.trainer.dpo_trainer:add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    "trl.trainer.kto_trainer:add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    # overridden in `trainers/candidate_trainer.py`
    "trl.trainer.dpo_trainer:DPOTrainer._prepare_dataset": (
        "self",
        "dataset",
        "processing_class",
        "args",
        "dataset_name",
    ),
    "trl.trainer.dpo_trainer:DPOTrainer._set_signature_columns_if_needed": ("self",),
    "trl.trainer.dpo_trainer:DPOTrainer.compute_ref_log_probs": ("self", "model", "inputs"),
    "trl.trainer.dpo_trainer:DPOTrainer.compute_loss": (
        "self",
        "model",
        "inputs",
        "return_outputs",
        "num_items_in_batch",
    ),
    "trl.trainer.dpo_trainer:DPOTrainer.prediction_step": (
        "self",
        "model",
        "inputs",
        "prediction_loss_only",
        "ignore_keys",
    ),
    "trl.trainer.dpo_trainer:DPOTrainer.predict": ("self", "test_dataset", "ignore_keys", "metric_key_prefix"),
    "trl.trainer.dpo_trainer:DPOTrainer.log": ("self", "logs", "start_time"),
    # overridden in `trainers/resumable.py`
    "trl.trainer.dpo_trainer:DPOTrainer.create_model_card": ("self", "model_name", "dataset_name", "tags"),
    # overridden, inherited by TRL from transformers.Trainer
    "trl.trainer.dpo_trainer:DPOTrainer._get_train_sampler": ("self", "train_dataset"),
    "trl.trainer.dpo_trainer:DPOTrainer._get_eval_sampler": ("self", "eval_dataset"),
    "trl.trainer.dpo_trainer:DPOTrainer.train": ("self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "trl.trainer.dpo_trainer:DPOTrainer._prepare_input": ("self", "data"),
    "trl.trainer.dpo_trainer:DPOTrainer.get_batch_samples": ("self", "epoch_iterator", "num_batches", "device"),
    "trl.trainer.dpo_trainer:DPOTrainer.get_train_dataloader": ("self",),
    "trl.trainer.dpo_trainer:DPOTrainer.get_eval_dataloader": ("self", "eval_dataset"),
    "trl.trainer.dpo_trainer:DPOTrainer._init_training_state": (
        "self",
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "trl.trainer.dpo_trainer:DPOTrainer._save_checkpoint": ("self", "model", "trial"),
    "trl.trainer.dpo_trainer:DPOTrainer._push_from_checkpoint": ("self", "checkpoint_folder"),
    "trl.trainer.dpo_trainer:DPOTrainer.save_model": ("self", "output_dir", "_internal_call"),
    "trl.trainer.dpo_trainer:DPOTrainer.evaluation_loop": (
        "self",
        "dataloader",
        "description",
        "prediction_loss_only",
        "ignore_keys",
        "metric_key_prefix",
    ),
}

# What trainers of this package override beside that, on any of TRL's trainers: looked at by the canary alone.
OVERRIDDEN = {
    "trl.experimental.orpo.orpo_trainer:ORPOTrainer._save_checkpoint": ("self", "model", "trial"),
    "trl.experimental.orpo.orpo_trainer:ORPOTrainer.tokenize_row": ("self", "feature", "model"),
    "trl.trainer.base_trainer:_BaseTrainer.create_model_card": ("self", "model_name", "dataset_name", "tags"),
    "trl.trainer.dpo_trainer:DPOTrainer.evaluate": ("self", "eval_dataset", "ignore_keys", "metric_key_prefix"),
    "trl.trainer.kto_trainer:KTOTrainer._get_train_sampler": ("self", "train_dataset"),
    "trl.trainer.kto_trainer:KTOTrainer._prepare_dataset": (
        "self", "dataset", "processing_class", "args", "dataset_name",
    ),
    "trl.trainer.kto_trainer:KTOTrainer._save_checkpoint": ("self", "model", "trial"),
    "trl.trainer.reward_trainer:RewardTrainer._prepare_dataset": (
        "self", "dataset", "processing_class", "args", "dataset_name",
    ),
    "trl.trainer.reward_trainer:RewardTrainer._save_checkpoint": ("self", "model", "trial"),
    "trl.trainer.reward_trainer:RewardTrainer.compute_loss": (
        "self", "model", "inputs", "return_outputs", "num_items_in_batch",
    ),
    "trl.trainer.rloo_trainer:RLOOTrainer._save_checkpoint": ("self", "model", "trial"),
    "trl.trainer.rloo_trainer:RLOOTrainer.get_eval_dataloader": ("self", "eval_dataset"),
    "trl.trainer.rloo_trainer:RLOOTrainer.get_train_dataloader": ("self",),
    "trl.trainer.sft_trainer:SFTTrainer._prepare_dataset": (
        "self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name",
    ),
    "trl.trainer.sft_trainer:SFTTrainer._save_checkpoint": ("self", "model", "trial"),
}  # fmt: skip


def check_trl_version() -> None:
    """
    Refuse a TRL that is missing or older than the one this package was written for.

    Raises:
        ImportError: in one sentence, with the command that mends it.
    """
    try:
        installed = version("trl")
    except PackageNotFoundError:
        installed = None
    if installed is None or Version(installed) < Version(OLDEST_TRL):
        found = f"trl {installed} is installed" if installed else "trl is not installed"
        raise ImportError(f"trl_ext needs trl>={OLDEST_TRL} and {found}: run `pip install 'trl>={OLDEST_TRL}'`.")


def find_borrowed(path: str):
    """The object named `"module:qualified.name"`; raises `ImportError` or `AttributeError` when it is gone."""
    module, _, name = path.partition(":")
    found = import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
    return getattr(found, "__func__", found)  # unwrap staticmethod


def check_borrowed_names() -> None:
    """
    Refuse a TRL that has lost a name in `BORROWED` or changed its parameters. New parameters at the end are no matter.

    Raises:
        ImportError: in one sentence, naming the names and the version that has them.
    """
    changed = []
    for path, expected in BORROWED.items():
        try:
            found = find_borrowed(path)
            if not inspect.isclass(found):
                parameters = tuple(inspect.signature(inspect.unwrap(found)).parameters)
                if parameters[: len(expected)] != expected:
                    changed.append(f"{path} now takes {parameters}")
        except (ImportError, AttributeError):
            changed.append(f"{path} is gone")
    if changed:
        raise ImportError(
            f"trl_ext builds on names that have changed in trl {version('trl')} ({'; '.join(changed)}): "
            f"run `pip install 'trl=={OLDEST_TRL}.*'` or upgrade trl_ext."
        )


# where TRL's trainers keep what they measure, until it is logged; ORPO's is the second
MEASURED = ("_metrics", "_stored_metrics")


def measured_in_evaluation(trainer) -> dict[str, list[float]] | None:
    """
    Values that a trainer of TRL has measured since the last log of an evaluation, by name; `None` if it keeps none.
    """
    kept = next((vars(trainer)[name] for name in MEASURED if name in vars(trainer)), None)
    return None if kept is None else kept["eval"]


@contextlib.contextmanager
def without_reference_model(policy_is_loaded_by_trl: bool):
    """
    Keep `DPOTrainer.__init__` from loading a reference model.

    `DPOTrainer` 1.16 has no switch for this. Of the ways round it, the precompute flag hashes all weights and still
    loads a copy under FSDP, and a copy that is dropped afterwards costs the peak memory we want to save. Here the one
    loader call that would build the reference returns `None` instead, which is the state TRL itself is in when PEFT
    or precomputed log-probs make a reference unnecessary.

    Args:
        policy_is_loaded_by_trl (`bool`):
            Whether the constructor was given a model name, so that its first load is the policy's and must happen.
    """
    from trl.trainer import dpo_trainer

    load = dpo_trainer.create_model_from_path
    loads_to_let_through = 1 if policy_is_loaded_by_trl else 0

    def load_policy_only(*args, **kwargs):
        nonlocal loads_to_let_through
        if loads_to_let_through == 0:
            return None
        loads_to_let_through -= 1
        return load(*args, **kwargs)

    dpo_trainer.create_model_from_path = load_policy_only
    try:
        yield
    finally:
        dpo_trainer.create_model_from_path = load


@contextlib.contextmanager
def without_rotation():
    """Keep `Trainer` from removing older checkpoints as soon as it has written a new one."""
    from transformers import trainer

    rotate = trainer.rotate_checkpoints
    trainer.rotate_checkpoints = lambda *args, **kwargs: None
    try:
        yield
    finally:
        trainer.rotate_checkpoints = rotate


@contextlib.contextmanager
def after_fused_lm_head(callback):
    """
    Call `callback(model)` on every model to which a `DPOTrainer` or a `KTOTrainer` being constructed adds TRL's fused
    LM head.
    """
    from trl.trainer import dpo_trainer, kto_trainer

    modules = dpo_trainer, kto_trainer
    added_by = [module.add_fused_lm_head for module in modules]

    def calling_back(add):
        def add_and_call(model, *args, **kwargs):
            add(model, *args, **kwargs)
            callback(model)

        return add_and_call

    for module, add in zip(modules, added_by, strict=True):
        module.add_fused_lm_head = calling_back(add)
    try:
        yield
    finally:
        for module, add in zip(modules, added_by, strict=True):
            module.add_fused_lm_head = add


_checked = False


def __getattr__(name: str):
    global _checked
    if name.startswith("__"):
        raise AttributeError(name)
    if not _checked:  # before the first borrowed name is handed out, so that a lost one is refused in one sentence
        check_borrowed_names()
        _checked = True
    for path in BORROWED:
        module, _, qualified_name = path.partition(":")
        if qualified_name == name:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'trl_ext._trl' has no attribute {name!r}; TRL names must be listed in BORROWED")


def take_down_deepspeed(engine) -> None:
    """
    Let go of what `prepare_deepspeed` has made of a model, so that the model can be given to another engine.

    DeepSpeed's own `destroy` (0.19) leaves two hooks of the engine on the model, and under ZeRO-3 the functions with
    which its parameters are collected in the backward pass, which the next engine would take for its own; and it keeps
    the model itself on a stack of the modules that are being run.
    """
    engine.destroy()
    module = engine.module
    for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
        if getattr(engine, hook, None) is not None:
            getattr(engine, hook).remove()
            setattr(engine, hook, None)
    for part in module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            part.__dict__.pop(name, None)
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK[:] = [part for part in parameter_offload.FWD_MODULE_STACK if part is not module]


@contextlib.contextmanager
def loaded_whole():
    """
    Within, models are loaded whole on each process, though the run shards the models it trains with ZeRO-3: a model
    that only scores is used by each process by itself.
    """
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
