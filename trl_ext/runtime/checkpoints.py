"""
Checkpoints that are whole.

A checkpoint is sealed when all processes have written it: `checkpoint.json`, written last, lists its files with sizes,
and how the run was split. A run resumes from the last sealed one that has all its files in these sizes. What they hold
is not compared. Until it is sealed it holds `checkpoint.json.unfinished`, which tells one that was interrupted from
one that another program wrote.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .files import unfinished_path, write_atomically
from .parallelism import asks_for_fsdp
from .processes import SHARE_CHECKPOINTS, all_gather_objects, ranks_without_access, refuse_unless_all_see_checkpoint
from .run_lock import hold_folder

SEAL = "checkpoint.json"
UNFINISHED = unfinished_path(Path(SEAL)).name  # so that it is gone when the seal is there
RESUME_LAST = ("true", "yes", "last", "latest")


def wants_to_resume(training_args) -> bool:
    """Whether `--resume_from_checkpoint` is given, and not as a no."""
    return str(training_args.resume_from_checkpoint).lower() not in ("none", "false", "no")


def checkpoint_to_resume(training_args) -> str | None:
    """
    The checkpoint to resume from: `--resume_from_checkpoint PATH`, or `true` for the last whole one in the output
    folder. `None` if there is none yet, so that the same command serves the first start and every restart.

    Checkpoints that are not whole, because the run was killed while it wrote them or because a file was lost or has
    changed since, are passed over, and named. If none is whole the run begins anew only over those it was killed in;
    others, which it would write over, are refused. Without `--resume_from_checkpoint`, checkpoints of an earlier run
    in the output folder are refused: a later resume could not tell whose they are. For the same reason, one of the
    output folder that is named has to be the last whole one. All processes have to call this.

    Args:
        training_args: with `output_dir` and `resume_from_checkpoint`.

    Raises:
        FileNotFoundError: a named checkpoint is not there or not whole, or not on all machines.
        FileExistsError: another run is in the output folder; or it holds checkpoints and it was not asked to resume,
            or none of them is whole, or there are whole ones after the one that is named.
        ValueError: the checkpoint belongs to steps of other size, or its parts to another number of processes.
    """
    output_dir = Path(training_args.output_dir)
    hold_folder(output_dir, create=False)
    # of all, before one of them writes anything
    checkpoints = max(all_gather_objects([path.name for path in _checkpoints(output_dir)]), key=len)
    if wants_to_resume(training_args):
        return find_checkpoint(training_args, training_args.resume_from_checkpoint)
    if checkpoints:
        raise FileExistsError(
            f"{output_dir} holds checkpoints of an earlier run, up to {checkpoints[0]}. Add "
            "`--resume_from_checkpoint true` to resume from there, or set another `--output_dir`."
        )
    return None


def find_checkpoint(training_args, wanted: str | bool) -> str | None:
    """[`checkpoint_to_resume`] for `wanted`, a path or a word for the last one; called by all processes."""
    state = PartialState()
    if str(wanted).lower() not in RESUME_LAST:
        problem = _problem(Path(wanted))
        if problem is not None:
            raise FileNotFoundError(
                f"`resume_from_checkpoint` must be a whole checkpoint, got {str(wanted)!r}: {problem}. Name a whole "
                "one, or set it to 'true' for the last whole one in the output folder. To start from the weights of "
                "another program's checkpoint, set `--model_name_or_path` to its folder."
            )
        if Path(wanted).resolve().parent == Path(training_args.output_dir).resolve():
            _refuse_unless_it_is_last(Path(wanted))
        _refuse_unless_it_fits(Path(wanted), training_args)
        return str(wanted)
    # of all processes, as a folder need not look the same from each machine
    names = all_gather_objects([path.name for path in _checkpoints(Path(training_args.output_dir))])
    lost = None
    for name in sorted({name for seen in names for name in seen}, key=_step, reverse=True):
        checkpoint = Path(training_args.output_dir) / name
        problem = _problem(checkpoint)
        if problem is None:
            _refuse_unless_it_fits(checkpoint, training_args)
            return str(checkpoint)
        state.print(f"{checkpoint} is skipped: {problem}.")
        if lost is None and not any(all_gather_objects((checkpoint / UNFINISHED).exists())):
            lost = f"{checkpoint} is not whole ({problem})"
    if lost is not None:
        raise FileExistsError(
            f"{lost}, and there is no other to resume from. A new run would overwrite it. To start over, remove it or "
            "set another `--output_dir`. To start from its weights, set `--model_name_or_path` to its folder."
        )
    return None


def _refuse_unless_it_is_last(checkpoint: Path) -> None:
    names = [path.name for path in _checkpoints(checkpoint.parent)]
    later = names[: names.index(checkpoint.name)] if checkpoint.name in names else []  # one set aside is none of them
    whole = (name for name in later if _read_seal(checkpoint.parent / name)[1] is None)
    last = all_gather_objects(next(whole, None))[0]
    if last is not None:
        raise FileExistsError(
            f"{checkpoint.parent} holds whole checkpoints after {checkpoint.name}, up to {last}. A later "
            "`--resume_from_checkpoint true` could not tell them from those of this run. Move them away, or set "
            "another `--output_dir`, which leaves them where they are."
        )


def _step(name: str) -> int:
    return int(name.removeprefix("checkpoint-"))


def _checkpoints(folder: Path) -> list[Path]:
    """Those in a folder, the last one first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: _step(path.name), reverse=True)


def _problem(checkpoint: Path) -> str | None:
    """
    Why a checkpoint cannot be resumed from, the same on all processes; `None` if it can.

    Raises:
        FileNotFoundError: a machine has it whole and another does not have it. It must not be passed over: what
            comes before it may be gone, and a run that began anew would write over it.
    """
    seal_problem = _read_seal(checkpoint)[1]
    everybody = all_gather_objects((socket.gethostname(), seal_problem))
    missing = [(number, *found) for number, found in enumerate(everybody) if found[1] is not None]
    if 0 < len(missing) < len(everybody):
        number, host, problem = missing[0]
        raise FileNotFoundError(
            f"Process {number} ({host}) does not see {checkpoint} as others do: {problem}. {SHARE_CHECKPOINTS}"
        )
    if missing:
        return missing[0][-1]
    problem = next(filter(None, all_gather_objects(_damage(checkpoint))), None)
    if problem is None:
        refuse_unless_all_see_checkpoint(checkpoint)
    return problem


def _damage(checkpoint: Path) -> str | None:
    """The first file that is missing or has another size than it was written with."""
    for name, size in sorted(_read_seal(checkpoint)[0]["files"].items()):
        file = checkpoint / name
        try:
            if not file.is_file():
                return f"{name} is gone"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes and was written with {size}"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def _read_seal(checkpoint: Path) -> tuple[dict[str, Any], str | None]:
    if not checkpoint.is_dir():
        return {}, "there is no such folder"
    try:
        seal = json.loads((checkpoint / SEAL).read_text())
        files = {str(name): int(size) for name, size in seal["files"].items()}
        return {"files": files, "run": {**seal["run"]}}, None
    except FileNotFoundError:
        if (checkpoint / UNFINISHED).exists():
            return {}, f"it has no {SEAL}, so the run that wrote it was interrupted"
        return {}, f"it has no {SEAL} and is not unfinished either, so this package has not written it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"its {SEAL} cannot be read ({type(error).__name__}: {error})"


def _refuse_unless_it_fits(checkpoint: Path, training_args) -> None:
    """
    Raise a `ValueError` unless the run that goes on takes the same rows in each step, and can take up what each
    process has kept.

    Weights and optimiser states that every process holds whole can be taken up by any number of processes. Losses and
    gradients of this package's trainers do not depend on how a step is split; those of TRL's ORPO and KTO do, by a
    little. Shards can be taken up by as many processes alone.
    """
    before, now = _read_seal(checkpoint)[0]["run"], _run(training_args)
    if before.get("only_model"):
        raise ValueError(
            f"{checkpoint} holds only the model (`save_only_model`), and the optimiser would start over in the middle "
            "of the run. Start a new run from its weights: set `--model_name_or_path` to its folder, and another "
            "`--output_dir`."
        )
    if before.get("prompts_per_step") != now["prompts_per_step"]:
        raise ValueError(
            f"{checkpoint} was written with {before.get('prompts_per_step')} prompts per optimiser step "
            f"({before.get('num_processes')} processes), and this run takes {now['prompts_per_step']} "
            f"({now['num_processes']} processes). It would skip rows or repeat them. Set "
            "`per_device_train_batch_size` and `gradient_accumulation_steps` so that their product with the number of "
            f"processes is {before.get('prompts_per_step')}."
        )
    if before.get("sharding") != now["sharding"] or (
        now["sharding"] != "none" and before.get("num_processes") != now["num_processes"]
    ):
        raise ValueError(
            f"{checkpoint} was written by {before.get('num_processes')} processes with sharding "
            f"{before.get('sharding')!r}, and this run has {now['num_processes']} with {now['sharding']!r}. The parts "
            "that each process has saved do not fit. Launch as many processes with the same strategy, or start a new "
            "run from the weights: set `--model_name_or_path` to the folder, and another `--output_dir`."
        )


def _run(training_args) -> dict[str, Any]:
    """How a run is split."""
    num_processes = training_args.world_size
    per_process = training_args.train_batch_size * training_args.gradient_accumulation_steps
    return {
        "num_processes": num_processes,
        "prompts_per_step": per_process * num_processes,
        "sharding": _sharding(training_args),
        "only_model": training_args.save_only_model,
    }


def _sharding(training_args) -> str:
    if training_args.deepspeed_plugin is not None:
        stage = training_args.deepspeed_plugin.deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        return f"ZeRO-{stage}"  # 0 as well: the files have other names than without DeepSpeed
    return "none" if asks_for_fsdp(training_args) is None else "FSDP"


# Writing


def make_room(checkpoint: Path) -> None:
    """
    Begin a checkpoint: remove what an interrupted run, or one that went on from an earlier step, has left of it, and
    mark it as unfinished.
    """
    state = PartialState()
    if state.is_local_main_process:  # of each machine, as they may not share the folder
        (checkpoint / SEAL).unlink(missing_ok=True)  # first: half removed it must not look whole
        shutil.rmtree(checkpoint, ignore_errors=True)
    state.wait_for_everyone()
    if state.is_local_main_process:
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / UNFINISHED).touch()
    state.wait_for_everyone()


def seal(checkpoint: Path, training_args) -> None:
    """
    Say that a checkpoint is whole; called by all processes when they have written their part.

    One process of each machine lists the files that the machine sees, once the disk has them: older checkpoints are
    removed after this. Where machines do not share the folder, each seals what it has.
    """
    state = PartialState()
    state.wait_for_everyone()
    machine = "all"
    if state.num_processes > _local_count(state) and ranks_without_access(checkpoint):
        machine = os.environ.get("GROUP_RANK", "0")
    sizes = {}
    if state.is_local_main_process:
        for path in checkpoint.rglob("*"):
            if path.is_file() and path.name not in (SEAL, UNFINISHED):
                with path.open("rb") as opened:
                    os.fsync(opened.fileno())
                    sizes[str(path.relative_to(checkpoint))] = os.fstat(opened.fileno()).st_size
    # a network file system need not show all machines all files at once
    seen = {
        index: found for index, (where, found) in enumerate(all_gather_objects((machine, sizes))) if where == machine
    }
    if state.process_index == min(seen):
        files = dict(sorted(item for found in seen.values() for item in found.items()))
        if files:
            write_atomically(checkpoint / SEAL, json.dumps({"files": files, "run": _run(training_args)}, indent=2))
        else:  # a machine that has no part of it
            shutil.rmtree(checkpoint, ignore_errors=True)
    state.wait_for_everyone()


def _local_count(state: PartialState) -> int:
    """Processes on this machine."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)), state.num_processes)


class DiskFullError(OSError):
    """There was no room for what had to be written."""


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """
    Say of an error while writing into `folder` that the disk is full, if it is. Libraries have their own words for it,
    or none.

    Raises:
        DiskFullError: with what is left to resume from.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        is_full = isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT)
        if not (is_full or "No space left" in str(error) or free < 2**20):
            raise
        others = [*_checkpoints(folder), *_checkpoints(folder.parent)]
        whole = [path for path in others if path != folder and _read_seal(path)[1] is None]
        kept = f"The last whole checkpoint is {whole[0]}" if whole else "There is no whole checkpoint before it"
        raise DiskFullError(
            ENOSPC,
            f"The disk is full ({free / 2**20:.0f} MiB free), so {folder} could not be written. {kept}. Make room, "
            "and start the same command with `--resume_from_checkpoint true`; `--save_total_limit 2` keeps fewer.",
        ) from error
