"""
Runs of several processes in which one hangs.

A process that dies needs nothing here: the launcher notices and ends the others.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed
from transformers import TrainerCallback

from .signals import RESUME_HINT

_numbers = itertools.count()
# when this process last got on in training; no time while it does not train
_progress: dict[str, Any] = {"at": None, "doing": "at work"}


def progress(doing: str) -> None:
    """Note that this process gets on in training, and with what."""
    _progress.update(at=time.monotonic(), doing=doing)


class WatchCallback(TrainerCallback):
    """
    Runs a [`hang_watchdog`] from the first step to the end of training, and notes progress.

    Args:
        seconds (`float`): see [`hang_watchdog`].
    """

    def __init__(self, seconds: float):
        self.seconds, self.watchdog = seconds, contextlib.ExitStack()
        self.has_begun = False

    def stop(self) -> None:
        self.watchdog.close()
        _progress.update(at=None, doing="at work")

    def on_step_begin(self, args, state, control, **kwargs):
        progress(f"step {state.global_step + 1}")
        if not self.has_begun:  # not before: a resumed run may read for long to find its place in the data
            self.watchdog.enter_context(hang_watchdog(self.seconds))
            self.has_begun = True

    def on_substep_end(self, args, state, control, **kwargs):
        progress(f"step {state.global_step + 1}")

    def on_step_end(self, args, state, control, **kwargs):
        progress(f"end of step {state.global_step}")

    def on_prediction_step(self, args, state, control, **kwargs):
        progress(f"evaluating after step {state.global_step}")

    def on_save(self, args, state, control, **kwargs):
        progress(f"checkpoint-{state.global_step} is saved")

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()  # what follows is done by one process alone


@contextmanager
def hang_watchdog(seconds: float) -> Iterator[None]:
    """
    End this process when the run hangs, with a message that says where each process of the run was.

    Each process writes a sign of life into the store of the process group, from a thread. The run hangs when a process
    gives none for `seconds`: it is stopped, or its machine or the network is gone. It also hangs when all processes
    train, and none has called [`progress`] for as long. One process alone is not watched.

    Args:
        seconds (`float`): how long to wait. Collectives have a time-out of their own, the trainer's `ddp_timeout`,
            whose message does not name the process that is missing; so stay below it.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        yield
        return
    watchdog = _Watchdog(seconds)
    try:
        yield
    finally:
        watchdog.stop()


class _Watchdog:
    def __init__(self, seconds: float):
        self.seconds, self.period = seconds, min(seconds / 10, 15)
        self.rank, number = distributed.get_rank(), next(_numbers)
        self.keys = [f"trl_ext/watchdog/{number}/{rank}" for rank in range(distributed.get_world_size())]
        # a connection of its own: the main thread may be waiting on the other
        self.store = distributed.distributed_c10d._get_default_store().clone()
        self.ended = threading.Event()
        self._begin_anew()
        # two, as the store may never answer
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._watch)]
        for thread in self.threads:
            thread.start()

    def _begin_anew(self) -> None:
        now = time.monotonic()
        self.answered = now  # when the store last did
        # of each other process, when it last gave a new sign of life, and which
        self.heard = {rank: (now, {}) for rank in range(len(self.keys)) if rank != self.rank}

    def stop(self) -> None:
        self.ended.set()
        self.threads[0].join(timeout=2)
        with contextlib.suppress(RuntimeError):  # the main process is gone already
            self.store.set(self.keys[self.rank], json.dumps({"is_through": True}))

    def _talk(self) -> None:
        while not self.ended.is_set():
            try:
                self.store.set(self.keys[self.rank], json.dumps(self._sign_of_life()))
                heard = self.heard
                for rank, (_, before) in list(heard.items()):
                    if self.store.check([self.keys[rank]]):
                        said = json.loads(self.store.get(self.keys[rank]))
                        if said != before:
                            heard[rank] = time.monotonic(), said
            except RuntimeError:  # whoever keeps the store is gone, and the launcher notices
                self.ended.set()
            self.answered = time.monotonic()
            self.ended.wait(self.period)

    def _sign_of_life(self) -> dict[str, Any]:
        frame = sys._current_frames()[threading.main_thread().ident]
        return {
            "at": time.monotonic(),  # no two are equal
            "idle": None if _progress["at"] is None else time.monotonic() - _progress["at"],
            "doing": _progress["doing"],
            "where": f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}",
            "who": f"{socket.gethostname()}, pid {os.getpid()}",
        }

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.ended.wait(self.period):
            now = time.monotonic()
            if now - before > 3 * self.period + 1:  # this process was stopped, perhaps all were
                if _progress["at"] is not None:
                    progress("resumed after a pause")
                self._begin_anew()
            elif (what := self._what_hangs()) is not None:
                self._end(what)
            before = now

    def _what_hangs(self) -> str | None:
        now = time.monotonic()
        others = [(now - at, said) for at, said in self.heard.values() if "is_through" not in said]
        if max([now - self.answered, *(silence for silence, _ in others)]) > self.seconds:
            return "A process is missing"
        if len(others) < len(self.heard):  # one is through with training, so all have made their last step
            return None
        idle = [self._sign_of_life()["idle"], *(said.get("idle") for _, said in others)]
        return "No process has got on" if None not in idle and min(idle) > self.seconds else None

    def _end(self, what: str) -> None:
        lines, living, now = [], [self.rank], time.monotonic()
        for rank in range(len(self.keys)):
            at, said = (now, self._sign_of_life()) if rank == self.rank else self.heard[rank]
            if "is_through" in said:
                lines.append(f"process {rank}: at its end")
                continue
            line = f"process {rank} ({said.get('who', 'never heard of')}): {said.get('doing', '')}"
            if now - at > 4 * self.period:
                line += f"; NO SIGN OF LIFE for {now - at:.0f} s: it is stopped, or its machine or the network is gone"
            else:
                living.append(rank)
                line += f", in {said.get('where')}"
            lines.append(line)
        if self.rank != min(living):
            time.sleep(self.period)  # one message is enough; the launcher ends this process once it is printed
        print(
            f"{what} for {self.seconds:.0f} s, so the run ends here.\n  " + "\n  ".join(lines) + "\nA process that "
            "waits for others is in a collective or in the backward pass; look at the one that is not. If it was at "
            f"work, raise `ddp_timeout`. What is finished is kept. {RESUME_HINT}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
