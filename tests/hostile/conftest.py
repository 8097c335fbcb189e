"""A file that only foreign code would make, and no cache of `datasets`."""

import pytest
from datasets import disable_caching, enable_caching


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture(scope="module")
def no_cache():
    disable_caching()
    yield
    enable_caching()
