"""The loop: sample, score, rank, train, and again with the model just trained.

RRHF calls n rounds IP-n (https://huggingface.co/papers/2304.05302, section 3.3); with SLiC-HF one round is its
sample-rank (https://huggingface.co/papers/2305.10425, section 3.1). Each step is a stage of a [`Run`]; a recipe brings
the training.

    OUTPUT_DIR/
      run.json                      settings the run was begun with
      prompts/                      train.jsonl: to train on; watched.jsonl: set apart to watch the models with
      start/evaluation/             how the first model answers the watched prompts
      round-1/candidates/           sampled answers
      round-1/ranked/               the same with scores: ranked.jsonl, and pairs.jsonl where pairs are trained on
      round-1/model/                the trained model
      round-1/merged/               with LoRA: the adapter merged into its base, for the next round
      round-1/evaluation/           how it answers the watched prompts
      rounds.json, rounds.png       the figures side by side, and which model to take"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.messages import as_text
from ..runtime.files import write_atomically
from ..runtime.headings import count
from ..runtime.jsonl import as_jsonl, read_jsonl
from ..sampling.config import SamplingConfig
from .config import RoundsConfig
from .evaluation_stage import evaluation_stage
from .intervals import TIE_RULE
from .next_commands import after_rounds, print_next
from .run import Run
from .stages import merged_model, rank_stage, sample_stage, train_stage
from .watch import change, format_change, format_wins, reward_hacking, wins_over

STAGES_OF_ROUND = 4  # with a heading: sampling, ranking, training, evaluating


SFT_TITLE = "training the SFT model of the playground"


class Rounds:
    """
    The loop over rounds, with its run, prompts and figures.

    Args:
        run ([`Run`]): where it happens.
        config ([`RoundsConfig`]), sampling ([`SamplingConfig`]): how.
        prompts (`Sequence[dict]`): rows to train on, with `prompt` and whatever the scoring needs.
        watched (`Sequence[dict]`): rows to watch the models with.
        model (`str` or `Path`): folder of the model at the start.
        load (`dict`): keyword arguments with which models are loaded for sampling: `model_init_kwargs` and
            `trust_remote_code`.
        seed (`int`): of tournaments and pairs.
        min_completions (`int`): fewest answers with which a prompt is trained on.
        best_as_reference (`bool`, defaults to `False`): as in [`pair_rows`] and [`rank_rows`].
    """

    def __init__(
        self,
        run: Run,
        config: RoundsConfig,
        sampling: SamplingConfig,
        *,
        prompts: Sequence[dict],
        watched: Sequence[dict],
        model: str | Path,
        load: dict[str, Any],
        seed: int,
        min_completions: int,
        best_as_reference: bool = False,
    ):
        self.run, self.config, self.sampling, self.load, self.seed = run, config, sampling, load, seed
        self.min_completions, self.best_as_reference = min_completions, best_as_reference
        self.model = self.model_to_take = str(model)
        self.start_name, self.num_prompts, self.num_watched = "start", len(prompts), len(watched)
        self.subject: str | None = None  # for headings, where a run trains several methods
        self.first_prompt, self.stopped = watched[0]["prompt"], None
        self.fixed_model = config.perplexity_model or self.model
        kept = run.keep("prompts", {"train.jsonl": as_jsonl(prompts), "watched.jsonl": as_jsonl(watched)})
        self.prompts, self.watched = kept / "train.jsonl", kept / "watched.jsonl"
        self.figures: dict[str, dict[str, Any]] = {}
        self.candidate_figures: dict[str, dict[str, Any]] = {}

    def of(self, name: str) -> str:
        """Method, seed and round of a stage's folder, to put behind its title where there are several."""
        part = name.rpartition("/")[2]
        several = self.subject is not None or self.config.num_rounds > 1
        is_part = (part.startswith("round-") and several) or part in ("best-of-n", "reward_model")
        shown = [self.subject, part.replace("round-", "round ").replace("_", " ") if is_part else None]
        return "".join(f", {one}" for one in shown if one is not None)

    def _called(self, name: str) -> str:
        """What is evaluated."""
        if name == "start":
            return f"the {self.start_name} model"
        return f"the trained model{self.of(name)}"

    def evaluate(self, name: str, model: str | Path) -> dict[str, Any]:
        """Let a model answer the watched prompts; its figures are kept as `name`."""
        first = {}
        if self.config.ranker is not None and name != "start":
            first = {"first_answers": self.run.path("start", "evaluation", "answers.jsonl")}
        self.figures[name] = self.run.stage(
            f"{name}/evaluation",
            evaluation_stage,
            title=f"evaluating {self._called(name)} on {count(self.num_watched, 'held-out prompt')}",
            inputs={"model": Path(model), "prompts": self.watched, **first},
            **self.evaluation_settings(),
        )
        return self.figures[name]

    def evaluation_settings(self) -> dict[str, Any]:
        """How models are evaluated. All have the same random numbers: what differs is the model."""
        return {
            "config": self.sampling,
            "rewards": self.config.rewards or (),
            "reward_weights": self.config.reward_weights,
            "ranker": self.config.ranker,
            "judge": self.config.judge,
            "scorer_options": self.config.scorer_options(),
            "fixed_model": self.fixed_model,
            "load": self.load,
        }

    def make_candidates(self, name: str, model: str | Path, draw: int = 0) -> Path:
        """Sample and score candidates of a model; returns the file to train on. Every `draw` is another sample."""
        answers = count(self.sampling.num_candidates, "answer")
        self.run.stage(
            f"{name}/candidates",
            sample_stage,
            title=f"sampling {answers} to {count(self.num_prompts, 'prompt')}{self.of(name)}",
            inputs={"model": Path(model), "prompts": self.prompts},
            config=replaced(self.sampling, sampling_seed=self.sampling.sampling_seed + draw),
            mix_in=self.config.mix_in or (),
            load=self.load,
        )
        self.candidate_figures[name] = self.run.stage(
            f"{name}/ranked",
            rank_stage,
            title=f"scoring and ranking the answers{self.of(name)}",
            inputs={"candidates": self.run.path(name, "candidates", "candidates.jsonl")},
            config=self.config,
            seed=self.seed,
            min_completions=self.min_completions,
            best_as_reference=self.best_as_reference,
        )
        return self.run.path(name, "ranked", "ranked.jsonl" if self.config.pair_rule is None else "pairs.jsonl")

    def train(self, name: str, function: Callable, model: str | Path, data: Path, arguments: Sequence[str]) -> Path:
        """
        Train a model; returns the folder of the new one.

        Args:
            name (`str`): whose folder it goes into.
            function (`Callable`): the recipe's training, called as
                `function(arguments, model=..., data=..., output_dir=...)`, which returns figures.
            model (`str` or `Path`), data (`Path`): what from, and what on.
            arguments (`Sequence[str]`): the command line; its own model, data and folder do not count.
        """
        self.run.stage(
            f"{name}/model",
            train_stage,
            title=f"training{self.of(name)}",
            inputs={"model": Path(model), "data": data},
            shards_models=True,
            train_with=function,
            arguments=list(arguments),
        )
        return merged_model(self.run, name, trust_remote_code=self.load["trust_remote_code"])

    def play(self, train: Callable, arguments: Sequence[str]) -> Path:
        """
        Play all rounds, or as many as do good; returns the folder of the model to take.

        Args:
            train (`Callable`), arguments (`Sequence[str]`): as in [`~Rounds.train`].
        """
        model, before, first = self.model, "start", self.evaluate("start", self.model)
        for number in range(1, self.config.num_rounds + 1):
            name = f"round-{number}"
            data = self.make_candidates(name, model, draw=number - 1)
            model = self.train(name, train, model, data, arguments)
            now = self.evaluate(name, model)
            judged = self._judged(before), self._judged(name)
            reason = reward_hacking(first, self.figures[before], now, *judged, self.config)
            if reason is None:
                self.model_to_take, before = str(model), name
            self.write_report(reason)
            if reason is not None:
                self.stopped = reason
                PartialState().print(f"The rounds end here. Take the model before {name}: {reason}")
                break
        return Path(self.model_to_take)

    def answers(self, name: str) -> list[dict[str, Any]]:
        """What a model answered to the watched prompts."""
        return read_jsonl(self.run.path(name, "evaluation", "answers.jsonl"))

    def _judged(self, name: str) -> dict[int, float] | None:
        answers = self.answers(name)
        return {one["number"]: one["judge"] for one in answers} if "judge" in answers[0] else None

    def write_report(self, stopped: str | None = None) -> None:
        """`rounds.json` and `rounds.png`."""
        if not PartialState().is_main_process:
            return
        from .curves import plot_rounds

        report = {
            "model": self.model_to_take,
            "stopped": stopped,
            "models": self.figures,
            "candidates": self.candidate_figures,
        }
        write_atomically(self.run.path("rounds.json"), json.dumps(report, indent=2))
        plot_rounds(self.figures, self.candidate_figures, self.run.path("rounds.png"))

    def report(self, method: str) -> None:
        """Print the figures of all models side by side, some answers, and which model to take."""
        if not PartialState().is_main_process:
            return
        names = {"start": self.start_name, "best-of-n": "best-of-n SFT"}
        names = {name: names.get(name, f"{method} {name.replace('-', ' ')}") for name in self.figures}
        answers = {name: {one["number"]: one for one in self.answers(name)} for name in names}
        first, console = answers["start"], Console(width=110)
        table = Table(title=f"{len(first)} held-out prompts, one answer each at temperature 1", title_justify="left")
        for heading in ("", *names.values()):
            table.add_column(heading, justify="right" if heading else "left")

        def row(label: str, key: str, form: str) -> None:
            if key in self.figures["start"]:
                values = (self.figures[name][key] for name in names)
                table.add_row(label, *("–" if value is None else format(value, form) for value in values))

        row("reward", "reward", ".3f")
        pairs = zip(names, list(names)[1:], strict=False)
        table.add_row("change from the left", "", *(format_change(change(answers[b], answers[a])) for a, b in pairs))
        over_first = ("" if name == "start" else format_wins(wins_over(answers[name], first)) for name in names)
        table.add_row(f"wins over the first\n({TIE_RULE})", *over_first)
        row(f"judge: {str(self.config.judge).rpartition(':')[2]}", "judge", ".3f")
        row("perplexity, fixed model", "perplexity", ".2f")
        row("KL to it, nats per answer, temperature 1", "kl", ".2f")
        row("distinct-1", "distinct_1", ".3f")
        row("distinct-2", "distinct_2", ".3f")
        row("tokens per answer", "length", ".1f")
        console.print(table)

        last = list(names)[-1]
        examples = Table(title="Where they differ", title_justify="left")
        for heading in ("prompt", names["start"], "reward", names[last], "reward"):
            examples.add_column(heading, justify="right" if heading == "reward" else "left")
        both = [n for n in first if n in answers[last] and first[n]["reward"] != answers[last][n]["reward"]]
        for number in both[:8]:
            before, after = first[number], answers[last][number]
            cells = [_short(before["prompt"]), _short(before["answer"]), f"{before['reward']:.2f}"]
            examples.add_row(*cells, _short(after["answer"]), f"{after['reward']:.2f}")
        if both:
            console.print(examples)
        print(f"The model is {self.model_to_take}; rounds.json and rounds.png are in {self.run.folder}")
        print_next(after_rounds(self))


def _short(text: str | list[dict], width: int = 48) -> Text:
    text = " ".join(as_text(text if isinstance(text, str) else text[-1:]).split())
    return Text(text if len(text) <= width else text[: width - 1] + "…")


def replaced(config: SamplingConfig, **changes: Any) -> SamplingConfig:
    """The same settings but for some."""
    return SamplingConfig(**{**asdict(config), **changes})
