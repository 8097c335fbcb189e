"""
Peak memory of one SLiC-HF training step against one `DPOTrainer` step on the same batch.

    python benchmarks/slic_memory.py

Each trainer runs in a process of its own: load, three steps, done. On a CPU the figure is the peak resident memory of
the process less what it held before the model was loaded; on CUDA it is `max_memory_allocated`. Rows are appended to
`benchmarks/results/slic_memory.csv`. Models have random weights and a vocabulary of 32 000.
"""

import argparse
import csv
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

TRAINERS = ("SLiC-HF", "DPO", "DPO, precomputed reference")
RESULTS = Path(__file__).parent / "results" / "slic_memory.csv"
SHAPES = {  # parameters: hidden size, layers
    "30M": (384, 8),
    "160M": (1024, 8),
}


def make_model(directory: str, shape: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trl_ext.playground.model import byte_level_tokenizer

    hidden_size, num_layers = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3 // 32 * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)


def measure(job: dict) -> None:
    """Run one trainer in this process and print its peak memory in MiB."""
    import psutil
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from trl_ext import SLiCConfig, SLiCTrainer

    text = "abcdefgh " * 200
    rows = Dataset.from_list(
        [
            {
                "prompt": f"{i}" + text[: job["prompt"]],
                "chosen": text[: job["answer"]],
                "rejected": text[1 : job["answer"] + 1],
            }
            for i in range(3 * job["pairs"])
        ]
    )
    settings = {
        "output_dir": job["directory"],
        "per_device_train_batch_size": job["pairs"],
        "max_steps": 3,
        "max_length": None,
        "bf16": torch.cuda.is_available(),
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
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
    if job["trainer"] == "SLiC-HF":
        trainer = SLiCTrainer(job["directory"], args=SLiCConfig(**settings), train_dataset=rows)
    else:
        settings["precompute_ref_log_probs"] = job["trainer"] != "DPO"
        trainer = DPOTrainer(job["directory"], args=DPOConfig(**settings), train_dataset=rows)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    running = False
    watcher.join()
    mib = (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak - before) / 2**20
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(json.dumps({"peak_mib": mib, "seconds": seconds, "device": device, "parameters": parameters}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2, help="pairs per batch")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--runs", type=int, default=3, help="runs of each trainer, in turn; the median is kept")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        measure(json.loads(options.job))
        return

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    versions = " ".join(f"{name}=={version(name)}" for name in ("torch", "transformers", "trl"))
    command = shlex.join(["python", *sys.argv])
    rows = []
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as directory:
            make_model(directory, shape)
            found: dict[str, list[dict]] = {name: [] for name in TRAINERS}
            for _ in range(options.runs):
                for name in TRAINERS:
                    job = {**vars(options), "trainer": name, "directory": directory}
                    worker = [sys.executable, __file__, "--job", json.dumps(job)]
                    done = subprocess.run(worker, capture_output=True, text=True)
                    if done.returncode:
                        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
        for name, results in found.items():
            middle = sorted(results, key=lambda result: result["peak_mib"])[len(results) // 2]
            rows.append(
                {
                    "trainer": name,
                    "shape": shape,
                    "parameters": middle["parameters"],
                    "pairs": options.pairs,
                    "prompt_tokens": options.prompt,
                    "answer_tokens": options.answer,
                    "peak_mib": round(middle["peak_mib"]),
                    "lowest_mib": round(min(result["peak_mib"] for result in results)),
                    "highest_mib": round(max(result["peak_mib"] for result in results)),
                    "runs": len(results),
                    "device": middle["device"],
                    "machine": machine,
                    "versions": versions,
                    "commit": commit,
                    "command": command,
                }
            )
            print(f"{shape:>5}  {name:<28} {rows[-1]['peak_mib']:>6} MiB")
    RESULTS.parent.mkdir(exist_ok=True)
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
