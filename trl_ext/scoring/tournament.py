"""Scores from pairwise comparisons: all pairs, or a knock-out tournament."""

import hashlib
import json
import operator
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data.columns import as_given, without_nulls
from ..data.row_error import RowError
from ..data.rows import check_text
from .functions import _as_list, _call, _code, _function_name
from .models import RankerModelJudge


class PairwiseScorer:
    """
    Scores completions by a knock-out tournament with a judge who compares two at a time (SLiC-HF §3.2).

    Each row's candidates are drawn into pairs, the winners are drawn against each other, and so on. K candidates cost
    K - 1 games. With a number that is not a power of two, one stands out a round (a bye), never the same one twice
    before the final. All games of a round, over all rows given, are judged in one call.

    Identical completions play as one. Completions that say nothing do not play and score -1, below all others.

    The score is the longest chain of wins (beat one who beat one who beat one ...). Without byes this is the number of
    games won. With them it differs, and only so does the winner of every game score higher than its loser: of three,
    the winner may have had the bye, and then won one game, as did the one it beat.

    The draw, and which of two is shown first (RSO swaps them to cancel a judge's liking for a place), follow from the
    seed and the row itself, not from the other rows, the order of the candidates or the number of processes.

    Args:
        judge (`Callable`):
            Called with the keyword arguments `prompts` and `completions`, a list of two completions for each prompt.
            Returns for each 0 if the first is better, 1 if the second is, and -1 if it cannot tell; a seeded coin then
            decides, and `counts` keeps count.
        seed (`int`, defaults to 42): of the draw, the places and the coin.
        name (`str`, *optional*): what messages and columns call it; by default the judge's name.
    """

    def __init__(self, judge: Callable, *, seed: int = 42, name: str | None = None):
        self.judge, self.seed, self.name = judge, seed, name or _function_name(judge)
        self.code = None if isinstance(judge, RankerModelJudge) else _code(judge)
        self.identity = [judge.identity if isinstance(judge, RankerModelJudge) else None, seed]
        # how many texts a model had to cut goes with our own counts
        self.counts: Counter[str] = judge.counts if isinstance(judge, RankerModelJudge) else Counter()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[list[float | None]]:
        """Scores of every completion; see [`~PairwiseScorer.play`]."""
        return [tournament_scores(row, games) for row, games in zip(rows, self.play(rows), strict=True)]

    def play(self, rows: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
        """
        Play the tournaments.

        Args:
            rows (`Sequence[dict]`): candidate rows.

        Returns:
            `list[list[list[int]]]`: for each row its games in the order they were played, each as `[winner, loser]`,
            which are indices into `completions`.

        Raises:
            TypeError, ValueError: the judge does not take the arguments, or does not return one of 0, 1 and -1 for
                each pair.
            RuntimeError: the judge raised; the cause is chained.
        """
        what = f"The judge {self.name!r}"
        rows, brackets = [as_given(row) for row in rows], []
        for row in rows:
            generator = _generator(self.seed, "tournament", row)
            brackets.append(_KnockOut([players[0] for players in _distinct(row["completions"])], generator))
        while any(bracket.pairings() for bracket in brackets):
            prompts, completions, swaps = [], [], []
            for row, bracket in zip(rows, brackets, strict=True):
                for pairing in bracket.pairings():
                    swaps.append(bracket.generator.random() < 0.5)
                    shown = reversed(pairing) if swaps[-1] else pairing
                    prompts.append(row["prompt"])
                    completions.append([row["completions"][index] for index in shown])
            verdicts = _as_list(_call(self.judge, what, prompts=prompts, completions=completions), what, len(prompts))
            verdicts = iter(
                self._first_wins(verdict, swapped) for verdict, swapped in zip(verdicts, swaps, strict=True)
            )
            for bracket in brackets:
                bracket.record([next(verdicts) for _ in bracket.pairings()])
        for bracket in brackets:
            self.counts["games"] += len(bracket.games)
            self.counts["games that the judge could not decide, decided at random"] += bracket.num_coins
        return [[list(game) for game in bracket.games] for bracket in brackets]

    def _first_wins(self, verdict: Any, swapped: bool) -> bool | None:
        """Whether the first of a pairing wins, as it was before it was swapped; `None` if the judge cannot tell."""
        try:
            verdict = operator.index(verdict)
        except TypeError:
            verdict = repr(verdict)
        if verdict not in (0, 1, -1):
            raise ValueError(
                f"The judge {self.name!r} must return 0 if the first is better, 1 if the second is, or -1 if it "
                f"cannot tell, got {verdict!s:.60}."
            )
        return None if verdict == -1 else (verdict == 0) != swapped


class _KnockOut:
    """
    One row's tournament: who meets whom next, and the games so far as `(winner, loser)`.

    Args:
        players (`list[int]`): in an order that does not depend on that of the row's candidates.
        generator (`random.Random`): for the draw and for coins.
    """

    def __init__(self, players: list[int], generator: random.Random):
        self.generator, self.games, self.num_coins = generator, [], 0
        self.standing = generator.sample(players, len(players))

    def pairings(self) -> list[tuple[int, int]]:
        return list(zip(self.standing[::2], self.standing[1::2], strict=False))

    def record(self, first_wins: list[bool | None]) -> None:
        """Take the results of a round; a coin decides where they are `None`."""
        winners = []
        for (first, second), first_won in zip(self.pairings(), first_wins, strict=True):
            if first_won is None:
                first_won = self.generator.random() < 0.5
                self.num_coins += 1
            self.games.append((first, second) if first_won else (second, first))
            winners.append(self.games[-1][0])
        bye = self.standing[2 * len(winners) :]
        self.standing = bye + winners  # the bye to the front: the last one stands out next time


def tournament_scores(row: Mapping[str, Any], games: Sequence[Sequence[int]]) -> list[float]:
    """
    The scores that a row's games give: the longest chain of wins, see [`PairwiseScorer`].

    Args:
        row (`dict`): a candidate row.
        games (`Sequence`): `[winner, loser]` indices into `completions`, in the order they were played.

    Returns:
        `list[float]`: one score per completion; identical ones share it, empty ones have -1.
    """
    chain: Counter[int] = Counter()
    for winner, loser in games:
        chain[winner] = max(chain[winner], chain[loser] + 1)
    scores = [-1.0] * len(row["completions"])
    for players in _distinct(row["completions"]):
        for index in players:
            scores[index] = float(chain[players[0]])
    return scores


def _key(text: str | list) -> str:
    """Text or messages as one string; keys that are None, at any depth, do not count: Arrow fills them in."""
    if isinstance(text, str):
        return text
    return json.dumps(without_nulls(text), sort_keys=True, ensure_ascii=False, default=str)


def _is_empty(completion: Any) -> bool:
    try:
        check_text(completion, "completions", is_completion=True)
    except RowError as error:
        return error.problem == "empty"
    return False


def _distinct(completions: Sequence) -> list[list[int]]:
    """Indices of the completions that say something, identical ones together; sorted by what they say."""
    found: dict[str, list[int]] = {}
    for index, completion in enumerate(completions):
        if not _is_empty(completion):
            found.setdefault(_key(completion), []).append(index)
    return [found[key] for key in sorted(found)]


def _generator(seed: int, purpose: str, row: Mapping[str, Any]) -> random.Random:
    """Random numbers of a row's own: from the seed, the prompt and its candidates, in whatever order they are."""
    content = [seed, purpose, _key(row["prompt"]), sorted(_key(completion) for completion in row["completions"])]
    return random.Random(hashlib.sha256(json.dumps(content).encode()).digest())
