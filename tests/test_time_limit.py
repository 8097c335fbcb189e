"""What is done where the time for long tests is limited: `LONG_TESTS_UNTIL`, see `support/schedule.py`."""

import pytest

pytest_plugins = "pytester"

CONFTEST = """
from tests.support.schedule import pytest_runtest_setup
from tests.support.schedule import pytest_terminal_summary
def pytest_configure(config):
    for marker in ("slow", "matrix"):
        config.addinivalue_line("markers", marker)
"""
TESTS = """
import pytest
@pytest.mark.slow
def test_slow(): pass
@pytest.mark.matrix
def test_of_the_matrix(): pass
@pytest.mark.skip(reason="another reason")
def test_skipped(): pass
def test_quick(): pass
"""


@pytest.mark.parametrize(("until", "passed"), [("1", 1), ("1e12", 3), (None, 3)])
def test_long_tests_that_begin_too_late_are_named(until, passed, pytester, monkeypatch):
    monkeypatch.delenv("LONG_TESTS_UNTIL", raising=False)
    if until is not None:
        monkeypatch.setenv("LONG_TESTS_UNTIL", until)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_some=TESTS)
    found = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    found.assert_outcomes(passed=passed, skipped=4 - passed)
    named = ["*2 long tests were not run*", "test_some.py::test_slow", "test_some.py::test_of_the_matrix"]
    if passed == 1:
        found.stdout.fnmatch_lines(named)
    else:
        found.stdout.no_fnmatch_line("*not run*")
