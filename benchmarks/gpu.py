"""
What a CUDA GPU can show of prefix sharing, in one command of about 20 minutes.

    python benchmarks/gpu.py

Correctness comes before speed. Each part appends its rows, with the card's name, to `benchmarks/results/gpu.csv`.
Parts that are finished for this card, these versions and this commit are skipped, so the same command resumes an
interrupted run. `--rehearse --results FILE` runs every part at toy size, also on a CPU, without FlexAttention.

Parts:
- `tests`: the tests that need a GPU.
- `nan`: gradients of SDPA with a mask at row lengths for which cuDNN is known to give NaN, by kernel.
- `bf16`: how far log-probabilities and gradients in bf16 are from fp32, padded and shared. The tolerances of the
  self-check and of SPIN's first loss depend on it.
- `compilations`: graphs that FlexAttention needs for ragged batches.
- `speed`: forward and backward, with activation checkpointing, and the peak memory.
- `trainer`: losses of `DPOTrainer`, padded and `"auto"`.
"""

import argparse
import contextlib
import csv
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import MODELS, REPOSITORY, RESULTS, Shape, append, circumstances, make_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.equivalence.baseline import padded_dpo_trainer
from tests.equivalence.compare import batch_of, random_sequences
from trl_ext import enable_prefix_sharing
from trl_ext._trl import add_fused_lm_head
from trl_ext.execution.sharing import PrefixSharing

SHAPES = [
    Shape("TL;DR", (225, 375), (25, 55), 2, 8),
    Shape("HH", (100, 500), (30, 120), 2, 8),
    Shape("UltraFeedback", (50, 250), (150, 550), 2, 8),
    Shape("ranked 6", (150, 250), (45, 85), 6, 4),
    Shape("ranked 8", (700, 1300), (150, 350), 8, 2),
]
TOY_SHAPES = [Shape("toy", (8, 16), (3, 6), 2, 2)]
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


class Machine:
    """The device, and sizes of models and batches on it."""

    def __init__(self, rehearse: bool):
        self.rehearse = rehearse
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shapes = TOY_SHAPES if rehearse else SHAPES
        self.attention = ["sdpa"]
        if self.device.type == "cuda":
            self.attention.append("flex_attention")
        with contextlib.suppress(ImportError):
            import flash_attn  # noqa: F401

            self.attention.append("flash_attention_2")

    def model(self, size: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32):
        model = make_model("toy" if self.rehearse else size, attention).to(self.device, dtype)
        add_fused_lm_head(model, outputs=OUTPUTS)
        return model

    def batch(self, shape: Shape, seed: int) -> dict[str, torch.Tensor]:
        sequences = random_sequences(shape.prompts, shape.k, shape.prompt, shape.answer, seed)
        return {name: tensor.to(self.device) for name, tensor in batch_of(sequences).items()}

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def row(what: str, way: str, value: float, unit: str) -> dict[str, Any]:
    return {"what": what, "way": way, "value": value, "unit": unit}


def tests(machine: Machine) -> list[dict]:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "tests/equivalence/test_cuda.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    print(done.stdout[-2000:])
    return [row(done.stdout.strip().splitlines()[-1], "tests/equivalence/test_cuda.py", done.returncode, "exit code")]


def nan(machine: Machine) -> list[dict]:
    """Rows whose scores are all about -120, as of heads with massive activations, under the mask of a layout."""
    rows = []
    kernels = {"default": None, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for kernel, backend in kernels.items() if machine.device.type == "cuda" else [("default", None)]:
        for length in (64, 128) if machine.rehearse else (192, 448, 512, 704, 768):
            query, key, value = (torch.randn(1, 2, length, 64, device=machine.device) * 0.1 for _ in range(3))
            query[..., 0], key[..., 0] = 1.0, -120 * math.sqrt(64)
            tensors = [tensor.bfloat16().requires_grad_() for tensor in (query, key, value)]
            slot = torch.arange(length, device=machine.device)
            visible = (slot[:, None] >= slot) & ~((slot[:, None] >= length * 3 // 4) & (slot >= length // 2))
            visible |= torch.eye(length, dtype=torch.bool, device=machine.device)
            lowest = torch.finfo(torch.bfloat16).min / 2
            mask = torch.zeros(1, 1, length, length, dtype=torch.bfloat16, device=machine.device)
            mask.masked_fill_(~visible, lowest)
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                output = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
                gradients = torch.autograd.grad(output.sum(), tensors)
            finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
            rows.append(row(f"gradients of {length} slots", kernel, float(finite), "finite"))
    return rows


def bf16(machine: Machine) -> list[dict]:
    rows = []
    models = {way: machine.model("0.5B") for way in ("fp32", "padded", "shared")}
    PrefixSharing(True).install(models["shared"])
    for shape in machine.shapes[:2]:
        batch, logps, gradients = machine.batch(shape, 0), {}, {}
        for way, model in models.items():
            model.zero_grad()
            with machine.autocast() if way != "fp32" else contextlib.nullcontext():
                found = model(**batch, fused_lm_head=True, use_cache=False).log_probs.float()
            found.sum().backward()
            logps[way] = found.detach()
            gradients[way] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        lengths = (batch["labels"] != -100).sum(dim=1)
        for way in ("padded", "shared"):
            for what, of in (("log-probabilities", logps), ("gradients", gradients)):
                error = ((of[way] - of["fp32"]).norm() / of["fp32"].norm()).item()
                rows.append(row(f"{shape.name}: {what} from fp32", way, error, "of the norm"))
        distance = (logps["padded"] - logps["shared"]).sum(dim=1) / lengths.sqrt()
        rows.append(row(f"{shape.name}: first loss", "shared", distance.square().mean().sqrt().item(), "nats"))
    return rows


def compilations(machine: Machine) -> list[dict]:
    if "flex_attention" not in machine.attention:
        return []
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    dynamo.counters.clear()
    model = machine.model("0.5B", "flex_attention").train()
    PrefixSharing(True).install(model)
    for seed in range(12):
        shape = machine.shapes[seed % len(machine.shapes)]
        with machine.autocast():
            model(**machine.batch(shape, seed), fused_lm_head=True, use_cache=False).log_probs.sum().backward()
    return [row("12 ragged batches", "flex_attention", dynamo.counters["stats"]["unique_graphs"], "graphs")]


def speed(machine: Machine) -> list[dict]:
    rows = []
    for attention in machine.attention:
        for way in ("padded", "shared"):
            model = machine.model("1.5B", attention).train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if way == "shared":
                PrefixSharing(True).install(model)
            for shape in machine.shapes:
                batches = [machine.batch(shape, seed) for seed in range(3)]
                times = []
                for repeat in range(1 if machine.rehearse else 3):
                    if repeat == 1 and machine.device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    for batch in batches:
                        fresh = {name: tensor.clone() for name, tensor in batch.items()}  # planned anew
                        machine.synchronize()
                        start = time.perf_counter()
                        with machine.autocast():
                            outputs = model(**fresh, fused_lm_head=True, use_cache=False)
                        outputs.log_probs.sum().backward()
                        machine.synchronize()
                        times.append(time.perf_counter() - start)
                        model.zero_grad()
                what, known = (
                    f"{shape.name}, forward and backward",
                    times[len(batches) :] or times,
                )  # shapes seen before
                rows.append(row(what, f"{attention} {way}", statistics.median(known), "s"))
                rows.append(row(f"{what}, new lengths", f"{attention} {way}", max(times[: len(batches)]), "s"))
                if machine.device.type == "cuda":
                    peak = torch.cuda.max_memory_allocated() / 2**30
                    rows.append(row(f"{what}, peak", f"{attention} {way}", peak, "GiB"))
            del model
            if machine.device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def trainer(machine: Machine) -> list[dict]:
    from datasets import Dataset

    losses, rows = {}, []
    size, shape = ("toy", TOY_SHAPES[0]) if machine.rehearse else ("166M", SHAPES[0])
    steps = 2 if machine.rehearse else 40
    for way in ("padded", "auto"):
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "output_dir": folder, "per_device_train_batch_size": shape.prompts, "max_steps": steps, "bf16": True,
                "logging_steps": 1, "report_to": "none", "save_strategy": "no", "max_length": None,
                "disable_tqdm": True, "use_cpu": machine.device.type == "cpu",
            }  # fmt: skip
            dataset = Dataset.from_list(shape.rows(4))
            run = padded_dpo_trainer(make_model(size), dataset, settings, ref_model=make_model(size))
            if way == "auto":
                enable_prefix_sharing(run)
            seconds = run.train().metrics["train_runtime"]
        losses[way] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        rows.append(row(f"{steps} steps of DPOTrainer", way, seconds, "s"))
    worst = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    return [*rows, row(f"{steps} losses of DPOTrainer", "auto", worst, "largest difference")]


PARTS = {part.__name__: part for part in (tests, nan, bf16, compilations, speed, trainer)}


def finished(path: Path) -> set[str]:
    """The parts that this card, these versions and this commit have rows of."""
    if not path.exists():
        return set()
    here = circumstances()
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["what"] == "finished"]
    return {row["part"] for row in rows if all(row[name] == here[name] for name in ("device", "versions", "commit"))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="toy sizes")
    parser.add_argument("--results", type=Path, help="file of rows, with --rehearse needed")
    options = parser.parse_args(arguments)
    if options.rehearse and options.results is None:
        parser.error("--rehearse needs --results FILE, so that toy rows do not join the measured ones.")
    if not (options.rehearse or torch.cuda.is_available()):
        parser.error("there is no CUDA GPU. Add --rehearse to try the parts at toy size.")
    MODELS["toy"] = (64, 2, 4, 2, 96, True)
    path = options.results or RESULTS / "gpu.csv"
    machine, done = Machine(options.rehearse), finished(path)
    for name in options.parts:
        if name in done:
            print(f"{name}: finished before")
            continue
        start = time.perf_counter()
        rows = PARTS[name](machine)
        rows.append(row("finished", "", time.perf_counter() - start, "s"))
        append(path, [{"part": name, **found, **circumstances()} for found in rows])
        for found in rows:
            print(f"{name}: {found['what']}, {found['way']}: {found['value']:.4g} {found['unit']}", flush=True)


if __name__ == "__main__":
    main()
