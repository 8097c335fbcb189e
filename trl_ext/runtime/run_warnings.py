"""Warnings about a run that works and does not do what it is for."""

from collections.abc import Mapping
from typing import Any

MOST_CUT = 0.5  # share of answers cut by their length, above which there is a warning
TERMS_APART = 100  # how many times as large one term of a loss may be as another
ALL_TOLD_APART = 100  # pairs in a row


def cut_answers(truncated: float, max_new_tokens: int) -> str | None:
    """
    What to say where most sampled answers end at `max_new_tokens`.

    Args:
        truncated (`float`): share of the answers that do.
        max_new_tokens (`int`): the limit.
    """
    if truncated <= MOST_CUT:
        return None
    return (
        f"Warning: {truncated:.0%} of the sampled answers are cut at max_new_tokens={max_new_tokens}. They have no "
        "end token, so scores and training see unfinished answers, and the model does not learn to stop. Raise "
        "`--max_new_tokens`."
    )


def unequal_terms(logs: Mapping[str, float], weights: Mapping[str, tuple[str | None, float]]) -> str | None:
    """
    What to say where one term of a loss is over a hundred times another. A term of 0 counts as satisfied.

    Args:
        logs (`Mapping[str, float]`): logged means, the terms without their weights among them.
        weights (`Mapping`): for each term's name in `logs`: the setting that is its weight (`None` where it has none),
            and its value.
    """
    terms = {name: weight * logs[name] for name, (_, weight) in weights.items() if logs.get(name)}
    terms = {name: value for name, value in terms.items() if value}
    if len(terms) < 2:
        return None
    small, large = (pick(terms, key=lambda name: abs(terms[name])) for pick in (min, max))
    if abs(terms[large]) <= TERMS_APART * abs(terms[small]):
        return None
    remedies = [
        f"{verb} `{setting}` ({value:g} now)"
        for verb, (setting, value) in (("raise", weights[small]), ("lower", weights[large]))
        if setting is not None
    ]
    remedy = " or ".join(remedies)
    return (
        f"Warning: `{large}` adds {terms[large]:,.4g} to the loss and `{small}` {terms[small]:,.4g}, over "
        f"{TERMS_APART} times less, so that it has next to no effect. {remedy[:1].upper()}{remedy[1:]}."
    )


class ToldApart:
    """Notice when SPIN's margin is above 0 for all pairs of one log after the other."""

    def __init__(self):
        self._since, self._said = 0, False

    def look(self, logs: Mapping[str, Any], step: int, pairs_per_step: int) -> str | None:
        """
        What to say, once.

        Args:
            logs (`Mapping`): of training, with `rewards/accuracies`.
            step (`int`): optimiser steps so far.
            pairs_per_step (`int`): pairs in each of them.
        """
        if logs.get("rewards/accuracies", 1.0) < 1.0:
            self._since = step
        pairs = (step - self._since) * pairs_per_step
        if self._said or "rewards/accuracies" not in logs or pairs < ALL_TOLD_APART:
            return None
        self._said = True
        return (
            f"Warning: the margin is above 0 for all of the last {pairs:,} pairs: the model tells the real answers "
            "from the generated ones, and this iteration has little left to teach it. Lower `--num_train_epochs` or "
            "`--learning_rate`, or begin the next iteration."
        )
