"""
Train on this process's share and write down what came out; run under torchrun or `accelerate launch`.

    worker.py JOBS.json

The file is a list of jobs, run one after the other in the same processes: each names a folder, the method, the model,
the rows, and the settings. The main process writes `logs.json` and the folder `model` to the job's folder, and every
process its own `process-<rank>.json`.
"""

import contextlib
import functools
import gc
import json
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig, LlamaForCausalLM, LlamaModel, TrainerCallback
from trl import DPOConfig, DPOTrainer

import trl_ext
from trl_ext import enable_prefix_sharing, methods
from trl_ext._trl import after_fused_lm_head, take_down_deepspeed
from trl_ext.cli.run import run_recipe

METHODS = {
    "dpo": (DPOTrainer, DPOConfig),
    **{
        name: tuple(getattr(trl_ext, method.classes + kind) for kind in ("Trainer", "Config"))
        for name, method in methods.METHODS.items()
        if method.is_public
    },
}
counts = {"models": 0, "forwards": 0}


class Logs(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


def count_models_and_forwards():
    forward, load = LlamaModel.forward, LlamaForCausalLM.from_pretrained.__func__

    def counted_forward(*args, **kwargs):
        counts["forwards"] += 1
        return forward(*args, **kwargs)

    def counted_load(cls, *args, **kwargs):
        counts["models"] += 1
        return load(cls, *args, **kwargs)

    LlamaModel.forward = functools.wraps(forward)(counted_forward)
    LlamaForCausalLM.from_pretrained = classmethod(counted_load)


def adapter_in_float32(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def construct(job, config, rows, logs):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )  # fmt: skip
    # TRL makes the adapter of a quantised model bfloat16, where small mistakes would not show. Before ZeRO-3 splits it
    in_float32 = after_fused_lm_head(adapter_in_float32) if job["trained"] == "qlora" else contextlib.nullcontext()
    with in_float32:
        trainer = METHODS[job["method"]][0](
            model=job["model"],
            args=config,
            train_dataset=rows,
            eval_dataset=rows,
            quantization_config=quantized if job["trained"].startswith("qlora") else None,
            peft_config=None if job["trained"] == "full" else lora,
            callbacks=[logs],
        )
    if job["enable_prefix_sharing"]:
        enable_prefix_sharing(trainer, True, self_check=True)
    return trainer


def run(job):
    folder, logs, rows = Path(job["folder"]), Logs(), Dataset.from_list(job["rows"])
    counts.update(models=0, forwards=0)
    config = METHODS[job["method"]][1](**job["settings"])
    trainer = construct(job, config, rows, logs)
    before = counts["forwards"]  # SPIN's reference
    trainer.train()
    training_forwards = counts["forwards"] - before
    evaluation = trainer.evaluate()
    trainer.save_model(str(folder / "model"))
    sharing = getattr(trainer, "prefix_sharing", None)
    process = {
        "models": counts["models"],
        "forwards": training_forwards,
        "reentrant": (trainer.args.activation_checkpointing_kwargs or {}).get("use_reentrant"),
        "checkpointed": any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()),
        "world": trainer.accelerator.num_processes,
        "strategy": _strategy(trainer),
        "sharded": all(hasattr(p, "ds_tensor") or isinstance(p, DTensor) for p in trainer.model.parameters()),
        "reference": str(trainer.ref_model),
        "dtypes": sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}),
        "quantized": any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules()),
        "positions": [sharing.statistics.positions_computed, sharing.statistics.positions_padded] if sharing else None,
    }
    (folder / f"process-{trainer.accelerator.process_index}.json").write_text(json.dumps(process))
    if trainer.is_world_process_zero():
        (folder / "logs.json").write_text(json.dumps({"train": logs.logs, "eval": evaluation}))
    trainer.accelerator.wait_for_everyone()  # or one tears the group down while the other still uses it
    return trainer


def _strategy(trainer) -> str:
    """What really runs, whatever was launched."""
    if trainer.is_fsdp_enabled:
        return f"fsdp{trainer.accelerator.state.fsdp_plugin.fsdp_version}"
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.model_wrapped.zero_optimization_stage()}"
    return "ddp" if isinstance(trainer.model_wrapped, DistributedDataParallel) else "single"


def main(jobs_file: str) -> None:
    disable_progress_bars()
    count_models_and_forwards()
    for job in json.loads(Path(jobs_file).read_text()):
        trainer = run(job)
        if trainer.is_deepspeed_enabled:
            take_down_deepspeed(trainer.model_wrapped)
            trainer.model_wrapped = trainer.model
        gc.collect()  # an engine and its model hold each other
    trainer.end()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_recipe(lambda arguments: main(*arguments))
