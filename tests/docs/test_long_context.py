"""The search behind the table of longest prompts, on memory whose longest prompt is known."""

import long_context
import pytest


@pytest.mark.parametrize(
    "memory",
    [
        lambda n: 300 + 0.1 * n,
        lambda n: 100 + 3 * n,
        lambda n: 50 + 0.05 * n + 1e-5 * n**2,
        lambda n: 10 + 1e-4 * n**2,
        lambda n: 2000 + n,
    ],
)
def test_the_longest_is_found_within_a_tenth(memory):
    budget, probed = 1000, []

    def peak_at(length):
        probed.append(length)
        return memory(length) if memory(length) <= budget else None

    low, too_long = long_context.longest(peak_at, budget, 512, 100_000)
    assert low == 0 or memory(low) <= budget
    assert memory(too_long) > budget
    assert too_long - low <= max(long_context.LENGTH_STEP, 0.1 * low)
    assert len(probed) == len(set(probed)) <= 10


def test_a_budget_that_all_lengths_fit():
    assert long_context.longest(lambda n: n / 1000, 1000, 512, 4096) == (4096, None)
