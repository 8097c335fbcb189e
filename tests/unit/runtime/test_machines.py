"""What processes see of each other's files. Over two hosts: `tests/distributed/test_two_hosts.py`."""

import threading

import pytest

from trl_ext.runtime.processes import (
    first_lacking,
    ranks_without_access,
    read_when_there,
    refuse_unless_all_see_checkpoint,
)

MODEL = ["model.safetensors", "optimizer.pt", "trainer_state.json"]


def shard(rank):
    return f"global_step8/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize(
    ("main", "other", "lacking"),
    [
        (MODEL, MODEL, None),
        ([*MODEL, "rng_state_0.pth"], [*MODEL, "rng_state_1.pth"], None),
        ([*MODEL, shard(0)], [*MODEL, shard(1)], None),
        ([*MODEL, shard(0), shard(1)], [*MODEL, shard(0), shard(1)], None),
        (MODEL, MODEL[1:], (1, "b", "model.safetensors")),
        ([*MODEL, shard(0), shard(1)], MODEL, (1, "b", shard(1))),
        (MODEL, [*MODEL, shard(0), shard(1)], (0, "a", shard(0))),
    ],
)
def test_what_each_process_needs_of_a_checkpoint(main, other, lacking):
    assert first_lacking([("a", set(main)), ("b", set(other))]) == lacking


def test_one_process_sees_what_it_sees(tmp_path):
    refuse_unless_all_see_checkpoint(tmp_path)
    assert ranks_without_access(tmp_path / "new") == {}
    assert list((tmp_path / "new").iterdir()) == [], "nothing is left there"


def test_a_file_that_shows_late_is_waited_for(tmp_path):
    file = tmp_path / "shard"
    threading.Timer(0.5, file.write_text, ["text"]).start()
    assert read_when_there(file, seconds=60) == "text"
    with pytest.raises(FileNotFoundError, match="other was written by another process .* `--output_dir` to one that"):
        read_when_there(tmp_path / "other", seconds=0)
