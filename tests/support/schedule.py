"""Which test begins when, and which long ones are left out where time is limited: hooks of `conftest.py`."""

import os
import time

import pytest

NOT_RUN = "NOT RUN: the time for long tests is over (LONG_TESTS_UNTIL)"


def pytest_runtest_setup(item):
    """Where time is limited, long tests that would begin after `LONG_TESTS_UNTIL` (seconds since 1970) are skipped."""
    until = os.environ.get("LONG_TESTS_UNTIL")
    if until is not None and time.time() > float(until) and any(map(item.get_closest_marker, ("slow", "matrix"))):
        pytest.skip(NOT_RUN)


# files that take longest, and begin first so that no process is left alone with one at the end
LONGEST = (
    "test_playground_runs", "distributed/test_matrix", "distributed/test_distributed", "test_comparison",
    "hostile/test_faults", "test_self_play", "distributed/test_launches", "test_recipes", "test_printed_commands",
    "test_odd_rows", "test_odd_settings", "test_rounds", "distributed/test_two_hosts",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    def place(item):
        return next((number for number, name in enumerate(LONGEST) if f"{name}.py" in item.nodeid), len(LONGEST))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """What `--dist loadfile` does, function by function where a file takes minutes: processes end at the same time."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            if file.endswith(("test_matrix.py", "test_distributed.py")):
                return "runs that share their launches"
            if file.endswith(("test_playground_runs.py", "test_self_play.py", "test_rounds.py")):
                return file  # its tests share runs
            is_long = any(file.endswith(f"{name}.py") for name in LONGEST)
            return nodeid.partition("[")[0] if is_long else file

    if config.option.dist != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter):
    """They are named one by one, where pytest's own summary has a number."""
    missed = [report.nodeid for report in terminalreporter.getreports("skipped") if NOT_RUN in str(report.longrepr)]
    if missed:
        terminalreporter.section(f"{len(missed)} long tests were not run, as their time was over")
        terminalreporter.write("".join(f"{name}\n" for name in missed))
