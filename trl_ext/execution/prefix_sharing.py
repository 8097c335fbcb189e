"""Prefix sharing for a trainer: the public switch over `execution/`."""

import contextlib
import functools
from collections.abc import Iterator

import torch
import transformers
from peft import PeftConfig
from transformers import PreTrainedModel, Trainer
from trl import DPOConfig, DPOTrainer, KTOTrainer

from .._trl import after_fused_lm_head
from ..runtime.models import load_config
from ..runtime.parallelism import refuse_sharding_that_would_not_be, sequence_split
from .shared_prefixes import SharedPrefixes, reason_against
from .sharing import PrefixSharing, cannot_be_honoured, warn_not_shared
from .support import adapter_reason, inspect_model

# TRL's trainers that score completions with the fused LM head, and those that read what the whole model returns
WITH_FUSED_HEAD = {"DPOTrainer", "KTOTrainer", "RLOOTrainer", "GRPOTrainer"}
WITHOUT_FUSED_HEAD = {"RewardTrainer", "ORPOTrainer", "CPOTrainer"}


def enable_prefix_sharing(
    trainer: Trainer, prefix_sharing: str | bool = "auto", *, self_check: bool = False
) -> PrefixSharing | SharedPrefixes | None:
    """
    Make a trainer of TRL compute each prompt once for all its completions, with the same results.

    Losses, metrics, sampling order, step counts and checkpoints stay TRL's: a batch is rearranged inside the model's
    forward, and the per-token outputs are put back where TRL expects them. The reference model, if there is one,
    is treated the same. Works with every loss type, WPO weighting, `ld_alpha`, PEFT, gradient checkpointing, DDP and
    DeepSpeed. The trainers of this package do it by themselves (`prefix_sharing` of their configs).

    With dropout (LoRA's, say) the noise is drawn for other shapes, and completions of a prompt share the noise in it.

    What the constructor computes with `precompute_ref_log_probs=True` comes before this call: construct the trainer
    inside [`share_prefixes`] to have that shared as well.

    Args:
        trainer ([`~trl.DPOTrainer`], [`~trl.KTOTrainer`], [`~trl.RLOOTrainer`], [`~trl.GRPOTrainer`],
            [`~trl.RewardTrainer`], or `ORPOTrainer` or `CPOTrainer` of `trl.experimental`):
            The trainer, before or between calls of `train` and `evaluate`. A reward model shares the prompt of a
            pair. ORPO and CPO share it too; their LM head still sees every position, and `logits/chosen`, which
            TRL averages over padding as well, differs. RLOO and GRPO share prompts wherever they compute
            log-probabilities, as far as TRL puts answers to a prompt into the same micro-batch; sampling is theirs.
        prefix_sharing (`str` or `bool`, *optional*, defaults to `"auto"`):
            `"auto"` rearranges the batches for which that is expected to be faster, and leaves models alone that
            cannot share, with one warning that says why. `True` rearranges every batch, and what cannot be is an
            error. `False` undoes an earlier call.
        self_check (`bool`, *optional*, defaults to `False`):
            Run two sequences of the first batch that shares anything both ways, compare their per-token
            log-probabilities and the gradients that reach their embedded tokens, and stop with the difference if they
            disagree. Not under FSDP. For reward models, ORPO and CPO, hidden states take the place of
            log-probabilities.

    Returns:
        [`PrefixSharing`] for DPO, KTO, RLOO and GRPO, [`SharedPrefixes`] for the others, also kept as
        `trainer.prefix_sharing`. `statistics` tells what was saved, `remove()` undoes this call. `None` with
        `prefix_sharing=False`, and where the model of one of the others cannot share.

    Raises:
        TypeError: not one of these trainers.
        ValueError: `prefix_sharing=True` and the model cannot share, or FSDP on a CPU.

    Example:
    ```python
    from trl import DPOConfig, DPOTrainer
    from trl_ext import enable_prefix_sharing

    trainer = DPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", train_dataset=dataset)
    enable_prefix_sharing(trainer)
    trainer.train()
    ```
    """
    if not _is_one_of(trainer, WITH_FUSED_HEAD | WITHOUT_FUSED_HEAD):
        known = ", ".join(sorted(WITH_FUSED_HEAD | WITHOUT_FUSED_HEAD))
        raise TypeError(f"`trainer` must be TRL's {known}, or a subclass of one, got a {type(trainer).__name__}.")
    if prefix_sharing not in ("auto", True, False):
        raise ValueError(f"`prefix_sharing` must be 'auto', True or False, got {prefix_sharing!r}.")
    if getattr(trainer, "prefix_sharing", None) is not None:
        trainer.prefix_sharing.remove()
        trainer.prefix_sharing = None
    if prefix_sharing is False:
        return None
    refuse_sharding_that_would_not_be(trainer.args)
    if not _is_one_of(trainer, WITH_FUSED_HEAD):
        trainer.prefix_sharing = _share_without_fused_head(trainer, prefix_sharing, self_check)
        return trainer.prefix_sharing
    sharing = PrefixSharing(prefix_sharing, self_check)
    try:
        reason = settings_reason(trainer.args, trainer.model)
        if reason is not None:
            sharing.cannot(reason)
        for model in (trainer.model, trainer.ref_model):
            if model is not None and reason is None:
                sharing.install(trainer.accelerator.unwrap_model(model))
    except ValueError:
        sharing.remove()
        raise
    trainer.prefix_sharing = sharing
    return sharing


def _is_one_of(trainer: Trainer, names: set[str]) -> bool:
    return any(base.__name__ in names and base.__module__.startswith("trl.") for base in type(trainer).__mro__)


def _share_without_fused_head(trainer: Trainer, mode: str | bool, self_check: bool) -> SharedPrefixes | None:
    model, always = trainer.accelerator.unwrap_model(trainer.model), mode is True
    reason = settings_reason(trainer.args, model)
    reason = reason or reason_against(model, always=always, option="prefix_sharing=True")
    if reason is None:
        sharing = SharedPrefixes(model, always=always, self_check=self_check)
        sharing.install()
        return sharing
    if always:
        raise ValueError(cannot_be_honoured(reason))
    warn_not_shared(reason)
    return None


@contextlib.contextmanager
def sharing_from_the_start(trainer: Trainer, prefix_sharing: str | bool, *, self_check: bool) -> Iterator[None]:
    """
    [`enable_prefix_sharing`] around the constructor of a trainer. What the constructor itself computes with a fused LM
    head, the reference's log-probabilities, is shared as well.

    Args:
        trainer ([`~transformers.Trainer`]): the trainer whose TRL constructor is called inside the block.
        prefix_sharing, self_check:
            As in [`enable_prefix_sharing`].
    """
    if prefix_sharing is False or not _is_one_of(trainer, WITH_FUSED_HEAD):
        yield
        if prefix_sharing is not False:
            enable_prefix_sharing(trainer, prefix_sharing, self_check=self_check)
        return
    sharing = PrefixSharing(prefix_sharing, self_check)
    try:
        with after_fused_lm_head(sharing.install):
            yield
    except BaseException:
        sharing.remove()  # a model that was passed in is left as it was
        raise
    trainer.prefix_sharing = sharing
    reason = settings_reason(trainer.args, trainer.model)
    if reason is not None:
        sharing.remove()
        sharing.cannot(reason)


@contextlib.contextmanager
def share_prefixes(prefix_sharing: str | bool = "auto", *, self_check: bool = False) -> Iterator[None]:
    """
    [`enable_prefix_sharing`] for every [`~trl.DPOTrainer`] and [`~trl.KTOTrainer`] constructed inside the block, from
    its first forward on. Needed only where the constructor itself runs the model, which it does with
    `precompute_ref_log_probs=True`. The trainers of this package follow their config instead.

    Args:
        prefix_sharing, self_check:
            As in [`enable_prefix_sharing`].

    Example:
    ```python
    with share_prefixes():
        trainer = DPOTrainer(model, args=DPOConfig(precompute_ref_log_probs=True), train_dataset=dataset)
    trainer.train()
    ```
    """
    constructors = {trainer_class: trainer_class.__init__ for trainer_class in (DPOTrainer, KTOTrainer)}

    def sharing_constructor(construct):
        @functools.wraps(construct)
        def construct_sharing(self, *args, **kwargs):
            mode = False if getattr(self, "shares_by_config", False) else prefix_sharing
            with sharing_from_the_start(self, mode, self_check=self_check):
                construct(self, *args, **kwargs)

        return construct_sharing

    for trainer_class, construct in constructors.items():
        trainer_class.__init__ = sharing_constructor(construct)
    try:
        yield
    finally:
        for trainer_class, construct in constructors.items():
            trainer_class.__init__ = construct


def settings_reason(args: DPOConfig, model: str | PreTrainedModel) -> str | None:
    """Why batches cannot be rearranged under these settings; `None` if they can."""
    split = sequence_split(args, model)
    if split is not None:
        return f"with {split} a process does not compute its sequences whole"
    if args.n_gpu > 1:
        return "one process with several GPUs copies the model into threads; start a process for each GPU"
    if args.torch_compile:
        return "the model is compiled as a whole (torch_compile), and layouts differ from batch to batch"
    if args.neftune_noise_alpha is not None:
        return "the noise of `neftune_noise_alpha` depends on the length of a row"
    return None


def refuse_unless_shareable(model: str | PreTrainedModel, args: DPOConfig, peft_config: PeftConfig | None) -> None:
    """
    Refuse `prefix_sharing=True` for a model that cannot, before its weights are loaded.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): name, folder or model.
        args ([`~trl.DPOConfig`]): the trainer's settings, with what the model will be loaded with.
        peft_config ([`~peft.PeftConfig`], *optional*): adapter it will get.

    Raises:
        ValueError: it cannot share prefixes; the message says why and what to set.
    """
    reason = settings_reason(args, model)
    if reason is None and peft_config is not None:
        reason = adapter_reason(peft_config)
    if reason is None and isinstance(model, str):
        config = load_config(model, args)
        model_class = getattr(transformers, (config.architectures or ["?"])[0], None)
        if model_class is None:  # code from the Hub, looked at once it is loaded
            return
        with torch.device("meta"):  # the modules without weights; not `from_config`, which under ZeRO-3 makes weights
            model = model_class(config)
    if reason is None:
        reason = inspect_model(model).reason
    if reason is not None:
        raise ValueError(cannot_be_honoured(reason))
