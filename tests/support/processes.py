"""Processes that a test starts: to wait for what they do, and to leave none behind."""

import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator

import psutil


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A process and all that it has started, workers in sessions of their own included."""
    try:
        one = psutil.Process(process.pid)
        return [one, *one.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def ended_after(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Kill what is left of a process and its family at the end of the block, however that is reached."""
    try:
        yield process
    finally:
        for one in family(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(timeout=60)


def wait_until(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 300) -> None:
    """Wait for something that a running process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline, f"not after {seconds} s"
        time.sleep(0.01)


def stages_are_numbered(printed: str) -> bool:
    """Whether the headings in the output of a run that ended count up to the number of stages that they name."""
    found = re.findall(r"^(\d+) of (?:at most )?(\d+): ", printed, re.MULTILINE)
    return bool(found) and found == [(str(number), found[0][1]) for number in range(1, int(found[0][1]) + 1)]
