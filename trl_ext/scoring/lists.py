"""Scored candidates to ranked lists."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .candidate_rows import _check_rows
from .score_report import CARRIED_COLUMNS, _check_scored_row
from .tournament import _distinct


@dataclass
class RankingReport:
    """
    What became of scored rows.

    Attributes:
        made (`str`): what was made, with the rule: `"pairs (best_worst)"`, `"ranked rows"`.
        num_rows (`int`): rows that came in.
        num_used (`int`): rows of which something was made.
        num_made (`int`): pairs or ranked rows that went out.
        num_empty (`int`): candidates left out because they say nothing.
        num_identical (`int`): candidates that repeat another one of their row; pairs count it once.
        num_without_likelihood (`int`): candidates left out because `logps` has `None` for them.
        dropped (`dict[str, int]`): why rows gave nothing -> how many.
    """

    made: str
    num_rows: int = 0
    num_used: int = 0
    num_made: int = 0
    num_empty: int = 0
    num_identical: int = 0
    num_without_likelihood: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        of_rows = f" from {self.num_used} rows" if self.made.startswith("pairs") else ""
        lines = [f"{self.num_rows} rows -> {self.num_made} {self.made}{of_rows}"]
        for count, what in (
            (self.num_empty, "candidates left out: empty"),
            (self.num_identical, "candidates repeat another one of their prompt"),
            (self.num_without_likelihood, "candidates left out: no likelihood under the sampler"),
        ):
            if count:
                lines.append(f"{count} {what}")
        lines += [f"{count} rows gave none: {reason}" for reason, count in sorted(self.dropped.items())]
        return "\n  ".join(lines)


def _count_candidates(row: Mapping[str, Any], report: RankingReport, *, count_likelihoods: bool = False) -> None:
    distinct = _distinct(row["completions"])
    num_usable = sum(map(len, distinct))
    report.num_empty += len(row["completions"]) - num_usable
    report.num_identical += num_usable - len(distinct)
    if count_likelihoods and row.get("logps") is not None:
        report.num_without_likelihood += sum(row["logps"][i] is None for indices in distinct for i in indices)


def rank_rows(
    rows: Sequence[Mapping[str, Any]], *, min_completions: int = 1, best_as_reference: bool = False
) -> tuple[list[dict[str, Any]], RankingReport]:
    """
    Make ranked rows of scored rows: what trainers on lists, such as SLiC's and RRHF's, read.

    Candidates stay in their order; their scores rank them. Empty candidates are left out, identical ones stay.

    Args:
        rows (`Sequence[dict]`): candidate rows with `scores`, as [`~trl_ext.scoring.score.score_rows`] gives them.
        min_completions (`int`, defaults to 1): rows with fewer usable candidates are left out and counted. RRHF can
            do with 1, which it merely imitates; SLiC needs 2.
        best_as_reference (`bool`, defaults to `False`): whether the row's own `reference` is left out, so that the
            best candidate stands in for it, as in SLiC-HF's sample-rank.

    Returns:
        `tuple`: rows with `prompt`, `completions`, `scores`, of `sources`, `logps`, `num_tokens` and `ends` those that
        are there, and the columns that trainers read (`reference`, `tools`, `chat_template_kwargs`); and the
        [`RankingReport`].

    Raises:
        ValueError: an unusable row or setting, or no row is left; says why.
    """
    if min_completions < 1:
        raise ValueError(f"`min_completions` must be at least 1, got {min_completions}.")
    _check_rows(rows, _check_scored_row)
    report = RankingReport("ranked rows", num_rows=len(rows))
    ranked = []
    for row in rows:
        _count_candidates(row, report)
        usable = sorted(index for indices in _distinct(row["completions"]) for index in indices)
        if len(usable) < min_completions:
            some = "only one candidate" if len(usable) == 1 else f"only {len(usable)} candidates"
            report.dropped["no usable candidate" if not usable else some] += 1
            continue
        of_candidates = {
            column: [row[column][index] for index in usable]
            for column in ("completions", "scores", "sources", "logps", "num_tokens", "ends")
            if row.get(column) is not None
        }
        carried = {column: row[column] for column in CARRIED_COLUMNS if column in row}
        if best_as_reference:
            carried.pop("reference", None)
        ranked.append({"prompt": row["prompt"], **of_candidates, **carried})
    report.num_made = report.num_used = len(ranked)
    if not ranked:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in report.dropped.most_common())
        raise ValueError(
            f"None of the {len(rows)} rows has {min_completions} usable candidates: {reasons}. Sample more candidates "
            "per prompt, or lower `min_completions`."
        )
    return ranked, report
