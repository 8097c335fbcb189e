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
import socket
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
        self.folder = Path(folder)
        self.state = all_processes()
        file = self.folder / "run.json"
        problem = None
        if self.state.is_main_process:
            problem = self._check(settings, resume, may_change)
            if problem is None:
                write_atomically(file, json.dumps({"settings": settings}, indent=2, default=str))
        problem = self.first(problem)
        if problem is not None:
            kind, message = problem
            raise kind(message)
        if not file.exists():
            raise FileNotFoundError(
                f"Process {self.state.process_index} does not see {file}, which the main process has written. Rounds "
                "need an output folder that all machines share: set `--output_dir` to one."
            )

    def _check(self, settings, resume, may_change) -> tuple[type[Exception], str] | None:
        found = settings_of(self.folder)
        if found is None:
            others = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
            if not others:
                return None
            return FileExistsError, (
                f"{self.folder} is no folder of such a run: it has no run.json and holds {', '.join(others[:5])}. Set "
                "`--output_dir` to an empty or a new folder."
            )
        if not _begun(self.folder):  # it failed before there was anything to lose
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
        problem = self.first(problem)
        if problem is not None:
            raise RuntimeError(problem)
        if manifest is not None:
            return manifest["figures"]
        port = self.first(_free_port() if self.state.is_main_process else None)
        exit_code = _run_in_fresh_process(
            port, shards_models, (str(folder), name, function, {**inputs, **arguments}, hashes)
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

    def keep(self, name: str, files: dict[str, str]) -> Path:
        """
        Keep files that the stages read in a folder of the run's. On a resume they stay as they were.

        Args:
            name (`str`): the folder.
            files (`dict[str, str]`): contents by name.

        Returns:
            `Path`: the folder.
        """
        folder = self.path(name)
        if self.state.is_main_process and read_manifest(folder) is None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MARK).touch()
            for file, content in files.items():
                write_atomically(folder / file, content)
            write_atomically(folder / "manifest.json", json.dumps({"outputs": sorted(files)}))
        self.state.wait_for_everyone()
        return folder

    def first(self, problem: Any) -> Any:
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


def all_processes() -> PartialState:
    """
    The processes of the launch.

    Raises:
        RuntimeError: they do not see each other.
    """
    state, launched = process_state(), int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise RuntimeError(
            f"The launcher has started {launched} processes, and this one sees {state.num_processes}: each would do "
            "all the work, in the same folder. Without accelerator set `--use_cpu true`; else launch one process."
        )
    return state


def settings_of(folder: str | Path) -> dict[str, Any] | None:
    """The settings of the run in a folder; `None` if there is none."""
    file = Path(folder) / "run.json"
    return json.loads(file.read_text())["settings"] if file.is_file() else None


def _begun(folder: Path) -> list[Path]:
    """Folders that a run has begun to fill, but not those of a run inside of it."""
    begun = (mark.parent for mark in sorted(folder.rglob(MARK)))
    return [
        stage
        for stage in begun
        if not any((parent / "run.json").exists() for parent in (stage, *stage.parents) if folder in parent.parents)
    ]


def start_afresh(folder: str | Path) -> None:
    """Remove the folders that an earlier run has filled, and nothing else, so that another run can begin there."""
    state, folder = process_state(), Path(folder)
    state.wait_for_everyone()
    if state.is_main_process and settings_of(folder) is not None:
        begun = _begun(folder)
        for stage in begun:  # first: interrupted before the end, nothing half removed looks finished
            (stage / "manifest.json").unlink(missing_ok=True)
        for stage in begun:
            shutil.rmtree(stage, ignore_errors=True)
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


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("", 0))
        return opened.getsockname()[1]


def _run_in_fresh_process(port: int, shards_models: bool, job: tuple) -> int:
    # A server forks a process in no time, but must not have touched a GPU; so it is for CPUs only.
    on_cpu = process_state().device.type == "cpu"
    forks = on_cpu and "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(list(PRELOADED))
    sys.stdout.flush()
    sys.stderr.flush()
    process = context.Process(target=_stage_process, args=(port, shards_models, on_cpu, dict(os.environ), *job))
    process.start()
    try:
        process.join()
    except BaseException:
        process.kill()
        process.join()
        raise
    return process.exitcode


def _stage_process(port, shards_models, on_cpu, environment, folder, name, function, arguments, hashes) -> None:
    """What a stage's process does, from its first line to its last."""
    _die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    # where the stage's processes meet: in the launcher's store they would find the addresses of those that asked
    if "MASTER_PORT" in os.environ:
        os.environ.update({"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"})
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
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return without_secrets(value)
    if hasattr(value, "__qualname__"):  # functions and classes
        return f"{value.__module__}:{value.__qualname__}"
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line to write down: what follows `--hub_token` and the like is left out."""
    found, is_secret = [], False
    for argument in arguments:
        name, _, value = argument.partition("=")
        ends_so = name.startswith("--") and name.endswith("token")
        found.append("..." if is_secret else f"{name}=..." if ends_so and value else argument)
        is_secret = ends_so and not value
    return found


def _die_with_parent() -> None:
    """End this process when the one that asked for it is gone, however that ended."""
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
