"""Ranking: scored candidates in, ranked rows or pairs out.

    rows = score_rows(rows, build_scorers(["rewards.py:is_right"]))     # see `trl_ext.scoring`
    print(score_report(rows))
    ranked, report = rank_rows(rows)                     # for SLiC, RRHF: all candidates with their scores
    pairs, report = pair_rows(rows, "best_worst")        # or pairs, for whatever wants pairs

As in scoring, whatever is drawn at random is drawn from the seed and the row itself.

Papers: SLiC-HF (https://huggingface.co/papers/2305.10425) for pairs drawn from scores; RRHF
(https://huggingface.co/papers/2304.05302) for ranked lists; CLICK (https://huggingface.co/papers/2306.03350) for pairs
that are close in likelihood."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..data.row_error import RowError
from .candidate_rows import REMEDIES, _check_rows
from .lists import RankingReport, _count_candidates
from .score_report import CARRIED_COLUMNS, _check_scored_row
from .tournament import _distinct, _generator, _KnockOut

PAIR_RULES = ("all", "best_worst", "tournament", "random", "likelihood_near")


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
        raise ValueError(f"`rule` must be one of {', '.join(PAIR_RULES)}, got {rule!r}.")
    if max_pairs is not None and max_pairs < 1:
        raise ValueError(f"`max_pairs` must be at least 1, or None for all, got {max_pairs}.")
    if not math.isfinite(positive_above):
        raise ValueError(f"`positive_above` must be a finite score, got {positive_above}.")


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
            f"is missing, which the rule 'likelihood_near' needs; the others ({', '.join(PAIR_RULES[:-1])}) do not",
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
            raise RowError("other games", "games", f"must be a list of [winner, loser], got {games!r:.40}")
        for game in games:
            indices = game if isinstance(game, list | tuple) else [game]
            players = [by_index.get(index) if isinstance(index, int) else None for index in indices]
            if len(players) != 2 or None in players or not players[0].score > players[1].score:
                raise RowError(
                    "other games", "games", f"must hold [winner, loser] with scores to match, got {game!r:.40}"
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
        rows (`Sequence[dict]`): candidate rows with `scores`, as [`~trl_ext.scoring.score.score_rows`] gives them.
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
