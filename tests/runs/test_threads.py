"""Threads of a run: what the user has set stays, what a launcher has set by itself does not."""

import os
import subprocess
import sys

import pytest

from tests.support.data import REPOSITORY

CORES = len(os.sched_getaffinity(0))
# what a launcher does: it starts a script with variables of its own
LAUNCHER = """
import os, subprocess, sys
script = '''
import os, sys
from trl_ext.runtime.threads import settle_threads
settle_threads()
print(settle_threads(), os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
'''
own = dict(pair.split("=") for pair in sys.argv[1].split())
subprocess.run([sys.executable, "-c", script], env={**os.environ, **own}, check=True)
"""
ACCELERATE = "ACCELERATE_MIXED_PRECISION=no OMP_NUM_THREADS=1"


@pytest.mark.parametrize(
    ("set_by_user", "flags", "set_by_launcher", "threads"),
    [
        ({}, [], ACCELERATE, CORES),
        ({}, [], "TORCHELASTIC_RUN_ID=x LOCAL_WORLD_SIZE=2 OMP_NUM_THREADS=1", max(CORES // 2, 1)),
        ({}, [], "ACCELERATE_MIXED_PRECISION=no OMP_NUM_THREADS=7", 7),  # it has counted cores itself
        ({}, [], "A=b", CORES),
        ({"OMP_NUM_THREADS": "1"}, [], ACCELERATE, 1),
        ({"OMP_NUM_THREADS": "1"}, [], "A=b", 1),
        ({"OMP_NUM_THREADS": "3,1"}, [], "A=b", 3),
        ({}, ["--num_cpu_threads_per_process", "1"], ACCELERATE, 1),
        ({}, ["--num-cpu-threads-per-process=1"], ACCELERATE, 1),
    ],
)
def test_threads_are_the_users_or_all_cores(set_by_user, flags, set_by_launcher, threads):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "ACCELERATE_"))}
    environment |= {"PYTHONPATH": str(REPOSITORY), **set_by_user}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, set_by_launcher, *flags],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    number = set_by_user.get("OMP_NUM_THREADS", str(threads))
    assert done.stdout.split() == [str(threads), number, "PASSIVE", "False"]


def test_the_users_policy_stays():
    environment = {**os.environ, "OMP_WAIT_POLICY": "ACTIVE", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, ACCELERATE], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[2] == "ACTIVE"
