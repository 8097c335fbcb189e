"""
The measures of a comparison, one entry each: where its values come from, what becomes of them, where it is shown.

All else reads [`MEASURES`]: results, summaries, `comparison.csv`, tables, pictures and findings. A new measure is a
new entry. Results that were written before it have no values of it, and show a dash.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .statistics import (
    Estimate,
    difference_interval,
    mean_interval,
    perplexity_interval,
    perplexity_ratio_interval,
)
from .text import format_count, format_number

REWARD = "reward"  # the scorer that methods are trained towards


@dataclass(frozen=True)
class FinishedRun:
    """
    What the training of one method with one seed has left, for measures to be computed from.

    Attributes:
        answers (`list[dict]`): one row for each held-out prompt, as [`evaluation_stage`] writes them: `prompt`,
            `answer`, `num_tokens`, `is_cut`, `reward`, `kl`, `fixed_logp`, and `judge` if there is one.
        evaluation (`dict`): the figures that [`evaluation_stage`] returns, such as `truncated`.
        trainings (`list[dict]`): the figures of each training, as `train_stage` returns them: `updates`, `seconds`,
            `num_tokens`, `peak_memory_mib`, `prompts` and `logps`. Empty for the SFT model.
        completions_sampled (`int`): answers that were sampled to train on.
        sampling_seconds (`float`): seconds that this took; NaN without sampling.
        reward_model_seconds (`float`): seconds in which a reward model was trained first; 0 without one.
        models_resident (`str`): models in memory during training, such as `"2"` or `"1 + LoRA"`.
    """

    answers: list[dict[str, Any]]
    evaluation: dict[str, Any]
    trainings: list[dict[str, Any]]
    completions_sampled: int
    sampling_seconds: float
    reward_model_seconds: float
    models_resident: str

    def total(self, name: str) -> float | None:
        """Sum of a figure over all trainings; `None` without a training, or where one lacks it."""
        values = [figures.get(name) for figures in self.trainings]
        return None if not values or None in values else sum(values)

    @property
    def seconds(self) -> float:
        """Seconds of training, with that of the reward model; NaN without a training."""
        return self.total("seconds") + self.reward_model_seconds if self.trainings else math.nan


@dataclass(frozen=True)
class Statistic:
    """
    How values of prompts become a figure with an interval.

    Attributes:
        interval (`Callable`): of one list of values for each seed, and keys of the prompts.
        change (`Callable`): the same of a method's lists and those of the base.
        change_name, change_meaning (`str`): behind the measure's key in `comparison.csv`, and what that means.
        equal (`float`): the change where both are equal.
        also (`tuple[str, ...]`): stored values of other measures that both functions take behind the measure's own.
    """

    interval: Callable[..., Estimate]
    change: Callable[..., Estimate]
    change_name: str
    change_meaning: str
    equal: float
    also: tuple[str, ...] = ()


MEAN = Statistic(mean_interval, difference_interval, "difference", "from the base", 0.0)
PERPLEXITY = Statistic(perplexity_interval, perplexity_ratio_interval, "ratio", "to the base", 1.0, also=("lengths",))


@dataclass(frozen=True)
class Picture:
    """
    A measure's panel on the page.

    Attributes:
        section (`str`): where: one of [`PICTURES`].
        title (`str`): above the panel.
        caption (`str`): said of it below the picture.
    """

    section: str
    title: str
    caption: str = ""


# sections of the page that show measures: name -> title, and what they show, for those who do not see it
PICTURES = {
    "perplexity": (
        "Perplexity under a fixed model",
        "Perplexity of each method's answers under a fixed model, and KL divergence from the SFT model.",
    ),
    "length": (
        "Length, and win rate at equal length",
        "Length of answers, win rate over {base}, and what it would be at equal length.",
    ),
    "further": ("Further figures", "Further figures of each method."),
}


@dataclass(frozen=True)
class Measure:
    """
    A measure of a method.

    Attributes:
        key (`str`): its name in `comparison.csv`.
        values (`Callable`): its values of a [`FinishedRun`]: a number for each held-out prompt if it has a
            `statistic`, otherwise one number for the run, or a text. NaN and `None` stand for "not measured".
        name (`str`): what sentences call it.
        stored (`str`, *optional*): key of the values in `comparison.json`, where that is not `key`.
        values_name (`str`, *optional*): what sentences call the values, where that is not `name`.
        statistic ([`Statistic`], *optional*): for a value for each prompt: what becomes of them. Without one the
            figure is the mean over seeds, and has no interval.
        is_compared (`bool`, defaults to `True`): with a `statistic`: whether the change from the base is a figure too.
        better (`int`, defaults to 0): 1 where more is better, -1 where more is worse, 0 where it is neither. A
            compared measure that got worse is named among the signs of reward hacking.
        format (`Callable`, defaults to [`format_number`]): makes a text of the figure.
        meaning (`str`, *optional*): its unit or meaning, for the readers of `comparison.csv`.
        column (`str`, *optional*): its heading in the table of results. There, it is noted if no method has it.
        cost_column (`str`, *optional*): its heading in the page's table of costs.
        markdown_column (`str`, *optional*): a measure of costs: its heading in `comparison.md`.
        picture ([`Picture`], *optional*): its panel on the page.
    """

    key: str
    values: Callable[[FinishedRun], Sequence[float] | float | str | None]
    name: str
    stored: str = ""
    values_name: str = ""
    statistic: Statistic | None = None
    is_compared: bool = True
    better: int = 0
    format: Callable[[float], str] = format_number
    meaning: str = ""
    column: str | None = None
    cost_column: str | None = None
    markdown_column: str | None = None
    picture: Picture | None = None

    def __post_init__(self):
        object.__setattr__(self, "stored", self.stored or self.key)
        object.__setattr__(self, "values_name", self.values_name or self.name)
        object.__setattr__(self, "is_compared", self.is_compared and self.statistic is not None)

    @property
    def change_key(self) -> str:
        """Name of the change from the base in `comparison.csv`."""
        return f"{self.key}_{self.statistic.change_name}"


MEASURES = [
    Measure(
        "kl",
        lambda run: [one["kl"] for one in run.answers],
        "KL",
        statistic=MEAN,
        is_compared=False,
        meaning="nats per answer",
        column="KL, nats",
        picture=Picture(
            "perplexity",
            "KL to the SFT model, nats per answer",
            "KL: how far a model is from the SFT model, without a comparison (○).",
        ),
    ),
    Measure(
        "perplexity",
        lambda run: [-one["fixed_logp"] for one in run.answers],
        "perplexity",
        stored="nll",
        values_name="likelihood of the fixed model",
        statistic=PERPLEXITY,
        better=-1,
        column="perplexity",
        picture=Picture(
            "perplexity",
            "perplexity of the answers",
            "Perplexity: how unlikely the answers are to a model that is not trained. "
            f"{REWARD.capitalize()} that rises together with it is what reward hacking looks like.",
        ),
    ),
    Measure(
        "length",
        lambda run: [one["num_tokens"] for one in run.answers],
        "length",
        stored="lengths",
        statistic=MEAN,
        meaning="tokens per answer",
        column="tokens",
        picture=Picture("length", "tokens per answer"),
    ),
    Measure(
        "distinct_2",
        lambda run: run.evaluation["distinct_2"],
        "distinct-2",
        meaning="share of different ones among all pairs of words in the answers",
        column="distinct-2",
    ),
    Measure(
        "updates",
        lambda run: run.total("updates") or 0,
        "updates",
        format=format_count,
        cost_column="updates",
    ),
    Measure(
        "training_prompts",
        lambda run: None if run.total("prompts") is None else fmean(one["prompts"] for one in run.trainings),
        "prompts trained on",
        format=format_count,
        cost_column="prompts trained on",
    ),
    Measure(
        "completions_sampled",
        lambda run: run.completions_sampled,
        "answers sampled",
        format=format_count,
        cost_column="answers sampled",
    ),
    Measure(
        "seconds",
        lambda run: run.seconds,
        "seconds of training",
        meaning="of training",
        cost_column="training, s",
        markdown_column="training, s",
    ),
    Measure(
        "sampling_seconds",
        lambda run: run.sampling_seconds,
        "seconds of sampling",
        cost_column="sampling, s",
    ),
    Measure(
        "tokens_per_second",
        lambda run: None if run.total("num_tokens") is None else run.total("num_tokens") / run.total("seconds"),
        "tokens per second",
        cost_column="tokens/s in training",
    ),
    Measure(
        "peak_memory_mib",
        lambda run: max((one["peak_memory_mib"] for one in run.trainings), default=None),
        "peak memory",
        cost_column="peak memory, MiB",
        markdown_column="peak MiB",
    ),
    Measure(
        "models_resident",
        lambda run: run.models_resident,
        "models in memory",
        format=str,
        cost_column="models in memory",
        markdown_column="models",
    ),
]


def measured(run: FinishedRun) -> dict[str, Any]:
    """All measures' values of a run, by their key in `comparison.json`."""
    return {measure.stored: measure.values(run) for measure in MEASURES}
