"""Scorers as reward functions in TRL's signature."""

from collections.abc import Callable, Sequence

from .functions import Scorer

# what TRL's trainers give a reward function beside the columns of the dataset
TRL_REWARD_ARGUMENTS = ("trainer_state", "log_extra", "log_metric", "environments")


def reward_functions(scorers: Sequence[Scorer], is_cut: Callable[[list[int]], bool]) -> list[Callable]:
    """
    Scorers as reward functions of the kind TRL's `RLOOTrainer` and `GRPOTrainer` take: what a scorer reads is what it
    reads here, wherever it is used. A function gets the columns that [`FunctionScorer`] gives it, and needs no
    `**kwargs`.

    Args:
        scorers (`Sequence[Scorer]`): one or several.
        is_cut (`Callable`): tells of a completion's token ids whether it was ended by its length alone. A reward model
            then reads it without an end token.
    """
    return [_reward_function(scorer, is_cut) for scorer in scorers]


def _reward_function(scorer: Scorer, is_cut: Callable[[list[int]], bool]) -> Callable:
    def reward(prompts, completions, completion_ids, **columns):
        kept = {name: values for name, values in columns.items() if name not in TRL_REWARD_ARGUMENTS}
        kept["ends"] = [["length" if is_cut(ids) else "stop"] for ids in completion_ids]
        rows = [
            {"prompt": prompt, "completions": [completion], **{name: values[index] for name, values in kept.items()}}
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        return [score for (score,) in scorer(rows)]

    reward.__name__ = scorer.name
    return reward
