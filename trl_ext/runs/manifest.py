"""Manifests of stages: what a stage was given, what it made, and whether that is still there."""

import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..runtime.files import read_sealed
from ..runtime.fingerprints import file_digest, model_fingerprint
from ..runtime.processes import process_state
from ..runtime.run_lock import hold_folder

PACKAGES = ("trl_ext", "trl", "transformers", "datasets", "peft", "accelerate", "deepspeed", "torch")


# in every folder a stage has begun
STAGE_MARKER = ".stage"


# what the files hold, and of which type
RUN_KEYS = {"id": str, "settings": dict}


MANIFEST_KEYS = {"stage": str, "run": str, "inputs": dict, "figures": dict, "outputs": dict}


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
    return f"Restore it, or remove {folder} and the stages after it to run them again, or set another `--output_dir`."


def outputs_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of each file of a stage, but for checkpoints, which nobody needs afterwards."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        is_checkpoint = name.parts[0].startswith("checkpoint-")
        if file.is_file() and not is_checkpoint and name.name not in (STAGE_MARKER, "manifest.json"):
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


def settings_of(folder: str | Path) -> dict[str, Any] | None:
    """The settings of the run in a folder; `None` if there is none. A `ValueError` if they were changed or damaged."""
    file = Path(folder) / "run.json"
    if not file.is_file():
        return None
    try:
        return read_sealed(file, RUN_KEYS)["settings"]
    except ValueError as error:
        raise ValueError(f"{error} Restore it, or set another `--output_dir`.") from None


def _begun(folder: Path) -> list[Path]:
    """Folders that a run has begun to fill, but not those of a run inside of it."""
    begun = (mark.parent for mark in sorted(folder.rglob(STAGE_MARKER)))
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
