"""
Tokenise a file of rows, as every trainer does first; run on several processes.

    prepare.py MODEL ROWS.jsonl

Each process says whether it did the work or found it done.
"""

import socket

import datasets
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoTokenizer

from trl_ext.cli.run import run_recipe
from trl_ext.data.prepare import prepare_dataset
from trl_ext.data.rows import RowOptions


def main(model: str, rows: str) -> None:
    state = PartialState(cpu=True)
    dataset = load_dataset("json", data_files=rows, split="train")
    datasets.logging.set_verbosity_info()
    prepared, _ = prepare_dataset(dataset, AutoTokenizer.from_pretrained(model), RowOptions(), name="train")
    assert len(prepared) == len(dataset)
    state.wait_for_everyone()
    print(f"process {state.process_index} of {state.num_processes} on {socket.gethostname()} has its rows", flush=True)


if __name__ == "__main__":
    run_recipe(lambda arguments: main(*arguments))
