"""Known mistakes of a user, which a recipe prints as one line, and true faults, which keep their traceback."""

import dis
import os
import sys
import time
import traceback
from pathlib import Path

KINDS = (ValueError, TypeError, OSError, NotImplementedError, RuntimeError, ImportError)
OURS = str(Path(__file__).parents[1]) + os.sep


def is_known(error: BaseException) -> bool:
    """
    Whether an error is the message of a check: a `raise` statement of this package or of the recipe, or of any package
    while options are parsed. An error that an expression causes (`None + 1`) is a true fault wherever it is.
    """
    if not isinstance(error, KINDS) or error.__traceback__ is None:
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    if last.tb_frame.f_code.co_code[last.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return False
    recipe = getattr(sys.modules.get("__main__"), "__file__", None)
    file = frames[-1].f_code.co_filename
    while_parsing = any(f.f_code.co_name == "parse_args" and f.f_code.co_filename.startswith(OURS) for f in frames)
    return file.startswith(OURS) or file == recipe or while_parsing


def print_mistake(error: BaseException, *, wait: bool = True) -> None:
    """
    Print an error as one line on stderr.

    Args:
        error (`BaseException`): its message is printed.
        wait (`bool`, defaults to `True`): of several processes, let the first print before the others: the launcher
            ends them when it has failed, so that a mistake that all have met is printed once.
    """
    if wait and os.environ.get("RANK", "0") != "0":
        time.sleep(5)
    sys.stdout.flush()
    print("Error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
