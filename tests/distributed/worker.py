"""
Train on this process's share and write down what came out; run under torchrun or `accelerate launch`.

    worker.py JOB.json

The job names the method, the model, the rows, and the settings. The main process writes `logs.json` and the folder
`model` to the job's folder, and every process its own `process-<rank>.json`.
"""

import functools
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM, LlamaModel, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_ext import (
    CLICKConfig,
    CLICKTrainer,
    RRHFConfig,
    RRHFTrainer,
    SLiCConfig,
    SLiCTrainer,
    enable_prefix_sharing,
)
from trl_ext.cli import run_recipe

METHODS = {
    "click": (CLICKTrainer, CLICKConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "rrhf": (RRHFTrainer, RRHFConfig),
    "slic": (SLiCTrainer, SLiCConfig),
}


class Logs(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    folder = Path(job_file).parent
    models_loaded = forwards = 0
    forward = LlamaModel.forward

    def counted_forward(*args, **kwargs):
        nonlocal forwards
        forwards += 1
        return forward(*args, **kwargs)

    LlamaModel.forward = functools.wraps(forward)(counted_forward)
    load = LlamaForCausalLM.from_pretrained.__func__

    def counted_load(cls, *args, **kwargs):
        nonlocal models_loaded
        models_loaded += 1
        return load(cls, *args, **kwargs)

    LlamaForCausalLM.from_pretrained = classmethod(counted_load)
    logs = Logs()
    rows = Dataset.from_list(job["rows"])
    trainer_class, config_class = METHODS[job["method"]]
    trainer = trainer_class(
        model=job["model"],
        args=config_class(**job["settings"]),
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        if job["lora"]
        else None,
        callbacks=[logs],
    )
    if job["enable_prefix_sharing"]:
        enable_prefix_sharing(trainer, True, self_check=True)
    trainer.train()
    training_forwards = forwards
    evaluation = trainer.evaluate()
    trainer.save_model(str(folder / "model"))
    sharing = getattr(trainer, "prefix_sharing", None)
    process = {
        "models": models_loaded,
        "forwards": training_forwards,
        "reentrant": (trainer.args.activation_checkpointing_kwargs or {}).get("use_reentrant"),
        "world": trainer.accelerator.num_processes,
        "reference": str(trainer.ref_model),
        "positions": [sharing.statistics.positions_computed, sharing.statistics.positions_padded] if sharing else None,
    }
    (folder / f"process-{trainer.accelerator.process_index}.json").write_text(json.dumps(process))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (folder / "logs.json").write_text(json.dumps({"train": logs.logs, "eval": evaluation}))
    trainer.accelerator.wait_for_everyone()  # or one tears the group down while the other still uses it
    trainer.end()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_recipe(lambda arguments: main(*arguments))
