"""Conclusions from the figures of a comparison, in words."""

import math
from collections.abc import Sequence

from .measures import MEASURES, REWARD
from .results import ComparisonResults
from .statistics import MISSING, Estimate, direction
from .summary import MethodSummary, results_by_method, scorers, summaries, win_rate_matrix
from .text import listed, signed


class Findings:
    """The summaries of one comparison, and what can be said of them."""

    def __init__(self, comparison: ComparisonResults):
        self.comparison = comparison
        self.by_method = results_by_method(comparison)
        self.scorers = scorers(comparison)
        self.summaries = summaries(comparison)
        self.base = next(one for one in self.summaries if one.method == comparison.base)
        self.others = [one for one in self.summaries if one is not self.base]
        self.rates = {scorer: win_rate_matrix(comparison, scorer) for scorer in self.scorers}

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
                changes = [f"{one.label} ({signed(one.differences[REWARD].value)})" for one in these]
                points.append(f"{which} {REWARD} than {base}, by more than the 95 % interval: {listed(changes)}.")
        if neither:
            points.append(f"Not to be told apart from {base} by {REWARD}: {listed(one.label for one in neither)}.")
        if not compared:
            points.append(f"Nothing can be compared with {base}: there is no {REWARD} of both for any seed.")
        points += self._prices(more)
        failed = [
            f"{one.label} (seed{'s' if len(one.failures) > 1 else ''} {listed(map(str, one.failures))})"
            for one in self.summaries
            if one.failures
        ]
        points += [f"Failed: {listed(failed)}."] if failed else []
        return self._setting(), points, self._caution(compared) if compared else ""

    def _setting(self) -> str:
        seeds = sorted({result.seed for result in self.comparison.results})
        tried = f"{len(seeds)} seeds: " if len(seeds) > 1 else "seed "
        number, prompts = len(self.others), self.comparison.prompts
        return (
            f"{number} method{'' if number == 1 else 's'} and {self.base.label}, compared by one answer to each of "
            f"{prompts} held-out prompts, sampled at temperature 1 ({tried}{listed(map(str, seeds))})."
        )

    def _prices(self, more: Sequence[MethodSummary]) -> list[str]:
        """What got worse where there is more reward: the signs of reward hacking."""
        watched = [measure for measure in MEASURES if measure.is_compared and measure.better]
        worse = {}
        for measure in watched:
            changed = "higher" if measure.better < 0 else "lower"
            ways = {one.method: direction(one.changes[measure.key], measure.statistic.equal) for one in more}
            worse[f"A {changed} {measure.name}"] = [one for one in more if ways[one.method] * measure.better < 0]
        for scorer in self.scorers:
            if scorer != REWARD:
                falls = [one for one in more if direction(one.differences.get(scorer, MISSING), 0) < 0]
                worse[f"A lower {scorer}"] = falls
        longer = [one for one in more if direction(one.changes["length"], 0) > 0]
        by_length = [one for one in longer if direction(one.length_controlled.get(REWARD, MISSING), 0.5) < 1]
        worse["Longer answers, and no lead at equal length"] = by_length
        found = [f"{what}: {listed(one.label for one in these)}." for what, these in worse.items() if these]
        if not more:
            return []
        if found:
            said = f"Some with more {REWARD} are worse in what was only watched."
            return [f"{said} That can be reward hacking: read the answers. {' '.join(found)}"]
        measured = [scorer for scorer in self.scorers if scorer != REWARD]
        measured += [measure.name for measure in watched if any(is_measured(one.changes[measure.key]) for one in more)]
        if not measured:
            return [f"Nothing but {REWARD} was measured that would show reward hacking: read the answers."]
        return [f"None of those with more {REWARD} is worse by {listed(measured, 'or')}."]

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
                said += f" Of {listed(one.label for one in single)} one run can be compared, over prompts alone."
        if len(compared) > 1:
            said += f" Of {len(compared)} comparisons, one in twenty or so stands out by chance."
        return said

    def missing_values(self) -> list[str]:
        """What was left out of means because it is NaN."""
        found = []
        for one in self.summaries:
            counts: dict[str, int] = {}
            for result in self.by_method[one.method]:
                lists = {
                    measure.values_name: result.measured.get(measure.stored) or ()
                    for measure in MEASURES
                    if measure.statistic is not None
                }
                lists |= result.scores
                for key, values in lists.items():
                    counts[key] = counts.get(key, 0) + sum(not math.isfinite(value) for value in values)
            missing = [f"{count} of {key}" for key, count in counts.items() if count]
            if missing:
                found.append(f"{one.label}: values that are missing and left out: {listed(missing)}.")
        return found

    def notes(self) -> list[str]:
        own = [f"{one.label}: {note}" for one in self.summaries for note in one.notes]
        shown = [measure for measure in MEASURES if measure.column is not None]
        missing = [
            measure.name
            for measure in shown
            if not any(is_measured(one.figures[measure.key]) for one in self.summaries)
        ]
        missing = [f"Not measured for any method: {listed(missing)}."] if missing else []
        return [*self.comparison.notes, *own, *missing, *self.missing_values()]


def is_measured(figure: Estimate | str) -> bool:
    return bool(figure) if isinstance(figure, str) else math.isfinite(figure.value)
