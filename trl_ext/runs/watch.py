"""Changes and wins between models on held-out prompts, and when a gain is not believed."""

from .config import RoundsConfig
from .intervals import Mean, Wins, paired_difference, wins


def change(answers: dict[int, dict], before: dict[int, dict]) -> Mean:
    """Mean change of the reward on the prompts that both answered."""
    return paired_difference(*_rewards(answers, before))


def format_change(change: Mean) -> str:
    """A cell of two lines for a table."""
    return f"{change.value:+.3f}\n{change.low:+.3f} to {change.high:+.3f}"


def wins_over(answers: dict[int, dict], first: dict[int, dict]) -> Wins:
    """Wins, ties and losses by reward on the prompts that both answered."""
    return wins(*_rewards(answers, first))


def format_wins(found: Wins) -> str:
    """A cell of three lines for a table."""
    low, high = found.interval
    return f"{found.rate:.1%}\n{low:.1%} to {high:.1%}\n{found.tied} of {found.num_pairs} tied"


def _rewards(answers: dict[int, dict], others: dict[int, dict]) -> tuple[list[float], list[float]]:
    both = [number for number in answers if number in others]
    return [answers[number]["reward"] for number in both], [others[number]["reward"] for number in both]


def reward_hacking(
    first: dict[str, float],
    before: dict[str, float],
    now: dict[str, float],
    judged_before: dict[int, float] | None,
    judged_now: dict[int, float] | None,
    config: RoundsConfig,
) -> str | None:
    """
    Why a round's gain is not to be believed: the reward rose, and something else went wrong. `None` if nothing did.

    Args:
        first, before, now (`dict`): figures of the model at the start, before the round and after it.
        judged_before, judged_now (`dict`, *optional*): the judge's score by prompt.
        config ([`RoundsConfig`]): with the thresholds.
    """
    if now["reward"] <= before["reward"]:
        return None
    rose = f"the reward rose from {before['reward']:.3f} to {now['reward']:.3f} while "
    if now["perplexity"] > config.max_perplexity_ratio * first["perplexity"]:
        return rose + f"perplexity went from {first['perplexity']:.1f} at the start to {now['perplexity']:.1f}"
    if first["distinct_1"] and now["distinct_1"] is None:
        return rose + "the answers lost all words"
    for name in ("distinct_1", "distinct_2"):
        measured = first[name] is not None and now[name] is not None
        if measured and now[name] < config.min_distinct_ratio * first[name]:
            return rose + f"{name.replace('_', '-')} fell from {first[name]:.2f} at the start to {now[name]:.2f}"
    if judged_before is not None and judged_now is not None:
        both = sorted(judged_before.keys() & judged_now.keys())
        if both:
            difference = paired_difference([judged_now[n] for n in both], [judged_before[n] for n in both])
            if difference.high < 0:
                return rose + f"the judge's score changed by {difference}"
    return None
