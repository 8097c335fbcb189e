"""
Train, and meet with a fault on the way; run under `accelerate launch`.

    faulty_worker.py JOB.json

The job names the model, the rows, the settings, whether to resume, and the fault: its kind, the process and the step.
The moment it happens is written to `fault`, the final weights to the folder `model`, both beside the job.
"""

import functools
import json
import os
import signal
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaModel, TrainerCallback

from trl_ext import SLiCConfig, SLiCTrainer
from trl_ext.cli.run import run_recipe


class Steps(TrainerCallback):
    """Writes down the losses of all steps, also of those before an end that nobody has foreseen."""

    def __init__(self, file: Path):
        self.file = file

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            with self.file.open("a") as opened:
                opened.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def main(job_file: str) -> None:
    job, folder = json.loads(Path(job_file).read_text()), Path(job_file).parent
    trainer = SLiCTrainer(
        model=job["model"],
        args=SLiCConfig(**job["settings"]),
        train_dataset=Dataset.from_list(job["rows"]),
        callbacks=[Steps(folder / "steps.jsonl")],
    )
    fault = job["fault"] or {}
    if fault.get("process") == trainer.accelerator.process_index:
        prepare(fault, trainer, folder)
    trainer.train(resume_from_checkpoint=job["resume"])
    trainer.save_model(str(folder / "model"))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def prepare(fault: dict, trainer: SLiCTrainer, folder: Path) -> None:
    """Let the fault happen to this process, in the forward pass of a step or while its checkpoint is written."""

    def happen():
        (folder / "fault").write_text(str(time.time()))
        if fault["kind"] == "loop":
            while True:
                time.sleep(0.1)
        victim = int((folder / "launcher").read_text()) if fault.get("to") == "launcher" else os.getpid()
        os.kill(victim, signal.Signals[fault["kind"]])
        time.sleep(fault.get("seconds", 0))

    if fault["where"] == "forward":
        forward = LlamaModel.forward

        def faulty_forward(*args, **kwargs):
            if trainer.model.training and trainer.state.global_step == fault["step"]:
                if not (folder / "fault").exists():
                    happen()
            return forward(*args, **kwargs)

        LlamaModel.forward = functools.wraps(forward)(faulty_forward)
    else:  # half a file of the checkpoint is there
        save = torch.save

        def faulty_save(obj, f, *args, **kwargs):
            save(obj, f, *args, **kwargs)
            if f"checkpoint-{fault['step']}" in str(f) and fault["file"] in str(f):
                os.truncate(f, os.path.getsize(f) // 2)
                happen()

        torch.save = faulty_save


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_recipe(lambda arguments: main(*arguments))
