"""Prefix sharing under whole trainers: TRL's own `DPOTrainer` and ours give the same losses, metrics and weights."""

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from tests.equivalence.baseline import padded_dpo_trainer
from tests.equivalence.small_models import make
from tests.support.data import read_jsonl, real_data
from tests.support.whole_runs import assert_same_run, remember
from trl_ext import SLiCConfig, SLiCTrainer, enable_prefix_sharing, share_prefixes
from trl_ext.playground.model import byte_level_tokenizer

LOSS_TYPES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


def train_both(model, settings, dataset, *, peft_config=None, ref_model=None, **changed):
    """The same run with plain TRL and with prefix sharing."""
    trainers = []
    for enabled in (False, True):
        trainer = padded_dpo_trainer(
            model() if callable(model) else model,
            dataset,
            {**settings, **changed},
            ref_model=ref_model() if ref_model is not None else None,
            eval_dataset=dataset.select(range(3)),
            peft_config=peft_config,
        )
        if enabled:
            enable_prefix_sharing(trainer, True)
        remember(trainer)
        trainer.train()
        trainer.evaluate()
        trainers.append(trainer)
    assert trainers[1].prefix_sharing.statistics.batches_shared > 0
    statistics = trainers[1].prefix_sharing.statistics
    assert statistics.positions_computed < 0.75 * statistics.positions_padded
    return trainers


@pytest.mark.parametrize(
    "loss_type",
    [
        pytest.param(name, marks=() if name in ("sigmoid", "bco_pair", "aot_unpaired") else pytest.mark.slow)
        for name in LOSS_TYPES
    ],
)
def test_every_loss_type_of_dpo_trainer(strong_model_dir, settings, long_prompts, loss_type):
    settings["label_smoothing"] = 0.1 if loss_type in ("exo_pair", "robust") else 0.0
    settings["discopop_tau"] = 0.5  # the default, 0.05, multiplies rounding by 20
    assert_same_run(*train_both(strong_model_dir, settings, long_prompts, loss_type=loss_type))


@pytest.mark.parametrize(
    "changed",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
        {"gradient_accumulation_steps": 2},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
        {"pad_to_multiple_of": 8},
        {"max_length": 70},
    ],
    ids=lambda changed: ",".join(f"{k}={v}" for k, v in changed.items())[:50],
)
def test_settings_of_dpo_trainer(strong_model_dir, settings, long_prompts, changed):
    assert_same_run(*train_both(strong_model_dir, settings, long_prompts, **changed))


@pytest.mark.parametrize("peft", ["new adapter", "trained adapter"])
def test_peft_reference(strong_model_dir, settings, long_prompts, peft):
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    if peft == "new adapter":
        assert_same_run(*train_both(strong_model_dir, settings, long_prompts, peft_config=lora))
        return

    def trained():
        torch.manual_seed(0)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(strong_model_dir, dtype=torch.float32), lora)

    assert_same_run(*train_both(trained, settings, long_prompts))


def test_reference_of_another_size(strong_model_dir, settings, long_prompts):
    def reference():
        return make("qwen3", vocab_size=len(byte_level_tokenizer()))

    assert_same_run(*train_both(strong_model_dir, settings, long_prompts, ref_model=reference))


def test_mixture_of_experts_with_balancing_loss(settings, long_prompts):
    def model():
        return make("qwen3_moe", vocab_size=len(byte_level_tokenizer()), router_aux_loss_coef=0.1)

    plain, shared = train_both(model, settings, long_prompts, ref_model=model)
    assert_same_run(plain, shared)
    assert plain.state.log_history[0]["aux_loss"] > 0


def test_precomputing_the_reference_is_shared_too(strong_model_dir, settings, long_prompts, tmp_path):
    trainers = []
    for enabled in (False, True):
        args = DPOConfig(**settings, precompute_ref_log_probs=True)
        dataset = Dataset.from_list(list(long_prompts))  # in memory: no cache that the first run could leave behind
        arguments = {"model": strong_model_dir, "args": args, "train_dataset": dataset}
        if enabled:
            with share_prefixes(True):
                trainer = DPOTrainer(**arguments)
            assert trainer.prefix_sharing.statistics.batches_shared == 4
        else:
            trainer = DPOTrainer(**arguments)
        remember(trainer)
        trainer.train()
        trainers.append(trainer)
    assert_same_run(*trainers)
    assert trainers[1].prefix_sharing.statistics.batches_shared == 8


def test_it_can_be_undone(strong_model_dir, settings, long_prompts):
    trainer = DPOTrainer(strong_model_dir, args=DPOConfig(**settings), train_dataset=long_prompts)
    before = trainer.model.forward, trainer.ref_model.forward
    sharing = enable_prefix_sharing(trainer)
    assert trainer.model.forward != before[0] and trainer.ref_model.forward != before[1]
    assert enable_prefix_sharing(trainer, False) is None
    assert (trainer.model.forward, trainer.ref_model.forward) == before
    enable_prefix_sharing(trainer)
    again = enable_prefix_sharing(trainer, True)  # replaces, does not nest
    assert again is trainer.prefix_sharing and again is not sharing
    again.remove()
    assert (trainer.model.forward, trainer.ref_model.forward) == before
    trainer.train()
    assert again.statistics.batches_shared == 0


def test_self_check_inside_a_trainer(strong_model_dir, settings, long_prompts):
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    settings.update(activation_checkpointing=True, max_steps=2, disable_dropout=False)
    args = DPOConfig(**settings)
    trainer = DPOTrainer(strong_model_dir, args=args, train_dataset=long_prompts, peft_config=lora)
    enable_prefix_sharing(trainer, self_check=True)
    trainer.train()
    assert trainer.prefix_sharing.statistics.batches_shared == 2


def test_bf16_with_a_live_reference_and_a_self_check(strong_model_dir, settings, long_prompts):
    # accelerate wraps the reference's forward in autocast before sharing is installed, the policy's after
    trainer = padded_dpo_trainer(strong_model_dir, long_prompts, {**settings, "bf16": True, "max_steps": 2})
    enable_prefix_sharing(trainer, True, self_check=True)
    trainer.train()
    assert trainer.prefix_sharing.statistics.batches_shared == 2
    enable_prefix_sharing(trainer, True, self_check=True)  # now outside the policy's autocast as well
    trainer.evaluate(long_prompts)
    assert trainer.prefix_sharing.statistics.batches_shared > 0


def test_adapters_that_look_at_places_are_not_shared(strong_model_dir, settings, long_prompts):
    activated = LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    trainer = padded_dpo_trainer(strong_model_dir, long_prompts, settings, peft_config=activated)
    with pytest.warns(UserWarning, match="activated LoRA"):
        assert not enable_prefix_sharing(trainer).shares
    with pytest.raises(ValueError, match="activated LoRA"):
        enable_prefix_sharing(trainer, True)
    with pytest.warns(UserWarning, match="activated LoRA"), share_prefixes():
        trainer = padded_dpo_trainer(strong_model_dir, long_prompts, settings, peft_config=activated)
    assert not trainer.prefix_sharing.shares


@pytest.mark.parametrize("changed", [{"torch_compile": True}, {"neftune_noise_alpha": 5.0}])
def test_settings_under_which_nothing_is_rearranged(strong_model_dir, settings, long_prompts, changed):
    trainer = padded_dpo_trainer(strong_model_dir, long_prompts, {**settings, **changed})
    with pytest.warns(UserWarning, match=next(iter(changed))):
        assert not enable_prefix_sharing(trainer).shares
    with pytest.raises(ValueError, match=next(iter(changed))):
        enable_prefix_sharing(trainer, True)
    with pytest.raises(ValueError, match=next(iter(changed))):
        SLiCTrainer(
            strong_model_dir, args=SLiCConfig(**settings, **changed, prefix_sharing=True), train_dataset=long_prompts
        )


def test_one_process_with_several_gpus_runs_padded(strong_model_dir, settings, long_prompts):
    """transformers would copy the model into threads, which share what sharing remembers of a batch."""
    trainer = padded_dpo_trainer(strong_model_dir, long_prompts, settings)
    trainer.args._n_gpu = 2
    with pytest.warns(UserWarning, match="start a process for each GPU"):
        assert not enable_prefix_sharing(trainer).shares


@pytest.mark.slow
def test_dropout_is_drawn_in_either_layout(strong_model_dir, settings, long_prompts):
    # not the same draws, but the same loss on average: at learning rate 0, over many draws
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False)
    means = []
    for enabled in (False, True):
        args = DPOConfig(
            **{**settings, "learning_rate": 0.0, "num_train_epochs": 60, "per_device_train_batch_size": 7},
            disable_dropout=False,
        )
        trainer = DPOTrainer(strong_model_dir, args=args, train_dataset=long_prompts, peft_config=lora)
        if enabled:
            enable_prefix_sharing(trainer, True)
        trainer.train()
        logps = torch.tensor([entry["logps/chosen"] for entry in trainer.state.log_history[:-1]])
        assert logps.std() > 0.01
        means.append((logps.mean(), logps.std() / len(logps) ** 0.5))
    difference, error = means[0][0] - means[1][0], (means[0][1] ** 2 + means[1][1] ** 2) ** 0.5
    assert abs(difference) < 4 * error


def test_only_trainers_whose_calls_are_known(strong_model_dir):
    with pytest.raises(TypeError, match="got a str"):
        enable_prefix_sharing("trainer")


def test_a_mode_that_does_not_exist(strong_model_dir, settings, long_prompts):
    trainer = DPOTrainer(strong_model_dir, args=DPOConfig(**settings), train_dataset=long_prompts)
    with pytest.raises(ValueError, match="must be 'auto', True or False, got 'always'"):
        enable_prefix_sharing(trainer, "always")


# Our trainers


@pytest.mark.parametrize("value, meant", [("auto", "auto"), (True, True), ("true", True), ("False", False)])
def test_the_config_takes_it_from_the_command_line(config_kwargs, value, meant):
    assert SLiCConfig(**config_kwargs, prefix_sharing=value).prefix_sharing == meant


def test_the_config_refuses_what_means_nothing(config_kwargs):
    with pytest.raises(ValueError, match="`prefix_sharing` must be .*got 'always'"):
        SLiCConfig(**config_kwargs, prefix_sharing="always")
    with pytest.raises(ValueError, match="`check_prefix_sharing` must be False"):
        SLiCConfig(**config_kwargs, prefix_sharing=False, check_prefix_sharing=True)


@pytest.mark.parametrize(
    "changed",
    [{"delta": 50.0}, {"calibration": "list_rank"}, {"delta": 50.0, "reg_type": "kl"}],  # every hinge is active
    ids=["rank", "list_rank", "kl"],
)
@pytest.mark.parametrize("lists", [pytest.param(False, marks=pytest.mark.slow), True], ids=["pairs", "lists"])
def test_slic_trainer(strong_model_dir, settings, long_prompts, ranked, changed, lists):
    trainers = []
    for prefix_sharing in (False, True):
        args = SLiCConfig(**settings, **changed, prefix_sharing=prefix_sharing, check_prefix_sharing=prefix_sharing)
        dataset = ranked if lists else long_prompts
        trainer = SLiCTrainer(strong_model_dir, args=args, train_dataset=dataset, eval_dataset=dataset)
        remember(trainer)
        trainer.train()
        trainer.evaluate()
        trainers.append(trainer)
    assert trainers[0].prefix_sharing is None
    assert_same_run(*trainers)
    statistics = trainers[1].prefix_sharing.statistics
    assert statistics.positions_computed < 0.8 * statistics.positions_padded


def test_true_is_refused_before_weights_are_loaded(model_dir, settings, long_prompts, tmp_path, monkeypatch):
    model = make("bamba", vocab_size=len(byte_level_tokenizer()))
    model.save_pretrained(tmp_path / "hybrid")
    byte_level_tokenizer().save_pretrained(tmp_path / "hybrid")
    loaded = []
    load = PreTrainedModel.from_pretrained.__func__
    monkeypatch.setattr(
        PreTrainedModel,
        "from_pretrained",
        classmethod(lambda cls, *args, **kwargs: loaded.append(cls) or load(cls, *args, **kwargs)),
    )
    prompt_tuning = PrefixTuningConfig(num_virtual_tokens=4)
    for name, peft_config, reason in (
        (str(tmp_path / "hybrid"), None, "BambaMixer"),
        (model_dir, prompt_tuning, "PREFIX_TUNING"),
    ):
        with pytest.raises(ValueError, match=f"prefix_sharing=True cannot be honoured.*{reason}"):
            SLiCTrainer(
                name,
                args=SLiCConfig(**settings, prefix_sharing=True),
                train_dataset=long_prompts,
                peft_config=peft_config,
            )
    assert not loaded
    SLiCTrainer(model_dir, args=SLiCConfig(**settings, prefix_sharing=True), train_dataset=long_prompts)
    assert len(loaded) == 1


def test_a_hybrid_model_trains_padded_and_says_so(settings, long_prompts, tmp_path):
    model = make("bamba", vocab_size=len(byte_level_tokenizer()))
    with pytest.warns(UserWarning, match="BambaForCausalLM.*BambaMixer"):
        trainer = SLiCTrainer(
            model,
            args=SLiCConfig(**settings, max_steps=1),
            train_dataset=long_prompts,
            processing_class=byte_level_tokenizer(),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    assert trainer.prefix_sharing.statistics.batches_shared == 0


def test_real_pairs(strong_model_dir, settings):
    rows = read_jsonl(real_data("preference.jsonl"))
    keep = ("prompt", "chosen", "rejected")
    rows = [{k: row[k] for k in keep if k in row} for row in rows]
    rows = [row for row in rows if len(str(row)) < 2000][:12]
    assert len(rows) == 12
    trainers = []
    for prefix_sharing in (False, True):
        args = SLiCConfig(**settings, prefix_sharing=prefix_sharing, max_length=2000, on_invalid_row="drop")
        trainer = SLiCTrainer(strong_model_dir, args=args, train_dataset=Dataset.from_list(rows))
        remember(trainer)
        trainer.train()
        trainers.append(trainer)
    assert_same_run(*trainers)
