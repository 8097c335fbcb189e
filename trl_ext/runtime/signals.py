"""
Signals that ask a run to end: SIGTERM, and SIGINT, which Ctrl-C sends to the launcher and all that it has started.

Only the standard library is imported here: a recipe answers before torch is loaded.
"""

import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODES = {128 + number: number for number in STOP_SIGNALS}  # as of a shell
RESUME_HINT = "The same command with `--resume_from_checkpoint true` resumes from there."
# a launcher passes on the SIGINT that its processes may have got as well: within so many seconds they are one
SAME_SIGINT = 1.0
LAUNCHER_VARIABLES = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}
ACCELERATE_COMMANDS = ("accelerate", "accelerate-launch", "accelerate.commands.launch")

_is_watched = False


def name_of(number: int) -> str:
    """What a signal is called in messages."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def in_stage() -> bool:
    """Whether another process has started this one as a stage, and says itself how the run goes on."""
    return multiprocessing.parent_process() is not None


def end_now(number: int) -> None:
    """Raise `SystemExit` with 128 plus the signal's number, and say how to go on."""
    # it may come twice, to the process and to its group; SIG_IGN would leave one that is pending without a handler
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    if not in_stage():
        print(f"{name_of(number)}: ended. What is finished is kept. {RESUME_HINT}", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


def _end_at_once() -> None:
    if not in_stage():
        print(f"Ctrl-C again: ended at once. What is finished is kept. {RESUME_HINT}", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)


@contextmanager
def on_stop(action: Callable[[int], Any] = end_now) -> Iterator[None]:
    """
    Call `action` with the signal's number, in the main thread, on SIGTERM and on SIGINT. A second SIGINT ends recipes
    and stages at once and is a `KeyboardInterrupt` elsewhere.

    A handler that somebody else has set stays, and other threads than the main one can set none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, interrupted_at = os.getpid(), None

    def handle(number, frame):
        nonlocal interrupted_at
        if os.getpid() != owner:  # a process forked from this one has no part in it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT:
            if interrupted_at is not None:
                if time.monotonic() - interrupted_at < SAME_SIGINT or _is_watched:
                    return
                if in_stage():
                    _end_at_once()
                raise KeyboardInterrupt
            interrupted_at = time.monotonic()
        action(number)

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        is_ours = getattr(handler, "__module__", None) == __name__
        if is_ours or handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)


def signal_again(number: int) -> None:
    """Handle a signal that was held back, as if it came now."""
    handler = signal.getsignal(number)
    if callable(handler):
        handler(number, None)
    else:
        os.kill(os.getpid(), number)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Hold back SIGTERM and SIGINT from this thread, and from the processes that it starts meanwhile, for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def watch_signals_and_launcher() -> None:
    """
    For a recipe, in a thread, as the main one may be in a step for long:

    - A second SIGINT ends the process at once.
    - A SIGINT ends the launcher of a single process (`accelerate launch`) quietly. It would end within 0.25 s anyway,
      and print a traceback.
    - The end of the launcher is taken for a SIGTERM. A launcher that is killed cannot pass anything on, and that of a
      single process does not; what it has started would go on, unseen, in the folder that the next start uses.
    """
    global _is_watched
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget_watch)
    _is_watched = True
    is_launched = LAUNCHER_VARIABLES & set(os.environ)
    # started by hand, whoever did so may well leave
    launcher = os.getppid() if is_launched else None

    def watch():
        nonlocal launcher
        interrupted_at = None
        while True:
            if select.select([reader], [], [], 1)[0] and signal.SIGINT in os.read(reader, 64):
                if interrupted_at is None:
                    interrupted_at = time.monotonic()
                    if launcher is not None and _is_simple_launcher(launcher):
                        os.kill(launcher, signal.SIGTERM)
                        launcher = None
                elif time.monotonic() - interrupted_at > SAME_SIGINT:
                    _end_at_once()
            if launcher is not None and os.getppid() != launcher:
                launcher = None
                os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="signal-watch").start()


def _forget_watch() -> None:
    global _is_watched
    _is_watched = False
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


def end_simple_launcher() -> None:
    """
    End Accelerate's launcher of a single process with SIGTERM, if it has started this one. It would print a traceback
    of its own behind the message of a process that fails.
    """
    if LAUNCHER_VARIABLES & set(os.environ) and _is_simple_launcher(os.getppid()):
        os.kill(os.getppid(), signal.SIGTERM)


def _is_simple_launcher(pid: int) -> bool:
    """Whether a process is Accelerate's launcher of one process: torch's, of several, has to end them first."""
    if "TORCHELASTIC_RUN_ID" in os.environ or os.getppid() != pid:
        return False
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:  # not on Linux
        return False
    return any(Path(word).name in ACCELERATE_COMMANDS for word in words[:3])
