"""
The loop: sample, score, rank, train, and again with the model just trained.

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
      rounds.json, rounds.png       the figures side by side, and which model to take
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import get_peft_config

from .adapter_checks import check_adapter
from .checkpoints import RESUME_LAST, wants_to_resume
from .checks import Limits
from .cli import (
    MAY_CHANGE,
    changed_fields,
    is_playground,
    loading_for_sampling,
    local_model,
    run_settings,
)
from .data import RowError, RowOptions, prepare_row, refusal, refuse_outside_window
from .evaluation_stage import evaluation_stage
from .headings import Headings, count
from .intervals import TIE_RULE, Mean, Wins, paired_difference, wins
from .jsonl import as_jsonl, read_jsonl, write_jsonl
from .load import load_prompts
from .machines import from_all
from .next_commands import after_rounds, print_next
from .pretrained import is_adapter, merge_adapter
from .ranking import PAIR_RULES, check_pair_rule, pair_rows, rank_rows, score_report
from .safety import check_field_types
from .sampling import (
    SamplingConfig,
    load_tokenizer,
    mixed_in,
    prompt_key,
    prompt_token_ids,
    sample_candidates,
    write_atomically,
)
from .scoring import ScorerConfig, as_text, build_scorers, check_scorers, score_rows
from .stages import Run, all_processes, settings_of, start_afresh

STAGES_OF_ROUND = 4  # with a heading: sampling, ranking, training, evaluating
SFT_TITLE = "training the SFT model of the playground"


@dataclass
class RankingConfig(ScorerConfig):
    """
    How candidates are ranked: the fields of [`ScorerConfig`], and

    Parameters:
        rewards (`list[str]`, *optional*): what scores: `file.py:function` or `package.module:function` with TRL's
            reward-function signature, or a sequence-classification model (a folder or a name of the Hub). Several are
            added up.
        reward_weights (`list[float]`, *optional*): one for each of `rewards`; 1 by default.
        ranker (`str`, *optional*): instead of `rewards` a pairwise judge, a function or a model in the same notation
            (see [`load_judge`]): the answers to a prompt meet in a knock-out tournament, K - 1 comparisons.
        mix_in (`list[str]`, *optional*): columns of the dataset whose answers join the sampled ones, such as `chosen
            rejected` (RRHF mixes both in).
        pair_rule (`str`, *optional*): make pairs of the ranked answers, by this rule of [`make_pairs`].
        pairs_per_prompt (`int`, *optional*): most pairs of one prompt.
        positive_above (`float`, *optional*, defaults to `0.5`): for `pair_rule="likelihood_near"`: answers with a
            higher score are positive.

    Raises:
        ValueError: a setting that would do nothing.
    """

    rewards: list[str] | None = field(
        default=None,
        metadata={"help": "What scores: file.py:function, package.module:function, or a reward model. Added up."},
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight per reward; default 1."})
    ranker: str | None = field(
        default=None,
        metadata={"help": "A pairwise judge instead of rewards: answers meet in a knock-out tournament."},
    )
    mix_in: list[str] | None = field(
        default=None, metadata={"help": "Columns whose answers join the sampled ones, such as: chosen rejected."}
    )
    pair_rule: str | None = field(
        default=None,
        metadata={"help": "Make pairs: " + ", ".join(PAIR_RULES) + ".", "choices": list(PAIR_RULES)},
    )
    pairs_per_prompt: int | None = field(default=None, metadata={"help": "Most pairs of one prompt."})
    positive_above: float = field(
        default=0.5, metadata={"help": "For likelihood_near: answers with a higher score are positive."}
    )

    def check(self) -> None:
        """Refuse settings that contradict each other. A single name counts as a list of one."""
        check_field_types(self)
        for name in ("rewards", "mix_in"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if bool(self.rewards) == bool(self.ranker):
            raise ValueError(
                ("Both `rewards` and `ranker` are" if self.ranker else "Neither `rewards` nor `ranker` is")
                + " given. Set either `rewards` to functions (file.py:function) and reward models, or `ranker` to a "
                "pairwise judge."
            )
        if self.pair_rule is None and self.pairs_per_prompt is not None:
            raise ValueError(f"pairs_per_prompt={self.pairs_per_prompt} would do nothing. Set `pair_rule` too.")
        if self.pair_rule != "likelihood_near" and self.positive_above != 0.5:
            raise ValueError(
                f"positive_above={self.positive_above} would do nothing. It belongs to `pair_rule` 'likelihood_near'."
            )
        if self.pair_rule is not None:
            try:
                check_pair_rule(self.pair_rule, max_pairs=self.pairs_per_prompt, positive_above=self.positive_above)
            except ValueError as error:  # it has other names for them
                given = ("pair_rule", "pairs_per_prompt", "positive_above")
                raise ValueError(f"{', '.join(f'{n}={getattr(self, n)!r:.40}' for n in given)}: {error}") from None

    def check_scorers(self, columns: Sequence[str]) -> None:
        """Find out what scoring rows with these columns would fail on, without loading a weight."""
        check_scorers(
            self.rewards or (), self.reward_weights, judge=self.ranker, columns=columns, **self.scorer_options()
        )


@dataclass
class RoundsConfig(RankingConfig):
    """
    Sampling, ranking and training in rounds: the fields of [`RankingConfig`], and

    Parameters:
        num_rounds (`int`, *optional*, defaults to `0`):
            0: train once, on the dataset as it is. From 1 on, the dataset supplies prompts; each round samples answers
            to them from the model as it stands, ranks them, and trains on the result.
        judge (`str`, *optional*): a scorer that is never trained on, named like a reward, to watch the models with.
        num_watched_prompts (`int`, *optional*, defaults to `128`): prompts set apart, never trained on.
        perplexity_model (`str`, *optional*): the fixed model whose perplexity on the answers is watched; by
            default the one the rounds start from.
        max_perplexity_ratio (`float`, *optional*, defaults to `1.5`), min_distinct_ratio (`float`, *optional*,
            defaults to `0.7`):
            Rounds end when the reward has risen in a round while the perplexity exceeds this many times that of the
            first model, or distinct-n falls below this share of its value, or the judge's mean falls by more than two
            standard errors. The model before that round is then the one to take. In the RRHF paper perplexity moves by
            3 % in three good rounds and goes up more than fourfold where reward was hacked.

    With a `ranker`, a model's reward is how often its answer beats that of the first model.

    Raises:
        ValueError: a value out of its range, or a setting that would do nothing.
    """

    num_rounds: int = field(
        default=0,
        metadata={"help": "0: train once on the dataset as it is. N: sample, rank and train on its prompts N times."},
    )
    judge: str | None = field(
        default=None, metadata={"help": "A further scorer that is only watched, never trained on."}
    )
    num_watched_prompts: int = field(
        default=128, metadata={"help": "Prompts set apart to watch the models with, never trained on."}
    )
    perplexity_model: str | None = field(
        default=None, metadata={"help": "Fixed model whose perplexity is watched; default: the one at the start."}
    )
    max_perplexity_ratio: float = field(
        default=1.5,
        metadata={"help": "Rounds end if the reward rises while perplexity exceeds this times the first model's."},
    )
    min_distinct_ratio: float = field(
        default=0.7,
        metadata={"help": "Rounds end if the reward rises while distinct-n falls below this share of the first's."},
    )

    def check_scorers(self, columns: Sequence[str]) -> None:
        super().check_scorers(columns)
        if self.judge is not None:
            check_scorers([self.judge], columns=columns, **self.scorer_options())

    def __post_init__(self):
        check_field_types(self)
        if self.num_rounds < 0:
            raise ValueError(f"num_rounds={self.num_rounds}: set it to 0 (train on the data as it is) or more.")
        if self.num_watched_prompts < 2:
            raise ValueError(
                f"num_watched_prompts={self.num_watched_prompts} shows nothing. Set it to 2 or more; 100 and more "
                "tell models apart."
            )
        if not 1 < self.max_perplexity_ratio or not 0 <= self.min_distinct_ratio < 1:
            raise ValueError(
                f"max_perplexity_ratio={self.max_perplexity_ratio}, min_distinct_ratio={self.min_distinct_ratio}: an "
                "unchanged model would count as degenerate. Set the first above 1 and the second below 1."
            )
        if self.num_rounds:
            self.check()
            return
        idle = [
            entry.name
            for entry in fields(self)
            if entry.name != "num_rounds" and getattr(self, entry.name) != entry.default
        ]
        if idle:
            raise ValueError(
                f"{', '.join(idle)} would do nothing: nothing is sampled. Set `--num_rounds 1`, or leave them out."
            )


# Stages


def sample_stage(
    folder: Path, *, model: Path, prompts: Path | list[dict], config: SamplingConfig, mix_in: Sequence[str], load: dict
) -> dict[str, Any]:
    """Candidates for every prompt, a list of rows or a file of them: `candidates.jsonl`."""
    rows = prompts if isinstance(prompts, list) else read_jsonl(prompts)
    rows, report = sample_candidates(model, rows, config, folder, mix_in=mix_in, **load)
    _say(report)
    write_jsonl(folder / "candidates.jsonl", [{key: row[key] for key in row if key != "token_ids"} for row in rows])
    return asdict(report)


def rank_stage(
    folder: Path,
    *,
    candidates: Path,
    config: RankingConfig,
    seed: int,
    min_completions: int,
    best_as_reference: bool = False,
) -> dict[str, Any]:
    """Scores: `ranked.jsonl` of prompts with so many answers, and with a `pair_rule` `pairs.jsonl`."""
    names, weights, how = config.rewards or (), config.reward_weights, config.scorer_options()
    scorers = build_scorers(names, weights, judge=config.ranker, seed=seed, **how)
    scored = score_rows(read_jsonl(candidates), scorers, weights, folder=folder / "scores")
    report = score_report(scored)
    _say(report)
    ranked, ranked_report = rank_rows(scored, min_completions=min_completions, best_as_reference=best_as_reference)
    _say(ranked_report)
    write_jsonl(folder / "ranked.jsonl", ranked)
    if config.pair_rule is not None:
        pairs, pair_report = pair_rows(
            scored,
            config.pair_rule,
            seed,
            max_pairs_per_prompt=config.pairs_per_prompt,
            positive_above=config.positive_above,
            best_as_reference=best_as_reference,
        )
        _say(pair_report)
        write_jsonl(folder / "pairs.jsonl", pairs)
    return {
        "reward": report.mean,
        "reward_best": report.mean_of_best,
        "reward_worst": report.mean_of_worst,
        "all_equal": report.all_equal,
        "num_prompts": len(ranked),
    }


def merge_stage(folder: Path, *, adapter: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The adapter's weights added to its base, as an ordinary model."""
    if PartialState().is_main_process:
        merge_adapter(adapter, folder, trust_remote_code=trust_remote_code)
    return {}


def merged_start(run: Run, adapter: str | Path, *, trust_remote_code: bool) -> Path:
    """An adapter that a run starts from, merged into its base in the run's folder."""
    run.stage("start/merged", merge_stage, inputs={"adapter": Path(adapter)}, trust_remote_code=trust_remote_code)
    run.state.print(f"{adapter} is an adapter: the run starts from {run.path('start', 'merged')}, merged of its base")
    return run.path("start", "merged")


def merged_model(run: Run, name: str, *, trust_remote_code: bool) -> Path:
    """What was trained in a run's folder `name`, as an ordinary model: an adapter is merged into its base."""
    trained = run.path(name, "model")
    if not (trained / "adapter_config.json").is_file():
        return trained
    run.stage(f"{name}/merged", merge_stage, inputs={"adapter": trained}, trust_remote_code=trust_remote_code)
    return run.path(name, "merged")


# The loop


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
                PartialState().print(f"The rounds end here, and the model before {name} is the one to take: {reason}")
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
        from .plots import plot_rounds

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
                table.add_row(label, *(format(self.figures[name][key], form) for name in names))

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


def change(answers: dict[int, dict], before: dict[int, dict]) -> Mean:
    """Mean change of the reward on the prompts that both answered."""
    return paired_difference(*_rewards(answers, before))


def format_change(change: Mean) -> str:
    """A cell of two lines for a table."""
    return f"{change.value:+.3f}\n{change.low:+.3f} to {change.high:+.3f}"


def wins_over(answers: dict[int, dict], first: dict[int, dict]) -> Wins:
    """Wins, ties and losses by reward on the prompts that both answered."""
    return wins(*_rewards(answers, first))


def format_wins(found: Wins) -> str:
    """A cell of three lines for a table."""
    low, high = found.interval
    return f"{found.rate:.1%}\n{low:.1%} to {high:.1%}\n{found.tied} of {found.num_pairs} tied"


def _rewards(answers: dict[int, dict], others: dict[int, dict]) -> tuple[list[float], list[float]]:
    both = [number for number in answers if number in others]
    return [answers[number]["reward"] for number in both], [others[number]["reward"] for number in both]


def _short(text: str | list[dict], width: int = 48) -> Text:
    text = " ".join(as_text(text if isinstance(text, str) else text[-1:]).split())
    return Text(text if len(text) <= width else text[: width - 1] + "…")


def in_rounds(parsed: Sequence[Any]) -> bool:
    """
    Whether a recipe is to sample and train in rounds, given what [`parse_recipe_args`] returned.

    Raises:
        ValueError: it is not, and sampling has settings that would do nothing.
    """
    sampling, config = parsed[4:6]
    if config.num_rounds == 0 and (idle := changed_fields(sampling)):
        raise ValueError(
            f"{', '.join(idle)} would do nothing: nothing is sampled. Set `--num_rounds 1`, or leave them out."
        )
    return config.num_rounds > 0


def start_rounds(
    parsed: Sequence[Any],
    *,
    rows: RowOptions,
    best_as_reference: bool = False,
    more_stages: int = 0,
    headings: Headings | None = None,
) -> Rounds:
    """
    Begin the rounds of a recipe, or take them up where they were interrupted. Everything that can be known to fail
    fails here, before a model is loaded.

    Args:
        parsed (`Sequence`): what [`parse_recipe_args`] returned, with a [`SamplingConfig`] and a [`RoundsConfig`] as
            the fifth and the sixth. Without a model and data, on the playground, an SFT model is trained first.
        rows ([`RowOptions`]): what the recipe's trainer wants of its rows. With `reference`, the playground's rows get
            one of the task.
        best_as_reference (`bool`, defaults to `False`): train towards the best sampled answer to a prompt, and not
            towards the dataset's `reference`, as in SLiC-HF's sample-rank.
        more_stages (`int`, defaults to 0): stages with a heading that the recipe adds to those of the rounds.
        headings ([`Headings`], *optional*): numbers the stages; by default those of the rounds and `more_stages`.

    Raises:
        FileExistsError, ValueError: see [`Run`], [`check_scorers`], [`check_prompts`] and [`set_apart`]; or a setting
            that has no meaning in rounds.
    """
    script_args, training_args, model_args, dataset_args, sampling, config, *_ = parsed
    _check_for_rounds(training_args, model_args, dataset_args)
    on_playground, resume = is_playground(*parsed), wants_to_resume(training_args)
    if on_playground:
        from .playground import Playground, sft_stage

        playground = Playground(seed=training_args.seed)
        prompts, watched = playground.rows("train", reference=rows.reference), playground.rows("held_out")
        before = from_all(settings_of(training_args.output_dir))[0]  # the same decision on all processes
        if not resume and before is not None and not (before["model_name_or_path"] or before["dataset_name"]):
            start_afresh(training_args.output_dir)  # over a playground only
    else:
        trust = training_args.trust_remote_code
        model, prompts = local_model(model_args, trust_remote_code=trust), load_prompts(script_args, dataset_args)
        tokenizer = load_tokenizer(model, trust_remote_code=trust)
        rows = replace(rows, max_length=training_args.max_length)
        check_adapter(model, training_args, get_peft_config(model_args))
        prompts = check_prompts(
            prompts,
            tokenizer,
            rows,
            config.mix_in or (),
            training_args.on_invalid_row,
            limits=Limits(model, training_args),
            max_new_tokens=sampling.max_new_tokens,
        )
        prompts, watched = set_apart(prompts, config.num_watched_prompts, training_args.seed)
    if best_as_reference and "reference" in prompts[0]:
        PartialState().print("The column `reference` is not trained towards: the best sampled answers are.")
    config.check_scorers(list(prompts[0]))
    settings = {**run_settings(parsed), "num_processes": all_processes().num_processes}
    if headings is None:
        stages = on_playground + 1 + STAGES_OF_ROUND * config.num_rounds + more_stages
        headings = Headings(stages, at_most=config.num_rounds > 1)
    run = Run(
        training_args.output_dir,
        settings,
        resume=resume,
        may_change=MAY_CHANGE,
        patience=training_args.ddp_timeout,
        headings=headings,
    )
    if on_playground:
        run.stage("sft", sft_stage, title=SFT_TITLE, playground=playground)
        model = run.path("sft")
    elif is_adapter(model):
        model = merged_start(run, model, trust_remote_code=trust)
    rounds = Rounds(
        run,
        config,
        sampling,
        prompts=prompts,
        watched=watched,
        model=model,
        load=loading_for_sampling(model_args, training_args),
        seed=training_args.seed,
        min_completions=rows.min_completions,
        best_as_reference=best_as_reference,
    )
    rounds.start_name = "SFT" if on_playground else "start"
    return rounds


def _check_for_rounds(training_args, model_args, dataset_args) -> None:
    """Refuse settings that training alone has a use for."""
    if training_args.push_to_hub:
        raise ValueError(
            "push_to_hub would push the model of every round, each over the one before. Leave it out, and push the "
            "model to take at the end: `hf upload NAME OUTPUT_DIR/round-N/model`."
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError(
            "Rounds sample from whole models, and merge adapters into them, which is not what a quantised model would "
            "answer. Leave `--load_in_4bit` and `--load_in_8bit` out; LoRA (`--use_peft`) works."
        )
    if wants_to_resume(training_args) and str(training_args.resume_from_checkpoint).lower() not in RESUME_LAST:
        raise ValueError(
            f"resume_from_checkpoint={training_args.resume_from_checkpoint!r}: rounds go on where they stopped. Set "
            "it to 'true'."
        )
    evaluates, splits = training_args.eval_strategy != "no", dataset_args.test_split_size is not None
    if evaluates != splits:
        raise ValueError(
            f"eval_strategy={training_args.eval_strategy!r} with test_split_size={dataset_args.test_split_size}: what "
            "is sampled has no test split. Set both, to evaluate the loss on some of it, or neither; the models are "
            "watched on prompts of their own in any case."
        )


def check_prompts(
    rows: Sequence[dict],
    tokenizer,
    options: RowOptions,
    mix_in: Sequence[str],
    on_invalid_row: str,
    *,
    limits: Limits | None = None,
    max_new_tokens: int = 0,
) -> list[dict]:
    """
    Find the rows that sampling or training would refuse whatever is sampled, by preparing each with a short answer and
    those that are mixed in.

    Args:
        rows (`Sequence[dict]`): with `prompt`, columns to mix in, and others.
        tokenizer: the model's.
        options ([`RowOptions`]): what the trainer wants.
        mix_in (`Sequence[str]`): columns with further answers.
        on_invalid_row (`str`): `"error"`, or `"drop"` to leave such rows out, and say so.
        limits ([`Limits`], *optional*): of the model.
        max_new_tokens (`int`, defaults to 0): of the answers that are sampled.

    Returns:
        `list[dict]`: the rows that can be used.

    Raises:
        ValueError: rows that cannot be used, with their numbers; a row that the model has too few positions or token
            embeddings for.
    """
    options = replace(options, min_completions=1, eos_token=tokenizer.eos_token)
    usable, problems = [], {}
    window, check_row = None, None
    if limits is not None:
        window, check_row = limits.made_for, limits.row_check("prompt", tokenizer, options.max_length)
    for index, row in enumerate(rows):
        stub = "x" if isinstance(row["prompt"], str) else [{"role": "assistant", "content": "x"}]
        answers = [stub, *(answer for column in mix_in for answer in mixed_in(row, column))]
        known = {key: row[key] for key in ("prompt", "reference", "tools", "chat_template_kwargs") if key in row}
        try:
            prepared = prepare_row(
                {**known, "completions": answers, "scores": [0.0] * len(answers)}, tokenizer, options
            )
            if limits is not None:
                refuse_outside_window(len(prompt_token_ids(tokenizer, row)), max_new_tokens, window)
                check_row(prepared)
        except RowError as error:
            problems.setdefault(error.problem, []).append((index, str(error)))
        else:
            usable.append(row)
    if problems and (on_invalid_row == "error" or not usable):
        raise ValueError(refusal("prompt", len(rows), problems))
    for problem, found in problems.items():
        PartialState().print(f"prompts dropped, {problem}: {len(found)} rows")
    return usable


def train_stage(
    folder: Path, *, model: Path, data: Path, train_with: Callable, arguments: list[str]
) -> dict[str, Any]:
    """A recipe's own training, on the stage's model, data and folder."""
    return train_with(arguments, model=str(model), data=str(data), output_dir=str(folder))


def reward_hacking(
    first: dict[str, float],
    before: dict[str, float],
    now: dict[str, float],
    judged_before: dict[int, float] | None,
    judged_now: dict[int, float] | None,
    config: RoundsConfig,
) -> str | None:
    """
    Why a round's gain is not to be believed: the reward rose, and something else went wrong. `None` if nothing did.

    Args:
        first, before, now (`dict`): figures of the model at the start, before the round and after it.
        judged_before, judged_now (`dict`, *optional*): the judge's score by prompt.
        config ([`RoundsConfig`]): with the thresholds.
    """
    if now["reward"] <= before["reward"]:
        return None
    rose = f"the reward rose from {before['reward']:.3f} to {now['reward']:.3f} while "
    if now["perplexity"] > config.max_perplexity_ratio * first["perplexity"]:
        return rose + f"perplexity went from {first['perplexity']:.1f} at the start to {now['perplexity']:.1f}"
    for name in ("distinct_1", "distinct_2"):
        if first[name] and now[name] < config.min_distinct_ratio * first[name]:
            return rose + f"{name.replace('_', '-')} fell from {first[name]:.2f} at the start to {now[name]:.2f}"
    if judged_before is not None and judged_now is not None:
        both = sorted(judged_before.keys() & judged_now.keys())
        if both:
            difference = paired_difference([judged_now[n] for n in both], [judged_before[n] for n in both])
            if difference.high < 0:
                return rose + f"the judge's score changed by {difference}"
    return None


def set_apart(rows: Sequence[dict], number: int, seed: int) -> tuple[list[dict], list[dict]]:
    """
    Split rows into those to train on and `number` to watch. Equal prompts stay on one side.

    Raises:
        ValueError: more than half of the prompts would be watched.
    """
    prompts = list(dict.fromkeys(map(prompt_key, rows)))
    if 2 * number > len(prompts):
        raise ValueError(
            f"num_watched_prompts={number} of {len(prompts)} different prompts leaves too few to train on. Lower it."
        )
    chosen = set(random.Random(seed).sample(prompts, number))
    train, watched = [], {}
    for row in rows:
        prompt = prompt_key(row)
        if prompt not in chosen:
            train.append(row)
        else:
            watched.setdefault(prompt, row)
    num_left_out = len(rows) - len(train) - len(watched)
    if num_left_out:
        PartialState().print(f"{num_left_out} rows are left out: another row with their prompt is watched")
    return train, list(watched.values())


def replaced(config: SamplingConfig, **changes: Any) -> SamplingConfig:
    """The same settings but for some."""
    return SamplingConfig(**{**asdict(config), **changes})


def _say(report: Any) -> None:
    PartialState().print(str(report))
