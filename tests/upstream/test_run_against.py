"""`tests/upstream/run_against.py`: what it makes of its arguments, and what it would run. Nothing is installed."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from tests.support.data import REPOSITORY
from tests.upstream.run_against import SHOWN, commands, oldest_trl, parse, without
from trl_ext._trl import OLDEST_TRL

CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text()


def test_what_stands_behind_the_version_is_for_pytest():
    given = parse(["--free", "transformers", "newest", "-m", "slow", "--free", "tests/upstream"])
    assert given.free == ["transformers"] and given.version == "newest"
    assert given.pytest == ["-m", "slow", "--free", "tests/upstream"]
    assert parse(["1.17.0rc1"]).pytest == []


@pytest.mark.parametrize("args", [[], ["latest"], [">=1.16"], ["tests/upstream"], ["--fre", "trl", "newest"]])
def test_what_is_no_version_is_refused(args, capsys):
    with pytest.raises(SystemExit) as ending:
        parse(args)
    assert ending.value.code == 2 and "usage: " in capsys.readouterr().err


def test_the_oldest_is_the_one_that_the_package_asks_for():
    found = oldest_trl((REPOSITORY / "setup.cfg").read_text())
    assert Version(found) == Version(OLDEST_TRL)
    with pytest.raises(ValueError, match="no line `trl>=VERSION`"):
        oldest_trl("[options]\ninstall_requires =\n    trl\n    trl_something>=3\n")


def test_only_what_is_freed_is_left_to_pip():
    left = without(["trl", "Transformers"], CONSTRAINTS).splitlines()
    gone = [line for line in CONSTRAINTS.splitlines() if line not in left]
    assert [line.partition("=")[0] for line in gone if not line.startswith("#")] == ["transformers", "trl"]
    assert len(left) > 50 and all("==" in line for line in left)
    with pytest.raises(ValueError, match="does not hold no-such: nothing to free"):
        without(["trl", "no-such"], CONSTRAINTS)


def test_what_is_run(tmp_path):
    install, show, tests = commands(Path(sys.executable), "1.16", tmp_path / "pins.txt", ["-x", "tests/test_house.py"])
    assert install[1:4] == ["-m", "pip", "install"] and "trl==1.16" in install and install[-2:] == ["-e", ".[test]"]
    assert install[install.index("-c") + 1] == str(tmp_path / "pins.txt")
    shown = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in shown.splitlines()] == list(SHOWN)
    assert tests[1:] == ["-m", "pytest", "-x", "tests/test_house.py"]
    done = subprocess.run([*tests[:3], "--version"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and "pytest" in done.stdout
