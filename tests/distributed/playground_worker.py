"""Build a tiny playground under torchrun and write down what each process sees."""

import json
import sys
from pathlib import Path

from transformers import TrainingArguments

from trl_ext.playground import Playground, build_playground


def main(folder: str) -> None:
    args = TrainingArguments(folder, use_cpu=True, report_to="none")
    playground = Playground(num_sft=128, num_prompts=21, num_candidates=2, num_held_out=9, max_digits=3)
    sft, candidates = build_playground(playground, folder)
    comparison = playground.evaluate(sft, sft)
    state = args.distributed_state.__class__()
    seen = {
        "world": state.num_processes,
        "candidates": candidates,
        "answers": comparison.sft_answers,
        "kl": comparison.kl_to_sft,
    }
    (Path(folder) / f"process-{state.process_index}.json").write_text(json.dumps(seen))
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
