"""CPU threads of a run. They are settled before torch is loaded, which reads the environment then."""

import contextlib
import os
from pathlib import Path

# set for the processes they start, by `accelerate launch` and by `torchrun`
OF_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


def settle_threads() -> int:
    """
    Set the environment variables of this process and of those it starts: OMP_WAIT_POLICY to PASSIVE, as threads that
    wait by spinning take the cores from other processes, and OMP_NUM_THREADS to this process's share of the cores.
    What the user has set stays.

    Launchers set OMP_NUM_THREADS=1 by themselves, which would leave cores idle; a 1 that is the user's own stays.

    Returns:
        `int`: threads of this process.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    number = os.environ.get("OMP_NUM_THREADS", "")
    if not number or (number == "1" and _is_launchers()):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        number = str(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))
        os.environ["OMP_NUM_THREADS"] = number
    first = number.partition(",")[0]  # of nested levels
    return int(first) if first.isdecimal() else 1


def _is_launchers() -> bool:
    """Whether OMP_NUM_THREADS comes from the launcher: its own environment, as it was started, has no such value."""
    if not any(name in os.environ for name in OF_LAUNCHERS):
        return False
    with contextlib.suppress(OSError):  # not on Linux, or not to be read
        launcher = Path("/proc", str(os.getppid()))
        words = launcher.joinpath("cmdline").read_bytes().replace(b"-", b"_").split(b"\0")
        if any(word.startswith(b"__num_cpu_threads_per_process") for word in words):
            return False
        variables = launcher.joinpath("environ").read_bytes().split(b"\0")
        return not any(variable.startswith(b"OMP_NUM_THREADS=") for variable in variables)
    return True
