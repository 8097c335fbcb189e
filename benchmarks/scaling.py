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
(counted, see `tests/test_scaling.py`); with checkpointing, 2 h for each layer and that for one. To these comes the
mask of a batch with shared prompts, 2 S^2 for rows of S slots.

Not in it: the CUDA context, buckets of DDP and DeepSpeed, fragmentation, the LM head's working memory. Gigabytes are
10^9 bytes.
"""

import argparse
import contextlib
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import MODELS, REPOSITORY, RESULTS, Shape, append, circumstances, make_model

GPU_MEMORY = 80e9
# Left for what the model leaves out.
HEADROOM = 8e9
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
NAMES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3, FSDP2", "offload": "ZeRO-3, offloaded"}


@dataclass(frozen=True)
class Architecture:
    """A Llama: its sizes, with heads of 128."""

    name: str
    parameters: float
    hidden: int
    mlp: int
    heads: int
    key_value_heads: int
    layers: int
    vocabulary: int = 32000

    @property
    def lora(self) -> float:
        """Parameters of a LoRA of rank 16 on all linear layers."""
        hidden, key_value = self.hidden, 128 * self.key_value_heads
        return 16 * self.layers * (2 * 2 * hidden + 2 * (hidden + key_value) + 3 * (hidden + self.mlp))

    @property
    def recomputed(self) -> float:
        """Parameters that activation checkpointing runs again: of each layer all but its last matrix."""
        key_value = 128 * self.key_value_heads
        return self.layers * 2 * self.hidden * (self.hidden + key_value + self.mlp)

    @property
    def gathered(self) -> float:
        """Bytes of weights in use at a time where they are split: two layers or the embedding, bf16."""
        embedding = self.vocabulary * self.hidden
        return 2 * max(embedding, 2 * (self.parameters - 2 * embedding) / self.layers)

    def activations(self, tokens: int, row_length: int, *, checkpointing: bool, shared: bool) -> float:
        """Bytes that autograd keeps for a batch of `tokens` in rows of `row_length`, and the mask if it is shared."""
        layer = 24 * self.hidden + 8 * self.mlp + 4 * self.heads + 8
        kept = 2 * self.hidden * self.layers + layer if checkpointing else layer * self.layers
        return tokens * kept + (2 * row_length**2 if shared else 0)


ARCHITECTURES = (
    Architecture("7B", 6.74e9, 4096, 11008, 32, 32, 32),
    Architecture("70B", 68.98e9, 8192, 28672, 64, 8, 80),
)

# one prompt on each GPU: tokens of the prompt, tokens of each answer, answers
BATCHES = ((2048, 512, 2), (2048, 512, 6))


def states(strategy: str, parameters: float, trained: float, processes: int) -> float:
    """
    Bytes of weights, gradients and optimiser states on each process; frozen weights are bf16.

    Args:
        strategy (`str`): `"ddp"`, `"zero1"`, `"zero2"`, `"zero3"` (also FSDP2) or `"offload"`.
        parameters, trained (`float`): of the model, and those that are trained.
        processes (`int`): N.
    """
    kept, split = {"ddp": (16, 0), "zero1": (4, 12), "zero2": (2, 14), "zero3": (0, 16), "offload": (0, 0)}[strategy]
    frozen = parameters - trained
    return trained * (kept + split / processes) + frozen * frozen_bytes(strategy, processes)


def frozen_bytes(strategy: str, processes: int) -> float:
    """Bytes on each process for each parameter that is not trained, a reference model's for instance."""
    return {"zero3": 2 / processes, "offload": 0.0}.get(strategy, 2.0)


def communication(
    strategy: str,
    parameters: float,
    trained: float,
    *,
    bytes_each: int = 2,
    recomputed: float = 0,
    parts: int = 1,
    frozen_embedding: float = 0,
    keeps_weights: bool = False,
) -> float:
    """
    Volume in bytes for one forward and backward of one optimiser step.

    Args:
        strategy, parameters, trained: as in [`states`].
        bytes_each (`int`): of a weight or gradient on the wire.
        recomputed (`float`): parameters of what is run again for the backward.
        parts (`int`): in which `max_completions_per_forward` runs a batch.
        frozen_embedding (`float`): parameters of an input embedding that is not trained, which no backward needs.
        keeps_weights (`bool`): ZeRO-3 keeps what it gathered till the backward, as DeepSpeed does by default with
            models of less than `stage3_max_live_parameters`, 10^9.
    """
    if strategy in ("ddp", "zero1", "zero2"):
        return (2 if strategy == "ddp" else 3) * bytes_each * trained
    gathered = parameters if keeps_weights else parts * (2 * parameters - frozen_embedding + recomputed)
    return bytes_each * (gathered + trained)


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
    from trl_ext.playground import byte_level_tokenizer

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


BASE = {
    "model": "39M",
    "prompt": 96,
    "answer": 32,
    "k": 2,
    "lora": False,
    "way": "shared",
    "checkpointing": False,
    "max_completions_per_forward": None,
    "keeps_weights": True,
    "processes": 2,
}


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


def expected(row: dict) -> float:
    """[`communication`] for a row of `scaling.csv`."""
    hidden, layers, _, _, mlp, _ = MODELS[BASE["model"]]
    embedding = 32000 * hidden
    most = row["max_completions_per_forward"]
    recomputed = layers * (4 * hidden**2 + 2 * hidden * mlp) if str(row["checkpointing"]) == "True" else 0
    if most:  # the layers; and of the head, as large as the embedding, one gathering less was counted
        recomputed += int(row["parameters"]) - 3 * embedding
    return communication(
        row["strategy"],
        int(row["parameters"]),
        int(row["trained"]),
        bytes_each=4,
        recomputed=recomputed,
        parts=-(-int(row["k"]) // int(most)) if most else 1,
        frozen_embedding=embedding if str(row["lora"]) == "True" else 0,
        keeps_weights=str(row["keeps_weights"]) == "True",
    )


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


# Tables


def tokens_of(batch: tuple[int, int, int], shared: bool) -> tuple[int, int]:
    """Tokens computed for a prompt with its answers, and the length of their rows."""
    prompt, answer, k = batch
    return (prompt + k * answer,) * 2 if shared else (k * (prompt + answer), prompt + answer)


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def gigabytes(value: float) -> str:
    text = f"{value / 1e9:,.1f}" if value < 99.5e9 else f"{value / 1e9:,.0f}"
    return f"**{text}**" if 0 <= value <= GPU_MEMORY - HEADROOM else text


def memory_table() -> str:
    head = ["computed, GB per GPU", *(f"{m.name}, {n} GPU{'s' * (n > 1)}" for m in ARCHITECTURES for n in (1, 8, 64))]
    rows = []
    for lora in (False, True):
        for strategy, name in NAMES.items():
            cells = []
            for model in ARCHITECTURES:
                adapters = model.lora if lora else 0
                for processes in (1, 8, 64):
                    held = states(strategy, model.parameters + adapters, adapters or model.parameters, processes)
                    held += model.gathered if strategy == "offload" or (strategy == "zero3" and processes > 1) else 0
                    tokens, length = tokens_of(BATCHES[0], shared=True)
                    held += model.activations(tokens, length, checkpointing=True, shared=True)
                    cells.append(gigabytes(held))
            rows.append([f"{'LoRA' if lora else 'full'}, {name}", *cells])
    for strategy in ("ddp", "zero3"):
        cells = [
            f"+ {2 * m.parameters / 1e9:.1f}" if strategy == "ddp" else f"+ {2 * m.parameters / n / 1e9:.1f}"
            for m in ARCHITECTURES
            for n in (1, 8, 64)
        ]
        names = "DDP, ZeRO-1, ZeRO-2" if strategy == "ddp" else "ZeRO-3, FSDP2"
        rows.append([f"a reference model (none here), {names}", *cells])
    return table(head, rows)


def largest_on_a_node() -> str:
    """The largest model whose states fit on 8 GPUs; the activations and gathered layers of the 7B scaled along."""
    rows = []
    model = ARCHITECTURES[0]
    tokens, length = tokens_of(BATCHES[0], shared=True)
    for strategy, name in NAMES.items():
        if strategy == "offload":
            continue
        cells = []
        for adapters in (0, model.lora / model.parameters):
            each = states(strategy, 1.0 + adapters, adapters or 1.0, 8)
            working = model.gathered if strategy == "zero3" else 0
            working += model.activations(tokens, length, checkpointing=True, shared=True)
            cells.append(f"{(GPU_MEMORY - HEADROOM) / (each + working / model.parameters) / 1e9:.0f} B")
        rows.append([name, *cells])
    return table(["computed, largest model on 8 GPUs of 80 GB", "full", "LoRA"], rows)


def activations_table() -> str:
    rows = []
    for batch in BATCHES:
        for checkpointing in (False, True):
            cells = []
            for model in ARCHITECTURES:
                for shared in (False, True):
                    tokens, length = tokens_of(batch, shared)
                    cells.append(
                        gigabytes(model.activations(tokens, length, checkpointing=checkpointing, shared=shared))
                    )
            padded, shared = (tokens_of(batch, way)[0] for way in (False, True))
            rows.append([f"K = {batch[2]}", "on" if checkpointing else "off", f"{padded} / {shared}", *cells])
    head = ["computed, GB of activations", "checkpointing", "tokens padded / shared"]
    return table(head + [f"{m.name}, {way}" for m in ARCHITECTURES for way in ("padded", "shared")], rows)


def communication_table() -> str:
    head = ["computed, GB per step", *(f"{m.name}, {t}" for m in ARCHITECTURES for t in ("full", "LoRA"))]
    rows = []
    for strategy, checkpointing, name in (
        ("ddp", False, "DDP"),
        ("zero2", False, "ZeRO-1, ZeRO-2"),
        ("zero3", False, "ZeRO-3, FSDP2"),
        ("zero3", True, "ZeRO-3, FSDP2, checkpointing"),
    ):
        cells = []
        for model in ARCHITECTURES:
            for adapters in (0, model.lora):
                sent = communication(
                    strategy,
                    model.parameters + adapters,
                    adapters or model.parameters,
                    recomputed=model.recomputed if checkpointing else 0,
                    frozen_embedding=model.vocabulary * model.hidden if adapters else 0,
                )
                cells.append(f"{sent / 1e9:,.1f}")
        rows.append([name, *cells])
    return table(head, rows)


def share_table(flops: float = 400e12, bandwidth: float = 50e9) -> str:
    """Communication's part of a step if nothing overlapped: 8 FLOPs per weight and token (with recomputing)."""
    model = ARCHITECTURES[0]
    rows = []
    for batch in BATCHES:
        cells = []
        for strategy in ("ddp", "zero3"):
            sent = communication(strategy, model.parameters, model.parameters, recomputed=model.recomputed) / bandwidth
            for shared in (False, True):
                computing = 8 * model.parameters * tokens_of(batch, shared)[0] / flops
                cells.append(f"{sent / (sent + computing):.0%}")
        rows.append([f"K = {batch[2]}", *cells])
    head = ["computed, communication / (communication + computing)"]
    return table(head + [f"{s}, {way}" for s in ("DDP", "ZeRO-3") for way in ("padded", "shared")], rows)


def measured_table(path: Path) -> str:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    lines = []
    for row in rows:
        is_spread = row["strategy"] == "zero3" and row["keeps_weights"] == "False"
        parts = [f"K = {row['k']}", row["way"]]
        parts += ["checkpointing"] * (row["checkpointing"] == "True")
        if row["max_completions_per_forward"]:
            parts.append(f"{row['max_completions_per_forward']} completions per forward")
        trained = float(row["trained"]) * 4
        whole = float(row["parameters"]) * 4
        unit = whole if row["strategy"] == "zero3" else trained
        lines.append(
            [
                {"zero3": "ZeRO-3"}.get(row["strategy"], NAMES[row["strategy"]]) + ", as a large model" * is_spread,
                "LoRA" if row["lora"] == "True" else "full",
                ", ".join(parts),
                row["collectives"],
                f"{float(row['volume_bytes']) / 1e6:,.1f}",
                f"{float(row['volume_bytes']) / unit:.2f} {'Ψ' if row['strategy'] == 'zero3' else 'Ψₜ'}",
                f"{expected(row) / unit:.2f}",
                f"{row['other_collectives']}, {float(row['other_bytes']) / 1e3:.1f} kB",
            ]
        )
    head = ["measured", "", "batch", "collectives", "MB", "in parameters", "model", "besides"]
    return table(head, lines)


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
