"""Numbers, lists and conversations as text."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from .statistics import Estimate


def format_number(value: float | None) -> str:
    """Three digits or so, and a dash for what was not measured."""
    if value is None or math.isnan(value):
        return "–"
    size = abs(value)
    if math.isinf(value):
        text = "∞"
    elif size >= 1000:
        text = f"{size:,.0f}".replace(",", "\u202f")  # narrow space
    elif size == 0 or size >= 0.001:
        text = f"{size:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 3}f}"
    else:
        text = f"{size:.1e}"
    return f"\u2212{text}" if value < 0 else text


def format_count(value: float) -> str:
    """A whole number, or the mean of whole numbers."""
    return f"{value:,.0f}".replace(",", "\u202f") if value % 1 == 0 else format_number(value)


def format_share(value: float | None) -> str:
    """0 to 1 as a percentage."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.0f}\u202f%"


def clean_text(text: str) -> str:
    """Text without what a file or a page cannot hold: control characters, and halves of surrogate pairs."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.replace("\r\n", "\n"))
    return text.encode("utf-8", "replace").decode("utf-8")


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


def listed(words: Iterable[str], last: str = "and") -> str:
    words = list(words)
    comma = "; " if any("," in word for word in words) else ", "
    return f"{comma.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def last_line(text: str) -> str:
    """Of a traceback, the one that says what is wrong."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def markdown_text(text: str) -> str:
    """Text in one line in which nothing is markup."""
    return re.sub(r"([\\|*_`\[\]<>#~@])", r"\\\1", " ".join(text.split()))


def markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
