"""
The longest prompt that fits into a given memory, padded and shared.

    python benchmarks/long_context.py --budget_gib 4

For every setting, the lengths of the prompt are searched until the longest that fits and the shortest that does not
are within 10 % of each other. Each length is a real step of the trainer (forward, backward, AdamW; fp32, SLiC-HF for
K = 2 and RRHF for more) on one prompt with K answers, in a process of its own, after a first step on a few tokens.
Processes are forked from one that has only imported libraries.
What counts is the peak of the process's resident memory (on CUDA: of allocated memory) above what it held before the
step: weights and AdamW's moments are not in it, gradients are. A process that passes the budget is ended at once.

Answers have from half of `--answer` tokens to all of them, evenly spread, so that the padded batch needs a mask, as
batches of real data do; with `--equal` all have the same length, and it needs none.

Ways:
- `padded`: TRL's forward, K rows per prompt.
- `scored head`: the padded batch, but only scored positions reach the LM head. TRL does so itself on GPUs: there, this
  is what sharing is to be compared with.
- `shared`: `prefix_sharing="auto"`.

Rows are appended to `benchmarks/results/long_context.csv`.
"""

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common import MODELS, RESULTS, append, circumstances, make_model

FRESH = multiprocessing.get_context("forkserver")
PRELOADED = ["deepspeed", "trl_ext.methods.slic.trainer", "trl_ext.methods.rrhf.trainer"]
WAYS = ("padded", "scored head", "shared")
LENGTH_STEP = 32
TOLERANCE = 0.1
MIB = 2**20


def rows_of(job: dict) -> list[dict]:
    """A row of a few tokens and the row that is measured; every character is a token, answers get an end token."""

    def row(prompt, shortest, longest):
        k = job["k"]
        lengths = [shortest + (longest - shortest) * i // (k - 1) for i in range(k)]
        answers = ["abcdefghijklmnopqrstuvwxyz"[i] * (length - 1) for i, length in enumerate(lengths)]
        return {"prompt": "p" * prompt, "completions": answers, "scores": [float(i) for i in range(k)]}

    shortest = job["answer"] if job["equal"] else job["answer"] // 2
    return [row(2, 2, 3), row(job["prompt"], shortest, job["answer"])]


def measure(job: dict, result, log: str) -> None:
    """Two steps of the trainer in this process; send the peak of the second in MiB, `None` if it does not fit."""
    output = os.open(log, os.O_WRONLY)
    os.dup2(output, 1), os.dup2(output, 2)
    import psutil
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from trl_ext import RRHFConfig, RRHFTrainer, SLiCConfig, SLiCTrainer
    from trl_ext.execution.cost import CostModel
    from trl_ext.playground.model import byte_level_tokenizer

    if job["way"] == "scored head":
        CostModel.pays = lambda *_: False
    on_gpu = torch.cuda.is_available()
    process = psutil.Process()

    def finish(peak):
        result.send(peak and peak / MIB)
        os._exit(0)

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                return
            if on_gpu:
                self.before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            else:
                self.before = self.peak = process.memory_info().rss
                threading.Thread(target=self.watch, daemon=True).start()

        def watch(self):
            while True:
                self.peak = max(self.peak, process.memory_info().rss)
                if self.peak - self.before > job["budget"]:
                    finish(None)
                time.sleep(0.002)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                peak = (torch.cuda.max_memory_allocated() if on_gpu else self.peak) - self.before
                finish(peak if peak <= job["budget"] else None)

    trainer_class, config_class = (SLiCTrainer, SLiCConfig) if job["k"] == 2 else (RRHFTrainer, RRHFConfig)
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_class(
            model=make_model(job["model"]),
            args=config_class(
                output_dir=directory,
                max_steps=2,
                per_device_train_batch_size=1,
                train_sampling_strategy="sequential",
                max_length=None,
                bf16=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                prefix_sharing="auto" if job["way"] != "padded" else False,
                activation_checkpointing=job["checkpointing"],
                max_completions_per_forward=job["max_completions_per_forward"],
            ),
            train_dataset=Dataset.from_list(rows_of(job)),
            processing_class=byte_level_tokenizer(),
            callbacks=[Watch()],
        )
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            finish(None)


def probe(job: dict) -> float | None:
    """[`measure`] in a fresh process."""
    received, result = FRESH.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as log:
        process = FRESH.Process(target=measure, args=(job, result, log.name))
        process.start()
        result.close()
        try:
            return received.recv()
        except EOFError:
            process.join()
            said = Path(log.name).read_text()[-3000:]
            raise RuntimeError(f"{job} failed with exit code {process.exitcode}:\n{said}") from None


def longest(peak_at: Callable[[int], float | None], budget: float, start: int, most: int) -> tuple[int, int | None]:
    """
    The longest length found that fits, 0 if none does, and the shortest found that does not, `None` if `most` fits.

    Args:
        peak_at (`Callable`): what a length takes, `None` if more than `budget`. Grows with the length.
        budget (`float`): same unit.
        start, most (`int`): first length tried, and the longest.
    """
    fits, too_long, length = {0: 0.0}, None, start
    while True:
        peak = peak_at(length)
        if peak is None:
            too_long = length
        else:
            fits[length] = peak
        low = max(fits)
        if low >= most:
            return low, None
        step = max(LENGTH_STEP, int(TOLERANCE * low))
        if too_long is not None and too_long - low <= step:
            return low, too_long
        # along the line through the last two that fitted; where memory grows faster, the upper bound corrects it
        below = max((n for n in fits if n < low), default=None)
        guess = 0 if below is None else low + (budget - fits[low]) * (low - below) / max(fits[low] - fits[below], 1)
        if too_long is None:
            length = min(max(int(guess), low + step), 4 * low, most)
        else:
            quarter = (too_long - low) // 4
            length = min(max(int(guess), low + max(quarter, step // 2)), too_long - max(quarter, step // 2))
        length = -(-length // LENGTH_STEP) * LENGTH_STEP
        if length in fits or length == too_long:
            length = low + LENGTH_STEP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget_gib", type=float, default=4.0, help="GiB that a step may take")
    parser.add_argument("--model", default="39M", choices=list(MODELS))
    parser.add_argument("--k", type=int, nargs="+", default=[2, 6], help="answers per prompt, 2 or more")
    parser.add_argument("--answer", type=int, default=128, help="tokens of the longest answer")
    parser.add_argument("--equal", action="store_true", help="answers of equal length: the padded batch needs no mask")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument(
        "--max_completions_per_forward", type=int, nargs="+", default=[0, 2], help="0: all at once; others if below K"
    )
    parser.add_argument("--most", type=int, default=32768, help="longest prompt tried, in tokens")
    parser.add_argument("--output", type=Path, default=RESULTS / "long_context.csv")
    options = parser.parse_args()
    # memory that is freed goes back to the system, so that what is resident is what is in use
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    os.environ["TQDM_DISABLE"] = "1"
    FRESH.set_forkserver_preload(PRELOADED)
    budget = int(options.budget_gib * 2**30)
    settings = [
        (k, checkpointing, parts or None, way)
        for k in options.k
        for checkpointing in options.checkpointing
        for parts in options.max_completions_per_forward
        if parts < k
        for way in options.ways
    ]
    for k, checkpointing, parts, way in settings:
        job = {
            **{name: getattr(options, name) for name in ("model", "answer", "equal")},
            **{"k": k, "checkpointing": checkpointing == "on", "max_completions_per_forward": parts, "way": way},
            "budget": budget,
        }
        found = {}

        def peak_at(length, job=job, found=found):
            found[length] = probe({**job, "prompt": length})
            return found[length]

        low, too_long = longest(peak_at, budget / MIB, 512, options.most)
        del job["budget"]
        append(
            options.output,
            [
                {
                    **job,
                    "budget_gib": options.budget_gib,
                    "longest_prompt": low,
                    "shortest_too_long": too_long or "",
                    "above_model_mib": round(found[low]) if low else "",
                    "probes": len(found),
                    **circumstances(),
                }
            ],
        )
        print(
            f"K={k:<2} checkpointing {checkpointing:<3} completions per forward {parts or 'all':<3} {way:<11} "
            f"{low:6} tokens fit, {too_long or 'more'} do not",
            flush=True,
        )


if __name__ == "__main__":
    main()
