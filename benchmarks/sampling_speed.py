"""
Time to sample K answers to each of many prompts, against what a user would write with `model.generate`.

    python benchmarks/sampling_speed.py

- `sample_candidates`: ours, from the prompts' text to the shards on disk, loading the model included.
- `one candidate`, `one prompt`: a loop over `generate`, one answer at a time, or all K to a prompt at a time
  (`num_return_sequences`).
- `batches`: `generate` over prompts sorted by length, padded on the left, as many answers at a time as ours.

The model has random weights; every 1/`--mean_length` of its vocabulary ends an answer, so that lengths are spread as
answers' are. One way after the other, `--repeats` times; rows are appended to `benchmarks/results/sampling_speed.csv`.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from common import MODELS, RESULTS, Shape, append, circumstances, make_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="30M")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt_length", type=int, nargs=2, default=(40, 200), help="shortest and longest, tokens")
    parser.add_argument("--k", type=int, default=6, help="answers per prompt")
    parser.add_argument("--mean_length", type=int, default=40, help="of an answer, tokens")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=64, help="answers at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "sampling_speed.csv")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from trl_ext.playground.model import byte_level_tokenizer
    from trl_ext.sampling.candidates import sample_candidates
    from trl_ext.sampling.config import SamplingConfig

    logging.disable_progress_bar()
    directory = tempfile.TemporaryDirectory()
    model = make_model(options.model)
    vocabulary = model.config.vocab_size
    model.generation_config.eos_token_id = list(range(vocabulary - vocabulary // options.mean_length, vocabulary))
    model.generation_config.pad_token_id = byte_level_tokenizer().pad_token_id
    model.save_pretrained(directory.name)
    byte_level_tokenizer().save_pretrained(directory.name)
    model = AutoModelForCausalLM.from_pretrained(directory.name, dtype="auto").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(directory.name, padding_side="left")
    shape = Shape("", tuple(options.prompt_length), (2, 2), 2, options.prompts)
    rows = [{"prompt": row["prompt"]} for row in shape.rows(1)]

    def generate(prompts: list[str], copies: int) -> int:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        output = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=options.max_new_tokens,
            num_return_sequences=copies,
        )
        return int((output[:, inputs["input_ids"].size(1) :] != tokenizer.pad_token_id).sum())

    prompts = sorted((row["prompt"] for row in rows), key=len)
    at_a_time = max(options.batch_size // options.k, 1)

    def ours() -> int:
        config = SamplingConfig(
            num_candidates=options.k,
            temperature=1.0,
            max_new_tokens=options.max_new_tokens,
            sampling_batch_size=options.batch_size,
            keep_duplicates=True,
            role_markers=None,
        )
        with tempfile.TemporaryDirectory() as folder:
            sampled, _ = sample_candidates(directory.name, rows, config, folder, keep_empty=True)
        return sum(sum(row["num_tokens"]) for row in sampled)

    ways = {
        "sample_candidates": ours,
        "one candidate": lambda: sum(generate([prompt], 1) for prompt in prompts for _ in range(options.k)),
        "one prompt": lambda: sum(generate([prompt], options.k) for prompt in prompts),
        "batches": lambda: sum(
            generate(prompts[start : start + at_a_time], options.k) for start in range(0, len(prompts), at_a_time)
        ),
    }
    generate(prompts[:2], 2)  # libraries load
    seconds = {way: [] for way in ways}
    tokens = {way: [] for way in ways}
    for repeat in range(options.repeats):
        for way, call in ways.items():
            torch.manual_seed(repeat)
            start = time.perf_counter()
            tokens[way].append(call())
            seconds[way].append(time.perf_counter() - start)
    shape = {
        name: getattr(options, name)
        for name in ("model", "prompts", "k", "mean_length", "max_new_tokens", "batch_size")
    }
    shape["prompt_length"] = "-".join(map(str, options.prompt_length))
    rate = {way: statistics.median(t / s for t, s in zip(tokens[way], seconds[way], strict=True)) for way in ways}
    found = [
        {
            **shape,
            "way": way,
            "seconds": round(statistics.median(seconds[way]), 2),
            "answer_tokens": round(statistics.median(tokens[way])),
            "tokens_per_second": round(rate[way], 1),
            "ours_times_as_fast": round(rate["sample_candidates"] / rate[way], 2),
            **circumstances(),
        }
        for way in ways
    ]
    append(options.output, found)
    for row in found:
        print(
            {key: row[key] for key in ("way", "seconds", "answer_tokens", "tokens_per_second", "ours_times_as_fast")}
        )


if __name__ == "__main__":
    main()
