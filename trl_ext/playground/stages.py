"""The playground's stages: SFT, and a reward model."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..runs.rounds import Rounds
from ..runs.stages import rank_stage, sample_stage
from ..runtime.headings import count
from ..runtime.jsonl import read_jsonl
from ..scoring.models import RewardModelScorer
from .task import Playground, spin_playground


def sft_stage(folder: Path, *, playground: "Playground") -> dict[str, float]:
    """The playground's SFT model, as a stage of a [`Run`]."""
    playground.train_sft(folder)
    return {}


# of SFT that goes on: of 1e-4, 2e-4 and 5e-4 the best with seed 42, when it saw a part of the examples again and again
CONTROL_LEARNING_RATE = 2e-4


def continue_sft(game: Any, *, learning_rate: float = CONTROL_LEARNING_RATE) -> dict[str, str]:
    """
    Continue SFT beside the iterations of SPIN, with as many updates and examples in each. Every stage takes up the
    examples where the one before stopped, so that none comes twice before all have come once.

    Args:
        game ([`SelfPlay`]): on the playground, with its iterations trained.
        learning_rate (`float`, *optional*): the highest.

    Returns:
        `dict[str, str]`: the models, which are evaluated in `game`: `control-N` to `iteration-N`.
    """
    config, model, seen, controls = game.config, game.model, 0, {}
    batch_size = config.train_batch_size * config.gradient_accumulation_steps * game.run.state.num_processes
    iterations = [name for name in game.training if name.startswith("iteration-")]
    for number, iteration in enumerate(iterations):  # fewer than wanted where the game was stopped
        name, num_steps = f"control-{number}", game.training[iteration]["steps"]
        game.run.stage(
            f"{name}/model",
            continue_sft_stage,
            title=f"training, {name.replace('-', ' ')}: SFT that goes on",
            inputs={"model": Path(model)},
            shards_models=True,
            playground=spin_playground(config.seed),
            first_example=seen,
            num_steps=num_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
        )
        model, seen = game.run.path(name, "model"), seen + num_steps * batch_size
        game.evaluate(name, model)
        controls[name] = iteration
    return controls


def continue_sft_stage(
    folder: Path,
    *,
    model: Path,
    playground: "Playground",
    first_example: int,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> dict:
    """SFT going on from a model, with the examples from a place on; a stage."""
    rows = playground.sft_examples(first_example, num_steps * batch_size)
    playground.train_sft(
        folder, rows=rows, start=model, num_steps=num_steps, batch_size=batch_size, learning_rate=learning_rate
    )
    return {}


NUM_CANDIDATES = 8


def reward_stage(folder: Path, *, model: Path, data: Path, seed: int) -> dict[str, Any]:
    """A reward model of pairs, a stage: what RLOO on the playground is trained towards."""
    from datasets import load_dataset

    from ..methods.reward.config import RewardConfig
    from ..methods.reward.trainer import RewardTrainer

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
