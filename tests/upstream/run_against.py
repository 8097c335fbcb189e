"""
Run the tests against a TRL of your choice, in a fresh virtual environment that is removed afterwards.

    python tests/upstream/run_against.py oldest
    python tests/upstream/run_against.py newest
    python tests/upstream/run_against.py 1.16.0 -m "not slow and not matrix" tests/upstream/test_trl_canary.py

`oldest` is the lower bound in `setup.cfg`, `newest` what pip finds. What stands behind the version goes to pytest. All
other packages have the versions of `constraints.txt`; where a TRL asks for others pip says which, and they are left to
pip by their names in front of the version:

    python tests/upstream/run_against.py --free transformers --free accelerate newest

The exit code is pytest's, or 1 where the installation failed.
"""

import argparse
import configparser
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHOWN = ("trl", "transformers", "torch", "accelerate", "datasets", "peft", "deepspeed")


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """`version`, `free` and `pytest`, the arguments for pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--free", action="append", default=[], metavar="NAME", help="a package that constraints.txt does not hold"
    )
    parser.add_argument("version", type=version_or_name, help="1.16.0, oldest or newest")
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="arguments for pytest")
    return parser.parse_args(args)


def version_or_name(text: str) -> str:
    if text not in ("oldest", "newest") and not re.fullmatch(r"\d+(\.\d+)*([a-z]+\d+)?(\.dev\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a version such as 1.16.0, nor `oldest` or `newest`")
    return text


def oldest_trl(setup: str) -> str:
    """The lower bound of trl in the text of a `setup.cfg`."""
    config = configparser.ConfigParser()
    config.read_string(setup)
    bounds = re.findall(r"^trl>=([\d.]+)$", config["options"]["install_requires"], flags=re.MULTILINE)
    if len(bounds) != 1:
        raise ValueError("setup.cfg has no line `trl>=VERSION` in install_requires. Put it back, or name the version.")
    return bounds[0]


def newest_trl(python: Path) -> str:
    """The version that pip would install if nothing else had a say."""
    words = [
        python,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--quiet",
        "--report",
        "-",
    ]
    report = subprocess.run([*words, "trl"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(report)["install"][0]["metadata"]["version"]


def without(names: Collection[str], constraints: str) -> str:
    """
    The text of a constraints file without the lines of some packages.

    Raises:
        ValueError: a package has no line.
    """
    names = {name.lower() for name in names}
    pinned = {line.partition("==")[0].lower(): line for line in constraints.splitlines() if "==" in line}
    if unknown := sorted(names - set(pinned)):
        raise ValueError(f"constraints.txt does not hold {', '.join(unknown)}: nothing to free. Leave it out.")
    return "".join(f"{line}\n" for name, line in pinned.items() if name not in names)


def commands(python: Path, version: str, constraints: Path, pytest: Sequence[str]) -> list[list[str]]:
    """What is run in the fresh environment, one after the other: the installation, its versions, the tests."""
    show = "from importlib.metadata import version; " + "; ".join(f"print('{one}', version('{one}'))" for one in SHOWN)
    return [
        [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), f"trl=={version}", "-e", ".[test]"],
        [str(python), "-c", show],
        [str(python), "-m", "pytest", *pytest],
    ]


def main(args: Sequence[str] | None = None) -> int:
    """Install and run; returns the exit code."""
    given = parse(args)
    pins = without(["trl", *given.free], (REPOSITORY / "constraints.txt").read_text())
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"
        version = given.version
        if version == "oldest":
            version = oldest_trl((REPOSITORY / "setup.cfg").read_text())
        elif version == "newest":
            version = newest_trl(python)
        (Path(folder) / "constraints.txt").write_text(pins)
        environment["PATH"] = os.pathsep.join([str(python.parent), environment.get("PATH", "")])
        for words in commands(python, version, Path(folder) / "constraints.txt", given.pytest):
            done = subprocess.run(words, cwd=REPOSITORY, env=environment)
            if done.returncode:
                break
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
