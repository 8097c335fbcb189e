"""
Comparison in, report out: a table to compute with, a table to paste, and a page to read.

    write_report(ComparisonResults.load("compared/results.json"), Path("compared"))
"""

import base64
import csv
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from .comparison_plots import (
    Panel,
    clean_text,
    direction,
    format_count,
    format_number,
    format_share,
    interval_plot,
    likelihood_plot,
    matrix_plot,
    path_plot,
    shortened,
)
from .comparison_results import REWARD, ComparisonResults, MethodResult
from .comparison_statistics import (
    MISSING,
    Estimate,
    MethodSummary,
    mean_curve,
    results_by_method,
    scorers,
    summaries,
    summarize,
    win_rate_matrix,
)
from .sampling import write_atomically

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


def write_report(results: ComparisonResults, folder: str | Path) -> None:
    """
    Write `comparison.csv` (tidy: one figure a row, per seed and over all seeds; see [`CSV_COLUMNS`]), `comparison.md`
    (one table) and `comparison.html` (one file with all figures, that needs no network).

    Args:
        results (`ComparisonResults`): what was measured. What has failed is shown as failed, with its error.
        folder (`str` or `Path`): where to.

    Raises:
        ValueError: no report can be made of it; see [`~trl_ext.comparison_results.ComparisonResults.check`].
    """
    results.check()
    folder, report = Path(folder), _Report(results)
    write_atomically(folder / "comparison.csv", clean_text(report.csv()))
    write_atomically(folder / "comparison.md", clean_text(report.markdown()))
    write_atomically(folder / "comparison.html", clean_text(report.html()))


class _Report:
    """What the three files say of one comparison."""

    def __init__(self, comparison: ComparisonResults):
        self.comparison = comparison
        self.by_method = results_by_method(comparison)
        self.scorers = scorers(comparison)
        self.summaries = summaries(comparison)
        self.base = next(one for one in self.summaries if one.method == comparison.base)
        self.others = [one for one in self.summaries if one is not self.base]
        self.rates = {scorer: win_rate_matrix(comparison, scorer) for scorer in self.scorers}

    # --- what can be said ---

    def conclusions(self) -> tuple[str, list[str], str]:
        """
        What was compared, what follows from it, and how far to trust that.

        Returns:
            `tuple[str, list[str], str]`: a sentence, some points, and some sentences.
        """
        base, points = self.base.label, []
        compared = [one for one in self.others if math.isfinite(one.differences.get(REWARD, MISSING).value)]
        way = {one.method: direction(one.differences[REWARD], 0) for one in compared}
        more, less, neither = ([one for one in compared if way[one.method] == sign] for sign in (1, -1, 0))
        for which, these in (("More", more), ("Less", less)):
            if these:
                changes = [f"{one.label} ({_signed(one.differences[REWARD].value)})" for one in these]
                points.append(f"{which} {REWARD} than {base}, by more than the 95 % interval: {_listed(changes)}.")
        if neither:
            points.append(f"Not to be told apart from {base} by {REWARD}: {_listed(one.label for one in neither)}.")
        if not compared:
            points.append(f"Nothing can be compared with {base}: there is no {REWARD} of both for any seed.")
        points += self._prices(more)
        failed = [
            f"{one.label} (seed{'s' if len(one.failures) > 1 else ''} {_listed(map(str, one.failures))})"
            for one in self.summaries
            if one.failures
        ]
        points += [f"Failed: {_listed(failed)}."] if failed else []
        return self._setting(), points, self._caution(compared) if compared else ""

    def _setting(self) -> str:
        seeds = sorted({result.seed for result in self.comparison.results})
        tried = f"{len(seeds)} seeds: " if len(seeds) > 1 else "seed "
        number, prompts = len(self.others), self.comparison.prompts
        return (
            f"{number} method{'' if number == 1 else 's'} and {self.base.label}, compared by one answer to each of "
            f"{prompts} held-out prompts, sampled at temperature 1 ({tried}{_listed(map(str, seeds))})."
        )

    def _prices(self, more: Sequence[MethodSummary]) -> list[str]:
        """What got worse where there is more reward: the signs of reward hacking."""
        worse = {"A higher perplexity": [one for one in more if direction(one.perplexity_ratio, 1) > 0]}
        for scorer in self.scorers:
            if scorer != REWARD:
                falls = [one for one in more if direction(one.differences.get(scorer, MISSING), 0) < 0]
                worse[f"A lower {scorer}"] = falls
        longer = [one for one in more if direction(one.length_difference, 0) > 0]
        by_length = [one for one in longer if direction(one.length_controlled.get(REWARD, MISSING), 0.5) < 1]
        worse["Longer answers, and no lead at equal length"] = by_length
        found = [f"{what}: {_listed(one.label for one in these)}." for what, these in worse.items() if these]
        if not more:
            return []
        if found:
            said = f"Some with more {REWARD} are worse in what was only watched."
            return [f"{said} That can be reward hacking: read the answers. {' '.join(found)}"]
        measured = [scorer for scorer in self.scorers if scorer != REWARD]
        measured += ["perplexity"] if any(math.isfinite(one.perplexity_ratio.value) for one in more) else []
        if not measured:
            return [f"Nothing but {REWARD} was measured that would show reward hacking: read the answers."]
        return [f"None of those with more {REWARD} is worse by {_listed(measured, 'or')}."]

    def _caution(self, compared: Sequence[MethodSummary]) -> str:
        single = [one for one in compared if one.differences[REWARD].num_seeds < 2]
        most = max(one.differences[REWARD].num_seeds for one in compared)
        if len(single) == len(compared):
            said = (
                "There is one training run of each: intervals are over prompts alone, and another run may differ more."
            )
        else:
            said = f"Intervals are over prompts and {most} training runs"
            said += ", which is few: they are too narrow where runs differ much." if most < 5 else "."
            if single:
                said += f" Of {_listed(one.label for one in single)} one run can be compared, over prompts alone."
        if len(compared) > 1:
            said += f" Of {len(compared)} comparisons, one in twenty or so stands out by chance."
        return said

    def missing_values(self) -> list[str]:
        """What was left out of means because it is NaN."""
        found = []
        for one in self.summaries:
            counts: dict[str, int] = {}
            for result in self.by_method[one.method]:
                lists = {"KL": result.kl, "likelihood of the fixed model": result.nll, **result.scores}
                for key, values in lists.items():
                    counts[key] = counts.get(key, 0) + sum(not math.isfinite(value) for value in values)
            missing = [f"{count} of {key}" for key, count in counts.items() if count]
            if missing:
                found.append(f"{one.label}: values that are missing and left out: {_listed(missing)}.")
        return found

    def notes(self) -> list[str]:
        own = [f"{one.label}: {note}" for one in self.summaries for note in one.notes]
        measured = {
            "KL": any(math.isfinite(one.kl.value) for one in self.summaries),
            "perplexity": any(math.isfinite(one.perplexity.value) for one in self.summaries),
            "length": any(math.isfinite(one.length.value) for one in self.summaries),
        }
        missing = [what for what, is_there in measured.items() if not is_there]
        missing = [f"Not measured for any method: {_listed(missing)}."] if missing else []
        return [*self.comparison.notes, *own, *missing, *self.missing_values()]

    # --- comparison.csv ---

    def csv(self) -> str:
        opened = io.StringIO()
        writer = csv.DictWriter(opened, list(CSV_COLUMNS), lineterminator="\n", restval="")
        writer.writeheader()
        base = self.by_method[self.comparison.base]
        for method, results in self.by_method.items():
            for result in results:
                self._rows(writer, str(result.seed), [result], [one for one in base if one.seed == result.seed])
            self._rows(writer, "all", results, base)
            for scorer, rates in self.rates.items():
                for (one, other), rate in rates.items():
                    if one == method and other != self.comparison.base and math.isfinite(rate.value):
                        about = {"method": one, "label": results[0].label, "seed": "all", "status": "done"}
                        about |= {"figure": "win_rate", "scorer": scorer, "over": other}
                        _write_figure(writer, about, rate)
        return opened.getvalue()

    def _rows(self, writer, seed: str, results: list[MethodResult], base: list[MethodResult]) -> None:
        one, over = summarize(results, base), self.comparison.base
        about = {"method": one.method, "label": one.label, "seed": seed}
        if not one.seeds:
            error = "; ".join(dict.fromkeys(one.failures.values()))
            writer.writerow({**about, "status": "failed", "error": error})
            return
        about["status"] = "done"
        is_base = one.method == over
        for scorer, estimate in one.scores.items():
            _write_figure(writer, {**about, "figure": "score", "scorer": scorer}, estimate)
        if not is_base:
            for figure, estimates in (
                ("difference", {key: one.differences[key] for key in one.scores}),
                ("win_rate", one.win_rates),
                ("length_controlled_win_rate", one.length_controlled),
            ):
                for scorer, estimate in estimates.items():
                    _write_figure(writer, {**about, "figure": figure, "scorer": scorer, "over": over}, estimate)
            _write_figure(writer, {**about, "figure": "perplexity_ratio", "over": over}, one.perplexity_ratio)
            _write_figure(writer, {**about, "figure": "length_difference", "over": over}, one.length_difference)
        for figure in ("kl", "perplexity", "length"):
            _write_figure(writer, {**about, "figure": figure}, getattr(one, figure))
        for figure in PLAIN_FIGURES:
            value = getattr(one, figure)
            shown = value if isinstance(value, str) else _exact(value)
            writer.writerow({**about, "figure": figure, "value": shown, "seeds": len(one.seeds)})

    # --- comparison.md ---

    def markdown(self) -> str:
        head, rows = self._table(lambda estimate, shown, way, better: _with_interval(estimate, shown))
        head += ["training, s", "peak MiB", "models"]
        for row, one in zip(rows, self.summaries, strict=True):
            row += [format_number(one.seconds), format_number(one.peak_memory_mib), one.models_resident or "–"]
        setting, points, caution = self.conclusions()
        lines = [f"**{_markdown(self.comparison.title)}**", "", _markdown(setting), ""]
        lines += [*(f"- {_markdown(point)}" for point in points), ""]
        lines += [_markdown(caution), ""] if caution else []
        lines += [_markdown_row(map(_markdown, head)), _markdown_row(["---"] + ["---:"] * (len(head) - 2) + ["---"])]
        lines += [_markdown_row(map(_markdown, row)) for row in rows]
        lines += ["", "In brackets: 95 % intervals.", ""]
        for one in self.summaries:
            for seed, error in one.failures.items():
                lines.append(f"- {_markdown(f'{one.label}, seed {seed}, failed: {_last_line(error)}')}")
        lines += [f"- {_markdown(note)}" for note in self.notes()]
        if self.comparison.command:
            lines += ["", *("    " + line for line in self.comparison.command.splitlines())]
        return "\n".join(lines).rstrip() + "\n"

    def _table(
        self, shown: Callable[[Estimate, Callable[[float], str], int, int], str]
    ) -> tuple[list[str], list[list[str]]]:
        """
        The table of all methods.

        Args:
            shown (`Callable`): makes a cell of an estimate, what formats a number, whether it is above (1) or below
                (-1) the base, and whether more is better (1), worse (-1) or neither (0).

        Returns:
            `tuple`: headings, and a row for each method.
        """
        base = self.base.label
        head = ["method", "seeds", *self.scorers, f"{REWARD} − {base}", f"wins over {base}", "wins at equal length"]
        head += ["KL, nats", "perplexity", "tokens"]
        rows = []
        for one in self.summaries:
            is_base = one is self.base

            def cell(estimate, how, change=MISSING, equal=0.0, better=1, is_base=is_base):
                return shown(estimate, how, 0 if is_base else direction(change, equal), better)

            row = [one.label, self._seeds(one)]
            for scorer in self.scorers:
                change = one.differences.get(scorer, MISSING)
                row.append(cell(one.scores.get(scorer, MISSING), format_number, change))
            for estimates, how, equal in (
                (one.differences, _signed, 0.0),
                (one.win_rates, format_share, 0.5),
                (one.length_controlled, format_share, 0.5),
            ):
                estimate = MISSING if is_base else estimates.get(REWARD, MISSING)
                row.append(cell(estimate, how, estimate, equal))
            row.append(cell(one.kl, format_number))
            row.append(cell(one.perplexity, format_number, one.perplexity_ratio, 1.0, better=-1))
            row.append(cell(one.length, format_number, one.length_difference, better=0))
            rows.append(row)
        return head, rows

    def _seeds(self, one: MethodSummary) -> str:
        if not one.failures:
            return str(len(one.seeds))
        return f"{len(one.seeds)}, {len(one.failures)} failed" if one.seeds else "failed"

    # --- comparison.html ---

    def html(self) -> str:
        title = _escaped(self.comparison.title)
        setting, points, caution = self.conclusions()
        body = [
            f"<header><h1>{title}</h1></header>",
            "<main>",
            f'<section class="summary" aria-label="Summary"><p>{_escaped(setting)}</p><ul>'
            + "".join(f"<li>{_escaped(point)}</li>" for point in points)
            + f"</ul><p>{_escaped(caution)}</p></section>",
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
            f"<title>{title}</title>\n<style>{_style()}</style>\n</head>\n<body>\n"
            + "\n".join(part for part in body if part)
            + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )

    def _main_table(self) -> str:
        marks: set[tuple[int, int]] = set()

        def shown(estimate, how, way, better):
            marks.update({(way, way * better)} if way else ())
            return _cell(estimate, how, way, better)

        head, rows = self._table(shown)
        lines = []
        for one, row in zip(self.summaries, rows, strict=True):
            state = ' class="failed"' if one.failures else ""
            seeds = f'<td{state} data-value="{len(one.seeds)}">{row[1]}</td>'
            lines.append(self._row(one, [seeds, *row[2:]]))
        caption = f"Highest {REWARD} first. Below a figure is its 95 % interval. A tie is half a win."
        caption += f" {self._signs(marks)}" if marks else ""
        notes = "".join(f"<li>{_escaped(note)}</li>" for note in self.notes())
        table = _html_table("All methods", head, lines, caption)
        return _section("results", "Results", table + (f'<ul class="notes">{notes}</ul>' if notes else ""))

    def _row(self, one: MethodSummary, cells: Iterable[str]) -> str:
        is_base = one is self.base
        label = _escaped(one.label) + (" <small>(base)</small>" if is_base else "")
        return f'<tr{" class=base" if is_base else ""}><th scope="row">{label}</th>{"".join(cells)}</tr>'

    def _failures(self) -> str:
        rows = [
            f"<dt>{_escaped(one.label)}, seed {seed}</dt><dd><pre>{_escaped(error)}</pre></dd>"
            for one in self.summaries
            for seed, error in one.failures.items()
        ]
        return _section("failed", "Failed", f"<dl>{''.join(rows)}</dl>") if rows else ""

    def _figures(self) -> list[str]:
        parts = [self.scorers[start : start + 3] for start in range(0, len(self.scorers), 3)]
        return [
            *(self._scores_figure(number, part) for number, part in enumerate(parts)),
            *(self._wins_figure(number, scorer) for number, scorer in enumerate(self.scorers)),
            self._paths_figure(),
            self._perplexity_figure(),
            self._length_figure(),
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
        return _figure(name, title, svg, " ".join(filter(None, [*captions, said, self._marks(shown, panels)])))

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
        return _figure(
            f"wins-{number}",
            f"All against all, by {scorer}",
            matrix_plot(f"wins-{number}", told, shown, rates, self.base.method),
            caption,
        )

    def _paths_figure(self) -> str:
        shown = [one for one in self.summaries if one.seeds]
        ends = [one.label for one in shown if math.isfinite(one.kl.value + one.scores.get(REWARD, MISSING).value)]
        if not ends:
            return ""
        has_ways = any(_has_way(self.by_method[one.method]) for one in shown)
        told = f"KL divergence and {REWARD} of {_listed(ends)}{', with their way through training' * has_ways}."
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
        return _figure(
            "paths",
            f"KL to the SFT model against {REWARD}",
            path_plot("paths", told, shown, self.by_method, self.base.method),
            caption,
        )

    def _perplexity_figure(self) -> str:
        return self._interval_figure(
            "perplexity",
            "Perplexity under a fixed model",
            "Perplexity of each method's answers under a fixed model, and KL divergence from the SFT model.",
            [
                Panel(
                    "perplexity of the answers",
                    lambda one: one.perplexity,
                    lambda one: (one.perplexity_ratio, 1.0),
                    line=self.base.perplexity.value,
                    better=-1,
                    caption="Perplexity: how unlikely the answers are to a model that is not trained. "
                    f"{REWARD.capitalize()} that rises together with it is what reward hacking looks like.",
                ),
                Panel(
                    "KL to the SFT model, nats per answer",
                    lambda one: one.kl,
                    lambda one: (MISSING, 0.0),
                    caption="KL: how far a model is from the SFT model, without a comparison (○).",
                ),
            ],
        )

    def _length_figure(self) -> str:
        base = self.base.label
        wins = [
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
        return self._interval_figure(
            "length",
            "Length, and win rate at equal length",
            f"Length of answers, win rate over {base}, and what it would be at equal length.",
            [
                Panel(
                    "tokens per answer",
                    lambda one: one.length,
                    lambda one: (one.length_difference, 0.0),
                    line=self.base.length.value,
                    better=0,
                ),
                *wins,
            ],
        )

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
        return _figure(
            "likelihoods",
            "Log-probability of chosen and rejected answers over training",
            svg,
            "▲ and solid: chosen, ▼ and dashed: rejected; the first point is as early as it was logged, and every "
            "panel has a scale of its own. The distance should grow. Where both fall, likelihood goes to answers that "
            "are in neither set (likelihood displacement)."
            + (f" Without a panel, as it was not logged: {_listed(missing)}." if missing else ""),
        )

    def _over_base(self, one: MethodSummary, name: str) -> Estimate:
        return MISSING if one is self.base else getattr(one, name).get(REWARD, MISSING)

    def _costs(self) -> str:
        columns = {
            "updates": "updates",
            "prompts trained on": "training_prompts",
            "answers sampled": "completions_sampled",
            "training, s": "seconds",
            "sampling, s": "sampling_seconds",
            "tokens/s in training": "tokens_per_second",
            "peak memory, MiB": "peak_memory_mib",
        }
        lines = []
        for one in self.summaries:
            cells = []
            for key in columns.values():
                value = getattr(one, key)
                most = max((getattr(other, key) for other in self.summaries if getattr(other, key) > 0), default=0)
                bar = f'<span class="bar" style="width:{100 * value / most:.0f}%"></span>' if value > 0 else ""
                shown = format_count(value) if key in COUNTS else format_number(value)
                cells.append(f'<td data-value="{_exact(value)}">{shown}{bar}</td>')
            models = _escaped(one.models_resident or "–")
            lines.append(self._row(one, [*cells, f'<td data-value="{models}">{models}</td>']))
        caption = (
            "Means over seeds. Bars are relative to the largest of a column; a method with less time, memory and "
            "fewer sampled answers is cheaper. Prompts that gave a method no row are not among those it trained on. "
            "Models: those in memory during training."
        )
        table = _html_table("Costs", ["method", *columns, "models in memory"], lines, caption)
        return _section("costs", "What it costs", table)

    def _examples(self) -> str:
        asked: dict[str, list[tuple[MethodSummary, MethodResult, dict[str, Any]]]] = {}
        for one in self.summaries:
            result = next((result for result in self.by_method[one.method] if result.examples), None)
            for example in result.examples if result else []:
                asked.setdefault(_as_text(example["prompt"]), []).append((one, result, example))
        parts = []
        for prompt, answers in asked.items():
            lines = [
                self._row(
                    one,
                    [
                        f"<td>{format_number(_number(example['reward']))}</td>",
                        f'<td class="text">{_escaped(_as_text(example["answer"]))}</td>',
                    ],
                )
                for one, _, example in answers
            ]
            table = _html_table("Answers", ["method", REWARD, "answer"], lines, "", is_text=True)
            parts.append(f'<h3>Prompt</h3><p class="text prompt">{_escaped(prompt)}</p>{table}')
        if not parts:
            return ""
        number = len(parts)
        seeds = sorted({result.seed for answers in asked.values() for _, result, _ in answers})
        summary = f"{number} prompt{'s' if number > 1 else ''}, with answers of seed {_listed(map(str, seeds))}"
        return _section(
            "examples", "Answers to read", f"<details><summary>{summary}</summary>{''.join(parts)}</details>"
        )

    def _settings(self) -> str:
        settings = json.dumps(self.comparison.settings, indent=2, ensure_ascii=False, default=str)
        command = self.comparison.command
        parts = [f"<h3>Command</h3><pre>{_escaped(command)}</pre>"] if command else []
        parts.append(f"<details><summary>Settings</summary><pre>{_escaped(settings)}</pre></details>")
        columns = "".join(f"<dt>{name}</dt><dd>{_escaped(text)}</dd>" for name, text in CSV_COLUMNS.items())
        parts.append(
            "<details><summary>Columns of comparison.csv</summary>"
            f"<p>One figure a row, for each seed and for all of them.</p><dl>{columns}</dl></details>"
        )
        parts.append(f"<details><summary>How intervals are made</summary>{INTERVALS}</details>")
        return _section("made-by", "How this was made", "".join(parts))


INTERVALS = (
    "<p>With one seed, held-out prompts are drawn with replacement, 2000 times, and an interval holds 95 % of the "
    "results. With several, seeds and prompts are drawn independently of each other, so that an interval is also "
    "about training runs that were not made. In simulation, nominal 95 % intervals contained the truth in 99 % of "
    "cases where seeds did not differ, and where they differed much in 73 % with two seeds, 81 % with three and 87 % "
    "with five. Where all values are equal an interval is a single point, which does not mean certainty.</p>"
    "<p>Comparisons are of answers to the same prompt with the same seed.</p>"
)


def _write_figure(writer: csv.DictWriter, about: dict[str, str], estimate: Estimate) -> None:
    numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    counts = {"seeds": estimate.num_seeds, "values": estimate.num_values}
    writer.writerow({**about, **{key: _exact(number) for key, number in numbers.items()}, **counts})


def _exact(value: float) -> str:
    """For programs: nothing where there is no number."""
    return "" if math.isnan(value) else f"{value:.6g}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + format_number(value)


def _with_interval(estimate: Estimate, shown: Callable[[float], str]) -> str:
    if math.isnan(estimate.low):
        return shown(estimate.value)
    return f"{shown(estimate.value)} ({shown(estimate.low)} to {shown(estimate.high)})"


def _has_way(results: Sequence[MethodResult]) -> bool:
    """Whether [`path_plot`] draws a line for a method."""
    kl, reward = (dict(mean_curve(results, key)) for key in ("kl", "reward"))
    return len(set(kl) & set(reward)) > 1


def _cell(estimate: Estimate, shown: Callable[[float], str], way: int, better: int) -> str:
    sign, place = {1: ("▲", "above"), -1: ("▼", "below"), 0: ("", "")}[way]
    kind, judged = {1: ("up", ", better"), -1: ("down", ", worse"), 0: ("neither", "")}[way * better]
    mark = f' <span class="{kind}" role="img" aria-label="{place} the base{judged}">{sign}</span>' if sign else ""
    interval = "" if math.isnan(estimate.low) else f"<small>{shown(estimate.low)} to {shown(estimate.high)}</small>"
    return f'<td data-value="{_exact(estimate.value)}">{shown(estimate.value)}{mark}{interval}</td>'


def _listed(words: Iterable[str], last: str = "and") -> str:
    words = list(words)
    comma = "; " if any("," in word for word in words) else ", "
    return f"{comma.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def _as_text(value: Any) -> str:
    """A prompt or an answer as one reads it: text, or messages one after the other."""
    if isinstance(value, list) and all(isinstance(one, dict) and {"role", "content"} <= set(one) for one in value):
        return "\n".join(f"{one['role']}: {_as_text(one['content'])}" for one in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _last_line(text: str) -> str:
    """Of a traceback, the one that says what is wrong."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _markdown(text: str) -> str:
    """Text in one line in which nothing is markup."""
    return re.sub(r"([\\|*_`\[\]<>#~@])", r"\\\1", " ".join(text.split()))


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return html.escape(text)


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{_escaped(title)}</h2>\n{content}</section>'


def _scrolling(label: str, content: str) -> str:
    """A box that scrolls by itself where the page is narrower, with the keyboard, too."""
    return f'<div class="scroll" role="region" aria-label="{_escaped(label)}" tabindex="0">{content}</div>'


def _figure(name: str, title: str, svg: str, caption: str) -> str:
    content = f"<figure>{_scrolling(title, svg)}<figcaption>{_escaped(caption)}</figcaption></figure>"
    return _section(name, title, content)


def _html_table(label: str, head: Sequence[str], rows: Iterable[str], caption: str, is_text: bool = False) -> str:
    heads = "".join(f'<th scope="col">{_escaped(one)}</th>' for one in head)
    kind = ' class="texts"' if is_text else ' class="sortable"'
    # in the box that scrolls it would be as wide as the table
    said = f'<caption class="hidden">{_escaped(label)}</caption>'
    table = f"<table{kind}>{said}<thead><tr>{heads}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table>"
    return (f"<p>{_escaped(caption)}</p>" if caption else "") + _scrolling(label, table)


THEMES = {
    "light": {
        "page": "#ffffff",
        "text": "#1b1d22",
        "muted": "#59606c",
        "grid": "#dde1e7",
        "raised": "#f3f5f8",
        "up": "#0a5cad",
        "down": "#b04500",
        "series": "#2f62a3 #b3324a #1c7a2d #8a6d00 #8f2a76 #0b7790 #6b5048",
    },
    "dark": {
        "page": "#14171c",
        "text": "#e8eaee",
        "muted": "#a5adba",
        "grid": "#333944",
        "raised": "#1e232b",
        "up": "#6cb2ff",
        "down": "#ff9d5c",
        "series": "#7fb0f0 #ff8a97 #62c971 #dcc84a #e58fd0 #5fd0ea #c9ab9d",
    },
}


def _style() -> str:
    def variables(theme: str) -> str:
        colours = {**THEMES[theme]}
        series = colours.pop("series").split()
        colours |= {f"series-{number}": colour for number, colour in enumerate(series)}
        return "".join(f"--{name}:{colour};" for name, colour in colours.items()) + f"color-scheme:{theme};"

    return (
        f":root{{{variables('light')}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{variables('dark')}}}}}\n"
        + "".join(f":root[data-theme={theme}]{{{variables(theme)}}}\n" for theme in THEMES)
        + STYLE
    )


STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1rem;background:var(--page);color:var(--text);overflow-wrap:anywhere;
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header{display:flex;flex-wrap:wrap;gap:.5rem 1rem;justify-content:space-between;align-items:baseline}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p,dl,ul{margin:.5rem 0;max-width:52rem}
.summary{background:var(--raised);border-left:4px solid var(--up);padding:.3rem 1rem}
.summary p,.summary ul{max-width:none}
.summary ul{padding-left:1.2rem}
.summary p:last-child{color:var(--muted);font-size:.9rem}
.notes{font-size:.9rem}
figure{margin:0}
figcaption{color:var(--muted);font-size:.9rem;max-width:52rem;margin-top:.4rem}
.scroll{overflow-x:auto;max-width:100%;scrollbar-color:var(--muted) var(--raised)}
.scroll.wide::before{content:"← → scroll sideways, there is more";position:sticky;left:0;display:block;
 width:max-content;max-width:100%;color:var(--muted);font-size:.8rem}
.scroll:focus-visible{outline:2px solid var(--up);outline-offset:2px}
svg{display:block}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif!important}
#paths text{paint-order:stroke;stroke:var(--page);stroke-width:3px}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.35rem .6rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--grid)}
thead th{vertical-align:bottom;border-bottom:2px solid var(--muted);min-width:4.2rem;
 max-width:10rem}
th[scope=row],thead th:first-child{text-align:left;position:sticky;left:0;background:var(--page);
 min-width:7rem;max-width:14rem;overflow-wrap:anywhere}
th[scope=row]{font-weight:500}
tr.base th,tr.base td{background:var(--raised)}
td small{display:block;color:var(--muted);font-size:.75rem;white-space:nowrap}
th small{font-weight:400;color:var(--muted)}
th button{all:unset;cursor:pointer}
th button:focus-visible,.theme:focus-visible{outline:2px solid var(--up)}
th[aria-sort] button::after{content:" ↓"}
th[aria-sort=ascending] button::after{content:" ↑"}
.up{color:var(--up)}
.down,.failed{color:var(--down)}
.bar{display:block;height:4px;margin:2px 0 0 auto;background:var(--up);border-radius:2px}
.texts td.text,.texts thead th:last-child{text-align:left;min-width:11rem}
.text,pre{white-space:pre-wrap;overflow-wrap:anywhere}
.prompt{background:var(--raised);padding:.4rem .7rem}
pre{background:var(--raised);padding:.6rem .8rem;margin:.4rem 0;font-size:.85rem;max-height:24rem;overflow:auto}
details{margin:.6rem 0}
summary{cursor:pointer}
dt{font-weight:600;margin-top:.4rem}
dd{margin-left:1rem}
.theme{font:inherit;font-size:.875rem;color:inherit;background:var(--raised);border:1px solid var(--muted);
 border-radius:4px;padding:.2rem .6rem;cursor:pointer}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
@media (max-width:40rem){th[scope=row],thead th:first-child{min-width:6rem;max-width:7.5rem}}
@media print{.theme{display:none}.scroll{overflow:visible}}
"""

# the page reads without it: it adds a button for the theme, sorting, and a line above what is wider than the page
SCRIPT = """
(function () {
  var root = document.documentElement, button = document.createElement("button");
  var dark = matchMedia("(prefers-color-scheme: dark)");
  function current() { return root.dataset.theme || (dark.matches ? "dark" : "light"); }
  function name() { button.textContent = current() === "dark" ? "Light theme" : "Dark theme"; }
  button.type = "button";
  button.className = "theme";
  button.onclick = function () { root.dataset.theme = current() === "dark" ? "light" : "dark"; name(); };
  dark.addEventListener("change", name);
  name();
  document.querySelector("header").append(button);

  function mark() {
    document.querySelectorAll(".scroll").forEach(function (box) {
      box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
    });
  }
  addEventListener("resize", mark);
  document.addEventListener("toggle", mark, true);
  mark();

  document.querySelectorAll("table.sortable").forEach(function (table) {
    table.querySelectorAll("thead th").forEach(function (head, column) {
      var sorter = document.createElement("button");
      sorter.type = "button";
      sorter.title = "Sort";
      sorter.append.apply(sorter, Array.from(head.childNodes));
      head.append(sorter);
      sorter.onclick = function () {
        var down = head.getAttribute("aria-sort") !== "descending", body = table.tBodies[0];
        function key(row) {
          var cell = row.cells[column], value = cell.dataset.value;
          if (value === undefined) return cell.textContent.toLowerCase();
          return value === "" || isNaN(value) ? value : Number(value);
        }
        table.querySelectorAll("th[aria-sort]").forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        Array.from(body.rows).sort(function (one, other) {
          var a = key(one), b = key(other);
          if (a === "" || b === "") return (a === "") - (b === "");
          return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
        }).forEach(function (row) { body.append(row); });
      };
    });
  });
})();
"""
