"""A run of several stages (sample, score, train, sample again, ...) under one launch, resumable at any point.

Every stage is a function that runs in fresh processes, one for each process of the launch, and writes into a folder of
its own. Fresh processes give back all memory, start from clean state in Accelerate and DeepSpeed, and let a stage that
samples use a whole model while the one that trains shards it. When all of them are through, the folder gets its
`manifest.json`. A stage with a manifest is finished and never run again; a stage without is run, or run again.

A run has an id, which each of its manifests repeats, and a manifest holds hashes of what the stage has written and of
itself. So files that were copied from another run, edited or damaged are noticed, and refused. This is no proof
against somebody who can write to the folder and computes the hashes anew."""

import atexit
import json
import os
import signal
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..runtime.files import read_sealed, sealed, write_atomically
from ..runtime.hang_watchdog import hang_watchdog
from ..runtime.headings import Headings
from ..runtime.processes import all_gather_objects, process_state, refuse_unless_all_see
from ..runtime.run_lock import hold_folder
from ..runtime.settings import changes
from ..runtime.signals import EXIT_CODES, RESUME_HINT, STOP_SIGNALS, name_of
from .manifest import (
    RUN_KEYS,
    STAGE_MARKER,
    ManifestError,
    _begun,
    _verify,
    fingerprint,
    outputs_of,
    read_manifest,
    settings_of,
)
from .process import _free_port, _run_in_fresh_process


class Run:
    """
    A folder of stages.

    Args:
        folder (`str` or `Path`): where everything goes; all processes must see it.
        settings (`dict`): what determines the results, in JSON's types. Kept in `run.json` and compared on a resume.
        resume (`bool`): go on with what is in the folder. If not, the folder must not hold a run.
        may_change (`Sequence[str]`): names in `settings` that may differ on a resume.
        default_of (`Callable`, *optional*): the value that a setting counts with if the folder's run was begun before
            there was such an option; see [`~trl_ext.runs.settings.unset_value`].
        patience (`float`, defaults to 1800): seconds without a sign of life of a process, after which the run ends;
            see [`~trl_ext.runtime.hang_watchdog.hang_watchdog`].
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
        default_of: Callable[[str], Any] = lambda name: None,
        patience: float = 1800,
        headings: Headings | None = None,
    ):
        self.folder, self.patience, self.id = Path(folder), patience, None
        self.headings = headings or Headings()
        self.state = all_processes()
        hold_folder(self.folder)
        watchdog = ExitStack()
        watchdog.enter_context(hang_watchdog(patience))  # for as long as this process lives
        atexit.register(watchdog.close)
        file = self.folder / "run.json"
        problem = None
        if self.state.is_main_process:
            try:
                problem = self._check(settings, resume, may_change, default_of)
            except ValueError as error:  # of a file that was tampered with
                problem = ValueError, str(error)
            if problem is None:
                self.id = (read_sealed(file, RUN_KEYS)["id"] if _begun(self.folder) else None) or uuid.uuid4().hex
                write_atomically(file, sealed({"id": self.id, "settings": settings}))
        problem = self.first_from_any_rank(problem)
        if problem is not None:
            kind, message = problem
            raise kind(message)
        self.id = self.first_from_any_rank(self.id)
        refuse_unless_all_see(self.folder)

    def _check(self, settings, resume, may_change, default_of) -> tuple[type[Exception], str] | None:
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
        changed = changes(found, wanted, default_of, apart_from=may_change)
        if not changed:
            return None
        return ValueError, (
            f"{self.folder} was begun with other settings: {changed}. Resume with the settings it was begun with, or "
            "set another `--output_dir`."
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
                    f"Remove {folder} and the stages after it to run them again, or set another `--output_dir`."
                )
        problem = self.first_from_any_rank(problem)
        if problem is not None:
            raise RuntimeError(problem)
        if title is not None:
            self.headings.print(f"{self.folder}/{name}", title, is_finished=manifest is not None)
        if manifest is not None:
            return manifest["figures"]
        port = self.first_from_any_rank(_free_port() if self.state.is_main_process else None)
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
            manifest = self.first_from_any_rank(read_manifest(folder) if self.state.is_main_process else None)
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
            (folder / STAGE_MARKER).touch()
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
        manifest, problem = self.first_from_any_rank((manifest, problem) if self.state.is_main_process else None)
        if problem is not None:
            raise ManifestError(problem)
        return manifest

    def first_from_any_rank(self, problem: Any) -> Any:
        """What went wrong on the first process that has something to say; the same on all."""
        return next(filter(None, all_gather_objects(problem)), None)


def all_processes() -> PartialState:
    """
    The processes of the launch.

    Raises:
        RuntimeError: they do not see each other.
    """
    state, launched = process_state(), int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise RuntimeError(
            f"The launcher must start as many processes as see each other, got {launched} started and "
            f"{state.num_processes} seen: each would do all the work in the same folder. Without an accelerator set "
            "`--use_cpu true`. Otherwise launch one process."
        )
    return state
