"""Reward functions that the tests of scoring and of rounds name on the command line."""

import os


def vowels(completions, **kwargs):
    """Share of vowels, which even an untrained model can be taught to write more of."""
    return [sum(character in "aeiou" for character in text) / max(len(text), 1) for text in completions]


def letters(completions, **kwargs):
    return [float(sum(character.isalpha() for character in text)) for text in completions]


def from_a_service(completions, **kwargs):
    """Breaks down on more than the four watched prompts while a file is there."""
    if len(completions) > 4 and os.path.exists(os.environ["SCORING_BREAKDOWN"]):
        raise RuntimeError("the scoring service is down")
    return vowels(completions)


def more_vowels(prompts, completions):
    """A pairwise judge."""
    return [int(vowels([first])[0] < vowels([second])[0]) for first, second in completions]


def length_reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def longer_is_better(prompts, completions):
    return [0 if len(first) > len(second) else 1 for first, second in completions]
