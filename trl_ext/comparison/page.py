"""Comparison in, report out: a table to compute with, a table to paste, and a page to read.

write_report(ComparisonResults.load("compared/results.json"), Path("compared"))"""

import base64
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..runtime.files import write_atomically
from .figures import Panel, interval_plot, likelihood_plot, matrix_plot, path_plot, shortened
from .findings import is_measured
from .html import SCRIPT, escaped, figure_of, html_table, section, style
from .measures import MEASURES, PICTURES, REWARD, Measure
from .results import ComparisonResults, MethodResult
from .statistics import MISSING, Estimate
from .summary import MethodSummary, mean_curve
from .tables import Tables, csv_columns, formatted
from .text import INTERVALS, as_text, clean_text, exact, format_number, html_cell, listed, number_or_nan


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


class Page(Tables):
    """`comparison.html`: one file, without anything from the network."""

    def html(self) -> str:
        title = escaped(self.comparison.title)
        setting, points, caution = self.conclusions()
        body = [
            f"<header><h1>{title}</h1></header>",
            "<main>",
            f'<section class="summary" aria-label="Summary"><p>{escaped(setting)}</p><ul>'
            + "".join(f"<li>{escaped(point)}</li>" for point in points)
            + f"</ul><p>{escaped(caution)}</p></section>",
            self._main_table(),
            self._failures(),
            *self._figures(),
            self._costs(),
            self._examples(),
            self._settings(),
            "</main>",
        ]
        digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f"<title>{title}</title>\n<style>{style()}</style>\n</head>\n<body>\n"
            + "\n".join(part for part in body if part)
            + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )

    def _main_table(self) -> str:
        marks: set[tuple[int, int]] = set()

        def shown(estimate, how, way, better):
            marks.update({(way, way * better)} if way else ())
            return html_cell(estimate, how, way, better)

        head, rows = self._table(shown)
        lines = []
        for one, row in zip(self.summaries, rows, strict=True):
            state = ' class="failed"' if one.failures else ""
            seeds = f'<td{state} data-value="{len(one.seeds)}">{row[1]}</td>'
            lines.append(self._row(one, [seeds, *row[2:]]))
        caption = f"Highest {REWARD} first. Below a figure is its 95 % interval. A tie is half a win."
        caption += f" {self._signs(marks)}" if marks else ""
        notes = "".join(f"<li>{escaped(note)}</li>" for note in self.notes())
        table = html_table("All methods", head, lines, caption)
        return section("results", "Results", table + (f'<ul class="notes">{notes}</ul>' if notes else ""))

    def _row(self, one: MethodSummary, cells: Iterable[str]) -> str:
        is_base = one is self.base
        label = escaped(one.label) + (" <small>(base)</small>" if is_base else "")
        return f'<tr{" class=base" if is_base else ""}><th scope="row">{label}</th>{"".join(cells)}</tr>'

    def _failures(self) -> str:
        rows = [
            f"<dt>{escaped(one.label)}, seed {seed}</dt><dd><pre>{escaped(error)}</pre></dd>"
            for one in self.summaries
            for seed, error in one.failures.items()
        ]
        return section("failed", "Failed", f"<dl>{''.join(rows)}</dl>") if rows else ""

    def _figures(self) -> list[str]:
        parts = [self.scorers[start : start + 3] for start in range(0, len(self.scorers), 3)]
        return [
            *(self._scores_figure(number, part) for number, part in enumerate(parts)),
            *(self._wins_figure(number, scorer) for number, scorer in enumerate(self.scorers)),
            self._paths_figure(),
            *(self._measures_figure(section) for section in PICTURES),
            self._likelihoods_figure(),
        ]

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

    def _interval_figure(self, name: str, title: str, told: str, panels: Sequence[Panel], said: str = "") -> str:
        shown = [one for one in self.summaries if one.seeds]
        panels = [panel for panel in panels if any(math.isfinite(panel.figure(one).value) for one in shown)]
        if not panels:
            return ""
        svg = interval_plot(name, told, shown, panels, self.base.method)
        captions = dict.fromkeys(panel.caption for panel in panels if panel.caption)
        return figure_of(name, title, svg, " ".join(filter(None, [*captions, said, self._marks(shown, panels)])))

    def _scores_figure(self, number: int, part: Sequence[str]) -> str:
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

    def _wins_figure(self, number: int, scorer: str) -> str:
        shown, rates = [one for one in self.summaries if one.seeds], self.rates[scorer]
        if not any(math.isfinite(rate.value) for rate in rates.values()):
            return ""
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
        return figure_of(
            f"wins-{number}",
            f"All against all, by {scorer}",
            matrix_plot(f"wins-{number}", told, shown, rates, self.base.method),
            caption,
        )

    def _paths_figure(self) -> str:
        shown = [one for one in self.summaries if one.seeds]
        ends = [
            one.label
            for one in shown
            if is_measured(one.figures["kl"]) and is_measured(one.scores.get(REWARD, MISSING))
        ]
        if not ends:
            return ""
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
        return figure_of(
            "paths",
            f"KL to the SFT model against {REWARD}",
            path_plot("paths", told, shown, self.by_method, self.base.method),
            caption,
        )

    def _measures_figure(self, section: str) -> str:
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

    def _likelihoods_figure(self) -> str:
        shown = [one for one in self.summaries if one.seeds]
        told = "Log-probabilities of chosen and rejected answers over training, by method."
        missing = [
            one.label
            for one in shown
            if not any(mean_curve(self.by_method[one.method], key) for key in ("chosen_logps", "rejected_logps"))
        ]
        svg = likelihood_plot("likelihoods", told, shown, self.by_method)
        if not svg:
            return ""
        return figure_of(
            "likelihoods",
            "Log-probability of chosen and rejected answers over training",
            svg,
            "▲ and solid: chosen, ▼ and dashed: rejected; the first point is as early as it was logged, and every "
            "panel has a scale of its own. The distance should grow. Where both fall, likelihood goes to answers that "
            "are in neither set (likelihood displacement)."
            + (f" Without a panel, as it was not logged: {listed(missing)}." if missing else ""),
        )

    def _over_base(self, one: MethodSummary, name: str) -> Estimate:
        return MISSING if one is self.base else getattr(one, name).get(REWARD, MISSING)

    def _costs(self) -> str:
        costs = [measure for measure in MEASURES if measure.cost_column is not None]
        lines = [self._row(one, [self._cost_cell(measure, one) for measure in costs]) for one in self.summaries]
        caption = (
            "Means over seeds. Bars are relative to the largest of a column; a method with less time, memory and "
            "fewer sampled answers is cheaper. Prompts that gave a method no row are not among those it trained on. "
            "Models: those in memory during training."
        )
        table = html_table("Costs", ["method", *(measure.cost_column for measure in costs)], lines, caption)
        return section("costs", "What it costs", table)

    def _cost_cell(self, measure: Measure, one: MethodSummary) -> str:
        figure, shown = one.figures[measure.key], escaped(formatted(measure, one))
        if isinstance(figure, str):
            return f'<td data-value="{shown}">{shown}</td>'
        bar = ""
        if is_measured(figure) and figure.value > 0:
            others = (other.figures[measure.key] for other in self.summaries)
            most = max(other.value for other in others if is_measured(other))
            bar = f'<span class="bar" style="width:{100 * figure.value / most:.0f}%"></span>'
        return f'<td data-value="{exact(figure.value)}">{shown}{bar}</td>'

    def _examples(self) -> str:
        asked: dict[str, list[tuple[MethodSummary, MethodResult, dict[str, Any]]]] = {}
        for one in self.summaries:
            result = next((result for result in self.by_method[one.method] if result.examples), None)
            for example in result.examples if result else []:
                asked.setdefault(as_text(example["prompt"]), []).append((one, result, example))
        parts = []
        for prompt, answers in asked.items():
            lines = [
                self._row(
                    one,
                    [
                        f"<td>{format_number(number_or_nan(example['reward']))}</td>",
                        f'<td class="text">{escaped(as_text(example["answer"]))}</td>',
                    ],
                )
                for one, _, example in answers
            ]
            table = html_table("Answers", ["method", REWARD, "answer"], lines, "", is_text=True)
            parts.append(f'<h3>Prompt</h3><p class="text prompt">{escaped(prompt)}</p>{table}')
        if not parts:
            return ""
        number = len(parts)
        seeds = sorted({result.seed for answers in asked.values() for _, result, _ in answers})
        summary = f"{number} prompt{'s' if number > 1 else ''}, with answers of seed {listed(map(str, seeds))}"
        return section(
            "examples", "Answers to read", f"<details><summary>{summary}</summary>{''.join(parts)}</details>"
        )

    def _settings(self) -> str:
        settings = json.dumps(self.comparison.settings, indent=2, ensure_ascii=False, default=str)
        command = self.comparison.command
        parts = [f"<h3>Command</h3><pre>{escaped(command)}</pre>"] if command else []
        parts.append(f"<details><summary>Settings</summary><pre>{escaped(settings)}</pre></details>")
        columns = "".join(f"<dt>{name}</dt><dd>{escaped(text)}</dd>" for name, text in csv_columns().items())
        parts.append(
            "<details><summary>Columns of comparison.csv</summary>"
            f"<p>One figure a row, for each seed and for all of them.</p><dl>{columns}</dl></details>"
        )
        parts.append(f"<details><summary>How intervals are made</summary>{INTERVALS}</details>")
        return section("made-by", "How this was made", "".join(parts))


def has_way(results: Sequence[MethodResult]) -> bool:
    """Whether [`path_plot`] draws a line for a method."""
    kl, reward = (dict(mean_curve(results, key)) for key in ("kl", "reward"))
    return len(set(kl) & set(reward)) > 1
