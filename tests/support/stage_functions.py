"""
What the stages in `test_stages.py` do: a module of its own, because a stage's process finds its function by name.

Run as a script under torchrun, it is the run of several stages on two processes.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from trl_ext.runs.process import SHARDING_VARIABLES
from trl_ext.runs.run import Run
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig

CALLS = []  # of this process


def look_around(folder: Path, **arguments) -> dict:
    """Notes what this process sees, and that it has been here."""
    CALLS.append(arguments)
    with (folder / "calls").open("a") as calls:
        calls.write("x")
    variables = ("TRL_EXT_SEEN", "TRL_EXT_REMOVED", "MASTER_PORT", *SHARDING_VARIABLES)
    return {
        "pid": os.getpid(),
        "calls": len(CALLS),
        "arguments": {name: str(value) for name, value in arguments.items()},
        "environment": {name: os.environ[name] for name in variables if name in os.environ},
    }


def end_early(folder: Path, how: str) -> dict:
    """Does not come to its end, unless it finds that it has been here before."""
    if (folder / "begun").exists():
        return {"found": (folder / "begun").read_text()}
    (folder / "begun").write_text(how)
    if how == "error":
        raise ValueError("so it goes")
    if how == "exit":
        raise SystemExit(0)
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(60)
    raise AssertionError("still there")


def sleep(folder: Path) -> dict:
    (folder / "pid.new").write_text(str(os.getpid()))
    (folder / "pid.new").rename(folder / "pid")
    time.sleep(300)
    return {}


def run_a_sleeping_stage(folder: str) -> None:
    # a process that was forked while a run held its signals back has them blocked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    Run(folder, {}, resume=False).stage("sleeping", sleep)


def meet(folder: Path, number: int) -> dict:
    """Both kinds of collectives; every process writes down what it heard."""
    state = PartialState()
    total = torch.tensor([state.process_index + number])
    torch.distributed.all_reduce(total)
    heard = {"total": total.item(), "ranks": gather_object([state.process_index]), "pid": os.getpid()}
    (folder / f"{state.process_index}.json").write_text(json.dumps(heard))
    return {**heard, "world": state.num_processes}


def sample(folder: Path, model: Path, prompts: list[dict], settings: dict) -> dict:
    rows, _ = sample_candidates(model, prompts, SamplingConfig(**settings), folder, shard_size=2)
    return {"rows": rows, "world": PartialState().num_processes}


def fail_on_the_second(folder: Path) -> dict:
    if PartialState().process_index == 1:
        raise ValueError("only here")
    PartialState().wait_for_everyone()
    return {}


def run_on_two_processes(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    run = Run(job["folder"], {}, resume=False)
    figures = [run.stage(f"meeting-{number}", meet, number=number) for number in range(2)]
    sampling = {"prompts": job["prompts"], "settings": job["settings"]}
    figures.append(run.stage("sampling", sample, inputs={"model": Path(job["model"])}, **sampling))
    Path(job_file).with_name(f"figures-{run.state.process_index}.json").write_text(json.dumps(figures))
    run.stage("failing", fail_on_the_second)


if __name__ == "__main__":
    from tests.support import stage_functions  # by the name that the stages' processes know

    stage_functions.run_on_two_processes(sys.argv[1])
