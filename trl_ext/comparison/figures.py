"""
The figures of a comparison's page: inline SVG whose colours are the page's, so that they follow its theme.

Text stays text, in the page's font. The same data give the same bytes.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


def matrix_plot(
    name: str,
    described: str,
    summaries: Sequence[MethodSummary],
    rates: dict[tuple[str, str], Estimate],
    base: str,
) -> str:
    """
    Win rate of the row over the column, in per cent: bold and coloured where its interval does not contain 50 %.

    Args:
        rates (`dict`): see [`~trl_ext.comparison.summary.win_rate_matrix`].
        name, described, summaries, base: as in [`interval_plot`].
    """
    from matplotlib.patches import Rectangle

    def draw(figure):
        axis = figure.subplots()
        for row, one in enumerate(summaries):
            for column, other in enumerate(summaries):
                rate = rates.get((one.method, other.method), MISSING)
                if row == column:
                    axis.add_patch(Rectangle((column, row), 1, 1, facecolor=GRID, edgecolor="none"))
                    continue
                if rate.lies_off(0.5):
                    colour, strength = UP if rate.value > 0.5 else DOWN, 0.12 + 0.45 * abs(2 * rate.value - 1)
                    axis.add_patch(
                        Rectangle((column, row), 1, 1, facecolor=colour, alpha=round(strength, 3), edgecolor="none")
                    )
                text = "–" if math.isnan(rate.value) else f"{100 * rate.value:.0f}"
                weight = "bold" if rate.lies_off(0.5) else "normal"
                axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", weight=weight)
        places, labels = np.arange(len(summaries)) + 0.5, [row_label(one, base) for one in summaries]
        axis.set(xlim=(0, len(summaries)), ylim=(len(summaries), 0))
        axis.set_yticks(places, labels)
        axis.set_xticks(places, labels, rotation=40, ha="left", rotation_mode="anchor")
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)

    side = 0.5 * len(summaries)
    return _svg(name, described, (max(3.4 + side, 4.5), 1.9 + 0.62 * side), draw)


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
        axis = figure.subplots()
        ends, passed = [], []
        for number, summary in enumerate(summaries):
            colour = INK if summary.method == base else SERIES[number % len(SERIES)]
            kl, reward = (dict(mean_curve(results[summary.method], key)) for key in ("kl", "reward"))
            way = [(kl[share], reward[share]) for share in sorted(set(kl) & set(reward))]
            end = (summary.figures["kl"].value, summary.scores.get(REWARD, MISSING).value)
            if len(way) > 1:
                axis.plot(*zip(*way, strict=True), color=colour, linewidth=1.2, marker=".", markersize=3, alpha=0.75)
                passed += way
            if all(map(math.isfinite, end)):
                if len(way) > 1:
                    axis.plot(*zip(way[-1], end, strict=True), color=colour, linewidth=1.2, linestyle=":")
                # another marker each time the colours begin anew
                turn = number + number // len(SERIES)
                marker = "D" if summary.method == base else MARKERS[turn % len(MARKERS)]
                axis.plot(*end, marker, color=colour, markersize=8)
                ends.append((*end, row_label(summary, base)))
        axis.set_xscale("function", functions=(_signed_root, _signed_square))
        axis.set(xlabel="KL to the SFT model, nats per answer (square-root scale)", ylabel="reward")
        values = [x for x, *_ in [*ends, *passed]]
        if values:
            low, high = _signed_root(np.array([min(values), max(values)]))
            room = 0.06 * (high - low) or 0.1
            axis.set_xlim(*_signed_square(np.array([low - room, high + 3 * room])))
        _place_labels(figure, axis, ends, passed)

    return _svg(name, described, (10, 5.6), draw)


def _signed_root(value):
    return np.sign(value) * np.sqrt(np.abs(value))


def _signed_square(value):
    return np.sign(value) * np.square(value)


def _place_labels(figure, axis, points: Sequence[tuple[float, float, str]], passed) -> None:
    """Write each point's label beside it, where it hides least, with a line to it where it had to move away."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()  # sets the layout
    figure.set_layout_engine("none")
    pixel = figure.dpi / 72
    inside = axis.get_window_extent().padded(4 * pixel)
    spots = [axis.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(x - 5 * pixel, y - 5 * pixel, 10 * pixel, 10 * pixel) for x, y in spots]
    crossed = [axis.transData.transform(point) for point in passed]
    angles = [0, 180, 45, -45, 135, -135, 90, -90, 20, -20, 160, -160]
    for (x, y, label), spot in zip(points, spots, strict=True):
        text = axis.text(0, 0, label)
        size = text.get_window_extent()
        text.remove()
        best: tuple[float, Any] = (math.inf, None)
        for distance in (9, 15, 24, 36, 50, 70, 95):
            for angle in angles:
                shift = distance * pixel * np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
                side = -round(math.cos(math.radians(angle)) / 0.72)  # which end of the text is at the point
                left = spot[0] + shift[0] - (side + 1) / 2 * size.width
                box = Bbox.from_bounds(left, spot[1] + shift[1] - size.height / 2, size.width, size.height)
                hidden = sum(box.padded(pixel).overlaps(other) for other in taken)
                hidden += 4 * (not (inside.x0 <= box.x0 and box.x1 <= inside.x1))
                hidden += 4 * (not (inside.y0 <= box.y0 and box.y1 <= inside.y1))
                cost = 100 * hidden + distance + 3 * sum(box.contains(*place) for place in crossed)
                if cost < best[0]:
                    best = (cost, (shift / pixel, ("left", "center", "right")[side + 1], box, distance))
        shift, anchor, box, distance = best[1]
        taken.append(box)
        axis.annotate(
            label,
            (x, y),
            xytext=tuple(shift),
            textcoords="offset points",
            ha=anchor,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6} if distance > 15 else None,
        )


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


def _of_page(tag: str, name: str) -> str:
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    return re.sub(r"#0000[0-9a-f]{2}\b", lambda found: COLOURS.get(found[0], found[0]), tag)


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
    text = opened.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>", "", text, flags=re.S)
    text = re.sub(r"<[^>]+>", lambda found: _of_page(found[0], name), text)  # what is between tags is the labels'
    text = re.sub(r"\n\s*", "\n", text)
    width, height = (round(72 * inches * PIXELS_PER_POINT) for inches in size)
    head = (
        f'<svg role="img" aria-label="{html.escape(described)}" viewBox="0 0 {72 * size[0]:g} {72 * size[1]:g}" '
        f'width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + text[text.index(">") + 1 :]
