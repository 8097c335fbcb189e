"""One run in a folder at a time."""

import fcntl
import os
from pathlib import Path

from accelerate import PartialState

from .processes import all_gather_objects
from .signals import in_stage

_held: dict[tuple[int, int], int] = {}  # device and inode of a folder: its descriptor


def hold_folder(folder: str | Path, *, create: bool = True) -> bool:
    """
    Lock the output folder of a run, until this process ends or calls [`release_folder`]. The kernel releases it when
    the process is killed. Called by all processes; the main one locks. A stage is covered by the lock of its run.

    Args:
        folder (`str` or `Path`): the output folder.
        create (`bool`, defaults to `True`): make a folder that is not there. `False` before a run has been checked,
            so that a run that is refused leaves nothing behind.

    Returns:
        `bool`: whether this call has locked it: `False` if this process has before.

    Raises:
        FileExistsError: another run holds it; on all processes.
    """
    if in_stage():
        return False
    problem, is_new = None, False
    folder = Path(folder)
    if PartialState().is_main_process and (create or folder.is_dir()):
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
        if _identity(opened) in _held:
            os.close(opened)
        else:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(opened)
                problem = f"Another run is active in {folder}. Wait until it has ended, or set another `--output_dir`."
            except OSError:  # a file system without locks
                os.close(opened)
            else:
                _held[_identity(opened)], is_new = opened, True
    problem, is_new = all_gather_objects((problem, is_new))[0]
    if problem is not None:
        raise FileExistsError(problem)
    return is_new


def release_folder(folder: str | Path) -> None:
    """Let another run begin in a folder."""
    if PartialState().is_main_process:
        opened = os.open(folder, os.O_RDONLY)
        held = _held.pop(_identity(opened), None)
        for descriptor in {opened, held} - {None}:
            os.close(descriptor)


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
