"""Two processes score exactly as one. Run as a script under torchrun, this file is the worker of its own test."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from tests.support import warm
from tests.support.data import REPOSITORY
from tests.support.scoring import save_reward_model
from trl_ext.scoring.functions import FunctionScorer
from trl_ext.scoring.models import RewardModelScorer
from trl_ext.scoring.score import score_rows
from trl_ext.scoring.tournament import PairwiseScorer


def work(folder, reward_model_dir, state):
    """What each process does in the test on two of them."""
    rows = [{"prompt": f"{i} ", "completions": [str(i * j) for j in range(1, 2 + i % 5)]} for i in range(11)]

    def mean_of_batch(completions, **kwargs):  # depends on what is scored together
        return [sum(map(len, completions)) / len(completions)] * len(completions)

    def unsure(prompts, completions):
        return [-1] * len(prompts)

    def fails_on_the_second_process(prompts, **kwargs):
        return [1 / (int(prompt) - 4) for prompt in prompts]

    scorers = [
        FunctionScorer(mean_of_batch),
        RewardModelScorer(reward_model_dir, batch_size=2),
        PairwiseScorer(unsure),
    ]
    scorers[1].model.to("cpu")
    seen = {
        "scored": score_rows(rows, scorers, [1.0, 0.5, 2.0], batch_size=3),
        "games": score_rows(rows, scorers[2:], batch_size=3),
        "kept": score_rows(rows, scorers, [1.0, 0.5, 2.0], batch_size=3, folder=Path(folder) / "kept"),
        "counts": [getattr(scorer, "counts", {}) for scorer in scorers],
    }
    try:
        score_rows(rows, [FunctionScorer(fails_on_the_second_process)], batch_size=3)
    except RuntimeError as error:
        seen["error"] = str(error)
    seen["world"] = state.num_processes
    (Path(folder) / f"process-{state.num_processes}-{state.process_index}.json").write_text(json.dumps(seen))


def test_two_processes_score_exactly_as_one(tmp_path):
    reward_model_dir = str(save_reward_model(tmp_path / "tiny-rm"))
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as there, so that sums are made in the same order
        work(tmp_path, reward_model_dir, PartialState())
    finally:
        torch.set_num_threads(num_threads)
    (place,) = (tmp_path / "kept").iterdir()
    portions = {file.name: file.stat().st_mtime_ns for file in sorted(place.glob("0*.json"))}
    (place / "00001.json").unlink()  # two processes go on with what one has begun
    (place / "00002.json").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = warm.run(
        [*command, __file__, str(tmp_path), reward_model_dir],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    alone, first, second = (json.loads(file.read_text()) for file in sorted(tmp_path.glob("process-*.json")))
    assert (alone["world"], first["world"], second["world"]) == (1, 2, 2)
    assert "on another process (process 1, RuntimeError: The reward function 'fails_on" in first["error"]
    assert second["error"].startswith("The reward function 'fails_on_the_second_process' raised ZeroDivisionError")
    for name in ("scored", "games", "kept", "counts"):
        assert alone[name] == first[name] == second[name], name
    assert len(alone["scored"]) == 11 and alone["counts"][2]["games"] == 3 * sum(i % 5 for i in range(11))
    assert alone["kept"] == alone["scored"] and list(portions) == [f"0000{number}.json" for number in range(4)]
    now = {file.name: file.stat().st_mtime_ns for file in sorted(place.glob("0*.json"))}
    assert [name for name in portions if portions[name] != now[name]] == ["00001.json", "00002.json"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    work(*sys.argv[1:], state)
    state.wait_for_everyone()
    state.destroy_process_group()
