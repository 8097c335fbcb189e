"""What would fail or go wrong hours later is found before training, by every trainer."""

import json
import logging
import shutil

import pytest
import torch
from datasets import Dataset
from peft import (
    C3AConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from tests.support.data import PAIRS
from tests.support.methods import all_but
from trl_ext import (
    IPOConfig,
    IPOTrainer,
    RRHFConfig,
    RRHFTrainer,
    SLiCConfig,
    SLiCTrainer,
    SPINConfig,
    SPINTrainer,
)
from trl_ext.methods.dpo.config import DPOConfig
from trl_ext.methods.dpo.trainer import DPOTrainer
from trl_ext.methods.kto.trainer import KTOTrainer
from trl_ext.methods.orpo.config import ORPOConfig
from trl_ext.methods.orpo.trainer import ORPOTrainer
from trl_ext.methods.reward.trainer import RewardTrainer
from trl_ext.runtime.models import _downloaded_adapter, merge_adapter, repair_generation_config
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig

TRAINERS = list(all_but("spin", "orpo", "rloo").values())
EVERY = pytest.mark.parametrize(("trainer_class", "config"), TRAINERS, ids=lambda one: one.__name__)


def lora(**settings):
    return LoraConfig(r=2, **{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})


@pytest.fixture(scope="module")
def adapter(model_dir, tokenizer, tmp_path_factory):
    """The folder of a LoRA adapter that changes what the model computes."""
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora(init_lora_weights=False)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@EVERY
def test_rows_longer_than_the_positions(trainer_class, config, gpt2, pairs, config_kwargs):
    with pytest.raises(ValueError, match=r"row of \d\d tokens, and .* has 24 positions .* `max_length` to 24 or less"):
        trainer_class(gpt2, args=config(**config_kwargs), train_dataset=pairs)


def test_streams_are_checked_as_they_are_read(gpt2, pairs, config_kwargs):
    kwargs = {**config_kwargs, "max_steps": 2, "train_sampling_strategy": "sequential"}
    with pytest.raises(ValueError, match="has 24 positions"):
        SLiCTrainer(gpt2, args=SLiCConfig(**kwargs), train_dataset=pairs.to_iterable_dataset()).train()


@EVERY
def test_tokens_beyond_the_embeddings(trainer_class, config, model, tokenizer, pairs, config_kwargs):
    model.resize_token_embeddings(40)
    with pytest.raises(ValueError, match=r"has 40 token embeddings.*resize_token_embeddings"):
        trainer_class(model, args=config(**config_kwargs), train_dataset=pairs, processing_class=tokenizer)


@EVERY
def test_rows_are_grouped_by_length(trainer_class, config, model_dir, pairs, config_kwargs):
    kwargs = {**config_kwargs, "train_sampling_strategy": "group_by_length", "max_steps": 1}
    if trainer_class is KTOTrainer:  # TRL says why
        with pytest.raises(ValueError, match="train_sampling_strategy='sequential'"):
            trainer_class(model_dir, args=config(**kwargs), train_dataset=pairs)
        return
    trainer = trainer_class(model_dir, args=config(**kwargs), train_dataset=pairs, eval_dataset=pairs)
    trainer.train()
    if trainer_class is SLiCTrainer:  # the first row: 15 bytes, 18 bytes, an end token
        assert list(trainer._get_train_sampler().lengths)[0] == 15 + 19
    with pytest.raises(ValueError, match="must be a `Dataset` with train_sampling_strategy='group_by_length'"):
        SLiCTrainer(model_dir, args=SLiCConfig(**kwargs), train_dataset=pairs.to_iterable_dataset())


@EVERY
def test_adapters_that_do_not_fit(trainer_class, config, gpt2, model_dir, pairs, config_kwargs):
    def build(adapter):
        return trainer_class(model_dir, args=config(**config_kwargs), train_dataset=pairs, peft_config=adapter)

    task = "SEQ_CLS" if trainer_class is RewardTrainer else "CAUSAL_LM"
    with pytest.raises(ValueError, match="`target_modules` must name modules .*'all-linear'"):
        build(lora(target_modules=["nothing"], task_type=task))
    if trainer_class is not RewardTrainer:  # which has no LM head
        with pytest.raises(ValueError, match="must not train single tokens .* on tied embeddings"):
            build(lora(trainable_token_indices={"embed_tokens": [40, 41]}))
        with pytest.raises(ValueError, match="must not train single tokens .* on tied embeddings"):
            build(TrainableTokensConfig(token_indices=[4], target_modules=["embed_tokens"], task_type="CAUSAL_LM"))


@EVERY
@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
def test_adapters_that_would_not_fit_their_base(init, trainer_class, config, model_dir, pairs, config_kwargs):
    adapter = lora(task_type="SEQ_CLS" if trainer_class is RewardTrainer else "CAUSAL_LM")
    adapter.init_lora_weights = init
    message = (
        f"init_lora_weights='{init}'|that loading the adapter repeats, got '{init}'"  # DPO and KTO: the reference
    )
    with pytest.raises(ValueError, match=message):
        trainer_class(model_dir, args=config(**config_kwargs), train_dataset=pairs, peft_config=adapter)


def test_architecture_without_default_modules(model_dir, pairs, config_kwargs, monkeypatch):
    from peft.tuners.lora.model import LoraModel

    monkeypatch.setattr(LoraModel, "target_module_mapping", {})
    with pytest.raises(ValueError, match="no default `target_modules` .*--lora_target_modules all-linear"):
        SLiCTrainer(
            model_dir, args=SLiCConfig(**config_kwargs), train_dataset=pairs, peft_config=lora(target_modules=None)
        )


@pytest.mark.parametrize("trainer_class", [SLiCTrainer, DPOTrainer, KTOTrainer])
def test_reference_that_is_not_the_start(trainer_class, model_dir, pairs, config_kwargs):
    config, settings = dict(TRAINERS)[trainer_class], {"reg_type": "kl"} if trainer_class is SLiCTrainer else {}
    for adapter, named in (
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lora(init_lora_weights="olora"), "init_lora_weights='olora'"),
        (lora(init_lora_weights=False), "init_lora_weights=False"),
        (lora(bias="all"), "bias='all'"),
        (C3AConfig(block_size=16, target_modules=["q_proj"], task_type="CAUSAL_LM"), "C3A"),
        (VBLoRAConfig(vector_length=16, target_modules=["q_proj"], task_type="CAUSAL_LM"), "VBLORA"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
    ):
        with pytest.raises(ValueError, match=named):
            args = config(**config_kwargs, **settings)
            trainer_class(model_dir, args=args, train_dataset=pairs, peft_config=adapter)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_reference_that_is_run_before_training_is_the_start(init, model_dir, pairs, config_kwargs):
    args = IPOConfig(**{**config_kwargs, "max_steps": 1})
    trainer = IPOTrainer(model_dir, args=args, train_dataset=pairs, peft_config=lora(init_lora_weights=init))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(25.0, abs=1e-3)


def test_peft_model_of_another_initialisation_stays_what_it_is(model, tokenizer, pairs, config_kwargs):
    adapted, ids = get_peft_model(model, lora(init_lora_weights="pissa")), torch.arange(5, 25)[None]
    with torch.no_grad():
        before = adapted.eval()(input_ids=ids).logits
        args = SLiCConfig(**config_kwargs)
        trainer = SLiCTrainer(adapted, args=args, train_dataset=pairs, processing_class=tokenizer)
        torch.testing.assert_close(trainer.model.eval()(input_ids=ids).logits, before)
    assert adapted.peft_config["default"].init_lora_weights == "pissa"


@EVERY
def test_an_adapters_folder_is_merged_and_trained(trainer_class, config, adapter, model_dir, pairs, config_kwargs):
    kwargs = {**config_kwargs, "max_steps": 1, "learning_rate": 0.0}
    trainer = trainer_class(adapter, args=config(**kwargs), train_dataset=pairs)
    trainer.train()
    if trainer_class is RewardTrainer:
        return
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter).merge_and_unload()
    torch.testing.assert_close(trainer.model.state_dict(), whole.state_dict())
    again = trainer_class(adapter, args=config(**kwargs), train_dataset=pairs, peft_config=lora())
    assert again.model.peft_config["default"].base_model_name_or_path.endswith("/out/start")


@pytest.fixture
def adapter_on_hub(adapter, tmp_path, monkeypatch):
    """The name of an adapter in the Hub's cache, without a tokenizer."""
    folder, commit = tmp_path / "cache" / "models--someone--adapter", "0" * 40
    shutil.copytree(adapter, folder / "snapshots" / commit, ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield "someone/adapter"
    _downloaded_adapter.cache_clear()


@EVERY
def test_an_adapter_of_the_hub_is_merged_and_trained(
    trainer_class, config, adapter_on_hub, adapter, pairs, config_kwargs
):
    kwargs = {**config_kwargs, "max_steps": 1, "learning_rate": 0.0}
    found = trainer_class(adapter_on_hub, args=config(**kwargs), train_dataset=pairs).model.state_dict()
    expected = trainer_class(adapter, args=config(**kwargs), train_dataset=pairs).model.state_dict()
    for name in found:  # but for the head of a reward model, which is new
        assert "score" in name or torch.equal(found[name], expected[name])


def test_self_play_and_sampling_from_an_adapter_of_the_hub(adapter_on_hub, adapter, pairs, config_kwargs, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    args = SPINConfig(**{**config_kwargs, "max_steps": 1}, max_new_tokens=4, num_watched_prompts=2, num_iterations=1)
    SPINTrainer(adapter_on_hub, args=args, train_dataset=Dataset.from_list(rows))  # looks at everything
    config = SamplingConfig(num_candidates=1, max_new_tokens=4)
    answered, _ = sample_candidates(adapter_on_hub, rows[:1], config, tmp_path / "sampled", keep_empty=True)
    assert len(answered[0]["completions"]) == 1
    args = IPOConfig(**{**config_kwargs, "output_dir": str(tmp_path / "ipo"), "max_steps": 1})
    IPOTrainer(adapter, ref_model=adapter_on_hub, args=args, train_dataset=pairs)


def test_adapters_without_tokenizer_or_base(adapter, model_dir, pairs, config_kwargs, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "adapter", ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    merge_adapter(moved, tmp_path / "whole")  # with the tokenizer of the base
    assert (tmp_path / "whole" / "tokenizer.json").is_file()
    file = moved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "./gone"}))
    with pytest.raises(FileNotFoundError, match="base_model_name_or_path.*got './gone', and there is no such folder"):
        SLiCTrainer(str(moved), args=SLiCConfig(**config_kwargs), train_dataset=pairs)


@EVERY
def test_models_that_are_not_there(trainer_class, config, model_dir, pairs, config_kwargs, tmp_path):
    bare = shutil.copytree(model_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    for model, message in (
        ("./none", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("nobody/nothing", "there is no folder of that name here"),
        (str(tmp_path), "with neither a `config.json` nor"),
        (str(bare), "has no tokenizer"),
    ):
        with pytest.raises(FileNotFoundError, match=message) as raised:
            trainer_class(model, args=config(**config_kwargs), train_dataset=pairs)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
        {"top_k": 5, "typical_p": 0.5, "early_stopping": True},
        {"num_return_sequences": 3},
        {"max_new_tokens": -1},
    ],
)
def test_generation_configs_are_repaired(settings, model, tmp_path, caplog):
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    ends = model.generation_config.eos_token_id
    repair_generation_config(model)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == ends


def test_what_cannot_be_saved_is_said_before_the_first_step(model, tokenizer, pairs, config_kwargs):
    model.config.note = object()
    trainer = SLiCTrainer(model, args=SLiCConfig(**config_kwargs), train_dataset=pairs, processing_class=tokenizer)
    with pytest.raises(ValueError, match="The model's config could not be saved after training"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("trainer_class", "config"), [(SLiCTrainer, SLiCConfig), (DPOTrainer, DPOConfig), (ORPOTrainer, ORPOConfig)]
)
def test_best_metric_that_no_evaluation_gives(trainer_class, config, model_dir, pairs, config_kwargs):
    def train(metric, eval_dataset):
        args = config(
            **{**config_kwargs, "save_strategy": "steps"}, eval_strategy="steps", eval_steps=2, save_steps=2,
            load_best_model_at_end=True, metric_for_best_model=metric, max_steps=2,
        )  # fmt: skip
        trainer = trainer_class(model_dir, args=args, train_dataset=pairs, eval_dataset=eval_dataset)
        return trainer.train()

    for metric, eval_dataset in (("loss", {"a": pairs, "b": pairs}), ("accuracy", pairs)):
        with pytest.raises(ValueError, match=f"must be a metric that an evaluation gives, got {metric!r}"):
            train(metric, eval_dataset)
    train("rewards/margins", pairs)
    train("eval_a_loss", {"a": pairs, "b": pairs})


def test_a_trainer_says_it_once(model_dir, tmp_path, caplog):
    config = RRHFConfig(
        str(tmp_path), sft_weight=1e5, max_steps=3, logging_steps=1, report_to="none", use_cpu=True, bf16=False
    )
    trainer = RRHFTrainer(model_dir, args=config, train_dataset=Dataset.from_list(PAIRS))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [record.message for record in caplog.records if "next to no effect" in record.message]
    assert len(said) == 1 and "`sft_weight` (100000 now)" in said[0]
