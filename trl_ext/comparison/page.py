"""Comparison in, report out: a table to compute with, a table to paste, and a page to read.

write_report(ComparisonResults.load("compared/results.json"), Path("compared"))"""

import base64
import hashlib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..runtime.files import write_atomically
from .figures import Panel, interval_plot, likelihood_plot, path_plot, row_label, shortened
from .findings import is_measured
from .measures import MEASURES, PICTURES, REWARD, Measure
from .results import ComparisonResults, MethodResult
from .statistics import MISSING, Estimate
from .summary import MethodSummary, mean_curve
from .tables import Tables, csv_columns, formatted
from .text import clean_text, exact, format_number, listed, number_or_nan


def write_report(results: ComparisonResults, folder: str | Path) -> None:
    """
    Write `comparison.csv` (tidy: one figure a row, per seed and over all seeds; see [`csv_columns`]), `comparison.md`
    (one table) and `comparison.html` (one file with all figures, that needs no network).

    Args:
        results (`ComparisonResults`): what was measured. What has failed is shown as failed, with its error.
        folder (`str` or `Path`): where to.

    Raises:
        ValueError: no report can be made of it; see [`~trl_ext.comparison.results.ComparisonResults.check`].
    """
    results.check()
    folder, report = Path(folder), Page(results)
    write_atomically(folder / "comparison.csv", clean_text(report.csv()))
    write_atomically(folder / "comparison.md", clean_text(report.markdown()))
    write_atomically(folder / "comparison.html", clean_text(report.html()))


@dataclass(frozen=True)
class Figure:
    """
    A section of the page with a picture, or with a matrix of win rates.

    Attributes:
        name (`str`): the section's id.
        title, caption (`str`): above it, and below it.
        svg (`str`): the picture.
        told, methods, rates: of a matrix: what it shows, for those who do not see it, its rows and columns, and the
            win rate of each over each other.
    """

    name: str
    title: str
    caption: str
    svg: str = ""
    told: str = ""
    methods: Sequence[MethodSummary] = ()
    rates: dict[tuple[str, str], Estimate] | None = None


class Page(Tables):
    """`comparison.html`: one file, without anything from the network. What `page.html.j2` shows."""

    def html(self) -> str:
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=StrictUndefined,
        )
        environment.tests["nan"] = math.isnan
        environment.filters |= {
            "exact": exact,
            "listed": listed,
            "row_label": row_label,
            "sha256": lambda text: base64.b64encode(hashlib.sha256(clean_text(text).encode()).digest()).decode(),
        }
        return environment.get_template("page.html.j2").render(page=self, reward=REWARD, columns=csv_columns())

    def results_table(self) -> tuple[list[str], list[tuple[MethodSummary, list[tuple]]], str]:
        """Headings, methods with what [`Tables`] says of each cell, and what the triangles in them mean."""
        head, rows = self._table(lambda *cell: cell)
        marks = {(way, way * better) for row in rows for _, _, way, better in row[2:] if way}
        cells = (row[2:] for row in rows)
        return head, list(zip(self.summaries, cells, strict=True)), self._signs(marks) if marks else ""

    def costs_table(self) -> tuple[list[str], list[tuple[MethodSummary, list[tuple[str, str, str]]]]]:
        """Headings, and methods with figures as text, as a value to sort by, and as a percentage of the largest."""
        costs = [measure for measure in MEASURES if measure.cost_column is not None]
        rows = [(one, [self._cost(measure, one) for measure in costs]) for one in self.summaries]
        return ["method", *(measure.cost_column for measure in costs)], rows

    def _cost(self, measure: Measure, one: MethodSummary) -> tuple[str, str, str]:
        figure, shown = one.figures[measure.key], formatted(measure, one)
        if isinstance(figure, str):
            return shown, shown, ""
        if not is_measured(figure) or figure.value <= 0:
            return shown, exact(figure.value), ""
        others = (other.figures[measure.key] for other in self.summaries)
        most = max(other.value for other in others if is_measured(other))
        return shown, exact(figure.value), f"{100 * figure.value / most:.0f}"

    def examples(self) -> tuple[dict[str, list[tuple[MethodSummary, str, str]]], list[int]]:
        """Prompts with methods, their rewards and their answers, and the seeds that these are of."""
        asked, seeds = {}, set()
        for one in self.summaries:
            result = next((result for result in self.by_method[one.method] if result.examples), None)
            for example in result.examples if result else []:
                reward = format_number(number_or_nan(example["reward"]))
                asked.setdefault(example["prompt"], []).append((one, reward, example["answer"]))
                seeds.add(result.seed)
        return asked, sorted(seeds)

    def settings(self) -> str:
        return json.dumps(self.comparison.settings, indent=2, ensure_ascii=False, default=str)

    def figures(self) -> Iterator[Figure]:
        """All figures for which something was measured, in their order."""
        parts = [self.scorers[start : start + 3] for start in range(0, len(self.scorers), 3)]
        found = [
            *(self._scores_figure(number, part) for number, part in enumerate(parts)),
            *(self._wins_figure(number, scorer) for number, scorer in enumerate(self.scorers)),
            self._paths_figure(),
            *(self._measures_figure(section) for section in PICTURES),
            self._likelihoods_figure(),
        ]
        return filter(None, found)

    def _signs(self, marks: Collection[tuple[int, int]]) -> str:
        """What triangles mean: for each above (1) or below (-1), and better (1), worse (-1) or neither (0)."""
        signs = {"▲": (1, "above"), "▼": (-1, "below")}
        known = {sign: word for sign, (way, word) in signs.items() if way in {way for way, _ in marks}}
        colours = {1: "blue: better", -1: "orange: worse", 0: "in the colour of the text: neither"}
        said = "; ".join(text for judged, text in colours.items() if judged in {judged for _, judged in marks})
        return (
            f"{' and '.join(known)}: {' and '.join(known.values())} {self.base.label} by more than the 95 % interval "
            f"of the difference ({said})."
        )

    def _marks(self, shown: Sequence[MethodSummary], panels: Sequence[Panel]) -> str:
        """What the marks of a figure mean that are in it."""
        drawn = [(one, panel) for one in shown for panel in panels if math.isfinite(panel.figure(one).value)]
        ways = {
            (way := panel.way(one, self.base.method), way * panel.better)
            for one, panel in drawn
            if one is not self.base and math.isfinite(panel.change(one)[0].value)
        }
        base, marks = self.base.label, {mark for mark in ways if mark[0]}
        said = [self._signs(marks)] if marks else []
        said += [f"○: not to be told apart from {base}."] if ways - marks else []
        said += [f"◆: {base}."] if any(one is self.base for one, _ in drawn) else []
        has_line = any(panel.line is not None and math.isfinite(panel.line) for panel in panels)
        said += [f"Dashed: equal to {base}."] if has_line else []
        return " ".join(said)

    def _interval_figure(
        self, name: str, title: str, told: str, panels: Sequence[Panel], said: str = ""
    ) -> Figure | None:
        shown = [one for one in self.summaries if one.seeds]
        panels = [panel for panel in panels if any(math.isfinite(panel.figure(one).value) for one in shown)]
        if not panels:
            return None
        svg = interval_plot(name, told, shown, panels, self.base.method)
        captions = dict.fromkeys(panel.caption for panel in panels if panel.caption)
        caption = " ".join(filter(None, [*captions, said, self._marks(shown, panels)]))
        return Figure(name, title, caption, svg)

    def _scores_figure(self, number: int, part: Sequence[str]) -> Figure | None:
        panels = [
            Panel(
                shortened(scorer),
                lambda one, scorer=scorer: one.scores.get(scorer, MISSING),
                lambda one, scorer=scorer: (one.differences.get(scorer, MISSING), 0.0),
                line=self.base.scores.get(scorer, MISSING).value,
                caption="Mean score of the held-out answers with its interval.",
            )
            for scorer in part  # equal captions are said once
        ]
        values = [
            f"{one.label} {', '.join(format_number(one.scores.get(scorer, MISSING).value) for scorer in part)}"
            for one in self.summaries
        ]
        return self._interval_figure(
            f"scores-{number}",
            "Further scores" if number else "Scores",
            f"Mean {', '.join(part)} of each method: {'; '.join(values)}.",
            panels,
            f"A method that gains in {REWARD}, which it was trained towards, and loses in what was only watched has "
            "learned to please the scorer."
            if {REWARD} < set(part)
            else "",
        )

    def _wins_figure(self, number: int, scorer: str) -> Figure | None:
        shown, rates = [one for one in self.summaries if one.seeds], self.rates[scorer]
        if not any(math.isfinite(rate.value) for rate in rates.values()):
            return None
        told = f"Win rates by {scorer} of each of {len(shown)} methods over each other; see comparison.csv for all."
        caption = (
            "How many of 100 answers by the method of the row score higher than those by the method of the column to "
            "the same prompt; a tie is half a win."
        )
        if any(rate.lies_off(0.5) for rate in rates.values()):
            caption += " Bold and coloured: the interval does not contain 50; blue: the row wins, orange: it loses."
        unbeaten = [
            one.label
            for one in shown
            if all(rates.get((one.method, other.method), MISSING).low > 0.5 for other in shown if other is not one)
        ]
        caption += f" {unbeaten[0]} beats all others." if unbeaten and len(shown) > 2 else ""
        title = f"All against all, by {scorer}"
        return Figure(f"wins-{number}", title, caption, told=told, methods=shown, rates=rates)

    def _paths_figure(self) -> Figure | None:
        shown = [one for one in self.summaries if one.seeds]
        ends = [
            one.label
            for one in shown
            if is_measured(one.figures["kl"]) and is_measured(one.scores.get(REWARD, MISSING))
        ]
        if not ends:
            return None
        has_ways = any(has_way(self.by_method[one.method]) for one in shown)
        told = f"KL divergence and {REWARD} of {listed(ends)}{', with their way through training' * has_ways}."
        caption = (
            "Large marks: the finished model on the held-out prompts. "
            f"Further up is more {REWARD}, further right is further from the model that training began with. Of two "
            "that are equally high the left one gave up less for it."
        )
        if has_ways:
            caption += (
                " Lines: what was measured along training, dotted from the last look to the finished model; a line "
                "that goes right without going up pays for nothing."
            )
        svg = path_plot("paths", told, shown, self.by_method, self.base.method)
        return Figure("paths", f"KL to the SFT model against {REWARD}", caption, svg)

    def _measures_figure(self, section: str) -> Figure | None:
        title, told = PICTURES[section]
        shown = [measure for measure in MEASURES if measure.picture is not None and measure.picture.section == section]
        panels = [self._panel(measure) for measure in sorted(shown, key=lambda measure: not measure.is_compared)]
        if section == "length":
            panels += self._wins_panels()
        return self._interval_figure(section, title, told.format(base=self.base.label), panels)

    def _panel(self, measure: Measure) -> Panel:
        equal = measure.statistic.equal if measure.is_compared else 0.0
        return Panel(
            measure.picture.title,
            lambda one: one.figures[measure.key],
            lambda one: (one.changes.get(measure.key, MISSING), equal),
            line=self.base.figures[measure.key].value if measure.is_compared else None,
            better=measure.better,
            caption=measure.picture.caption,
        )

    def _wins_panels(self) -> list[Panel]:
        base = self.base.label
        return [
            Panel(
                title,
                lambda one, name=name: self._over_base(one, name),
                lambda one, name=name: (self._over_base(one, name), 0.5),
                line=0.5,
                beside=None if name == "win_rates" else lambda one: self._over_base(one, "win_rates"),
                is_share=True,
                caption=caption,
            )
            for title, name, caption in (
                (
                    f"wins over {shortened(base)}",
                    "win_rates",
                    f"Wins: the share of prompts on which the method's answer has more {REWARD} than that of {base}; "
                    "a tie is half a win.",
                ),
                (
                    "the same at equal length",
                    "length_controlled",
                    "At equal length: what that share would be if both answers were equally long, by a logistic "
                    "regression on the difference in length, with the raw share as an upright tick. Where the mark is "
                    "well to the left of its tick, the method wins by length.",
                ),
            )
        ]

    def _likelihoods_figure(self) -> Figure | None:
        shown = [one for one in self.summaries if one.seeds]
        told = "Log-probabilities of chosen and rejected answers over training, by method."
        missing = [
            one.label
            for one in shown
            if not any(mean_curve(self.by_method[one.method], key) for key in ("chosen_logps", "rejected_logps"))
        ]
        svg = likelihood_plot("likelihoods", told, shown, self.by_method)
        if not svg:
            return None
        caption = (
            "▲ and solid: chosen, ▼ and dashed: rejected; the first point is as early as it was logged, and every "
            "panel has a scale of its own. The distance should grow. Where both fall, likelihood goes to answers that "
            "are in neither set (likelihood displacement)."
        )
        caption += f" Without a panel, as it was not logged: {listed(missing)}." if missing else ""
        title = "Log-probability of chosen and rejected answers over training"
        return Figure("likelihoods", title, caption, svg)

    def _over_base(self, one: MethodSummary, name: str) -> Estimate:
        return MISSING if one is self.base else getattr(one, name).get(REWARD, MISSING)


def has_way(results: Sequence[MethodResult]) -> bool:
    """Whether [`path_plot`] draws a line for a method."""
    kl, reward = (dict(mean_curve(results, key)) for key in ("kl", "reward"))
    return len(set(kl) & set(reward)) > 1
