"""Odd values, and whether they were refused as a user can understand."""

import contextlib
import json
import math
import pickle

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXPECTED = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotImplementedError, RuntimeError, ImportError)
# kinds of these that say nothing to somebody who has only made a mistake
BARE = (UnicodeError, RecursionError, json.JSONDecodeError, pickle.PickleError)


def cases(number):
    """So many cases by default; the same property with more of them is a slow test."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )


@contextlib.contextmanager
def refused(*names):
    """Lets exceptions through that are expected and name one of `names`; yields a list that is filled if one came."""
    found = []
    try:
        yield found
    except EXPECTED as error:
        assert not isinstance(error, BARE), f"{type(error).__name__}: {error}"
        message = str(error)
        assert len(message) > 15, repr(error)
        assert not names or any(str(name) in message for name in names), f"{names} not in: {message}"
        found.append(error)


TEXT = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(exclude_categories=()), max_size=6),  # with surrogates
    st.sampled_from(["", " ", "\x00", "\ud800", "a\u2028b", "<|im_end|>", "{{ x }}", "{%", "x" * 3000, "NaN", "null"]),
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([0, 1.5, math.nan, math.inf, -math.inf, 10**400, -(10**30), 1e39, True, False]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
NESTED = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


def more_or_less(default, thousands):
    """Parametrises a test with the number of cases: `default` ones, and `thousands` in the slow suite."""
    return pytest.mark.parametrize("number", [default, pytest.param(thousands, marks=pytest.mark.slow)])
