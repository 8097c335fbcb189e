"""A stage in a fresh process."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from accelerate import PartialState

from ..runtime.files import sealed, write_atomically
from ..runtime.hang_watchdog import hang_watchdog
from ..runtime.processes import barrier_without_timeout, process_state
from ..runtime.signals import STOP_SIGNALS, on_stop, stop_signals_blocked
from ..runtime.threads import settle_threads
from .manifest import STAGE_MARKER, _jsonable, installed_versions, outputs_of

# imported once by the server that the stages' processes are forked from
PRELOADED = (
    "trl_ext.runtime.library_warnings",
    "trl_ext.trainers.candidate_trainer",
    "trl_ext.sampling.candidates",
    "trl",
    "scipy.stats",
    "matplotlib",
)


# what would make a stage that only samples or scores build its models in shards
SHARDING_VARIABLES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("", 0))
        return opened.getsockname()[1]


def _run_in_fresh_process(port: int, shards_models: bool, patience: float, job: tuple) -> int:
    settle_threads()  # whose environment the server gets, and the stage
    # A server forks a process in no time, but must not have touched a GPU; so it is for CPUs only.
    on_cpu = process_state().device.type == "cpu"
    forks = on_cpu and "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(list(PRELOADED))
    sys.stdout.flush()
    sys.stderr.flush()
    how = (port, shards_models, patience, on_cpu, dict(os.environ))
    process = context.Process(target=_stage_process, args=(*how, *job))
    # a signal may come to the whole process group: the server has to outlive it, or nobody would know how the stage
    # has ended, and the stage must not get it before it can handle it
    resource_tracker.ensure_running()  # which lifts the block while it starts
    asked: list[int] = []

    def pass_on(number):  # a thread may get the signal, and its handler runs here all the same
        asked.append(number)
        if process.pid is not None:
            process.terminate()
        elif forks:  # the server is still importing
            raise _EndedAtStart

    with on_stop(pass_on):
        try:
            if forks:
                with stop_signals_blocked():
                    forkserver.ensure_running()
                process.start()
            else:
                with stop_signals_blocked():
                    process.start()
        except _EndedAtStart:
            os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # or it would import to the end
            return 128 + asked[0]
        if asked:
            process.terminate()
        try:
            process.join()
        except BaseException:
            process.kill()
            process.join()
            raise
    return 128 + asked[0] if asked else process.exitcode


class _EndedAtStart(BaseException):
    pass


def _stage_process(port, shards_models, patience, on_cpu, environment, *job) -> None:
    """What a stage's process does, from its first line to its last."""
    from ..runtime import library_warnings  # noqa: F401  (a process that is spawned has not preloaded it)

    _die_with_parent()
    multiprocessing.set_start_method(None, force=True)  # the platform's, for workers that load data, not the server's
    os.environ.clear()
    os.environ.update(environment)
    # where the stage's processes meet: in the launcher's store they would find the addresses of those that asked
    if "MASTER_PORT" in os.environ:
        os.environ.update({"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"})
    if not shards_models:
        for variable in SHARDING_VARIABLES:
            os.environ.pop(variable, None)
    with on_stop():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if shards_models:  # a trainer has its own settings for the process group, and watches it itself
            _run_stage(on_cpu, *job)
            return
        PartialState(cpu=on_cpu, timeout=timedelta(seconds=patience))
        with hang_watchdog(patience):
            _run_stage(on_cpu, *job)


def _run_stage(on_cpu, folder, name, run, function, arguments, hashes) -> None:
    folder, started = Path(folder), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAGE_MARKER).touch()
    figures = function(folder, **arguments)
    state = PartialState(cpu=on_cpu)
    barrier_without_timeout()
    if state.is_main_process:
        manifest = {
            "stage": name,
            "run": run,
            "inputs": hashes,
            "arguments": {key: _jsonable(value) for key, value in arguments.items()},
            "figures": figures,
            "outputs": outputs_of(folder),
            "versions": installed_versions(),
            "num_processes": state.num_processes,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
            "seconds": round(time.time() - started, 1),
        }
        write_atomically(folder / "manifest.json", sealed(manifest))
    state.wait_for_everyone()
    state.destroy_process_group()


def _die_with_parent() -> None:
    """End this process when the one that asked for it is gone, however that ended."""
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
