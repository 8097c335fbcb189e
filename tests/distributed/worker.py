"""
Train on this process's share and write down what came out; run under torchrun or `accelerate launch`.

    worker.py JOB.json

The job names the model, the rows, and the settings. The main process writes `logs.json` and `weights.pt` to the job's
folder, and every process its own `process-<rank>.json`.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM, TrainerCallback

from trl_ext import SLiCConfig, SLiCTrainer


class Logs(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    folder = Path(job_file).parent
    models_made = 0
    init = LlamaForCausalLM.__init__

    def counted_init(self, *args, **kwargs):
        nonlocal models_made
        models_made += 1
        init(self, *args, **kwargs)

    LlamaForCausalLM.__init__ = counted_init
    logs = Logs()
    rows = Dataset.from_list(job["rows"])
    trainer = SLiCTrainer(
        model=job["model"],
        args=SLiCConfig(**job["settings"]),
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        if job["lora"]
        else None,
        callbacks=[logs],
    )
    trainer.train()
    evaluation = trainer.evaluate()
    trainer.save_model(str(folder / "model"))
    process = {"models": models_made, "world": trainer.accelerator.num_processes, "reference": str(trainer.ref_model)}
    (folder / f"process-{trainer.accelerator.process_index}.json").write_text(json.dumps(process))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (folder / "logs.json").write_text(json.dumps({"train": logs.logs, "eval": evaluation}))
    trainer.end()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
