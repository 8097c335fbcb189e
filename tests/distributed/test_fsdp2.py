"""
FSDP2 through `accelerate_configs/fsdp2.yaml`, on one GPU or two. It needs CUDA: on a CPU Accelerate would make it DDP,
which is refused (`test_launches.py`).
"""

import pytest
import torch

from tests.distributed.launching import ACCELERATE, CONFIGS, Cell, assert_as_one_process, run_jobs, strategy_command

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP2 needs a CUDA GPU"),
]
PROCESSES = min(max(torch.cuda.device_count(), 1), 2)
SPLITS = {1: ("4x1x1", "2x2x1"), 2: ("2x1x2", "1x2x2")}[PROCESSES]
SHARED = {"prefix_sharing": True}  # its check is refused under FSDP
CELLS = [
    Cell("fsdp2", method, trained, split, rows, checkpointing, execution={**SHARED, **parts})
    for method, rows in (("slic", "seven ranked"), ("rrhf", "ragged"))
    for trained in ("full", "lora")
    for split, checkpointing, parts in (
        (SPLITS[0], False, {}),
        (SPLITS[1], True, {}),
        (SPLITS[0], False, {"max_completions_per_forward": 2}),
    )
]


@pytest.fixture(scope="module")
def outcomes(wide_model_dir, tmp_path_factory):
    """Those of all cells and of their references on one GPU, each kind under one launch."""
    folder = tmp_path_factory.mktemp("fsdp2")
    launcher = [*ACCELERATE, "--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", str(PROCESSES)]
    found = {}
    for name, command, cells, environment in (
        ("single", strategy_command("single"), [cell.reference for cell in CELLS], {"CUDA_VISIBLE_DEVICES": "0"}),
        ("fsdp2", launcher, CELLS, {}),
    ):
        jobs = {}
        for cell in cells:
            job = cell.job(wide_model_dir)
            jobs[cell.name] = {**job, "settings": {**job["settings"], "use_cpu": False}}
        environment = {"DS_ACCELERATOR": "cuda", **environment}
        finished, said = run_jobs(command, folder / name, jobs, timeout=100 + 15 * len(jobs), environment=environment)
        assert not said, said
        found.update(finished)
    return found


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_fsdp2_as_one_process(cell, outcomes):
    reference, found = outcomes[cell.reference.name], outcomes[cell.name]
    assert_as_one_process(cell, reference, found)
