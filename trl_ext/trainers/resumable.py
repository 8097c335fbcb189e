"""Checkpointing and resuming, shared by every trainer in this package, ours and TRL's."""

import math
import os
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from .._trl import get_config_model_id, without_rotation
from ..runtime.checkpoints import find_checkpoint, make_room, naming_a_full_disk, seal
from ..runtime.faults import SaveOnStop, protect_workers
from ..runtime.hang_watchdog import WatchCallback
from ..runtime.run_lock import hold_folder, release_folder
from ..runtime.signals import RESUME_HINT, in_stage, name_of, on_stop, signal_again
from ..runtime.trust import weights_only
from .checks import check_before_training
from .model_card import name_local_folders


class ResumableTrainer(Trainer):
    """
    A base to put before a [`~transformers.Trainer`] in the list of bases. Checkpoints are sealed when they are whole,
    and older ones are removed after that; `train` describes the rest.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        As in `Trainer`, and:

        - `True` goes on from the last checkpoint that is whole, see `runtime/checkpoints.py`; one that is named has to
          be.
        - Meanwhile `torch.load` gives tensors and plain values alone, whoever calls it: DeepSpeed would unpickle its
          checkpoints whole. (FSDP's `SHARDED_STATE_DICT` has an index that torch unpickles by another way.)
        - On SIGTERM and on Ctrl-C the step is finished, a checkpoint saved, and the process ends with exit code 143 or
          130; a second Ctrl-C ends it at once.
        - When no process has got on for four fifths of `args.ddp_timeout` (30 minutes by default), the run ends with
          a message that says where each of them was, see `runtime/hang_watchdog.py`.

        Raises:
            FileExistsError: another run is in the output folder.
            ValueError: there is no whole checkpoint, or it does not fit this run.
            FileNotFoundError: the checkpoint that is named is not whole, or not for all processes.
            UnsafeFileError: a file of the checkpoint holds more than tensors and plain values.
        """
        is_trial = kwargs.get("trial") is not None  # of a hyper-parameter search, which has its own way of resuming
        holds = not is_trial and hold_folder(self.args.output_dir)
        try:
            return self._train_interruptibly(resume_from_checkpoint, is_trial, kwargs)
        finally:
            if holds:
                release_folder(self.args.output_dir)

    def _train_interruptibly(self, resume_from_checkpoint: str | bool | None, is_trial: bool, kwargs: dict[str, Any]):
        if resume_from_checkpoint is not None and resume_from_checkpoint is not False and not is_trial:
            found = find_checkpoint(self.args, resume_from_checkpoint)
            if found is None:
                raise ValueError(
                    f"`resume_from_checkpoint` must name a complete checkpoint, got {resume_from_checkpoint}, and "
                    f"{self.args.output_dir} has none. Remove it to train from the start."
                )
            resume_from_checkpoint = found
        check_before_training(self)
        save, watch = SaveOnStop(), WatchCallback(0.8 * self.args.ddp_timeout)
        callbacks = [save, watch]
        for callback in callbacks:
            self.add_callback(callback)
        try:
            with on_stop(save.ask), weights_only():
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            watch.stop()
            for callback in callbacks:
                self.remove_callback(callback)
        if save.asked and not save.stopped:  # after the last step
            signal_again(save.asked)
        if save.stopped:
            hint = "" if in_stage() else f" {RESUME_HINT}"
            self.accelerator.print(f"{name_of(save.stopped)}: checkpoint-{self.state.global_step} is saved.{hint}")
            raise SystemExit(128 + save.stopped)
        return output

    def get_train_dataloader(self):
        return protect_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        return protect_workers(super().get_eval_dataloader(eval_dataset))

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """As in `Trainer`, which takes all steps of a stream for its first pass over the data."""
        passes, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if num_train_epochs != sys.maxsize or not self.state.epoch:  # no stream, or begun anew
            return passes, batches
        # finished passes, and the share of `max_steps` that was trained of the one begun: above 0, at most 1
        before = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
        passes = math.ceil(before.epoch) - 1
        steps = round((before.epoch - passes) * before.max_steps)
        return passes, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def _save_checkpoint(self, model, trial):
        self._pushes_checkpoints = trial is not None
        if trial is not None:  # it is in a folder of the search's
            super()._save_checkpoint(model, trial)
            return
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with naming_a_full_disk(checkpoint):
            make_room(checkpoint)
            with without_rotation():  # older ones are removed when this one is whole, not before
                super()._save_checkpoint(model, trial)
            seal(checkpoint, self.args)
        if self.args.should_save:
            rotate_checkpoints(
                self.args.output_dir,
                self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder):
        """Left to [`~ResumableTrainer._save_checkpoint`], which does it once the checkpoint is sealed."""
        if self._pushes_checkpoints:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with naming_a_full_disk(Path(output_dir or self.args.output_dir)):
            super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and card.is_file():
            name_local_folders(card, get_config_model_id(self.model.config), self.args.output_dir)
