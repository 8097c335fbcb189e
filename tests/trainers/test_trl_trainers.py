"""TRL's trainers on the rows of this package: the same numbers as TRL's own, and what is added to them."""

import json

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.orpo import ORPOConfig as TRLORPOConfig
from trl.experimental.orpo import ORPOTrainer as TRLORPOTrainer

from tests.support.data import PAIRS
from trl_ext.data.trl_columns import for_dpo, for_kto, with_mismatched
from trl_ext.losses import bradley_terry_loss
from trl_ext.methods.best_of_n.config import BestOfNConfig
from trl_ext.methods.best_of_n.trainer import BestOfNTrainer
from trl_ext.methods.dpo.config import DPOConfig
from trl_ext.methods.dpo.trainer import DPOTrainer
from trl_ext.methods.kto.config import KTOConfig
from trl_ext.methods.kto.trainer import KTOTrainer
from trl_ext.methods.orpo.config import ORPOConfig
from trl_ext.methods.orpo.trainer import ORPOTrainer
from trl_ext.methods.reward.config import RewardConfig
from trl_ext.methods.reward.trainer import RewardTrainer
from trl_ext.methods.rloo.config import RLOOConfig
from trl_ext.methods.rloo.trainer import RLOOTrainer
from trl_ext.scoring.models import RewardModelScorer

# ours and TRL's: trainer and config
KINDS = {
    "dpo": ((DPOTrainer, DPOConfig), (trl.DPOTrainer, trl.DPOConfig)),
    "kto": ((KTOTrainer, KTOConfig), (trl.KTOTrainer, trl.KTOConfig)),
    "orpo": ((ORPOTrainer, ORPOConfig), (TRLORPOTrainer, TRLORPOConfig)),
    "reward": ((RewardTrainer, RewardConfig), (trl.RewardTrainer, trl.RewardConfig)),
    "best_of_n": ((BestOfNTrainer, BestOfNConfig), (trl.SFTTrainer, trl.SFTConfig)),
}


@pytest.fixture
def trained_dir(model, tokenizer, tmp_path):
    """The larger weights of `model`, in a folder."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def as_trl_has_them(kind, ours, rows, tokenizer):
    """The same rows, in the same order, for TRL to tokenise by itself."""
    if kind == "best_of_n":
        return Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    if kind != "kto":
        return Dataset.from_list(rows)
    end = tokenizer.eos_token
    return Dataset.from_list(
        [
            {
                "prompt": tokenizer.decode(row["prompt_ids"]),
                "completion": tokenizer.decode(row["completion_ids"]).removesuffix(end),
                "label": row["label"],
            }
            for row in ours.train_dataset
        ]
    )


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("rows", ["pairs", pytest.param("chat_pairs", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_losses_as_trl(kind, rows, trained_dir, config_kwargs, tokenizer, request):
    if (kind, rows) == ("kto", "chat_pairs"):
        pytest.skip("rows in TRL's order are taken back from tokens, which a template does not allow")
    rows = request.getfixturevalue(rows)
    (trainer_class, config_class), (their_trainer, their_config) = KINDS[kind]
    kwargs = {**config_kwargs, "num_train_epochs": 2}
    ours = trainer_class(trained_dir, args=config_class(**kwargs), train_dataset=rows)
    theirs = their_trainer(
        AutoModelForCausalLM.from_pretrained(trained_dir) if kind == "orpo" else trained_dir,
        args=their_config(**kwargs),
        train_dataset=as_trl_has_them(kind, ours, rows.to_list(), tokenizer),
        processing_class=tokenizer,
    )
    expected = losses_of(theirs)
    assert len(expected) > 6 and losses_of(ours) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_ranked_rows_give_the_best_and_the_worst(kind, model_dir, config_kwargs, ranked, tokenizer):
    (trainer_class, config_class), _ = KINDS[kind]
    trainer = trainer_class(model_dir, args=config_class(**config_kwargs), train_dataset=ranked)
    rows = trainer.train_dataset.to_list()
    end = tokenizer.eos_token
    best = {"a? ": "yy", "bb? ": "two", "c ": "s"}
    worst = {"a? ": "x", "bb? ": "one", "c ": "rr"}
    text = tokenizer.decode
    if kind == "dpo":
        found = {text(row["prompt_ids"]): (text(row["chosen_ids"]), text(row["rejected_ids"])) for row in rows}
        assert found == {prompt: (best[prompt] + end, worst[prompt] + end) for prompt in best}
    elif kind in ("reward", "orpo"):
        columns = ("chosen_ids", "rejected_ids") if kind == "reward" else ("chosen_input_ids", "rejected_input_ids")
        found = {tuple(text(row[column]) for column in columns) for row in rows}
        assert found == {(prompt + best[prompt] + end, prompt + worst[prompt] + end) for prompt in best}
        if kind == "orpo":
            answers = {text([t for t in row["rejected_labels"] if t != -100]) for row in rows}
            assert answers == {answer + end for answer in worst.values()}
    elif kind == "kto":
        found = sorted((text(row["prompt_ids"]), text(row["completion_ids"]), row["label"]) for row in rows)
        labelled = [(best, True), (worst, False)]
        assert found == sorted((p, answers[p] + end, label) for answers, label in labelled for p in best)
        batch = config_kwargs["per_device_train_batch_size"]
        for start in range(0, len(rows), batch):
            taken = rows[start : start + batch]
            answers = [row["completion_ids"] for row in taken]
            assert [row["KL_completion_ids"] for row in taken] == answers[-1:] + answers[:-1]
    else:
        # a prompt whose answers are all equally good is learned, from the first of them
        found = {text(row["input_ids"]) for row in rows}
        assert found == {prompt + answer + end for prompt, answer in {**best, "dd ": "same"}.items()}
        assert all(sum(label != -100 for label in row["labels"]) < len(row["labels"]) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_unusable_rows_are_refused_before_weights_are_loaded_or_dropped_and_counted(
    kind, model_dir, config_kwargs, monkeypatch
):
    (trainer_class, config_class), _ = KINDS[kind]
    rows = [*PAIRS, {"prompt": "x", "chosen": "same", "rejected": "same"}, {**PAIRS[0], "chosen": " "}]
    if kind == "best_of_n":
        rows[-2] = {**PAIRS[1], "chosen": ""}
    with monkeypatch.context() as patched:
        patched.setattr("torch.nn.Module.__init__", lambda *_: pytest.fail("a model is made"))
        with pytest.raises(ValueError, match="2 of 10 rows that cannot be used"):
            trainer_class(model_dir, args=config_class(**config_kwargs), train_dataset=Dataset.from_list(rows))
    config = config_class(**config_kwargs, on_invalid_row="drop")
    trainer = trainer_class(model_dir, args=config, train_dataset=Dataset.from_list(rows))
    assert trainer.data_reports["train"].num_prompts == 8 and sum(trainer.data_reports["train"].dropped.values()) == 2
    assert len(trainer.train_dataset) == (16 if kind == "kto" else 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_where_it_was_interrupted(kind, model_dir, config_kwargs, pairs, tmp_path):
    (trainer_class, config_class), _ = KINDS[kind]
    kwargs = {**config_kwargs, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def weights(folder, **resume):
        config = config_class(**{**kwargs, "output_dir": str(tmp_path / folder)})
        trainer = trainer_class(model_dir, args=config, train_dataset=pairs)
        trainer.train(**resume)
        return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}

    whole = weights("whole")
    (tmp_path / "half").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "half" / "checkpoint-2")
    again = weights("half", resume_from_checkpoint=True)
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    # one that is not whole is passed over, and nothing is left
    seal = next(path for path in (tmp_path / "half" / "checkpoint-4").glob("*.safetensors"))
    seal.write_bytes(seal.read_bytes()[:-1])
    (tmp_path / "other").mkdir()
    (tmp_path / "half" / "checkpoint-4").rename(tmp_path / "other" / "checkpoint-4")
    with pytest.raises(FileExistsError, match="is not whole"):
        weights("other", resume_from_checkpoint=True)


def test_dpo_shares_prefixes(model_dir, config_kwargs):
    rows = Dataset.from_list([{**row, "prompt": row["prompt"] * 8} for row in PAIRS])
    losses, shares = [], []
    for sharing in (False, True):
        config = DPOConfig(**config_kwargs, prefix_sharing=sharing, precompute_ref_log_probs=sharing)
        trainer = DPOTrainer(model_dir, args=config, train_dataset=rows)
        losses.append(losses_of(trainer))
        shares.append(trainer.prefix_sharing is not None and trainer.prefix_sharing.statistics.batches_shared)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and not shares[0] and shares[1]


def test_streams_are_prepared_as_they_are_read(model_dir, config_kwargs):
    stream = IterableDataset.from_generator(lambda: iter(PAIRS))
    expected = losses_of(
        RewardTrainer(model_dir, args=RewardConfig(**config_kwargs), train_dataset=Dataset.from_list(PAIRS))
    )
    config = RewardConfig(**{**config_kwargs, "max_steps": len(expected)})
    trainer = RewardTrainer(model_dir, args=config, train_dataset=stream)
    batches = [batch for _, batch in zip(range(4), trainer.get_train_dataloader(), strict=False)]
    ids = [ids for batch in batches for ids in batch["input_ids"]]
    texts = [trainer.processing_class.decode(one).split("<|im_end|>")[0] for one in ids]
    assert sorted(texts) == sorted(row["prompt"] + row[name] for row in PAIRS for name in ("chosen", "rejected"))
    assert len(losses_of(trainer)) == len(expected)


def test_kto_reads_single_answers(model_dir, config_kwargs, tokenizer):
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in PAIRS
        for name in ("chosen", "rejected")
    ]
    single = KTOTrainer(model_dir, args=KTOConfig(**config_kwargs), train_dataset=Dataset.from_list(rows))
    paired = KTOTrainer(model_dir, args=KTOConfig(**config_kwargs), train_dataset=Dataset.from_list(PAIRS))

    def key(row):
        return row["prompt_ids"], row["completion_ids"], row["label"]

    assert sorted(map(key, single.train_dataset)) == sorted(map(key, paired.train_dataset))
    order = [tokenizer.decode(row["prompt_ids"]) for row in single.train_dataset]
    assert any(order[i] != order[i + 1] for i in range(0, len(order), 2)), "answers to one prompt are not neighbours"


def test_kto_takes_no_other_labels(model_dir, config_kwargs):
    labels = [1, -1]
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": labels[i]} for i, row in enumerate(PAIRS[:2])
    ]
    with pytest.raises(ValueError, match="Row 1: column 'label' must be true .good. or false, or 1 or 0, got -1"):
        KTOTrainer(model_dir, args=KTOConfig(**config_kwargs), train_dataset=Dataset.from_list(rows))


def test_kto_evaluates_on_other_prompts_answers_too(model_dir, config_kwargs, pairs):
    config = KTOConfig(**config_kwargs, per_device_eval_batch_size=8)
    trainer = KTOTrainer(model_dir, args=config, train_dataset=pairs, eval_dataset=pairs)
    rows = trainer.eval_dataset.to_list()
    answers = {}
    for row in rows:
        answers.setdefault(tuple(row["prompt_ids"]), []).append(row["completion_ids"])
    own = sum(row["KL_completion_ids"] in answers[tuple(row["prompt_ids"])] for row in rows)
    assert len(rows) == 16 and own <= 4, "rows are shuffled"
    batches = [rows[:8], rows[8:]]
    assert all(batch[0]["KL_completion_ids"] == batch[-1]["completion_ids"] for batch in batches)


def test_kto_says_so_where_good_and_bad_are_unbalanced(model_dir, config_kwargs, caplog):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i != 0} for i, row in enumerate(PAIRS)]
    KTOTrainer(model_dir, args=KTOConfig(**config_kwargs), train_dataset=Dataset.from_list(rows))
    assert "7 answers are good and 1 bad" in caplog.text
    caplog.clear()
    KTOTrainer(model_dir, args=KTOConfig(**config_kwargs), train_dataset=Dataset.from_list(PAIRS))
    assert "answers are good" not in caplog.text


def test_columns_of_batches():
    batch = {"prompt_ids": [[1], [2]], "completion_ids": [[[3], [4], [5]], [[6], [7]]],
             "scores": [[1.0, 2.0, 2.0], [0.0, 0.0]]}  # fmt: skip
    assert for_dpo(batch) == {"prompt_ids": [[1]], "chosen_ids": [[4]], "rejected_ids": [[3]]}
    assert for_kto(batch)["label"] == [True, False]
    assert with_mismatched({"completion_ids": [[1], [2], [3]]}) == {"KL_completion_ids": [[3], [1], [2]]}
    alone = {"prompt_ids": [[1], [2]], "completion_ids": [[[3]], [[4]]], "scores": [[1.0], [0.0]]}
    assert for_kto(alone)["label"] == [True, False]


def test_rows_without_an_order_are_refused(model_dir, config_kwargs):
    rows = Dataset.from_list([{"prompt": "a", "completions": ["b", "c"], "scores": [1.0, 1.0]}])
    with pytest.raises(ValueError, match="The train dataset must have rows with two answers of different scores"):
        DPOTrainer(model_dir, args=DPOConfig(**config_kwargs), train_dataset=rows)


# Reward models


def test_bradley_terry_loss():
    chosen = torch.tensor([0.5, 3.0, -1.0], requires_grad=True)
    rejected = torch.tensor([0.0, -3.0, 1.0])
    losses = bradley_terry_loss(chosen, rejected, torch.tensor([0.0, 1.0, 0.5]), difference_penalty=0.1)
    for place, (difference, margin) in enumerate([(0.5, 0.0), (6.0, 1.0), (-2.0, 0.5)]):
        expected = -torch.tensor(difference - margin, dtype=torch.float64).sigmoid().log() + 0.1 * difference**2
        assert losses[place].item() == pytest.approx(expected.item(), rel=1e-5)
    bradley_terry_loss(chosen, rejected, max_difference=4.0).sum().backward()
    assert chosen.grad[1] == 0 and chosen.grad[0] < 0 and chosen.grad[2] < 0, "beyond the clamp nothing is pushed"


@pytest.mark.parametrize("option", [{}, {"difference_penalty": 0.05}, {"max_difference": 0.01}])
def test_reward_trainer_minimises_that_loss(option, model_dir, config_kwargs):
    rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(PAIRS)]
    trainer = RewardTrainer(
        model_dir,
        args=RewardConfig(**config_kwargs, center_rewards_coefficient=0.02, **option),
        train_dataset=Dataset.from_list(rows),
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    assert batch["margin"].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    model = trainer.model.eval()
    loss = trainer.compute_loss(model, dict(batch))
    rewards = []  # one sequence at a time
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        rewards.append(model(input_ids=ids[mask.bool()].unsqueeze(0)).logits.squeeze())
    chosen, rejected = torch.stack(rewards).chunk(2)
    expected = bradley_terry_loss(chosen, rejected, batch["margin"], **option).mean()
    expected = expected + 0.02 * (chosen + rejected).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, model.score.weight)[0], torch.autograd.grad(expected, model.score.weight)[0]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


# Reinforcement learning


def length_reward(prompts, completions, wanted):
    """No `**kwargs`: only what it needs."""
    return [-abs(len(text) - number) for text, number in zip(completions, wanted, strict=True)]


RL_ROWS = [{"prompt": row["prompt"], "wanted": len(row["chosen"])} for row in PAIRS]


@pytest.fixture
def rl_kwargs(config_kwargs):
    return {**config_kwargs, "num_generations": 2, "max_completion_length": 8, "max_steps": 2, "beta": 0.1}


def test_rloo_with_a_function(model_dir, rl_kwargs, monkeypatch):
    config = RLOOConfig(**rl_kwargs, rewards="tests.trainers.test_trl_trainers:length_reward")
    trainer = RLOOTrainer(model_dir, args=config, train_dataset=Dataset.from_list(RL_ROWS))
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == 2 and all(entry["reward"] < 0 for entry in logged)
    assert not torch.equal(before, trainer.model.lm_head.weight)


def test_rloo_with_a_reward_model(model_dir, rl_kwargs, tmp_path, tokenizer):
    rewards = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
    rewards.save_pretrained(tmp_path / "rewards")
    tokenizer.save_pretrained(tmp_path / "rewards")
    config = RLOOConfig(**rl_kwargs, rewards=[str(tmp_path / "rewards")])
    trainer = RLOOTrainer(model_dir, args=config, train_dataset=Dataset.from_list(RL_ROWS))
    texts, ends = ["one", "two"], ["stop", "length"]
    found = trainer.reward_funcs[0](
        prompts=["a", "b"], completions=texts, completion_ids=[[5, tokenizer.eos_token_id], [5]], trainer_state=None,
        log_extra=print, log_metric=print, wanted=[1, 2],
    )  # fmt: skip
    scorer = RewardModelScorer(str(tmp_path / "rewards"))
    rows = zip("ab", texts, ends, strict=True)
    expected = scorer([{"prompt": p, "completions": [text], "ends": [end]} for p, text, end in rows])
    assert found == [score for (score,) in expected]
    trainer.train()


def test_rloo_answers_the_prompt_that_training_on_the_row_would_see(model_dir, rl_kwargs):
    """Of whole conversations with `prompt` as text, or without one, the question as messages."""
    rows = [
        {
            "prompt": row["prompt"],
            **{
                name: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
                for name in ("chosen", "rejected")
            },
        }
        for row in PAIRS
    ]
    expected = [[{"role": "user", "content": row["prompt"]}] for row in PAIRS]
    config = RLOOConfig(**rl_kwargs, rewards=["tests.support.rewards:vowels"])
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).remove_columns("prompt")):
        trainer = RLOOTrainer(model_dir, args=config, train_dataset=dataset)
        assert trainer.train_dataset["prompt"][:] == expected


def test_rloo_samples_its_own_answers_to_the_prompts_of_ranked_lists(model_dir, rl_kwargs, ranked):
    """`completions` of a row are neither scored nor in the way of those that are."""
    config = RLOOConfig(**rl_kwargs, rewards=["tests.support.rewards:vowels"])
    trainer = RLOOTrainer(model_dir, args=config, train_dataset=ranked)
    trainer.train()
    assert trainer.state.global_step == 2


def test_rloo_goes_on_where_it_was_interrupted(model_dir, rl_kwargs, tmp_path):
    """What is sampled after the interruption is what would have been."""
    kwargs = {**rl_kwargs, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def train(folder, **resume):
        config = RLOOConfig(
            **{**kwargs, "output_dir": str(tmp_path / folder)}, rewards=["tests.support.rewards:vowels"]
        )
        trainer = RLOOTrainer(model_dir, args=config, train_dataset=Dataset.from_list(RL_ROWS))
        trainer.train(**resume)
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        return rewards, {name: weight.clone() for name, weight in trainer.model.state_dict().items()}

    rewards, whole = train("whole")
    (tmp_path / "half").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "half" / "checkpoint-2")
    again, resumed = train("half", resume_from_checkpoint=True)
    assert again == rewards and len(set(rewards)) > 1
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_rloo_refuses_before_weights_are_loaded(model_dir, rl_kwargs, monkeypatch):
    rows = Dataset.from_list(RL_ROWS)
    reward = {"rewards": "tests.trainers.test_trl_trainers:length_reward"}
    monkeypatch.setattr("torch.nn.Module.__init__", lambda *_: pytest.fail("a model is made"))
    for kwargs, dataset, error, message in (
        ({}, rows, ValueError, "`rewards` must name at least one scorer, got none"),
        (reward, rows.remove_columns("wanted"), TypeError, "wanted"),
        (reward, rows.remove_columns("prompt"), ValueError, "must have a column `prompt`"),
        (
            reward,
            rows.add_column("tools", [[{"name": "add"}]] * len(rows)),
            ValueError,
            "must not have values in `tools`: TRL",
        ),
        (reward, rows.to_iterable_dataset(), NotImplementedError, "must be a `Dataset`"),
        (reward, Dataset.from_list([{"prompt": None, "wanted": 1}]), ValueError, "row 0: column 'prompt' is missing"),
    ):
        with pytest.raises(error, match=message):
            RLOOTrainer(model_dir, args=RLOOConfig(**rl_kwargs, **kwargs), train_dataset=dataset)


# Settings


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (KTOConfig, {"per_device_train_batch_size": 1}, "must be at least 2, got 1: KTO estimates"),
        (RewardConfig, {"difference_penalty": -1.0}, "got -1.0: a negative penalty drives rewards apart"),
        (RewardConfig, {"max_difference": 0.0}, "`max_difference` must be above 0, got 0.0"),
        (RewardConfig, {"eos_token": "x"}, "eos_token='x': rows are tokenised before"),
        (BestOfNConfig, {"completion_only_loss": False}, "`completion_only_loss` must be True, got False"),
        (ORPOConfig, {"is_encoder_decoder": True}, "is_encoder_decoder=True: models are decoders"),
        (DPOConfig, {"truncation_mode": "keep_end"}, "truncation_mode='keep_end': cut prompts before training"),
        (DPOConfig, {"prefix_sharing": "maybe"}, "`prefix_sharing` must be 'auto', True or False, got 'maybe'"),
        (DPOConfig, {"on_invalid_row": "ignore"}, "`on_invalid_row` must be 'error' or 'drop', got 'ignore'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config, settings, message, config_kwargs):
    with pytest.raises(ValueError, match=message):
        config(**{**config_kwargs, **settings})


def test_models_that_only_score_are_loaded_whole():
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    from trl_ext._trl import loaded_whole

    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    with loaded_whole():
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled() and json.dumps(config.config)
