"""`outcome_of`: what a run of the worker has left behind, where many runs share one launch."""

import pytest

from tests.distributed.launching import STRATEGIES, run_jobs, strategy_command
from trl_ext.playground.model import save_byte_level_model


class Launches:
    """
    Starting processes takes longer than a run. So all selected cells of one strategy run under one launch, at the
    first call that asks for one of them.
    """

    def __init__(self, items, model_dir, folder):
        self.model_dir, self.folder, self.done = model_dir, folder, {}
        self.selected = {}
        for item in items:
            if "outcome_of" in item.fixturenames:
                cell = item.callspec.params["cell"]
                for each in (cell.reference, cell):
                    self.selected.setdefault(each.strategy, {})[each.name] = each

    def outcome(self, cell):
        key = cell.strategy
        if key not in self.done:
            jobs = {name: each.job(self.model_dir) for name, each in self.selected[key].items()}
            self.done[key] = run_jobs(
                strategy_command(cell.strategy), self.folder / key, jobs, timeout=120 + 30 * len(jobs)
            )
        finished, said = self.done[key]
        if cell.name not in finished:
            pytest.fail(f"{cell.name} did not come to its end under the launch of {key}:\n{said}")
        return finished[cell.name]


@pytest.fixture(scope="session")
def wide_model_dir(tmp_path_factory):
    """As `model_dir`, with layers wide enough for the blocks of 4-bit weights."""
    return str(save_byte_level_model(tmp_path_factory.mktemp("wide"), hidden_size=64, num_layers=2))


@pytest.fixture(scope="session")
def launches(request, wide_model_dir, tmp_path_factory):
    return Launches(request.session.items, wide_model_dir, tmp_path_factory.mktemp("launches"))


@pytest.fixture
def outcome_of(request, launches):
    """`outcome_of(cell)`: what the run of a cell, or of its reference, has left behind."""
    cell = request.node.callspec.params["cell"]
    for package in STRATEGIES[cell.strategy][1]:
        pytest.importorskip(package, reason="needs the extra trl_ext[deepspeed]")
    if cell.trained.startswith("qlora"):
        pytest.importorskip("bitsandbytes", reason="needs the extra trl_ext[quantization]")
    return launches.outcome
