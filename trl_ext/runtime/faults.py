"""
Runs that do not reach their end: a process that is asked to end, and one that hangs.

A process that dies needs nothing here: the launcher notices and ends the others.
"""

import contextlib
import copy
import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from .signals import RESUME_HINT, STOP_SIGNALS, name_of, stop_signals_blocked

# Signals


class SignalProofWorker:
    """
    A `worker_init_fn` of a `DataLoader`: the worker ends when its parent asks for it, and takes no notice of signals
    to the whole process group. The parent has a step to finish, and needs its batches.

    Args:
        init (`Callable`, *optional*): called with the worker's number afterwards.
    """

    def __init__(self, init: Callable[[int], None] | None):
        self.init = init

    def __call__(self, worker: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._wait_for_parent, args=(os.getppid(),), daemon=True).start()
        if self.init is not None:
            self.init(worker)

    @staticmethod
    def _wait_for_parent(parent: int) -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
            pass
        os._exit(0)


def _process_started_blocked(process_class: type, *args: Any, **kwargs: Any) -> multiprocessing.Process:
    process = process_class(*args, **kwargs)

    def start():
        del process.start  # a process that is spawned is pickled
        with stop_signals_blocked():
            process.start()

    process.start = start
    return process


def protect_workers(loader: DataLoader) -> DataLoader:
    """Make each worker of a trainer's loader a [`SignalProofWorker`], from its first moment."""
    base = getattr(loader, "base_dataloader", loader)  # inside of Accelerate's
    is_protected = isinstance(base.worker_init_fn, SignalProofWorker)
    if base.num_workers and not is_protected and hasattr(signal, "sigwaitinfo"):  # which macOS lacks
        base.worker_init_fn = SignalProofWorker(base.worker_init_fn)
        context = copy.copy(base.multiprocessing_context or multiprocessing.get_context())
        context.Process = functools.partial(_process_started_blocked, context.Process)
        base.multiprocessing_context = context
    return loader


class SaveOnStop(TrainerCallback):
    """
    On SIGTERM or SIGINT, to any of the processes, finish the optimiser step, save a checkpoint, and stop training.

    The processes agree after each step, one number each, so that all stop at the same. An evaluation that is due at
    that step is left out: there may be no time for it.

    Attributes:
        asked (`int`): the number of the signal that has come to this process; 0 if none has.
        stopped (`int`): the same, of the signal that has stopped the training of all processes.
    """

    def __init__(self) -> None:
        self.asked = self.stopped = 0

    def ask(self, number: int) -> None:
        if not self.asked:
            again = " Again: ended at once." if number == signal.SIGINT else ""
            print(f"{name_of(number)}: a checkpoint is saved after this step.{again}", file=sys.stderr, flush=True)
            self.asked = int(number)

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor(float(self.asked), device=args.device)
        if args.world_size > 1:
            distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        if asked:
            self.stopped = int(asked)
            control.should_save = control.should_training_stop = True
            args.save_only_model = False  # this one is to be resumed from
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # it is saved already; the end of an epoch may ask for both once more
            control.should_save = control.should_evaluate = False
        return control


# Hanging


_last_seen = {"at": time.monotonic(), "doing": "starting"}


def progress(doing: str) -> None:
    """Note that this process gets on, and with what."""
    _last_seen.update(at=time.monotonic(), doing=doing)


class WatchCallback(TrainerCallback):
    """
    Has a [`watched`] run from its first step to the end of training, and calls [`progress`] wherever it gets on.

    Args:
        seconds (`float`): see [`watched`].
    """

    def __init__(self, seconds: float):
        self.seconds, self.watch = seconds, contextlib.ExitStack()
        self.has_begun = False

    def stop(self) -> None:
        self.watch.close()

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.has_begun:  # not before: a resumed run may read for long to find its place in the data
            self.watch.enter_context(watched(self.seconds))
            self.has_begun = True
        progress(f"step {state.global_step + 1}")

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
def watched(seconds: float, *, may_wait: bool = False) -> Iterator[None]:
    """
    End this process, with a message that says where each process of the run was, when the run hangs.

    Each process notes a sign of life in the store of the process group, from a thread. A run hangs when no process has
    called [`progress`] for `seconds`; with `may_wait`, when a process has not given a sign of life for as long: it is
    stopped, or its machine or the network is gone. For runs of several processes; one process alone is not watched.

    Args:
        seconds (`float`): how long to wait. Collectives have a time-out of their own, the trainer's `ddp_timeout`,
            whose message does not name the process that is missing; so stay below it.
        may_wait (`bool`, defaults to `False`): whether a process may do nothing for as long as others are at work.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        yield
        return
    progress("starting")
    watch = _Watch(seconds, may_wait)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


class _Watch(threading.Thread):
    def __init__(self, seconds: float, may_wait: bool):
        super().__init__(daemon=True, name="watch")
        self.seconds, self.may_wait = seconds, may_wait
        self.period = min(seconds / 10, 15)
        self.rank, self.num_processes = distributed.get_rank(), distributed.get_world_size()
        # a connection of its own: the main thread may be waiting on the other
        self.store = distributed.distributed_c10d._get_default_store().clone()
        self.ended = threading.Event()
        self.main_thread = threading.main_thread().ident
        self._listen_anew()
        self.spoke_at = self.listened_at = time.monotonic()
        # a thread of its own as well: the store may never answer
        self.talk = threading.Thread(target=self._talk, daemon=True, name="signs of life")

    def _listen_anew(self) -> None:
        # of each other process: count, when it was new here, what was said; who never says anything is missing as well
        now = time.monotonic()
        self.known = {rank: (0, now, {}) for rank in range(self.num_processes) if rank != self.rank}

    def start(self) -> None:
        super().start()
        self.talk.start()

    def stop(self) -> None:
        self.ended.set()
        self.talk.join(timeout=2)
        try:
            self.store.set(self._key(self.rank), json.dumps({"count": -1}))
        except RuntimeError:  # the main process is gone already
            pass

    def _key(self, rank: int) -> str:
        return f"trl_ext/watch/{rank}"

    def run(self) -> None:
        before = time.monotonic()
        while not self.ended.wait(self.period):
            now = time.monotonic()
            if now - before > 3 * self.period + 1:  # this process was stopped, perhaps all were: begin anew
                progress("going on after a pause")
                self._listen_anew()
                self.spoke_at = now
            elif self._hangs() and not self.ended.is_set():
                self._end()
            before = now

    def _talk(self) -> None:
        count = 0
        while not self.ended.is_set():
            count += 1
            try:
                self.store.set(self._key(self.rank), json.dumps(self._sign_of_life(count)))
                for rank in range(self.num_processes) if self._wants_to_listen() else ():
                    if rank != self.rank and self.store.check([self._key(rank)]):
                        self._hear(rank, json.loads(self.store.get(self._key(rank))))
            except RuntimeError:  # whoever keeps the store is gone, and the launcher notices
                self.ended.set()
            self.spoke_at = time.monotonic()
            self.ended.wait(self.period)

    def _wants_to_listen(self) -> bool:
        """Whether it is time: many processes that all read what all others say would keep the store busy."""
        now = time.monotonic()
        if not self.may_wait:
            return now - _last_seen["at"] > self.seconds / 2
        if now - self.listened_at < self.seconds / 5:
            return False
        self.listened_at = now
        return True

    def _sign_of_life(self, count: int) -> dict[str, Any]:
        frame = sys._current_frames().get(self.main_thread)
        where = "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
        return {
            "count": count,
            "idle": time.monotonic() - _last_seen["at"],
            "doing": _last_seen["doing"],
            "where": where,
            "who": f"{socket.gethostname()}, pid {os.getpid()}",
        }

    def _hear(self, rank: int, said: dict) -> None:
        if self.known[rank][0] != said["count"]:
            self.known[rank] = (said["count"], time.monotonic(), said)

    def _silence(self, rank: int) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self.known[rank][1]

    def _hangs(self) -> bool:
        others = {rank: said for rank, (count, _, said) in self.known.items() if count >= 0}
        if time.monotonic() - self.spoke_at > self.seconds:  # whoever keeps the store is stopped
            return True
        if self.may_wait:
            return any(self._silence(rank) > self.seconds for rank in others)
        if len(others) < len(self.known):  # one is through with training, so all have made their last step
            return False
        idle = [said.get("idle", 0) + self._silence(rank) for rank, said in others.items()]
        return min([time.monotonic() - _last_seen["at"], *idle]) > self.seconds

    def _end(self) -> None:
        lines, at_most = [], 3 * self.period + 1 + (self.seconds / 5 if self.may_wait else 0)
        living = [self.rank]
        for rank in range(self.num_processes):
            said = self._sign_of_life(0) if rank == self.rank else self.known[rank][2]
            if said.get("count") == -1:
                lines.append(f"process {rank}: at its end")
                continue
            line = f"process {rank} ({said.get('who', 'never heard of')}): {said.get('doing', '')}"
            if rank != self.rank and self._silence(rank) > at_most:
                line += f"; NO SIGN OF LIFE for {self._silence(rank):.0f} s: it is stopped, or its machine or the "
                line += "network is gone"
            else:
                living.append(rank)
                line += f", in {said.get('where')}"
            lines.append(line)
        if self.rank != min(living):
            time.sleep(self.period)  # one message is enough; the launcher ends this process when it was printed
        what = "A process is missing" if self.may_wait else "No process has got on"
        print(
            f"{what} for {self.seconds:.0f} s, so the run ends here.\n  " + "\n  ".join(lines) + "\nA process that "
            "waits for others is in a collective or in the backward pass; look at the one that is not. If it was at "
            f"work, raise `ddp_timeout`. What is finished is kept. {RESUME_HINT}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
