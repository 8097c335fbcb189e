"""Calling a recipe from the command line."""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .._trl import check_trl_version
from ..runtime.signals import end_simple_launcher, on_stop, watch_signals_and_launcher
from ..runtime.threads import settle_threads
from .mistakes import is_known, print_mistake
from .preflight import check_before_imports


def run_recipe(
    main: Callable[[list[str]], Any], dataclass_types: Sequence[str] = (), docstring: str | None = None
) -> None:
    """
    Call a recipe's `main` with the command line, or print the recipe's help if that is asked for. End on SIGTERM, on
    Ctrl-C and when the launcher is gone, with what is finished kept. End a process that is one of several as soon as
    all else is done.

    Under DDP on CPU, gloo's threads outlive `destroy_process_group` (torch 2.13 never frees the group of a
    `DistributedDataParallel`). If one of them lets go of a tensor while the interpreter is being torn down, the
    process ends with SIGABRT after everything was saved, and the launcher reports a failed run. So it ends before
    that, after its threads and the exit handlers of what `main` has imported.

    Args:
        main (`Callable`): takes the arguments of the command line. A known mistake that it raises is printed as one
            line (see `cli/mistakes.py`) and the exit code is 1; anything else is raised. Accelerate's launcher of a
            single process ends with 143 then (see [`end_simple_launcher`]).
        dataclass_types (`Sequence[str]`, *optional*): dotted names of the dataclasses whose fields are the recipe's
            options. Without them `--help` is left to `main`.
        docstring (`str`, *optional*): of the recipe, for its help.
    """
    if dataclass_types and asks_for_help(sys.argv[1:]):
        print_help(dataclass_types, docstring or "")
        return
    if dataclass_types:
        try:
            check_trl_version()
            check_before_imports(dataclass_types, sys.argv[1:])
        except Exception as error:
            if not is_known(error):
                raise
            if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a machine find the same
                print_mistake(error, wait=False)
            end_simple_launcher()
            sys.exit(1)
    threads = settle_threads()
    if os.environ.get("RANK", "0") == "0":
        print(f"CPU threads of each process: {threads} (OMP_NUM_THREADS)", flush=True)
    from ..runtime import library_warnings  # noqa: F401  (before the libraries)

    exit_codes: list[int] = []

    def leave():
        if exit_codes and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_codes[0])

    atexit.register(leave)  # the first to be registered is the last to be called
    try:
        with on_stop():
            watch_signals_and_launcher()
            main(sys.argv[1:])
    except SystemExit as ending:
        if isinstance(ending.code, int):
            exit_codes.append(ending.code)
        raise
    except Exception as error:
        if not is_known(error):
            raise
        print_mistake(error)
        end_simple_launcher()
        sys.exit(1)
    exit_codes.append(0)


def asks_for_help(args: Sequence[str]) -> bool:
    """Whether `-h` or `--help` is among the arguments, and neither the name of a config file nor behind `--`."""
    for before, arg in zip(["", *args], args, strict=False):
        if arg == "--":
            return False
        if arg in ("-h", "--help") and before != "--config":
            return True
    return False


def print_help(dataclass_types: Sequence[str], docstring: str) -> None:
    from .help import recipe_help

    if os.environ.get("RANK", "0") != "0":  # one process of several is enough
        return
    try:
        print(recipe_help(os.path.basename(sys.argv[0]), docstring, dataclass_types), end="", flush=True)
    except BrokenPipeError:  # whoever reads it has seen enough, as `head` has; the interpreter flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
