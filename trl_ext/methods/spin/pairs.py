"""SPIN's pairs: the real answer to a prompt against one that the opponent generated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ...data.columns import TEMPLATE_COLUMNS
from ...data.messages import as_text, same_answer
from ...runtime.jsonl import read_jsonl, write_jsonl
from ...sampling.candidates import sample_candidates
from ...sampling.config import SamplingConfig


def generate_stage(
    folder: Path, *, model: Path, rows: Path, config: SamplingConfig, load: dict, real: str = "completion"
) -> dict[str, Any]:
    """
    Sample the opponent's answer to every prompt, and write the pairs to `pairs.jsonl`.

    Args:
        folder (`Path`): of the stage.
        model (`Path`): the opponent.
        rows (`Path`): file of rows with `prompt` and the real answer.
        config ([`SamplingConfig`]): one answer to each prompt, kept whatever it says.
        load (`dict`): keyword arguments with which the model is loaded.
        real (`str`, defaults to `"completion"`): column of the real answer.

    Returns:
        `dict`: `num_prompts`, `num_pairs`, `length` (mean, in tokens), and shares of the generated answers: `equal` to
        the real one, `empty`, `truncated` at `max_new_tokens`.

    Raises:
        ValueError: no pair is left.
    """
    answered, report = sample_candidates(
        model, read_jsonl(rows), config, folder, keep_empty=True, desc="Generating answers", **load
    )
    PartialState().print(str(report))
    pairs, num_equal, num_empty = spin_pairs(answered, real)
    write_jsonl(folder / "pairs.jsonl", pairs)
    PartialState().print(f"{len(pairs)} pairs; left out: {num_equal} equal to the real answer, {num_empty} empty")
    return {
        "num_prompts": len(answered),
        "num_pairs": len(pairs),
        "equal": num_equal / len(answered),
        "empty": num_empty / len(answered),
        "truncated": report.truncated,
        "length": report.mean_tokens,
    }


def spin_pairs(answered: Sequence[dict[str, Any]], real: str) -> tuple[list[dict[str, Any]], int, int]:
    """
    Make SPIN's pairs of generated answers.

    Args:
        answered (`Sequence[dict]`): candidate rows with one answer each, see [`sample_candidates`].
        real (`str`): column of the real answer.

    Returns:
        `tuple`: the pairs, and how many answers were left out because they equal the real one but for white space
        around them, and because they are empty. A pair has `prompt`, `chosen` (the real answer), `rejected` (the
        generated one), `rejected_is_cut` (whether it was ended by its length alone), and what the row has for the chat
        template.

    Raises:
        ValueError: no pair is left.
    """
    pairs, num_equal, num_empty = [], 0, 0
    for row in answered:
        generated = row["completions"][0]
        if not as_text(generated).strip():
            num_empty += 1
        elif same_answer(row[real], generated):
            num_equal += 1
        else:
            kept = {key: row[key] for key in ("prompt", *TEMPLATE_COLUMNS) if key in row}
            is_cut = row["ends"][0] == "length"
            pairs.append({**kept, "chosen": row[real], "rejected": generated, "rejected_is_cut": is_cut})
    if not pairs:
        raise ValueError(
            f"No generated answer makes a pair: of {len(answered)}, {num_equal} equal the real answer and {num_empty} "
            "are empty. A model that repeats its data learns nothing from it. Use other rows, or keep the model as "
            "it is."
        )
    return pairs, num_equal, num_empty
