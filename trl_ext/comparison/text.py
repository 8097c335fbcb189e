"""Numbers, lists and conversations as text."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .figures import format_number
from .results import MethodResult
from .statistics import Estimate
from .summary import mean_curve

CSV_COLUMNS = {
    "method": "its key",
    "label": "as shown",
    "seed": "a seed, or “all” for all of them together",
    "status": "done, or failed, with the reason under “error” and no figure",
    "figure": "score, difference (from the base), win_rate, length_controlled_win_rate, kl (nats per answer), "
    "perplexity, perplexity_ratio (to the base), length (tokens per answer), length_difference (from the base), "
    "updates, training_prompts, completions_sampled, seconds (of training), sampling_seconds, tokens_per_second, "
    "peak_memory_mib, models_resident",
    "scorer": "for score, difference and win rates: which one",
    "over": "for differences, ratios and win rates: the method it is compared with",
    "value": "the figure; empty where it was not measured",
    "low": "lower end of the 95 % interval, over prompts for one seed, over prompts and seeds for all",
    "high": "its upper end",
    "seeds": "training runs it comes from",
    "values": "values it comes from",
    "error": "why it failed",
}


COUNTS = ("updates", "training_prompts", "completions_sampled")


PLAIN_FIGURES = (
    *COUNTS,
    "seconds",
    "sampling_seconds",
    "tokens_per_second",
    "peak_memory_mib",
    "models_resident",
)


INTERVALS = (
    "<p>With one seed, held-out prompts are drawn with replacement, 2000 times, and an interval holds 95 % of the "
    "results. With several, seeds and prompts are drawn independently of each other, so that an interval is also "
    "about training runs that were not made. In simulation, nominal 95 % intervals contained the truth in 99 % of "
    "cases where seeds did not differ, and where they differed much in 73 % with two seeds, 81 % with three and 87 % "
    "with five. Where all values are equal an interval is a single point, which does not mean certainty.</p>"
    "<p>Comparisons are of answers to the same prompt with the same seed.</p>"
)


def write_figure(writer: csv.DictWriter, about: dict[str, str], estimate: Estimate) -> None:
    numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    counts = {"seeds": estimate.num_seeds, "values": estimate.num_values}
    writer.writerow({**about, **{key: exact(number) for key, number in numbers.items()}, **counts})


def exact(value: float) -> str:
    """For programs: nothing where there is no number."""
    return "" if math.isnan(value) else f"{value:.6g}"


def number_or_nan(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + format_number(value)


def with_interval(estimate: Estimate, shown: Callable[[float], str]) -> str:
    if math.isnan(estimate.low):
        return shown(estimate.value)
    return f"{shown(estimate.value)} ({shown(estimate.low)} to {shown(estimate.high)})"


def has_way(results: Sequence[MethodResult]) -> bool:
    """Whether [`path_plot`] draws a line for a method."""
    kl, reward = (dict(mean_curve(results, key)) for key in ("kl", "reward"))
    return len(set(kl) & set(reward)) > 1


def html_cell(estimate: Estimate, shown: Callable[[float], str], way: int, better: int) -> str:
    sign, place = {1: ("▲", "above"), -1: ("▼", "below"), 0: ("", "")}[way]
    kind, judged = {1: ("up", ", better"), -1: ("down", ", worse"), 0: ("neither", "")}[way * better]
    mark = f' <span class="{kind}" role="img" aria-label="{place} the base{judged}">{sign}</span>' if sign else ""
    interval = "" if math.isnan(estimate.low) else f"<small>{shown(estimate.low)} to {shown(estimate.high)}</small>"
    return f'<td data-value="{exact(estimate.value)}">{shown(estimate.value)}{mark}{interval}</td>'


def listed(words: Iterable[str], last: str = "and") -> str:
    words = list(words)
    comma = "; " if any("," in word for word in words) else ", "
    return f"{comma.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def as_text(value: Any) -> str:
    """A prompt or an answer as one reads it: text, or messages one after the other."""
    if isinstance(value, list) and all(isinstance(one, dict) and {"role", "content"} <= set(one) for one in value):
        return "\n".join(f"{one['role']}: {as_text(one['content'])}" for one in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def last_line(text: str) -> str:
    """Of a traceback, the one that says what is wrong."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def markdown_text(text: str) -> str:
    """Text in one line in which nothing is markup."""
    return re.sub(r"([\\|*_`\[\]<>#~@])", r"\\\1", " ".join(text.split()))


def markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
