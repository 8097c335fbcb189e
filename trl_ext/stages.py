"""
A run of several stages (sample, score, train, sample again, ...) under one launch, resumable at any point.

Every stage is a function that runs in fresh processes, one for each process of the launch, and writes into a folder of
its own. Fresh processes give back all memory, start from clean state in Accelerate and DeepSpeed, and let a stage that
samples use a whole model while the one that trains shards it. When all of them are through, the folder gets its
`manifest.json`. A stage with a manifest is finished and never run again; a stage without is run, or run again.

A run has an id, which each of its manifests repeats, and a manifest holds hashes of what the stage has written and of
itself. So files that were copied from another run, edited or damaged are noticed, and refused. This is no proof
against somebody who can write to the folder and computes the hashes anew.
"""

import atexit
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
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .faults import watched
from .headings import Headings
from .machines import from_all, refuse_unless_all_see, wait_as_long_as_it_takes
from .run_lock import hold_folder
from .sampling import file_digest, model_fingerprint, process_state, read_sealed, sealed, write_atomically
from .signals import EXIT_CODES, RESUME_HINT, STOP_SIGNALS, name_of, on_stop, stop_signals_blocked
from .threads import settle_threads

PACKAGES = ("trl_ext", "trl", "transformers", "datasets", "peft", "accelerate", "deepspeed", "torch")
# imported once by the server that the stages' processes are forked from
PRELOADED = (
    "trl_ext.library_warnings",
    "trl_ext.candidate_trainer",
    "trl_ext.sampling",
    "trl",
    "scipy.stats",
    "matplotlib",
)
# what would make a stage that only samples or scores build its models in shards
SHARDING_VARIABLES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


# in every folder a stage has begun
MARK = ".stage"
# what the files hold, and of which type
RUN_KEYS = {"id": str, "settings": dict}
MANIFEST_KEYS = {"stage": str, "run": str, "inputs": dict, "figures": dict, "outputs": dict}


class Run:
    """
    A folder of stages.

    Args:
        folder (`str` or `Path`): where everything goes; all processes must see it.
        settings (`dict`): what determines the results, in JSON's types. Kept in `run.json` and compared on a resume.
        resume (`bool`): go on with what is in the folder. If not, the folder must not hold a run.
        may_change (`Sequence[str]`): names in `settings` that may differ on a resume.
        patience (`float`, defaults to 1800): seconds without a sign of life of a process, after which the run ends;
            see [`~trl_ext.faults.watched`].
        headings ([`Headings`], *optional*): numbers the stages that have a title; without it they are counted.

    Raises:
        FileExistsError: another run is at work in the folder; or it holds one and `resume` is False; or something
            else.
        ValueError: `resume` with other settings, or run.json was changed or damaged.
        FileNotFoundError: a process does not see the folder; on all processes.
        RuntimeError: the processes of the launch do not see each other.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        *,
        resume: bool,
        may_change: Sequence[str] = (),
        patience: float = 1800,
        headings: Headings | None = None,
    ):
        self.folder, self.patience, self.id = Path(folder), patience, None
        self.headings = headings or Headings()
        self.state = all_processes()
        hold_folder(self.folder)
        watch = ExitStack()
        watch.enter_context(watched(patience, may_wait=True))  # for as long as this process lives
        atexit.register(watch.close)
        file = self.folder / "run.json"
        problem = None
        if self.state.is_main_process:
            try:
                problem = self._check(settings, resume, may_change)
            except ValueError as error:  # of a file that was tampered with
                problem = ValueError, str(error)
            if problem is None:
                self.id = (read_sealed(file, RUN_KEYS)["id"] if _begun(self.folder) else None) or uuid.uuid4().hex
                write_atomically(file, sealed({"id": self.id, "settings": settings}))
        problem = self.first(problem)
        if problem is not None:
            kind, message = problem
            raise kind(message)
        self.id = self.first(self.id)
        refuse_unless_all_see(self.folder)

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
        title: str | None = None,
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
            title (`str`, *optional*): what it does, for its heading. Without one it has no heading.
            arguments: anything else it takes; can be pickled.

        Returns:
            `dict`: the figures.

        Raises:
            SystemExit: the stage was ended by SIGTERM, code 143, or SIGINT, code 130.
            RuntimeError: the stage failed in this process (its own error is printed above), or was made from other
                inputs than those there are now.
            ManifestError: what it left behind was changed since, or is another run's.
        """
        folder, inputs = self.folder / name, inputs or {}
        manifest, hashes = self._finished(name), {}
        problem = None
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
        if title is not None:
            self.headings.print(f"{self.folder}/{name}", title, is_finished=manifest is not None)
        if manifest is not None:
            return manifest["figures"]
        port = self.first(_free_port() if self.state.is_main_process else None)
        exit_code = _run_in_fresh_process(
            port, shards_models, self.patience, (str(folder), name, self.id, function, {**inputs, **arguments}, hashes)
        )
        number = EXIT_CODES.get(exit_code, -exit_code)
        if number in STOP_SIGNALS:
            self.state.print(f"{name_of(number)}: ended in stage {name!r}. What is finished is kept. {RESUME_HINT}")
            raise SystemExit(128 + number)
        manifest = None
        if exit_code == 0:
            # the main process's: on a network file system another may not see it yet
            manifest = self.first(read_manifest(folder) if self.state.is_main_process else None)
        if manifest is None:
            if exit_code < 0:
                what = f"was ended by {signal.Signals(-exit_code).name}"
                what += ", as a rule because memory ran out" if exit_code == -signal.SIGKILL else ""
            else:
                what = "failed; its error is printed above" if exit_code else "left before its end"
            raise RuntimeError(f"Stage {name!r} {what}. What is finished is kept. {RESUME_HINT}")
        return manifest["figures"]

    def keep(self, name: str, files: dict[str, str]) -> Path:
        """
        Keep files that the stages read in a folder of the run's. On a resume they stay as they were.

        Args:
            name (`str`): the folder.
            files (`dict[str, str]`): contents by name.

        Returns:
            `Path`: the folder.

        Raises:
            ManifestError: they were changed since, or are another run's.
        """
        folder = self.path(name)
        if self._finished(name) is None and self.state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MARK).touch()
            for file, content in files.items():
                write_atomically(folder / file, content)
            manifest = {"stage": name, "run": self.id, "inputs": {}, "figures": {}, "outputs": outputs_of(folder)}
            write_atomically(folder / "manifest.json", sealed(manifest))
        self.state.wait_for_everyone()
        return folder

    def _finished(self, name: str) -> dict[str, Any] | None:
        """The manifest of a stage, if it is finished, the same on all processes; the main one has verified it."""
        folder, manifest, problem = self.folder / name, None, None
        if self.state.is_main_process:
            try:
                manifest = read_manifest(folder)
                if manifest is not None:
                    _verify(folder, manifest, name, self.id)
            except ManifestError as error:
                problem = str(error)
        manifest, problem = self.first((manifest, problem) if self.state.is_main_process else None)
        if problem is not None:
            raise ManifestError(problem)
        return manifest

    def first(self, problem: Any) -> Any:
        """What went wrong on the first process that has something to say; the same on all."""
        return next(filter(None, from_all(problem)), None)


class ManifestError(ValueError):
    """What a stage left behind was changed since, or is another run's."""


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """
    The manifest of a finished stage; `None` of one that is not.

    Raises:
        ManifestError: it was changed or damaged since it was written.
    """
    file = Path(folder) / "manifest.json"
    if not file.exists():
        return None
    try:
        return read_sealed(file, MANIFEST_KEYS)
    except ValueError as error:
        raise ManifestError(f"{error} {_remedy(Path(folder))}") from None


def _remedy(folder: Path) -> str:
    return (
        f"Put back what was there, or remove {folder} and what follows it to make it anew, or set another "
        "`--output_dir`."
    )


def outputs_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of each file of a stage, but for checkpoints, which nobody needs afterwards."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        is_checkpoint = name.parts[0].startswith("checkpoint-")
        if file.is_file() and not is_checkpoint and name.name not in (MARK, "manifest.json"):
            found[str(name)] = {"size": file.stat().st_size, "sha256": file_digest(file)}
    return found


def _verify(folder: Path, manifest: dict[str, Any], name: str, run: str) -> None:
    """
    Compare a stage with its manifest.

    Each file is read once in the life of this process: the weights of a model are hashed as an input of the next stage
    anyway.
    """

    def refuse(what: str) -> None:
        raise ManifestError(f"{what}. {_remedy(folder)}")

    file = folder / "manifest.json"
    if manifest["run"] != run:
        refuse(f"{file} belongs to another run: its id is {manifest['run']!r:.40}, and this run's is {run!r}")
    if manifest["stage"] != name:
        refuse(f"{file} belongs to another stage, {manifest['stage']!r:.80}, and was copied to that of {name!r}")
    for output, written in manifest["outputs"].items():
        path = folder / output
        if not isinstance(written, dict) or not {"size", "sha256"} <= set(written):
            refuse(f"{file} does not say what {output} held")
        if not path.is_file():
            refuse(f"{path} is gone, which stage {name!r} had written")
        if path.stat().st_size != written["size"]:
            refuse(f"{path} has {path.stat().st_size} bytes, and stage {name!r} had written {written['size']}")
        try:
            digest = file_digest(path)
        except ValueError as error:
            refuse(str(error).rstrip(". "))
        if digest != written["sha256"]:
            refuse(f"{path} holds something else than stage {name!r} had written")


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
    """The settings of the run in a folder; `None` if there is none. A `ValueError` if they were changed or damaged."""
    file = Path(folder) / "run.json"
    if not file.is_file():
        return None
    try:
        return read_sealed(file, RUN_KEYS)["settings"]
    except ValueError as error:
        raise ValueError(f"{error} Put back what was there, or set another `--output_dir`.") from None


def _begun(folder: Path) -> list[Path]:
    """Folders that a run has begun to fill, but not those of a run inside of it."""
    begun = (mark.parent for mark in sorted(folder.rglob(MARK)))
    return [
        stage
        for stage in begun
        if not any((parent / "run.json").exists() for parent in (stage, *stage.parents) if folder in parent.parents)
    ]


def start_afresh(folder: str | Path) -> None:
    """
    Remove the folders that an earlier run has filled, and nothing else, so that another run can begin there.

    Raises:
        FileExistsError: that run is still at work.
    """
    state, folder = process_state(), Path(folder)
    hold_folder(folder)
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
    from . import library_warnings  # noqa: F401  (a process that is spawned has not preloaded it)

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
        with watched(patience, may_wait=True):
            _run_stage(on_cpu, *job)


def _run_stage(on_cpu, folder, name, run, function, arguments, hashes) -> None:
    folder, started = Path(folder), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    figures = function(folder, **arguments)
    state = PartialState(cpu=on_cpu)
    wait_as_long_as_it_takes()
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
