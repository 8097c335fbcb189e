"""
Peak memory of forward, forward + backward and a whole training step over K answers per prompt, padded and shared.

    python benchmarks/prefix_sharing_memory.py

Each measurement runs in a process of its own. On a CPU it is the process's peak resident memory, on CUDA
`max_memory_allocated`; `above_model_mib` leaves out what was held before the measured stage began (the weights, and
before a whole step AdamW's moments). Rows are appended to
`benchmarks/results/prefix_sharing_memory.csv`; `benchmarks/plot.py` draws them.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time

from common import MODELS, RESULTS, Shape, append, circumstances, make_model

STAGES = ("forward", "forward+backward", "step")


def measure(job: dict) -> None:
    """Run one stage in this process and print its peak in MiB."""
    os.environ["TQDM_DISABLE"] = "1"
    import psutil
    import torch
    from datasets import Dataset
    from prefix_sharing_speed import Run, collate

    from tests.equivalence.baseline import padded_slic_trainer
    from trl_ext import enable_prefix_sharing

    shape = Shape("", (job["prompt"], job["prompt"]), (job["answer"], job["answer"]), job["k"], job["prompts"])
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "output_dir": directory,
            "bf16": torch.cuda.is_available(),
            "report_to": "none",
            "activation_checkpointing": job["checkpointing"],
            "max_length": None,
            "disable_tqdm": True,
            "reg_weight": 0.0,
        }
        trainer = padded_slic_trainer(make_model(job["model"]), Dataset.from_list(shape.rows(1)), settings)
        trainer._set_signature_columns_if_needed()
        enable_prefix_sharing(trainer, job["way"] == "always")
        run = Run(trainer, collate(trainer, 1))
        small = Run(trainer, [trainer.data_collator([{**row, **shorter(row)} for row in list(trainer.train_dataset)])])
        small.optimizer = run.optimizer
        small(job["stage"], 0)  # libraries load, and before a step Adam's moments are made
        process = psutil.Process()
        before = process.memory_info().rss
        peak, running = before, True

        def watch():
            nonlocal peak
            while running:
                peak = max(peak, process.memory_info().rss)
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        run(job["stage"], 0)
        running = False
        watcher.join()
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"peak_mib": peak / 2**20, "above_model_mib": (peak - before) / 2**20, **circumstances()}))


def shorter(row: dict) -> dict:
    return {"prompt_ids": row["prompt_ids"][:2], "completion_ids": [ids[:2] for ids in row["completion_ids"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="30M", choices=list(MODELS))
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 6, 8, 16])
    parser.add_argument("--prompt", type=int, default=200, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--prompts", type=int, default=1, help="prompts per batch")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        measure(json.loads(options.job))
        return
    command = shlex.join(["python", *sys.argv])
    for k in options.k:
        for stage in options.stages:
            rows = []
            for way in ("padded", "always"):
                job = {
                    **{name: getattr(options, name) for name in ("model", "prompt", "answer", "prompts")},
                    **{"checkpointing": options.checkpointing, "k": k, "stage": stage, "way": way},
                }
                done = subprocess.run(
                    [sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True
                )
                if done.returncode:
                    raise RuntimeError(f"{job} failed:\n{done.stderr[-3000:]}")
                found = json.loads(done.stdout.splitlines()[-1])
                found.update(peak_mib=round(found["peak_mib"]), above_model_mib=round(found["above_model_mib"]))
                distinct = options.prompts * (options.prompt + k * options.answer)
                padded = options.prompts * k * (options.prompt + options.answer)
                rows.append({**job, "tokens_distinct": distinct, "tokens_padded": padded, **found, "command": command})
            append(RESULTS / "prefix_sharing_memory.csv", rows)
            (padded, shared) = (row["above_model_mib"] for row in rows)
            print(
                f"K={k:<3} {stage:<17} {padded:6} MiB padded {shared:6} MiB shared  {shared / padded:.2f}", flush=True
            )


if __name__ == "__main__":
    main()
