"""The tables of a comparison: one to compute with (CSV), one to paste (Markdown)."""

import csv
import io
import math
from collections.abc import Callable

from .findings import Findings
from .measures import MEASURES, REWARD, Measure
from .results import MethodResult
from .statistics import MISSING, Estimate, direction
from .summary import MethodSummary, summarize
from .text import (
    exact,
    format_number,
    format_share,
    last_line,
    markdown_row,
    markdown_text,
    signed,
    with_interval,
)


def csv_columns() -> dict[str, str]:
    """The columns of `comparison.csv`, and what is in each."""
    figures = ["score", "difference (from the base)", "win_rate", "length_controlled_win_rate"]
    for measure in MEASURES:
        figures.append(measure.key + (f" ({measure.meaning})" if measure.meaning else ""))
        if measure.is_compared:
            figures.append(f"{measure.change_key} ({measure.statistic.change_meaning})")
    return {
        "method": "its key",
        "label": "as shown",
        "seed": "a seed, or “all” for all of them together",
        "status": "done, or failed, with the reason under “error” and no figure",
        "figure": ", ".join(figures),
        "scorer": "for score, difference and win rates: which one",
        "over": "for differences, ratios and win rates: the method it is compared with",
        "value": "the figure; empty where it was not measured",
        "low": "lower end of the 95 % interval, over prompts for one seed, over prompts and seeds for all",
        "high": "its upper end",
        "seeds": "training runs it comes from",
        "values": "values it comes from",
        "error": "why it failed",
    }


class Tables(Findings):
    """`comparison.csv`, `comparison.md`, and the rows of the page's table."""

    def csv(self) -> str:
        opened = io.StringIO()
        writer = csv.DictWriter(opened, list(csv_columns()), lineterminator="\n", restval="")
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
                        write_figure(writer, about, rate)
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
            write_figure(writer, {**about, "figure": "score", "scorer": scorer}, estimate)
        if not is_base:
            for figure, estimates in (
                ("difference", {key: one.differences[key] for key in one.scores}),
                ("win_rate", one.win_rates),
                ("length_controlled_win_rate", one.length_controlled),
            ):
                for scorer, estimate in estimates.items():
                    write_figure(writer, {**about, "figure": figure, "scorer": scorer, "over": over}, estimate)
            for measure in MEASURES:
                if measure.is_compared:
                    figure = {"figure": measure.change_key, "over": over}
                    write_figure(writer, {**about, **figure}, one.changes[measure.key])
        for measure in MEASURES:
            figure, row = one.figures[measure.key], {**about, "figure": measure.key}
            if measure.statistic is not None:
                write_figure(writer, row, figure)
            else:
                value = figure if isinstance(figure, str) else exact(figure.value)
                writer.writerow({**row, "value": value, "seeds": len(one.seeds)})

    def markdown(self) -> str:
        head, rows = self._table(lambda estimate, shown, way, better: with_interval(estimate, shown))
        costs = [measure for measure in MEASURES if measure.markdown_column is not None]
        head += [measure.markdown_column for measure in costs]
        for row, one in zip(rows, self.summaries, strict=True):
            row += [formatted(measure, one) for measure in costs]
        setting, points, caution = self.conclusions()
        lines = [f"**{markdown_text(self.comparison.title)}**", "", markdown_text(setting), ""]
        lines += [*(f"- {markdown_text(point)}" for point in points), ""]
        lines += [markdown_text(caution), ""] if caution else []
        lines += [markdown_row(map(markdown_text, head)), markdown_row(["---"] + ["---:"] * (len(head) - 2) + ["---"])]
        lines += [markdown_row(map(markdown_text, row)) for row in rows]
        lines += ["", "In brackets: 95 % intervals.", ""]
        for one in self.summaries:
            for seed, error in one.failures.items():
                lines.append(f"- {markdown_text(f'{one.label}, seed {seed}, failed: {last_line(error)}')}")
        lines += [f"- {markdown_text(note)}" for note in self.notes()]
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
        measures = [measure for measure in MEASURES if measure.column is not None]
        head += [measure.column for measure in measures]
        rows = []
        for one in self.summaries:
            is_base = one is self.base

            def cell(estimate, how, change=MISSING, equal=0.0, better=1, is_base=is_base):
                return shown(estimate, how, 0 if is_base else direction(change, equal), better)

            row = [one.label, self.seeds(one)]
            for scorer in self.scorers:
                change = one.differences.get(scorer, MISSING)
                row.append(cell(one.scores.get(scorer, MISSING), format_number, change))
            for estimates, how, equal in (
                (one.differences, signed, 0.0),
                (one.win_rates, format_share, 0.5),
                (one.length_controlled, format_share, 0.5),
            ):
                estimate = MISSING if is_base else estimates.get(REWARD, MISSING)
                row.append(cell(estimate, how, estimate, equal))
            for measure in measures:
                equal = measure.statistic.equal if measure.is_compared else 0.0
                change = one.changes.get(measure.key, MISSING)
                row.append(cell(one.figures[measure.key], measure.format, change, equal, measure.better))
            rows.append(row)
        return head, rows

    def seeds(self, one: MethodSummary) -> str:
        if not one.failures:
            return str(len(one.seeds))
        return f"{len(one.seeds)}, {len(one.failures)} failed" if one.seeds else "failed"


def formatted(measure: Measure, one: MethodSummary) -> str:
    """A method's figure, and a dash where it was not measured."""
    figure = one.figures[measure.key]
    if isinstance(figure, str):
        return figure or "–"
    return "–" if math.isnan(figure.value) else measure.format(figure.value)


def write_figure(writer: csv.DictWriter, about: dict[str, str], estimate: Estimate) -> None:
    numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    counts = {"seeds": estimate.num_seeds, "values": estimate.num_values}
    writer.writerow({**about, **{key: exact(number) for key, number in numbers.items()}, **counts})
