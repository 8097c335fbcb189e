"""
What training takes as it is spread over GPUs: memory on each, and what they send one another for each optimiser step.

    python benchmarks/scaling.py              # print the tables: what was measured, and what is computed
    python benchmarks/scaling.py --measure    # count the collectives of real steps on two processes, then print
    python benchmarks/scaling.py --time       # time steps on one process and on two; wants a quiet machine

**Measured.** Two processes on CPU, through the launchers and the shipped configs, fp32. Every call of a collective is
seen by a `TorchDispatchMode`, those of DDP's C++ reducer included, from the end of the first optimiser step to the end
of the second. Rows are appended to `benchmarks/results/scaling.csv` and `scaling_time.csv`.

**Volume.** What a process sends, times N / (N - 1), which is what the ZeRO paper counts: a reduce, a reduce-scatter, a
broadcast or an all-gather of M bytes (the whole, not a process's part) is M; an all-reduce is both, 2 M.

**The model.** Psi parameters, Psi_t of them trained, b bytes per weight and gradient on the wire, N processes; for one
forward and backward:

    DDP                     2 b Psi_t              gradients are all-reduced
    ZeRO-1, ZeRO-2          3 b Psi_t              the same, and the weights gathered. The paper has 2, for gradients
                                                   that are reduced to their owners only; DeepSpeed 0.19 all-reduces
                                                   them unless `use_multi_rank_bucket_allreduce` is off
    ZeRO-3, FSDP2           2 b Psi + b Psi_t      weights gathered in forward and backward, gradients reduced
      with checkpointing    + b Psi_r              what is run again is gathered again: the layers, each without its
                                                   last matrix, whose output the backward does not ask for
      in m parts            m (2 b Psi + b Psi_r) + b Psi_t, with all layers run again

Weights, gradients and AdamW's moments, in bytes per parameter. Full fine-tuning in bf16 under DeepSpeed: 2 for the
weights, 2 for the gradients, 12 for the fp32 master weights and moments (TRL's default under DDP, fp32 weights with
autocast: 4 + 4 + 8, the same 16):

    DDP 16     ZeRO-1 4 + 12 / N     ZeRO-2 2 + 14 / N     ZeRO-3, FSDP2 16 / N     ZeRO-3, all offloaded 0

LoRA: 2 for every weight, split under ZeRO-3 and FSDP2 only, and the above for the adapters. A reference model: 2 more,
split in the same cases. ZeRO-3 and FSDP2 besides hold what is gathered just now: the larger of the embedding and two
layers, in bf16.

Activations, bf16, for T tokens in the batch of one process, hidden size h, MLP width f, a heads and L layers: what
autograd keeps of each layer of transformers' Llama under SDPA with a mask is 24 h + 8 f + 4 a + 8 bytes per token
(counted, see `tests/docs/test_scaling.py`); with checkpointing, 2 h for each layer and that for one. To these comes
the mask of a batch with shared prompts, 2 S^2 for rows of S slots.

Not in it: the CUDA context, buckets of DDP and DeepSpeed, fragmentation, the LM head's working memory. Gigabytes are
10^9 bytes.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import REPOSITORY, RESULTS, Shape, append, circumstances, make_model
from scaling_model import (
    BASE,
    STRATEGIES,
)
from scaling_tables import (
    activations_table,
    communication_table,
    expected,
    largest_on_a_node,
    measured_table,
    memory_table,
    share_table,
)

# Measuring


@contextlib.contextmanager
def counted_collectives(trainer, seen: list):
    """Append `(inside a training step, name, bytes, volume)` to `seen` for every collective of this process."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    inside = False
    training_step = trainer.training_step

    def marked(*args, **kwargs):
        nonlocal inside
        inside = True
        try:
            return training_step(*args, **kwargs)
        finally:
            inside = False

    def size(value):
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                name = func._opname.strip("_")
                message = max((size(value) for value in args), default=0)  # the whole: gathered, or to be scattered
                seen.append((inside, name, message, message * (2 if name.startswith("allreduce") else 1)))
            return func(*args, **(kwargs or {}))

    trainer.training_step = marked
    with Counter():
        yield


def measure(job: dict) -> None:
    """Train a few steps in this process, one of several; the main process writes what it counted or timed."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    from trl_ext import RRHFConfig, RRHFTrainer, SLiCConfig, SLiCTrainer
    from trl_ext.playground.model import byte_level_tokenizer

    torch.set_num_threads(1)
    seen, marks, times = [], [], []

    class Marks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            marks.append(len(seen))
            times.append(time.perf_counter() - self.begun)

    k = job["k"]
    trainer_class, config_class = (SLiCTrainer, SLiCConfig) if k == 2 else (RRHFTrainer, RRHFConfig)
    shape = Shape("", (job["prompt"], job["prompt"]), (job["answer"] // 2, job["answer"]), k, job["steps"] * 2)
    args = config_class(
        output_dir=job["folder"],
        max_steps=job["steps"],
        per_device_train_batch_size=2 // job["processes"],
        logging_steps=1,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        prefix_sharing=job["way"] == "shared",
        activation_checkpointing=job["checkpointing"],
        max_completions_per_forward=job["max_completions_per_forward"],
    )
    trainer = trainer_class(
        model=make_model(job["model"]),
        args=args,
        train_dataset=Dataset.from_list(shape.rows(1)),
        processing_class=byte_level_tokenizer(),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if job["lora"] else None,
        callbacks=[Marks()],
    )
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    with counted_collectives(trainer, seen) if job["count"] else contextlib.nullcontext():
        trainer.train()
    if trainer.is_world_process_zero():
        found = {
            "parameters": sum(n for n, _ in sizes),
            "trained": sum(n for n, is_trained in sizes if is_trained),
            "seconds": statistics.median(times[2:]) if times[2:] else None,
            "calls": seen[marks[0] : marks[1]],
            **circumstances(),
        }
        Path(job["folder"], "found.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def launch(job: dict) -> dict:
    """Run [`measure`] under a launcher; what the main process wrote."""
    with tempfile.TemporaryDirectory() as folder:
        job = {**job, "folder": folder}
        module = [sys.executable, "-m"]
        accelerate = [*module, "accelerate.commands.launch", "--num_processes", str(job["processes"])]
        if job["strategy"] == "ddp":
            launcher = [*module, "torch.distributed.run", "--standalone", f"--nproc_per_node={job['processes']}"]
        elif job["strategy"] == "zero3" and not job["keeps_weights"]:
            # by default DeepSpeed keeps up to 10^9 gathered parameters for the backward pass: all of a small model
            settings = {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
            config = {
                "zero_optimization": settings,
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
            }
            Path(folder, "deepspeed.json").write_text(json.dumps(config))
            launcher = [*accelerate, "--use_deepspeed", "--deepspeed_config_file", f"{folder}/deepspeed.json"]
        else:
            launcher = [*accelerate, "--config_file", str(REPOSITORY / f"accelerate_configs/{job['strategy']}.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (REPOSITORY, Path(__file__).parent)))
        done = subprocess.run(
            [*launcher, __file__, "--job", json.dumps(job)], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{job} failed:\n{done.stderr[-3000:]}")
        return json.loads(Path(folder, "found.json").read_text())


def jobs() -> list[dict]:
    spread = {"strategy": "zero3", "keeps_weights": False}
    changes = [
        change
        for strategy in STRATEGIES
        for change in (
            {"strategy": strategy},
            {"strategy": strategy, "way": "padded"},
            {"strategy": strategy, "lora": True},
        )
    ]
    changes += [
        {"strategy": "ddp", "k": 6},
        spread,
        {**spread, "way": "padded"},
        {**spread, "k": 6},
        {**spread, "lora": True},
        {**spread, "checkpointing": True},
        {**spread, "k": 6, "max_completions_per_forward": 2},
    ]
    return [{**BASE, "count": True, "steps": 2, **change} for change in changes]


def count(options) -> None:
    for job in jobs():
        if job["strategy"] not in options.strategies:
            continue
        found = launch(job)
        calls = found.pop("calls")
        steps = [call for call in calls if call[0]]
        others = [call for call in calls if not call[0]]
        by_name = {}
        for _, name, message, _ in steps:
            number, total = by_name.get(name, (0, 0))
            by_name[name] = (number + 1, total + message)
        del found["seconds"]
        row = {
            **{name: job[name] for name in ("strategy", "keeps_weights", "lora", "k", "way", "checkpointing")},
            "max_completions_per_forward": job["max_completions_per_forward"] or "",
            "processes": job["processes"],
            "parameters": found.pop("parameters"),
            "trained": found.pop("trained"),
            "collectives": len(steps),
            "volume_bytes": sum(call[3] for call in steps),
            "other_collectives": len(others),
            "other_bytes": sum(call[3] for call in others),
            "calls": json.dumps(by_name),
            **found,
            "command": shlex.join(["python", *sys.argv]),
        }
        append(options.output, [row])
        print(
            f"{job['strategy']:<6} {'LoRA' if job['lora'] else 'full':<5} K={job['k']} {job['way']:<7}"
            f"{row['collectives']:5} collectives, {row['volume_bytes'] / 1e6:8.1f} MB, "
            f"model {expected(row) / 1e6:8.1f} MB; besides {row['other_collectives']}, {row['other_bytes']} bytes",
            flush=True,
        )


def time_steps(options) -> None:
    """One process and two, in turn; the global batch is the same, and each process has one thread."""
    for strategy in options.strategies:
        for way in ("padded", "shared"):
            job = {**BASE, "strategy": strategy, "way": way, "count": False, "steps": 8, "prompt": 256, "answer": 64}
            seconds = {1: [], 2: []}
            for _ in range(options.repeats):
                for processes, found in seconds.items():
                    result = launch({**job, "processes": processes})
                    found.append(result["seconds"])
            one, two = (statistics.median(found) for found in seconds.values())
            row = {
                **{name: job[name] for name in ("strategy", "way", "model", "prompt", "answer", "k")},
                "seconds_1": round(one, 3),
                "seconds_2": round(two, 3),
                "times_as_fast": round(statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)), 3),
                "repeats": options.repeats,
                **circumstances(),
                "threads": result["threads"],  # of each process
            }
            append(RESULTS / "scaling_time.csv", [row])
            print(f"{strategy:<6} {way:<7} {one:.2f} s on 1, {two:.2f} s on 2: {row['times_as_fast']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="count collectives first (19 launches)")
    parser.add_argument("--time", action="store_true", help="time steps first (4 launches each strategy and repeat)")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.csv")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        measure(json.loads(options.job))
        return
    if options.measure:
        count(options)
    if options.time:
        time_steps(options)
    tables = [memory_table(), largest_on_a_node(), activations_table(), communication_table(), share_table()]
    if options.output.exists():
        tables.insert(0, measured_table(options.output))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
