"""Which checkpoint a run goes on from, in one process; `hostile/test_faults.py` has whole runs."""

import json
import os
import shutil

import pytest
import torch
from datasets import Dataset

from tests.support.data import PAIRS
from trl_ext import SLiCConfig, SLiCTrainer
from trl_ext.runtime.checkpoints import SEAL, UNFINISHED, DiskFullError, checkpoint_to_resume, naming_a_full_disk, seal


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    """The output folder of a run with checkpoints at steps 1 to 4, and that run's last loss."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "activation_checkpointing": False,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 1,
        "num_train_epochs": 1,
        "disable_tqdm": True,
    }

    def trainer(output_dir, train_dataset=None, cls=SLiCTrainer, **more):
        args = SLiCConfig(str(output_dir), **{**settings, **more})
        return cls(model_dir, args=args, train_dataset=rows if train_dataset is None else train_dataset)

    rows = Dataset.from_list(PAIRS)
    run = trainer(folder / "out")
    run.train()
    return folder / "out", run.model.state_dict(), trainer


@pytest.fixture
def copied(trained, tmp_path):
    folder, weights, trainer = trained
    shutil.copytree(folder, tmp_path / "out")
    return tmp_path / "out", weights, trainer


def wanted(folder, value, **settings):
    settings = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 2, **settings}
    return checkpoint_to_resume(SLiCConfig(str(folder), resume_from_checkpoint=value, **settings))


def truncate(checkpoint):
    os.truncate(checkpoint / "optimizer.pt", 1000)


def lose_a_file(checkpoint):
    (checkpoint / "scheduler.pt").unlink()


def lose_the_seal(checkpoint):
    (checkpoint / SEAL).unlink()


def be_interrupted(checkpoint):
    (checkpoint / SEAL).rename(checkpoint / UNFINISHED)


def halve_the_seal(checkpoint):
    (checkpoint / SEAL).write_text((checkpoint / SEAL).read_text()[:100])


def empty_the_seal(checkpoint):
    (checkpoint / SEAL).write_text("{}")


DAMAGE = {
    truncate: "optimizer.pt has 1000 bytes and was written with",
    lose_a_file: "scheduler.pt is gone",
    lose_the_seal: "it has no checkpoint.json and is not unfinished either, so this package has not written it",
    be_interrupted: "it has no checkpoint.json, so the run that wrote it was interrupted",
    halve_the_seal: "its checkpoint.json cannot be read",
    empty_the_seal: "its checkpoint.json cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_passed_over(damage, copied, capsys):
    folder, *_ = copied
    damage(folder / "checkpoint-4")
    assert wanted(folder, "true") == wanted(folder, "last") == str(folder / "checkpoint-3")
    assert f"checkpoint-4 is skipped: {DAMAGE[damage]}" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="must be a whole checkpoint, got '.*checkpoint-4'.*Name a whole one"):
        wanted(folder, str(folder / "checkpoint-4"))


def test_going_on_behind_a_damaged_checkpoint_gives_the_same_weights(copied):
    folder, weights, trainer = copied
    truncate(folder / "checkpoint-4")
    lose_the_seal(folder / "checkpoint-3")
    again = trainer(folder)
    again.train(resume_from_checkpoint=True)
    assert [log["step"] for log in again.state.log_history if "loss" in log] == [1, 2, 3, 4]
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert wanted(folder, "true") == str(folder / "checkpoint-4")  # written anew


def test_which_checkpoint(copied, tmp_path):
    folder, *_ = copied
    (folder / "checkpoint-best").mkdir()
    assert wanted(folder, "true") == str(folder / "checkpoint-4")
    assert wanted(folder, str(folder / "checkpoint-4")) == str(folder / "checkpoint-4")
    with pytest.raises(FileNotFoundError, match="must be a whole checkpoint, got '.*gone': there is no such folder"):
        wanted(folder, str(folder / "gone"))
    with pytest.raises(FileExistsError, match="holds checkpoints of an earlier run, up to checkpoint-4. Add `--resu"):
        wanted(folder, None)
    for value in (None, "false", "true"):
        assert wanted(tmp_path / "new", value) is None


def test_going_back_to_an_earlier_one(copied, tmp_path):
    """What the run wrote after it would be taken for what comes now."""
    folder, *_ = copied
    earlier = str(folder / "checkpoint-2")
    with pytest.raises(FileExistsError, match="holds whole checkpoints after checkpoint-2, up to checkpoint-4"):
        wanted(folder, earlier)
    assert wanted(tmp_path / "other", earlier) == earlier
    kept = str(shutil.copytree(earlier, folder / "checkpoint-best"))
    assert wanted(folder, kept) == kept
    lose_the_seal(folder / "checkpoint-3")
    (folder / "checkpoint-4").rename(folder / "aside")
    assert wanted(folder, earlier) == earlier


def test_no_checkpoint_is_written_over_because_none_is_whole(copied):
    folder, *_ = copied
    for step in (1, 2, 3):
        shutil.rmtree(folder / f"checkpoint-{step}")
    truncate(folder / "checkpoint-4")
    with pytest.raises(FileExistsError, match="checkpoint-4 is not whole .optimizer.* and there is no other"):
        wanted(folder, "true")
    lose_the_seal(folder / "checkpoint-4")
    with pytest.raises(FileExistsError, match="is not whole .it has no checkpoint.json and is not unfinished either"):
        wanted(folder, "true")
    (folder / "checkpoint-4" / UNFINISHED).touch()  # the run was killed in its first checkpoint
    assert wanted(folder, "true") is None


def test_a_checkpoint_lists_what_is_there(copied):
    folder, *_ = copied
    checkpoint = folder / "checkpoint-4"
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert set(json.loads((checkpoint / SEAL).read_text())["files"]) == there - {SEAL}
    assert not (checkpoint / UNFINISHED).exists()


def test_damage_is_found_by_the_process_that_wrote_the_checkpoint(trained, tmp_path):
    *_, trainer = trained
    trainer(tmp_path).train()
    truncate(tmp_path / "checkpoint-4")
    assert wanted(tmp_path, "true") == str(tmp_path / "checkpoint-3")


def test_a_trainer_without_a_whole_checkpoint(trained, tmp_path):
    *_, trainer = trained
    with pytest.raises(ValueError, match="must name a complete checkpoint.* Remove it to train from the start"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_steps_of_another_size_are_refused(copied):
    folder, *_ = copied
    assert wanted(folder, "true", per_device_train_batch_size=1, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="with 2 prompts per optimiser step .*takes 4 .*product with the num"):
        wanted(folder, "true", gradient_accumulation_steps=2)


def test_shards_of_another_number_of_processes_are_refused(copied):
    folder, *_ = copied
    sealed = json.loads((folder / "checkpoint-4" / SEAL).read_text())
    sealed["run"]["sharding"] = "ZeRO-3"
    (folder / "checkpoint-4" / SEAL).write_text(json.dumps(sealed))
    with pytest.raises(ValueError, match="with sharding 'ZeRO-3', and this run has 1 with 'none'.*Launch as many"):
        wanted(folder, "true")


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(trained, tmp_path, monkeypatch):
    *_, trainer = trained
    seen = []

    def look(checkpoint, args):
        seen.append(sorted(path.parent.name for path in tmp_path.glob(f"checkpoint-*/{SEAL}")))
        seal(checkpoint, args)

    monkeypatch.setattr("trl_ext.trainers.resumable.seal", look)
    trainer(tmp_path, save_total_limit=1).train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


class Recording(SLiCTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(("num_rows", "accumulated"), [(6, 1), (5, 2)])
def test_a_stream_goes_on_in_the_pass_it_was_in(num_rows, accumulated, trained, tmp_path):
    """Passes of 3 batches, and of 5 of which two make a step; resumed for more steps than before."""
    *_, trainer = trained
    rows = Dataset.from_list(PAIRS[:num_rows]).to_iterable_dataset().shuffle(seed=1, buffer_size=8)
    more = {"gradient_accumulation_steps": accumulated, "lr_scheduler_type": "constant", "cls": Recording}
    more |= {"per_device_train_batch_size": 2 // accumulated}
    whole = trainer(tmp_path / "whole", rows, max_steps=8, **more)
    whole.train()
    trainer(tmp_path / "out", rows, max_steps=6, **more).train()
    for step in (6, 5, 3, 2):  # of what is there, the last
        again = trainer(tmp_path / "out", rows, max_steps=8, save_strategy="no", **more)
        again.train(resume_from_checkpoint=True)
        assert again.seen == whole.seen[-len(again.seen) :], step
        for name, weight in again.model.state_dict().items():
            assert torch.equal(weight, whole.model.state_dict()[name]), (step, name)
        for later in range(step, 2 * step):
            shutil.rmtree(tmp_path / "out" / f"checkpoint-{later}", ignore_errors=True)
        if step == 5:
            shutil.rmtree(tmp_path / "out" / "checkpoint-4")


def test_jit_checkpoints_are_refused(trained, tmp_path):
    *_, trainer = trained
    with pytest.raises(ValueError, match="`enable_jit_checkpoint` must be False"):
        trainer(tmp_path, enable_jit_checkpoint=True)


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), naming_a_full_disk(tmp_path / "checkpoint-1"):
        raise RuntimeError("something else")
    with pytest.raises(DiskFullError, match="There is no whole checkpoint before it. Make room"):
        with naming_a_full_disk(tmp_path / "checkpoint-1"):
            raise OSError(28, "No space left on device")
