"""One readable failure on the day TRL changes something this package borrows."""

import inspect
import pkgutil
import sys
from importlib import import_module

import pytest
import trl.trainer.dpo_trainer
from trl.experimental.orpo import ORPOTrainer

from tests.support import warm
from trl_ext import _trl, methods
from trl_ext.trainers import candidate_trainer, logged_metrics, resumable


@pytest.mark.parametrize("path", _trl.BORROWED)
def test_borrowed_name_is_there_with_the_parameters_it_was_read_with(path, monkeypatch):
    monkeypatch.setattr(_trl, "BORROWED", {path: _trl.BORROWED[path]})
    _trl.check_borrowed_names()


def test_every_overridden_private_method_is_listed():
    overridden = {
        name
        for base in (candidate_trainer.CandidateTrainer, logged_metrics.LoggedMetrics, resumable.ResumableTrainer)
        for name, value in vars(base).items()
        if inspect.isfunction(value) and hasattr(trl.DPOTrainer, name) and name not in ("__init__",)
    }
    listed = {path.rpartition("DPOTrainer.")[2] for path in _trl.BORROWED if "DPOTrainer." in path}
    assert overridden == listed


def overridden(trainer):
    """Each method of TRL's classes that a trainer of this package overrides, by its path, with its parameters."""
    ours = [base for base in trainer.__mro__ if base.__module__.startswith("trl_ext.")]
    return {
        f"{base.__module__}:{base.__qualname__}.{name}": tuple(inspect.signature(value).parameters)
        for base in trainer.__mro__
        if base.__module__.startswith("trl.")
        for name, value in vars(base).items()
        if inspect.isfunction(value) and name != "__init__" and any(name in vars(one) for one in ours)
    }


def test_what_any_trainer_overrides_is_listed_with_the_parameters_it_was_read_with():
    found = {}
    for entry in pkgutil.walk_packages(methods.__path__, "trl_ext.methods."):
        module = import_module(entry.name)
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == entry.name and hasattr(value, "train"):
                found |= overridden(value)
    assert {name: of for name, of in found.items() if name not in _trl.BORROWED} == _trl.OVERRIDDEN


def test_attributes_of_the_parent_that_are_read():
    source = inspect.getsource(trl.DPOTrainer.__init__)
    for attribute in ("aux_loss_enabled", "router_aux_loss_coef", "ref_model"):
        assert f"self.{attribute} =" in source


@pytest.mark.parametrize(
    ("trainer_class", "attribute"),
    [
        *((one, "_metrics") for one in (trl.DPOTrainer, trl.KTOTrainer, trl.RewardTrainer, trl.SFTTrainer)),
        (trl.RLOOTrainer, "_metrics"),
        (ORPOTrainer, "_stored_metrics"),
    ],
)
def test_where_metrics_are_kept(trainer_class, attribute):
    assert attribute in _trl.MEASURED and f"self.{attribute} = " in inspect.getsource(trainer_class.__init__)


def test_lost_or_changed_name_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(_trl, "BORROWED", {"trl.trainer.dpo_trainer:DPOTrainer._gone": ()})
    with pytest.raises(ImportError, match=r"\(trl.trainer.dpo_trainer:DPOTrainer._gone is gone\): run `pip install"):
        _trl.check_borrowed_names()
    monkeypatch.setattr(_trl, "BORROWED", {"trl.trainer.utils:pad": ("rows",)})
    with pytest.raises(ImportError, match=r"\(trl.trainer.utils:pad now takes \('tensors', .*\)\): run `pip install"):
        _trl.check_borrowed_names()


@pytest.mark.parametrize(
    "lost", ["data_utils.common_prefix_length", "trainer.dpo_trainer.DPOTrainer._prepare_dataset"]
)
def test_the_refusal_is_what_a_user_sees(lost, tmp_path):
    """A name that is called as well as one that is overridden, in a process that imports the package afterwards."""
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "for name in [name for name in sys.modules if name.startswith('trl_ext')]: del sys.modules[name]\n"
        f"import trl, trl.data_utils, trl.trainer.dpo_trainer\ndel trl.{lost}\nfrom trl_ext import SLiCTrainer\n"
    )
    done = warm.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True)
    assert done.returncode and "trl_ext builds on names that have changed in trl" in done.stderr.splitlines()[-1]


def test_old_trl_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(_trl, "version", lambda name: "1.9.2")
    with pytest.raises(
        ImportError, match=r"needs trl>=1.16 and trl 1.9.2 is installed: run `pip install 'trl>=1.16'`"
    ):
        _trl.check_trl_version()


def test_names_not_listed_cannot_be_borrowed():
    with pytest.raises(AttributeError, match="must be listed"):
        _trl.flush_left  # noqa: B018
