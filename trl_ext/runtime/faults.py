"""Training that is asked to end: the step is finished, and a checkpoint saved."""

import copy
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from .signals import STOP_SIGNALS, name_of, stop_signals_blocked


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
