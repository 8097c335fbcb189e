"""Prefix sharing in trainers that are not `DPOTrainer`'s: whole runs equal those of the padded batches."""

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.equivalence.small_models import make
from tests.support.whole_runs import assert_same_run, remember
from trl_ext import enable_prefix_sharing, share_prefixes
from trl_ext.execution import shared_prefixes as hooks
from trl_ext.methods.kto.config import KTOConfig
from trl_ext.methods.kto.trainer import KTOTrainer
from trl_ext.methods.orpo.config import ORPOConfig
from trl_ext.methods.orpo.trainer import ORPOTrainer
from trl_ext.methods.reward.config import RewardConfig
from trl_ext.methods.reward.trainer import RewardTrainer
from trl_ext.methods.rloo.config import RLOOConfig
from trl_ext.methods.rloo.trainer import RLOOTrainer
from trl_ext.playground.model import byte_level_tokenizer

RECIPES = {
    "reward": (RewardTrainer, RewardConfig),
    "kto": (KTOTrainer, KTOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
}


def without_padding_averages(trainers):
    """ORPO and CPO average logits over padding too, which is not computed."""
    for entry in (entry for trainer in trainers for entry in trainer.state.log_history):
        for name in ("logits/chosen", "logits/rejected", "eval_logits/chosen", "eval_logits/rejected"):
            entry.pop(name, None)


def other_trainer(kind, model, settings, dataset):
    """A trainer of TRL that is not `DPOTrainer`, with nothing of ours."""
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        trainer, config = trl.RewardTrainer, trl.RewardConfig(**{**settings, "max_length": 256})
    elif kind == "kto":
        trainer, config = trl.KTOTrainer, trl.KTOConfig(**{**settings, "max_length": 256})
        rows = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in dataset
            for name in ("chosen", "rejected")
        ]
        dataset = Dataset.from_list(rows)
    else:
        from trl.experimental import cpo, orpo

        trainer, config = {
            "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig),
            "cpo": (cpo.CPOTrainer, cpo.CPOConfig),
        }[kind]
        config = config(**{**settings, "max_length": 256})
    if isinstance(model, str) and kind in ("orpo", "cpo"):
        model = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    return trainer(model=model, args=config, train_dataset=dataset, processing_class=byte_level_tokenizer())


@pytest.mark.parametrize("kind", ["reward", "kto", "orpo", "cpo"])
def test_other_trainers_of_trl(kind, strong_model_dir, settings, long_prompts):
    trainers = []
    for enabled in (False, True):
        trainer = other_trainer(kind, strong_model_dir, settings, long_prompts)
        remember(trainer)
        if enabled:
            if trainers:  # a new head is drawn anew
                trainer.model.load_state_dict(trainers[0].initial, strict=False)
                remember(trainer)
            enable_prefix_sharing(trainer, True)
        trainer.train()
        trainers.append(trainer)
    if kind in ("orpo", "cpo"):
        without_padding_averages(trainers)
    assert_same_run(*trainers, tolerance=1e-4)
    statistics = trainers[1].prefix_sharing.statistics
    assert statistics.batches_shared > 0 and statistics.positions_computed < statistics.positions_padded
    trainers[1].prefix_sharing.remove()


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes_share_by_default_and_give_the_same_run(kind, strong_model_dir, settings, long_prompts):
    trainer_class, config_class = RECIPES[kind]
    trainers = []
    for options in ({"prefix_sharing": False}, {"check_prefix_sharing": True}):
        args = config_class(**{**settings, "max_length": 256}, **options)
        torch.manual_seed(0)
        eval_dataset = long_prompts.select(range(3))
        trainer = trainer_class(strong_model_dir, args=args, train_dataset=long_prompts, eval_dataset=eval_dataset)
        if trainers and kind == "reward":  # a new head is drawn anew
            trainer.model.load_state_dict(trainers[0].initial, strict=False)
        remember(trainer)
        trainer.train()
        trainer.evaluate()
        trainers.append(trainer)
    without_padding_averages(trainers)
    assert_same_run(*trainers, tolerance=1e-4)
    assert trainers[0].prefix_sharing is None
    statistics = trainers[1].prefix_sharing.statistics
    assert statistics.batches_shared > 0 and statistics.positions_computed < statistics.positions_padded
    if kind != "kto":  # whose batches hold a prompt once
        assert statistics.positions_computed < 0.75 * statistics.positions_padded


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes_run_padded_and_say_so_where_nothing_can_be_shared(kind, settings, long_prompts, tmp_path):
    make("bamba", vocab_size=len(byte_level_tokenizer())).save_pretrained(tmp_path / "hybrid")
    byte_level_tokenizer().save_pretrained(tmp_path / "hybrid")
    trainer_class, config_class = RECIPES[kind]
    settings |= {"max_steps": 1, "max_length": 256}
    if kind != "reward":  # Bamba has no sequence classification
        with pytest.warns(UserWarning, match="Prompts are not shared.*BambaMixer"):
            trainer_class(str(tmp_path / "hybrid"), args=config_class(**settings), train_dataset=long_prompts)
    with pytest.raises(ValueError, match="prefix_sharing=True cannot be honoured.*BambaMixer"):
        trainer_class(
            str(tmp_path / "hybrid"),
            args=config_class(**settings, prefix_sharing=True),
            train_dataset=long_prompts,
        )


@pytest.mark.parametrize("kind", ["reward", "orpo"])
def test_the_self_check_stops_at_a_wrong_mask(kind, strong_model_dir, settings, long_prompts, monkeypatch):
    trainer_class, config_class = RECIPES[kind]
    args = config_class(**{**settings, "max_length": 256}, check_prefix_sharing=True)
    trainer = trainer_class(strong_model_dir, args=args, train_dataset=long_prompts)
    in_layout = hooks.SharedPrefixes._in_layout

    def shifted(self, plan, kwargs):
        kwargs = in_layout(self, plan, kwargs)
        return kwargs | {"position_ids": kwargs["position_ids"].flip(1)}

    monkeypatch.setattr(hooks.SharedPrefixes, "_in_layout", shifted)
    with pytest.raises(RuntimeError, match="hidden states differ by.*LlamaFor"):
        trainer.train()


def test_kto_precomputes_its_reference_shared(strong_model_dir, settings, long_prompts):
    trainers = []
    for prefix_sharing in (False, True):
        args = KTOConfig(
            **{**settings, "max_length": 256}, precompute_ref_log_probs=True, prefix_sharing=prefix_sharing,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = KTOTrainer(strong_model_dir, args=args, train_dataset=long_prompts)
        trainers.append(trainer)
    assert trainers[1].prefix_sharing.statistics.batches_shared > 0
    for name in ("ref_logps", "ref_KL_logps"):
        expected, found = (torch.tensor(trainer.train_dataset[name][:]) for trainer in trainers)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with share_prefixes(True):
        trainer = other_trainer("kto", strong_model_dir, settings, long_prompts)
    assert trainer.prefix_sharing.shares


# RLOO and GRPO

QUESTIONS = [
    {"prompt": f"Here is a question that takes its time: what is {a} plus {b}? "}
    for a, b in [(1, 2), (30, 4), (5, 600), (7, 8), (90, 1), (11, 12)]
]


def length_reward(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


def sampling_trainer(kind, model, settings, *, shared, **changed):
    config = {
        **settings, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 7, "max_steps": 4,
        "beta": 0.1, **changed,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "recipe":
        args = RLOOConfig(
            **config, rewards="tests.equivalence.test_sharing_in_trainers:length_reward", prefix_sharing=shared
        )
        return RLOOTrainer(model, args=args, train_dataset=Dataset.from_list(QUESTIONS))
    trainer_class, config_class = {
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    }[kind]
    trainer = trainer_class(
        model, length_reward, args=config_class(**config), train_dataset=Dataset.from_list(QUESTIONS),
        processing_class=byte_level_tokenizer(),
    )  # fmt: skip
    if shared:
        enable_prefix_sharing(trainer, True, self_check=True)
    return trainer


@pytest.mark.parametrize(
    "kind, changed",
    [
        ("rloo", {}),
        ("rloo", {"gradient_accumulation_steps": 2, "num_iterations": 2}),  # micro-batches of several prompts
        ("grpo", {}),
        ("grpo", {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "loss_type": "grpo"}),
        ("recipe", {"gradient_accumulation_steps": 2}),
    ],
    ids=str,
)
def test_runs_that_sample(kind, changed, strong_model_dir, settings):
    trainers = []
    for shared in (False, True):
        trainer = sampling_trainer(kind, strong_model_dir, settings, shared=shared, **changed)
        remember(trainer)
        trainer.train()
        trainers.append(trainer)
    assert_same_run(*trainers, tolerance=1e-4)
    statistics = trainers[1].prefix_sharing.statistics
    assert statistics.batches_shared > 0 and statistics.positions_computed < 0.6 * statistics.positions_padded
