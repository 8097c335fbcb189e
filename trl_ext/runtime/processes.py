"""Processes of one run: gathering objects, waiting without a timeout, and which files each of them can see."""

import itertools
import re
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import distributed_c10d

_meetings = itertools.count()
SHARE_CHECKPOINTS = (
    "Every machine needs the whole checkpoint: set `output_dir` to a folder that all machines share, or copy it to "
    "each of them, from all of them where each has saved a part."
)
# in a checkpoint, the files that belong to one process
OF_A_PROCESS = re.compile(r"(?:^|/)(?:rng_state_|\w*zero_pp_rank_)(\d+)")


def all_gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


def barrier_without_timeout() -> None:
    """
    Wait for all processes, without the time-out of a collective: how long another is at work, sampling or scoring,
    depends on its prompts. A process that is gone is noticed by the launcher, or by
    [`~trl_ext.runtime.hang_watchdog.hang_watchdog`].
    """
    state = PartialState()
    if state.num_processes > 1:
        store, key = distributed_c10d._get_default_store(), f"trl_ext/arrived/{next(_meetings)}"
        store.add(key, 1)
        while store.add(key, 0) < state.num_processes:
            time.sleep(0.1)
        state.wait_for_everyone()


def ranks_without_access(folder: str | Path) -> dict[int, str]:
    """
    The processes that do not see what the main process writes into a folder, with their hosts; the same on all.

    The file has a name that nobody has looked for before: a network file system may remember for a minute that
    something was not there.
    """
    folder, state = Path(folder), PartialState()
    name = all_gather_objects(f".seen-by-all-{secrets.token_hex(8)}")[0]
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    state.wait_for_everyone()
    seen = all_gather_objects((socket.gethostname(), (folder / name).exists()))
    if state.is_main_process:
        (folder / name).unlink()
    state.wait_for_everyone()  # or another would take it for a file of the folder's
    return {index: host for index, (host, is_there) in enumerate(seen) if not is_there}


def refuse_unless_all_see(folder: str | Path) -> None:
    """
    Refuse a folder that the processes are to share and do not.

    Raises:
        FileNotFoundError: on all processes.
    """
    for index, host in ranks_without_access(folder).items():
        raise FileNotFoundError(
            f"Process {index} ({host}) does not see what the main process has written into {folder}. All machines "
            "must share the output folder. Set `--output_dir` to one that they share."
        )


def read_when_there(path: Path, seconds: float = 90) -> str:
    """
    The text of a file that another process has written, which a network file system may show some time later.

    Raises:
        FileNotFoundError: it is still not there after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise FileNotFoundError(
                    f"{path} was written by another process and is not visible after {seconds:g} s. All machines must "
                    "share the output folder. Set `--output_dir` to one that they share."
                ) from None
        time.sleep(1)


def refuse_unless_all_see_checkpoint(checkpoint: str | Path) -> None:
    """
    Refuse to resume from a checkpoint of which a process lacks a file: each has to see what belongs to all, and what
    belongs to itself. Called by all processes.

    Raises:
        FileNotFoundError: on all processes.
    """
    checkpoint = Path(checkpoint)
    files = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
    lacking = first_lacking(all_gather_objects((socket.gethostname(), files)))
    if lacking is not None:
        index, host, file = lacking
        raise FileNotFoundError(f"Process {index} ({host}) does not see {checkpoint / file}. {SHARE_CHECKPOINTS}")


def first_lacking(everyone: list[tuple[str, set[str]]]) -> tuple[int, str, str] | None:
    """Of the hosts and the files that each process sees: the first process that needs a file it does not see."""
    files = set().union(*(seen for _, seen in everyone))
    for index, (host, seen) in enumerate(everyone):
        lacks = sorted(file for file in files - seen if _owner(file) in (None, index))
        if lacks:
            return index, host, lacks[0]
    return None


def _owner(file: str) -> int | None:
    found = OF_A_PROCESS.search(file)
    return int(found.group(1)) if found else None


def process_state() -> PartialState:
    """
    The processes of this run, and the device of this one. Where there is no accelerator, Accelerate sees the other
    processes only if it is told to look for them on CPUs.
    """
    return PartialState(cpu=not torch.accelerator.is_available())
