"""The playground of the recipes that do not sample and train in rounds: reward models and reinforcement learning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .data import RowOptions
from .headings import Headings, count
from .rounds import Rounds, RoundsConfig, rank_stage, read_jsonl, sample_stage, start_rounds
from .sampling import SamplingConfig
from .scoring import RewardModelScorer

NUM_CANDIDATES = 8


def start_playground(parsed: Sequence[Any], *, num_stages: int) -> Rounds:
    """
    The playground with its SFT model, to sample, rank, train and evaluate on.

    Args:
        parsed (`Sequence`): what [`parse_recipe_args`] returned, without a model and data.
        num_stages (`int`): stages with a heading, that of the SFT model included.
    """
    sampling = SamplingConfig(
        num_candidates=NUM_CANDIDATES, temperature=1.0, max_new_tokens=16, sampling_batch_size=512
    )
    ranking = RoundsConfig(
        num_rounds=1,
        rewards=["trl_ext.playground:friendly_number_reward"],
        judge="trl_ext.playground:accuracy",
        pair_rule="best_worst",
    )
    return start_rounds((*parsed, sampling, ranking), rows=RowOptions(), headings=Headings(num_stages))


def reward_stage(folder: Path, *, model: Path, data: Path, seed: int) -> dict[str, Any]:
    """A reward model of pairs, a stage: what RLOO on the playground is trained towards."""
    from datasets import load_dataset

    from .trl_configs import RewardConfig
    from .trl_trainers import RewardTrainer

    config = RewardConfig(
        str(folder),
        seed=seed,
        use_cpu=PartialState().device.type == "cpu",
        per_device_train_batch_size=max(32 // PartialState().num_processes, 1),
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        num_train_epochs=1,
        max_length=128,
        bf16=False,
        activation_checkpointing=False,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
    )
    rows = load_dataset("json", data_files=str(data), split="train")
    trainer = RewardTrainer(str(model), args=config, train_dataset=rows)
    figures = trainer.train().metrics
    trainer.save_model(str(folder))
    return figures


def pair_accuracy(rounds: Rounds, model: Path) -> float:
    """How often a reward model tells the better of two answers to a watched prompt; printed, and kept as a stage."""
    folder = "watched"
    rounds.run.stage(
        f"{folder}/candidates",
        sample_stage,
        title=f"sampling {NUM_CANDIDATES} answers to {count(rounds.num_watched, 'held-out prompt')}",
        inputs={"model": Path(rounds.model), "prompts": rounds.watched},
        config=rounds.sampling,
        mix_in=(),
        load=rounds.load,
    )
    rounds.run.stage(
        f"{folder}/ranked",
        rank_stage,
        title="scoring and ranking these answers",
        inputs={"candidates": rounds.run.path(folder, "candidates", "candidates.jsonl")},
        config=rounds.config,
        seed=rounds.seed,
        min_completions=2,
    )
    figures = rounds.run.stage(
        f"{folder}/judged",
        judge_stage,
        title="scoring the same answers with the reward model",
        inputs={"model": Path(model), "pairs": rounds.run.path(folder, "ranked", "pairs.jsonl")},
    )
    PartialState().print(
        f"On the best and the worst answer to {figures['num_pairs']} other prompts the reward model prefers the best "
        f"in {figures['accuracy']:.1%}, by {figures['margin']:.2f} on average. The model is {model}"
    )
    return figures["accuracy"]


def judge_stage(folder: Path, *, model: Path, pairs: Path) -> dict[str, Any]:
    """How often, and by how much, a reward model prefers `chosen`."""
    rows = read_jsonl(pairs)
    scores = RewardModelScorer(str(model), batch_size=256)(
        [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in rows]
    )
    return {
        "accuracy": sum(chosen > rejected for chosen, rejected in scores) / len(rows),
        "margin": sum(chosen - rejected for chosen, rejected in scores) / len(rows),
        "num_pairs": len(rows),
    }
