"""SLiCTrainer: which models it holds, what it refuses, and what it takes as DPOTrainer does."""

import json
import warnings
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from tests.support import methods, reference
from tests.support.data import PAIRS, REFERENCES
from tests.support.training import Losses, counting, one_batch
from trl_ext import SLiCConfig, SLiCTrainer

build = partial(methods.build, "slic")
LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")


def test_without_regulariser_its_target_is_not_computed(model_dir, tokenizer, pairs, config_kwargs):
    rows = pairs.add_column("reference", REFERENCES)
    config_kwargs["prefix_sharing"] = False
    for reg_weight, expected in ((0.0, 16), (0.1, 16 + 5)):
        with counting() as counts:
            build(model_dir, tokenizer, rows, config_kwargs, reg_weight=reg_weight).train()
        assert counts["rows"] == expected


@pytest.mark.parametrize("how", ["full", "lora", "peft_model"])
def test_only_the_kl_regulariser_holds_a_reference(how, model_dir, tokenizer, pairs, config_kwargs):
    config_kwargs.update(learning_rate=1e-2 if how == "full" else 1.0, prefix_sharing=False)
    with counting() as counts:
        model = model_dir
        if how == "peft_model":
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), LORA)
        losses = Losses()
        trainer = build(
            model, tokenizer, pairs, config_kwargs, reg_type="kl",
            callbacks=[losses], peft_config=LORA if how == "lora" else None,
        )  # fmt: skip
        trainer.train()
    assert counts["models"] == (2 if how == "full" else 1)
    assert counts["forwards"] == 8 and counts["rows"] == 16 + 8
    kl = losses.series("loss/regularization")
    assert kl[0] == pytest.approx(0, abs=1e-5), "the model starts as its own reference"
    assert kl[-1] > 1e-4
    if how == "full":
        untouched = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
        assert all(
            torch.equal(untouched[n], p)
            for n, p in trainer.accelerator.unwrap_model(trainer.ref_model).state_dict().items()
        )


def test_kl_with_lora_is_the_kl_to_the_base_model(model_dir, tokenizer, pairs, config_kwargs):
    trainer = build(
        model_dir, tokenizer, pairs, {**config_kwargs, "learning_rate": 1.0}, reg_type="kl", peft_config=LORA
    )
    trainer.train()
    trainer.model.eval()
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = reference.slic_loss(
        trainer.model, list(trainer.train_dataset), calibration="rank", delta=1.0, reg_weight=0.1, reference_model=base
    )
    found = trainer.compute_loss(trainer.model, one_batch(trainer))
    assert reference.sequence_kl(trainer.model, base, [5, 6], [7, 8]) > 1e-4, "the adapter learned something"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "hinge"}, r"loss_type='hinge': set `calibration`"),
        ({"loss_type": ["sigmoid", "sft"]}, r"loss_type=\['sigmoid', 'sft'\]: set `calibration`"),
        ({"beta": 1.0}, r"beta=1.0: set `delta`, the margin in nats"),
        ({"ld_alpha": 0.5}, r"ld_alpha=0.5: set `logps_reduction='mean'`"),
        ({"label_smoothing": 0.1}, r"label_smoothing=0.1: leave out the pairs"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0.1: this trainer has a loss of its own"),
        ({"f_divergence_type": "forward_kl"}, r"f_divergence_type='forward_kl': set `reg_type`"),
        ({"use_weighting": True}, r"use_weighting=True: there is no weighting"),
        ({"sync_ref_model": True}, r"sync_ref_model=True: no reference model"),
        ({"precompute_ref_log_probs": True}, r"precompute_ref_log_probs=True: .* train a LoRA adapter"),
        ({"padding_free": True}, r"padding_free=True: TRL itself switches it off"),
        ({"truncation_mode": "keep_end"}, r"truncation_mode='keep_end': cut prompts before training"),
        ({"delta": 0}, r"`delta` must be above 0, got 0"),
        ({"delta": float("nan")}, r"`delta` must be above 0, got nan"),
        ({"reg_weight": -0.1}, r"`reg_weight` must be 0 .*got -0.1: a negative weight makes y_ref"),
        ({"calibration": "hinge"}, r"`calibration` must be one of rank, margin.*got 'hinge'"),
        ({"reg_type": "KL"}, r"`reg_type` must be one of cross_entropy, kl, got 'KL'"),
        ({"logps_reduction": "avg"}, r"`logps_reduction` must be one of .*got 'avg'"),
        ({"calibration": "expected_reward", "delta": 2.0}, r"with calibration='expected_reward', got 2.0"),
        ({"reg_type": "kl", "reg_weight": 0}, r"`reg_weight` must be above 0 with reg_type='kl', got 0"),
        ({"on_invalid_row": "skip"}, r"`on_invalid_row` must be 'error' or 'drop', got 'skip'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SLiCConfig(str(tmp_path), bf16=False, **settings)


def test_defaults_of_dpo_config_are_accepted_when_written_out(tmp_path):
    defaults = DPOConfig(str(tmp_path), bf16=False)
    SLiCConfig(str(tmp_path), bf16=False, beta=defaults.beta, loss_type=defaults.loss_type, ld_alpha=None)


def test_refusals_come_before_any_weight_is_loaded(model_dir, tokenizer, pairs, config_kwargs, model):
    bad_rows = Dataset.from_list([{**PAIRS[0], "rejected": PAIRS[0]["chosen"]}])
    with counting() as counts:
        with pytest.raises(ValueError, match="is the same as 'chosen'"):
            build(model_dir, tokenizer, bad_rows, config_kwargs)
        with pytest.raises(ValueError, match="eval dataset has 1 of 1 rows"):
            build(model_dir, tokenizer, pairs, config_kwargs, eval_dataset=bad_rows)
        with pytest.raises(ValueError, match="`ref_model` must be None for SLiCTrainer"):
            build(model_dir, tokenizer, pairs, config_kwargs, ref_model=model)
        with pytest.raises(NotImplementedError, match="`compute_metrics` must be None"):
            build(model_dir, tokenizer, pairs, config_kwargs, compute_metrics=lambda prediction: {})
        with pytest.raises(TypeError, match="`args` must be a SLiCConfig, got DPOConfig"):
            SLiCTrainer(model_dir, args=DPOConfig(**config_kwargs), train_dataset=pairs)
        with pytest.raises(ValueError, match="`train_dataset` must be a .*got None"):
            build(model_dir, tokenizer, None, config_kwargs)
        with pytest.raises(ValueError, match="`model` must be a name, .*got None"):
            build(None, tokenizer, pairs, config_kwargs)
        with pytest.raises(ValueError, match="`dispatch_batches` of `accelerator_config` must be False"):
            build(model_dir, tokenizer, pairs, config_kwargs, accelerator_config={"dispatch_batches": True})
        with pytest.raises(TypeError, match="`train_dataset` must be a .*got dict"):
            build(model_dir, tokenizer, {"train": pairs}, config_kwargs)
    assert counts["models"] == 0


def test_adapters_that_would_mean_the_wrong_reference_are_refused(model_dir, tokenizer, pairs, config_kwargs):
    def peft_model(*names):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        model = get_peft_model(model, LORA, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, LORA)
        return model

    with pytest.raises(ValueError, match=r"called 'default', got \['mine'\]. Load it with `adapter_name='default'`"):
        build(peft_model("mine"), tokenizer, pairs, config_kwargs)
    two = peft_model("default", "other")
    two.set_adapter("other")
    build(two, tokenizer, pairs, config_kwargs)
    with pytest.raises(ValueError, match=r"must be 'default' alone, got \['other'\] of .*Activate 'default' alone"):
        build(two, tokenizer, pairs, config_kwargs, reg_type="kl")
    used = peft_model("default")
    build(used, tokenizer, pairs, config_kwargs, reg_type="kl")
    for reg_type in ("kl", "cross_entropy"):
        with pytest.raises(ValueError, match=r"called 'ref', got .* with `model.delete_adapter\('ref'\)`"):
            build(used, tokenizer, pairs, config_kwargs, reg_type=reg_type)
    peft_model("default").save_pretrained(config_kwargs["output_dir"])
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with pytest.raises(ValueError, match="must have trainable weights, got none. Load it with `is_trainable=True`"):
        build(PeftModel.from_pretrained(base, config_kwargs["output_dir"]), tokenizer, pairs, config_kwargs)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    adalora = get_peft_model(base, AdaLoraConfig(total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="must not be AdaLoRA, which takes no second adapter"):
        build(adalora, tokenizer, pairs, config_kwargs)
    trained_head = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    build(model_dir, tokenizer, pairs, config_kwargs, peft_config=trained_head)
    with pytest.raises(NotImplementedError, match="the reference uses the same head. Remove the head"):
        build(model_dir, tokenizer, pairs, config_kwargs, peft_config=trained_head, reg_type="kl")


def test_padding_token_is_used_or_refused(model_dir, tokenizer, pairs, config_kwargs):
    trainer = build(model_dir, None, pairs, config_kwargs, pad_token="!")
    assert trainer.data_collator.pad_token_id == trainer.processing_class.convert_tokens_to_ids("!")
    with pytest.raises(ValueError, match="`pad_token` must be in the tokenizer's vocabulary, got '<nope>'"):
        build(model_dir, None, pairs, config_kwargs, pad_token="<nope>")


def test_foreign_collator_is_refused_by_name(model, tokenizer, pairs, config_kwargs):
    def collator(examples):
        return {"input_ids": torch.zeros(2, 3, dtype=torch.long)}

    trainer = build(model, tokenizer, pairs, config_kwargs, data_collator=collator)
    with pytest.raises(ValueError, match="must have what `trl_ext.CandidateCollator` makes"):
        trainer.train()


def test_invalid_rows_can_be_dropped(model_dir, tokenizer, config_kwargs):
    rows = Dataset.from_list([*PAIRS, {**PAIRS[0], "chosen": ""}])
    trainer = build(model_dir, tokenizer, rows, config_kwargs, on_invalid_row="drop")
    assert len(trainer.train_dataset) == len(PAIRS) and trainer.data_reports["train"].dropped == {"empty": 1}


def test_docstring_example_of_the_collator_is_what_it_prints():
    import doctest

    import trl_ext.data.collator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failures, tried = doctest.testmod(trl_ext.data.collator, optionflags=doctest.NORMALIZE_WHITESPACE)[:2]
    assert tried and not failures


def test_config_survives_saving(tmp_path):
    config = SLiCConfig(str(tmp_path), bf16=False, delta=2.5, calibration="margin")
    assert json.loads(config.to_json_string())["delta"] == 2.5
