"""The scripts of `benchmarks/` can be imported."""

import sys

from tests.support.data import REPOSITORY

sys.path[:0] = [str(REPOSITORY / "benchmarks" / "claims"), str(REPOSITORY / "benchmarks")]
