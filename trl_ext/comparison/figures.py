"""
The figures of a comparison's page: inline SVG whose colours are the page's, so that they follow its theme.

Text stays text, in the page's font. The same data give the same bytes.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.dom import minidom

import numpy as np

from .measures import REWARD
from .results import MethodResult
from .statistics import MISSING, Estimate, direction
from .summary import MethodSummary, mean_curve
from .text import clean_text, format_number, format_share

# what is drawn in the left colour gets the right one in the page
COLOURS = {"#000001": "currentColor", "#000002": "var(--muted)", "#000003": "var(--grid)"}
INK, MUTED, GRID = COLOURS
UP, DOWN, PAGE = "#000004", "#000005", "#000006"
COLOURS |= {UP: "var(--up)", DOWN: "var(--down)", PAGE: "var(--page)"}
SERIES = tuple(f"#0000{number:02x}" for number in range(16, 23))
COLOURS |= {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)}
MARKERS = "osD^vPX"

# user units of matplotlib's SVG are points
PIXELS_PER_POINT = 4 / 3
LONGEST_LABEL = 30
RC = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Panel:
    """
    One column of [`interval_plot`].

    Attributes:
        title (`str`): above it.
        figure (`Callable`): a method's figure.
        change (`Callable`): what tells whether it is above or below the base: a method's figure, and the value it
            would have if it were equal to the base.
        line (`float`, *optional*): where a vertical line goes.
        beside (`Callable`, *optional*): a second figure, as a tick without interval.
        is_share (`bool`, defaults to `False`): shown as a percentage, on an axis from 0 to 100 %.
        better (`int`, defaults to 1): 1 where more is better, -1 where more is worse, 0 where it is neither.
        caption (`str`): said of it below the figure.
    """

    title: str
    figure: Callable[[MethodSummary], Estimate]
    change: Callable[[MethodSummary], tuple[Estimate, float]]
    line: float | None = None
    beside: Callable[[MethodSummary], Estimate] | None = None
    is_share: bool = False
    better: int = 1
    caption: str = ""

    def way(self, summary: MethodSummary, base: str) -> int:
        """1 if a method is above the base by more than the interval, -1 if below, 0 if neither."""
        return 0 if summary.method == base else direction(*self.change(summary))


def interval_plot(
    name: str, described: str, summaries: Sequence[MethodSummary], panels: Sequence[Panel], base: str
) -> str:
    """
    Dots with intervals, one row per method and one column per figure. What lies above the base by more than the
    interval is a filled triangle that points up, what lies below one that points down, all else a circle. The colour
    says whether that is better or worse.

    Args:
        name (`str`): of the figure; unique in the page, letters and dashes.
        described (`str`): what it shows, for those who do not see it.
        summaries (`Sequence[MethodSummary]`): rows, from above.
        panels (`Sequence[Panel]`): columns.
        base (`str`): method that is marked.

    Returns:
        `str`: an `<svg>` element.
    """

    def draw(figure):
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            shown = format_share if panel.is_share else format_number
            if panel.line is not None and math.isfinite(panel.line):
                axis.axvline(panel.line, color=INK, linewidth=1, linestyle=(0, (3, 3)))
            for row, summary in enumerate(summaries):
                estimate = panel.figure(summary)
                if math.isfinite(estimate.value):
                    is_base = summary.method == base
                    way = panel.way(summary, base)
                    colour = {1: UP, -1: DOWN, 0: INK if is_base or way else MUTED}[way * panel.better]
                    if math.isfinite(estimate.low + estimate.high):
                        axis.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=1.6)
                    marker = "D" if is_base else {1: "^", -1: "v", 0: "o"}[way]
                    filled = colour if way or is_base else PAGE
                    axis.plot(estimate.value, row, marker, color=colour, markerfacecolor=filled, markersize=6)
                if panel.beside is not None and math.isfinite(panel.beside(summary).value):
                    axis.plot(panel.beside(summary).value, row, "|", color=INK, markersize=9)
                axis.text(1.02, row, shown(estimate.value), transform=axis.get_yaxis_transform(), va="center")
            axis.set_title(panel.title)
            axis.set_ylim(len(summaries) - 0.4, -0.6)
            axis.set_yticks(range(len(summaries)), [row_label(one, base) for one in summaries])
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
            axis.grid(axis="y", linestyle=":")
            if panel.is_share:
                axis.set_xlim(-0.02, 1.02)
                axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
            else:
                axis.margins(x=0.08)
                axis.locator_params(axis="x", nbins=5)

    return _svg(name, described, (10, 0.75 + 0.26 * len(summaries)), draw)


def path_plot(
    name: str,
    described: str,
    summaries: Sequence[MethodSummary],
    results: dict[str, list[MethodResult]],
    base: str,
) -> str:
    """
    KL divergence from the SFT model against reward: the way of each method through training, and where it ends up on
    held-out prompts. The KL axis is of the square root, which spreads what is near the SFT model.

    Args:
        results (`dict[str, list[MethodResult]]`): method to its results, for the curves.
        name, described, summaries, base: as in [`interval_plot`].
    """

    def draw(figure):
        axis, ends, names = figure.subplots(), [], []
        for number, summary in enumerate(summaries):
            colour = INK if summary.method == base else SERIES[number % len(SERIES)]
            kl, reward = (dict(mean_curve(results[summary.method], key)) for key in ("kl", "reward"))
            way = [(kl[share], reward[share]) for share in sorted(set(kl) & set(reward))]
            end = (summary.figures["kl"].value, summary.scores.get(REWARD, MISSING).value)
            if len(way) > 1:
                axis.plot(*zip(*way, strict=True), color=colour, linewidth=1.2, marker=".", markersize=3, alpha=0.75)
            if all(map(math.isfinite, end)):
                if len(way) > 1:
                    axis.plot(*zip(way[-1], end, strict=True), color=colour, linewidth=1.2, linestyle=":")
                # another marker each time the colours begin anew
                turn = number + number // len(SERIES)
                marker = "D" if summary.method == base else MARKERS[turn % len(MARKERS)]
                ends += axis.plot(*end, marker, color=colour, markersize=8)
                names.append(row_label(summary, base))
        axis.set_xscale("function", functions=(_signed_root, _signed_square))
        axis.set(xlabel="KL to the SFT model, nats per answer (square-root scale)", ylabel="reward")
        axis.margins(x=0.06)
        # named here: matplotlib leaves labels that begin with "_" out
        figure.legend(ends, names, loc="outside right upper", frameon=False)

    return _svg(name, described, (10, 5.6), draw)


def _signed_root(value):
    return np.sign(value) * np.sqrt(np.abs(value))


def _signed_square(value):
    return np.sign(value) * np.square(value)


def likelihood_plot(
    name: str, described: str, summaries: Sequence[MethodSummary], results: dict[str, list[MethodResult]]
) -> str:
    """
    Log-probabilities of chosen and rejected answers over training, one small panel per method that has them, each on
    a scale of its own.

    Args:
        name, described, summaries, results: as in [`path_plot`].

    Returns:
        `str`: an `<svg>` element, empty if no method has such a curve.
    """
    drawn = []
    for summary in summaries:
        curves = [mean_curve(results[summary.method], key) for key in ("chosen_logps", "rejected_logps")]
        if any(curves):
            drawn.append((summary, curves))
    if not drawn:
        return ""

    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)

    def draw(figure):
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for axis in axes.flat[len(drawn) :]:
            axis.set_visible(False)
        for number, (axis, (summary, curves)) in enumerate(zip(axes.flat, drawn, strict=False)):
            for curve, colour, style, marker in zip(curves, (UP, DOWN), ("-", "--"), "^v", strict=True):
                if curve:
                    axis.plot(*zip(*curve, strict=True), style, color=colour, marker=marker, markersize=3.5)
            axis.set_title(shortened(summary.label))
            axis.set_xlim(-0.05, 1.05)
            axis.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])
            axis.tick_params(labelbottom=number + columns >= len(drawn))
            axis.locator_params(axis="y", nbins=4)
            axis.margins(y=0.12)
        figure.supylabel("nats per answer", fontsize=9)
        figure.supxlabel("share of training", fontsize=9)

    return _svg(name, described, (2.5 * columns, 0.4 + 1.45 * rows), draw)


def row_label(summary: MethodSummary, base: str) -> str:
    return shortened(summary.label) + (" (base)" if summary.method == base else "")


def shortened(label: str) -> str:
    label = " ".join(clean_text(label).split())
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def _svg(name: str, described: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """
    An `<svg>` element, drawn by `draw(figure)`.

    Args:
        name (`str`): before all ids, which are the page's.
        described (`str`): its label for screen readers.
        size (`tuple[float, float]`): inches; 96 pixels of the page each.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        opened = io.StringIO()
        figure.savefig(opened, format="svg")
    root = minidom.parseString(opened.getvalue()).documentElement
    root.setAttribute("role", "img")
    root.setAttribute("aria-label", described)
    for side, inches in zip(("width", "height"), size, strict=True):
        root.setAttribute(side, str(round(72 * inches * PIXELS_PER_POINT)))
    for kind in ("metadata", "style"):  # the file's own, and a style that would be the whole page's
        for element in root.getElementsByTagName(kind):
            element.parentNode.removeChild(element)
    for element in [root, *root.getElementsByTagName("*")]:
        for comment in [node for node in element.childNodes if node.nodeType == node.COMMENT_NODE]:
            element.removeChild(comment)
        for key, value in element.attributes.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "xlink:href":
                value = f"#{name}-{value[1:]}"
            elif key in ("style", "clip-path"):
                value = value.replace("url(#", f"url(#{name}-")
                for colour, of_page in COLOURS.items():
                    value = value.replace(colour, of_page)
            element.setAttribute(key, value)
    return root.toxml()
