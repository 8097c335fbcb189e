"""
Ranking: scored candidates in, ranked rows or pairs out.

    rows = score_rows(rows, build_scorers(["rewards.py:is_right"]))     # see `trl_ext.scoring`
    print(score_report(rows))
    ranked, report = rank_rows(rows)                     # for SLiC, RRHF: all candidates with their scores
    pairs, report = pair_rows(rows, "best_worst")        # or pairs, for whatever wants pairs

As in scoring, whatever is drawn at random is drawn from the seed and the row itself.

Papers: SLiC-HF (https://huggingface.co/papers/2305.10425) for pairs drawn from scores; RRHF
(https://huggingface.co/papers/2304.05302) for ranked lists; CLICK (https://huggingface.co/papers/2306.03350) for pairs
that are close in likelihood.
"""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .data import RowError, _check_scores
from .scoring import REMEDIES, _check_row, _check_rows, _distinct, _generator, _KnockOut

# columns of the prompt that a trainer reads
CARRIED_COLUMNS = ("reference", "reference_is_cut", "tools", "chat_template_kwargs")
PAIR_RULES = ("all", "best_worst", "tournament", "random", "likelihood_near")


@dataclass(frozen=True)
class ScoreReport:
    """
    How scores are distributed. `print()` it, or call [`~ScoreReport.print`] with a console of your own.

    Attributes:
        num_prompts, num_completions (`int`): how many there are.
        mean, std, min, lower_quartile, median, upper_quartile, max (`float`): over all completions; `std` with the
            number of completions as its denominator.
        mean_of_best, mean_of_worst (`float`): over prompts, of the best and of the worst completion's score.
        all_equal (`float`): share of prompts whose scores are all equal, so that there is nothing to rank.
        histogram (`list[int]`): completions in each of 10 bins of equal width.
        bin_edges (`list[float]`): 11 edges. A bin includes its lower edge, the last one both.
    """

    num_prompts: int
    num_completions: int
    mean: float
    std: float
    min: float
    lower_quartile: float
    median: float
    upper_quartile: float
    max: float
    mean_of_best: float
    mean_of_worst: float
    all_equal: float
    histogram: list[int]
    bin_edges: list[float]

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=79)
        self.print(console)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def print(self, console: Console | None = None) -> None:
        """Print the figures and a small histogram, by default to the terminal."""
        console = console or Console()
        console.print(f"Scores of {self.num_completions} completions to {self.num_prompts} prompts", highlight=False)
        figures = Table(box=None, pad_edge=False)
        names = ("mean", "std", "min", "25 %", "50 %", "75 %", "max", "best", "worst", "all equal")
        values = (
            self.mean, self.std, self.min, self.lower_quartile, self.median, self.upper_quartile, self.max,
            self.mean_of_best, self.mean_of_worst,
        )  # fmt: skip
        for name in names:
            figures.add_column(name, justify="right")
        figures.add_row(*(f"{value:.3g}" for value in values), f"{self.all_equal:.1%}")
        console.print(figures)
        bars = Table.grid(padding=(0, 1))
        for justify in ("right", "right", "left"):
            bars.add_column(justify=justify)
        for count, lower in zip(self.histogram, self.bin_edges, strict=False):
            # something is shown where there is something
            length = max(round(40 * count / max(self.histogram)), int(count > 0))
            bars.add_row(f"{lower:.3g}", str(count), "█" * length)
        console.print(bars)


def _check_scored_row(row: Mapping[str, Any]) -> None:
    _check_row(row)
    if row.get("scores") is None:
        raise RowError("missing", "scores", "is missing; `score_rows` makes it")
    _check_scores(row["scores"], "scores", len(row["completions"]))


def score_report(rows: Sequence[Mapping[str, Any]]) -> ScoreReport:
    """
    Describe the scores of all rows.

    Args:
        rows (`Sequence[dict]`): with `scores`; of all processes, as [`~trl_ext.scoring.score_rows`] returns them.

    Returns:
        [`ScoreReport`]: each completion counts once in the distribution, each prompt once in the means of the best and
        worst and in the share of equals.

    Raises:
        ValueError: no rows, no scores, or a score that is not a finite number.
    """
    _check_rows(rows, _check_scored_row)
    lists = [row["scores"] for row in rows]
    scores = np.array([score for scores in lists for score in scores], dtype=np.float64)
    if not len(scores):
        raise ValueError(f"None of the {len(rows)} rows has a completion. Check the sampling.")
    low, high, step = scores.min(), scores.max(), 20 * np.spacing(np.abs(scores).max())
    around = max(0.5, step) if high - low < step else 0.0  # room for ten bins about equal scores, however large
    histogram, edges = np.histogram(scores, bins=10, range=(low - around, high + around))
    return ScoreReport(
        num_prompts=len(rows),
        num_completions=len(scores),
        mean=scores.mean().item(),
        std=scores.std().item(),
        **dict(
            zip(
                ("min", "lower_quartile", "median", "upper_quartile", "max"),
                np.quantile(scores, (0, 0.25, 0.5, 0.75, 1)).tolist(),
                strict=True,
            )
        ),
        mean_of_best=fmean(max(scores) for scores in lists if scores),
        mean_of_worst=fmean(min(scores) for scores in lists if scores),
        all_equal=fmean(len(set(scores)) <= 1 for scores in lists),
        histogram=histogram.tolist(),
        bin_edges=edges.tolist(),
    )


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


@dataclass(frozen=True)
class _Candidate:
    """One of a row's distinct completions that say something."""

    index: int
    completion: Any
    score: float
    logp: float | None
    is_cut: bool


class _NoPair(Exception):
    """Why a row gives no pair."""


def _candidates(row: Mapping[str, Any]) -> list[_Candidate]:
    """
    A row's distinct completions that say something, sorted by what they say.

    Identical completions become one, with the mean of their scores, which differ only if the scorer is noisy. It
    counts as cut by its length only if all of them were.
    """
    ends = row.get("ends") or [None] * len(row["completions"])
    logps = row.get("logps") or [None] * len(row["completions"])

    def mean(values):
        values = [value for value in values if value is not None]
        return None if not values else values[0] if len(set(values)) == 1 else fmean(values)

    return [
        _Candidate(
            indices[0],
            row["completions"][indices[0]],
            mean(row["scores"][index] for index in indices),
            mean(logps[index] for index in indices),
            all(ends[index] == "length" for index in indices),
        )
        for indices in _distinct(row["completions"])
    ]


def check_pair_rule(rule: str, *, max_pairs: int | None = None, positive_above: float = 0.5) -> None:
    """
    Refuse settings of [`make_pairs`] that cannot be, before there are rows.

    Raises:
        ValueError: there is no such rule, or a value is out of its range.
    """
    if rule not in PAIR_RULES:
        raise ValueError(f"rule={rule!r} is not known. Set it to one of {', '.join(PAIR_RULES)}.")
    if max_pairs is not None and max_pairs < 1:
        raise ValueError(f"max_pairs={max_pairs}: set it to 1 or more, or None for all.")
    if not math.isfinite(positive_above):
        raise ValueError(f"positive_above={positive_above}: set it to a finite score.")


def make_pairs(
    row: Mapping[str, Any],
    rule: str,
    seed: int = 42,
    *,
    max_pairs: int | None = None,
    positive_above: float = 0.5,
    best_as_reference: bool = False,
) -> list[dict[str, Any]]:
    """
    Make the pairs of one scored row.

    `chosen` scores strictly higher than `rejected`; neither is empty, they differ, and no pair is made twice.

    Args:
        row (`dict`):
            A candidate row with `scores`.
        rule (`str`):
            - `"all"`: every two candidates with different scores.
            - `"best_worst"`: the best against the worst. Among equals a seeded draw decides.
            - `"tournament"`: SLiC-HF's. The games of the judge who scored the row, if it has `games`; else a knock-out
              tournament decided by the scores, where equal scores give no pair and a seeded coin decides who goes on.
            - `"random"`: pairs with different scores at random, at most `max_pairs`, by default as many as there are
              candidates, like the m pairs of SLiC-HF's pointwise variant.
            - `"likelihood_near"`: CLICK's. Candidates are positive (score above `positive_above`) or negative. Each
              negative is paired with the most likely of the positives that are less likely than it, so that the margin
              bites and unlikely positives are not dragged up; if none is less likely, with the least likely positive.
              This is our reading: CLICK's script for pairs is not public.
        seed (`int`, defaults to 42):
            Of what is drawn; the row's content goes into it, its place and the order of its candidates do not.
        max_pairs (`int`, *optional*):
            Most pairs to make; a seeded draw decides which are kept. By default all (`"random"`: see there).
        positive_above (`float`, defaults to 0.5):
            For `"likelihood_near"`: scores above are positive.
        best_as_reference (`bool`, defaults to `False`):
            Whether `reference` of each pair is the best candidate of the row, as in SLiC-HF's sample-rank, instead of
            the row's own.

    Returns:
        `list[dict]`: with `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`, and the columns of the row
        that trainers read (`reference`, `tools`, `chat_template_kwargs`). Where the row has `ends`, `chosen_is_cut`,
        `rejected_is_cut` and with `best_as_reference` `reference_is_cut` say whether an answer was ended by its length
        alone. Empty if there is no pair to make.

    Raises:
        ValueError: an unusable row or setting; no `logps` for `"likelihood_near"`.
    """
    try:
        return _make_pairs(row, rule, seed, max_pairs, positive_above, best_as_reference)
    except _NoPair:
        return []


def _make_pairs(
    row, rule: str, seed: int, max_pairs: int | None, positive_above: float, best_as_reference: bool
) -> list[dict[str, Any]]:
    check_pair_rule(rule, max_pairs=max_pairs, positive_above=positive_above)
    _check_scored_row(row)
    if rule == "likelihood_near" and row.get("logps") is None:
        raise RowError(
            "missing", "logps",
            f"is missing, and the rule 'likelihood_near' goes by it; the others ({', '.join(PAIR_RULES[:-1])}) do not",
        )  # fmt: skip
    candidates = _candidates(row)
    if rule == "likelihood_near":
        candidates = [candidate for candidate in candidates if candidate.logp is not None]
    if not candidates:
        raise _NoPair("no usable candidate")
    if len(candidates) == 1:
        raise _NoPair("only one distinct candidate")
    if len({candidate.score for candidate in candidates}) == 1:
        raise _NoPair("all scores equal")
    generator = _generator(seed, "pairs", row)
    if rule == "best_worst":
        best, worst = (extreme(candidate.score for candidate in candidates) for extreme in (max, min))
        drawn = [generator.choice([c for c in candidates if c.score == score]) for score in (best, worst)]
        pairs = [tuple(drawn)]
    elif rule == "tournament":
        pairs = _tournament_pairs(row, candidates, seed)
    elif rule == "likelihood_near":
        pairs = _likelihood_near_pairs(candidates, positive_above)
    else:
        pairs = [(one, other) for one in candidates for other in candidates if one.score > other.score]
    limit = len(candidates) if rule == "random" and max_pairs is None else max_pairs
    if limit is not None and limit < len(pairs):
        pairs = generator.sample(pairs, limit)
    carried = {column: row[column] for column in CARRIED_COLUMNS if column in row}
    has_ends = row.get("ends") is not None
    if best_as_reference:
        winners = {winner.index for winner, _ in pairs}
        # among equals one that is `chosen`, whose likelihood is computed anyway
        best = max(candidates, key=lambda candidate: (candidate.score, candidate.index in winners))
        carried = {**carried, "reference": best.completion, "reference_is_cut": best.is_cut}
        if not has_ends:
            del carried["reference_is_cut"]
    return [
        {
            "prompt": row["prompt"],
            "chosen": chosen.completion,
            "rejected": rejected.completion,
            "score_chosen": chosen.score,
            "score_rejected": rejected.score,
            **({"chosen_is_cut": chosen.is_cut, "rejected_is_cut": rejected.is_cut} if has_ends else {}),
            **carried,
        }
        for chosen, rejected in pairs
    ]


def _tournament_pairs(row, candidates: list[_Candidate], seed: int) -> list[tuple[_Candidate, _Candidate]]:
    by_index = {candidate.index: candidate for candidate in candidates}
    if row.get("games") is not None:
        pairs, games = [], row["games"]
        if not isinstance(games, list):
            raise RowError("other games", "games", f"is {games!r:.40}, not a list of [winner, loser]")
        for game in games:
            indices = game if isinstance(game, list | tuple) else [game]
            players = [by_index.get(index) if isinstance(index, int) else None for index in indices]
            if len(players) != 2 or None in players or not players[0].score > players[1].score:
                raise RowError(
                    "other games", "games", f"holds {game!r:.40}, which is no [winner, loser] with scores to match"
                )
            pairs.append(tuple(players))
        if not pairs:
            raise _NoPair("no games")
        return pairs
    bracket = _KnockOut([candidate.index for candidate in candidates], _generator(seed, "tournament", row))
    while bracket.pairings():
        scores = [(by_index[first].score, by_index[second].score) for first, second in bracket.pairings()]
        bracket.record([None if first == second else first > second for first, second in scores])
    games = [(by_index[winner], by_index[loser]) for winner, loser in bracket.games]
    return [(winner, loser) for winner, loser in games if winner.score > loser.score]


def _likelihood_near_pairs(candidates: list[_Candidate], positive_above: float) -> list[tuple[_Candidate, _Candidate]]:
    positives = sorted((c for c in candidates if c.score > positive_above), key=lambda c: c.logp)
    negatives = [candidate for candidate in candidates if candidate.score <= positive_above]
    if not positives:
        raise _NoPair(f"no score above positive_above={positive_above}")
    if not negatives:
        raise _NoPair(f"all scores above positive_above={positive_above}")
    pairs = []
    for negative in negatives:
        less_likely = [positive for positive in positives if positive.logp < negative.logp]
        pairs.append((less_likely[-1] if less_likely else positives[0], negative))
    return pairs


def pair_rows(
    rows: Sequence[Mapping[str, Any]],
    rule: str,
    seed: int = 42,
    *,
    max_pairs_per_prompt: int | None = None,
    positive_above: float = 0.5,
    best_as_reference: bool = False,
) -> tuple[list[dict[str, Any]], RankingReport]:
    """
    Make pairs of scored rows.

    Args:
        rows (`Sequence[dict]`): candidate rows with `scores`, as [`~trl_ext.scoring.score_rows`] gives them.
        rule (`str`), seed (`int`, defaults to 42), max_pairs_per_prompt (`int`, *optional*), positive_above (`float`,
            defaults to 0.5), best_as_reference (`bool`, defaults to `False`): as in [`make_pairs`].

    Returns:
        `tuple`: the pairs, row by row, and the [`RankingReport`].

    Raises:
        ValueError: an unusable row or setting, or no row gives a pair; says why.
    """
    check_pair_rule(rule, max_pairs=max_pairs_per_prompt, positive_above=positive_above)
    _check_rows(rows, _check_scored_row)
    report = RankingReport(f"pairs ({rule})", num_rows=len(rows))
    pairs = []
    for index, row in enumerate(rows):
        _count_candidates(row, report, count_likelihoods=rule == "likelihood_near")
        try:
            made = _make_pairs(row, rule, seed, max_pairs_per_prompt, positive_above, best_as_reference)
        except _NoPair as reason:
            report.dropped[str(reason)] += 1
            continue
        except RowError as error:
            raise ValueError(f"Row {index}: {error}. {REMEDIES[error.problem]}") from None
        pairs += made
        report.num_used += 1
    report.num_made = len(pairs)
    if not pairs:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in report.dropped.most_common())
        raise ValueError(
            f"None of the {len(rows)} rows gives a pair by the rule {rule!r}: {reasons}. Sample more candidates per "
            "prompt or at a higher temperature, use a score that tells them apart"
            + (", or set `positive_above` to a score between good and bad." if rule == "likelihood_near" else ".")
        )
    return pairs, report


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
        rows (`Sequence[dict]`): candidate rows with `scores`, as [`~trl_ext.scoring.score_rows`] gives them.
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
        raise ValueError(f"min_completions={min_completions}: set it to 1 or more.")
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
