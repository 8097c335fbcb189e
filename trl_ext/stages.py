"""
A run of several stages (sample, score, train, sample again, ...) under one launch, resumable at any point.

Every stage is a function that runs in fresh processes, one for each process of the launch, and writes into a folder of
its own. Fresh processes give back all memory, start from clean state in Accelerate and DeepSpeed, and let a stage that
samples use a whole model while the one that trains shards it. When all of them are through, the folder gets its
`manifest.json`. A stage with a manifest is finished and never run again; a stage without is run, or run again.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from .sampling import model_fingerprint, process_state, write_atomically

PACKAGES = ("trl_ext", "trl", "transformers", "datasets", "peft", "accelerate", "deepspeed", "torch")
# imported once by the server that the stages' processes are forked from
PRELOADED = ("trl_ext.candidate_trainer", "trl_ext.sampling", "trl", "scipy.stats", "matplotlib")
# what would make a stage that only samples or scores build its models in shards
SHARDING_VARIABLES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


# in every folder a stage has begun
MARK = ".stage"


class Run:
    """
    A folder of stages.

    Args:
        folder (`str` or `Path`): where everything goes; all processes must see it.
        settings (`dict`): what determines the results, in JSON's types. Kept in `run.json` and compared on a resume.
        resume (`bool`): go on with what is in the folder. If not, the folder must not hold a run.
        may_change (`Sequence[str]`): names in `settings` that may differ on a resume.

    Raises:
        FileExistsError: there is a run in the folder and `resume` is False, or there is something else in it.
        ValueError: `resume` with other settings.
        FileNotFoundError: a process does not see the folder.
        RuntimeError: the processes of the launch do not see each other.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], *, resume: bool, may_change: Sequence[str] = ()):
        self.folder, self.number = Path(folder), 0
        self.state = process_state()
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.state.num_processes:
            raise RuntimeError(
                f"The launcher has started {launched} processes, and this one sees {self.state.num_processes}: each "
                "would do all the work, in the same folder. Without accelerator set `--use_cpu true`; else launch one "
                "process."
            )
        file = self.folder / "run.json"
        problem = None
        if self.state.is_main_process:
            problem = self._check(file, settings, resume, may_change)
            if problem is None:
                write_atomically(file, json.dumps({"settings": settings}, indent=2, default=str))
        problem = self._first(problem)
        if problem is not None:
            kind, message = problem
            raise kind(message)
        if not file.exists():
            raise FileNotFoundError(
                f"Process {self.state.process_index} does not see {file}, which the main process has written. Rounds "
                "need an output folder that all machines share: set `--output_dir` to one."
            )

    def _check(self, file: Path, settings, resume, may_change) -> tuple[type[Exception], str] | None:
        if not file.exists():
            others = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
            if not others:
                return None
            return FileExistsError, (
                f"{self.folder} is no folder of such a run: it has no run.json and holds {', '.join(others[:5])}. Set "
                "`--output_dir` to an empty or a new folder."
            )
        found = json.loads(file.read_text())["settings"]
        if found is None:  # see `start_afresh`
            return None
        if not resume:
            return FileExistsError, (
                f"{self.folder} holds an earlier run. Add `--resume_from_checkpoint true` to go on with it, or set "
                "another `--output_dir`."
            )
        wanted = json.loads(json.dumps(settings, default=str))
        changed = sorted(name for name in {*found, *wanted} - set(may_change) if found.get(name) != wanted.get(name))
        if not changed:
            return None
        return ValueError, (
            f"{self.folder} was begun with other settings: "
            + ", ".join(f"{name} was {found.get(name)!r:.80} and is {wanted.get(name)!r:.80}" for name in changed)
            + ". Resume with the settings it was begun with, or set another `--output_dir`."
        )

    def path(self, *parts: str) -> Path:
        """A path in the run's folder."""
        return self.folder.joinpath(*parts)

    def stage(
        self,
        name: str,
        function: Callable[..., dict[str, Any]],
        *,
        inputs: dict[str, Path] | None = None,
        shards_models: bool = False,
        **arguments: Any,
    ) -> dict[str, Any]:
        """
        Run a stage, or take what it left behind.

        Args:
            name (`str`): its folder in the run's.
            function (`Callable`): called in every process as `function(folder, **inputs, **arguments)`; returns
                figures, in JSON's types, those of the main process count. It must be importable by name. What it
                finds in its folder comes from an interrupted attempt.
            inputs (`dict[str, Path]`, *optional*): files and model folders it reads; their hashes are written down.
            shards_models (`bool`, defaults to `False`): whether it trains, under DeepSpeed or FSDP where the
                launch says so.
            arguments: anything else it takes; can be pickled.

        Returns:
            `dict`: the figures.

        Raises:
            RuntimeError: the stage failed in this process (its own error is printed above), or was made from other
                inputs than those there are now.
        """
        self.number += 1
        folder, inputs = self.folder / name, inputs or {}
        manifest = read_manifest(folder)
        self.state.wait_for_everyone()  # all processes have looked before one of them finishes the stage
        hashes, problem = {}, None
        if self.state.is_main_process:
            hashes = {key: fingerprint(Path(path)) for key, path in inputs.items()}
            changed = [key for key, value in hashes.items() if manifest and manifest["inputs"].get(key) != value]
            if changed:
                where = ", ".join(str(inputs[key]) for key in changed)
                problem = (
                    f"Stage {name!r} was made from another {' and '.join(changed)} than there is now in {where}. "
                    f"Remove {folder} and what follows it to make it anew, or set another `--output_dir`."
                )
        problem = self._first(problem)
        if problem is not None:
            raise RuntimeError(problem)
        if manifest is not None:
            return manifest["figures"]
        exit_code = _run_in_fresh_process(
            self.number, shards_models, (str(folder), name, function, {**inputs, **arguments}, hashes)
        )
        manifest = read_manifest(folder)
        if exit_code != 0 or manifest is None:
            if exit_code < 0:
                what = f"was ended by {signal.Signals(-exit_code).name}"
                what += ", as a rule because memory ran out" if exit_code == -signal.SIGKILL else ""
            else:
                what = "failed; its error is printed above" if exit_code else "left before its end"
            raise RuntimeError(
                f"Stage {name!r} {what}. Everything finished is kept: the same command with "
                "`--resume_from_checkpoint true` goes on from there."
            )
        return manifest["figures"]

    def _first(self, problem: Any) -> Any:
        """What went wrong on the first process that has something to say; the same on all."""
        problems = gather_object([problem]) if self.state.num_processes > 1 else [problem]
        return next(filter(None, problems), None)


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a finished stage; `None` of one that is not."""
    file = Path(folder) / "manifest.json"
    return json.loads(file.read_text()) if file.exists() else None


def fingerprint(path: Path) -> str:
    """A hash over a file, or over the weights in a model's folder; the name of a model of the Hub."""
    if path.is_file():
        with path.open("rb") as opened:
            return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"
    return model_fingerprint(path)


def start_afresh(folder: str | Path) -> None:
    """Remove the folders of an earlier run's stages, and nothing else, so that another run can begin there."""
    state, folder = process_state(), Path(folder)
    state.wait_for_everyone()
    if state.is_main_process and (folder / "run.json").is_file():
        for begun in sorted(folder.rglob(MARK)):
            shutil.rmtree(begun.parent, ignore_errors=True)
        # last: interrupted before, it is still the earlier run
        write_atomically(folder / "run.json", json.dumps({"settings": None}))
    state.wait_for_everyone()


def installed_versions() -> dict[str, str]:
    """Version of each package a result may depend on."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _run_in_fresh_process(number: int, shards_models: bool, job: tuple) -> int:
    # A server forks a process in no time, but must not have touched a GPU; so it is for CPUs only.
    on_cpu = process_state().device.type == "cpu"
    forks = on_cpu and "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(list(PRELOADED))
    sys.stdout.flush()
    sys.stderr.flush()
    process = context.Process(target=_stage_process, args=(number, shards_models, on_cpu, dict(os.environ), *job))
    process.start()
    try:
        process.join()
    except BaseException:
        process.kill()
        process.join()
        raise
    return process.exitcode


def _stage_process(number, shards_models, on_cpu, environment, folder, name, function, arguments, hashes) -> None:
    """What a stage's process does, from its first line to its last."""
    _die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    # the launcher's store is shared by all stages: each gets a part of its own
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(1000 * (restarts + 1) + number)
    elif "MASTER_PORT" in os.environ:
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + number)
    if not shards_models:
        for variable in SHARDING_VARIABLES:
            os.environ.pop(variable, None)

    from .cli import use_all_cpu_cores

    use_all_cpu_cores()
    folder, started = Path(folder), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    if on_cpu and not shards_models:
        PartialState(cpu=True)  # as in the process that asked for the stage; a trainer has its own settings for it
    figures = function(folder, **arguments)
    state = PartialState(cpu=on_cpu)
    state.wait_for_everyone()
    if state.is_main_process:
        manifest = {
            "stage": name,
            "inputs": hashes,
            "arguments": {key: _jsonable(value) for key, value in arguments.items()},
            "figures": figures,
            "outputs": {
                str(file.relative_to(folder)): file.stat().st_size
                for file in sorted(folder.rglob("*"))
                if file.is_file() and file.name != MARK
            },
            "versions": installed_versions(),
            "num_processes": state.num_processes,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
            "seconds": round(time.time() - started, 1),
        }
        write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2, default=str))
    state.wait_for_everyone()
    state.destroy_process_group()


def _jsonable(value: Any) -> Any:
    if hasattr(value, "__qualname__"):  # functions and classes
        return f"{value.__module__}:{value.__qualname__}"
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def _die_with_parent() -> None:
    """End this process when the one that asked for it is gone, however that ended."""
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
