"""
Prepared rows in the columns that TRL's trainers read, so that every recipe takes the same rows, checks
them alike, and trains on the same tokens.

Each function takes a batch of prepared rows, `prompt_ids`, `completion_ids` (a list of K) and `scores`, as columns,
and returns the columns of the rows that come out: it is made for `Dataset.map(..., batched=True)`. Where a loss
compares two answers these are the best (of equals the first) and the worst (of equals the last) of the K; a row whose
answers are all equal has none and gives no row.
"""

from collections.abc import Iterator
from typing import Any

Columns = dict[str, list]


def best_and_worst(batch: Columns) -> Iterator[tuple[int, list[int], list[int], list[int]]]:
    """Number of the row in the batch, its prompt, its best and its worst answer, for each row that has both."""
    for index, (prompt, answers, scores) in enumerate(
        zip(batch["prompt_ids"], batch["completion_ids"], batch["scores"], strict=True)
    ):
        best = max(range(len(scores)), key=scores.__getitem__)
        worst = min(reversed(range(len(scores))), key=scores.__getitem__)
        if scores[best] > scores[worst]:
            yield index, prompt, answers[best], answers[worst]


def for_dpo(batch: Columns) -> Columns:
    """`prompt_ids`, `chosen_ids`, `rejected_ids`, as `trl.DPOTrainer` reads them."""
    return _columns(
        ("prompt_ids", "chosen_ids", "rejected_ids"),
        [(prompt, best, worst) for _, prompt, best, worst in best_and_worst(batch)],
    )


def for_reward(batch: Columns) -> Columns:
    """`chosen_ids` and `rejected_ids`, each with its prompt, and `margin` where rows have one, for `RewardTrainer`."""
    margins = batch.get("margin")
    rows = [
        (prompt + best, prompt + worst, *([] if margins is None else [margins[index]]))
        for index, prompt, best, worst in best_and_worst(batch)
    ]
    return _columns(("chosen_ids", "rejected_ids", *([] if margins is None else ["margin"])), rows)


def for_orpo(batch: Columns) -> Columns:
    """What `trl.experimental.orpo.ORPOTrainer` makes of a row: the prompt, and both answers behind it with labels."""
    rows = []
    for _, prompt, best, worst in best_and_worst(batch):
        row = [prompt, [1] * len(prompt)]
        for answer in (best, worst):
            ids = prompt + answer
            row += [ids, [1] * len(ids), [-100] * len(prompt) + answer]
        rows.append(row)
    names = ["prompt_input_ids", "prompt_attention_mask"]
    names += [
        f"{which}_{what}" for which in ("chosen", "rejected") for what in ("input_ids", "attention_mask", "labels")
    ]
    return _columns(names, rows)


def for_kto(batch: Columns) -> Columns:
    """
    `prompt_ids`, `completion_ids`, `label`, as `trl.KTOTrainer` reads them: the best answer with True and the worst
    with False; an answer that is alone with whether its score is above 0.
    """
    rows = []
    for prompt, answers, scores in zip(batch["prompt_ids"], batch["completion_ids"], batch["scores"], strict=True):
        if len(answers) == 1:
            rows.append((prompt, answers[0], scores[0] > 0))
    for _, prompt, best, worst in best_and_worst(batch):
        rows += [(prompt, best, True), (prompt, worst, False)]
    return _columns(("prompt_ids", "completion_ids", "label"), rows)


def for_sft(batch: Columns) -> Columns:
    """The best answer alone: `input_ids` and `completion_mask`, as `trl.SFTTrainer` reads them."""
    rows = []
    for prompt, answers, scores in zip(batch["prompt_ids"], batch["completion_ids"], batch["scores"], strict=True):
        best = answers[max(range(len(scores)), key=scores.__getitem__)]
        rows.append((prompt + best, [0] * len(prompt) + [1] * len(best)))
    return _columns(("input_ids", "completion_mask"), rows)


def with_mismatched(batch: Columns) -> Columns:
    """
    Add `KL_completion_ids`: each prompt with the answer of the row before it in the batch, of which KTO estimates its
    reference point (https://huggingface.co/papers/2402.01306, section 4.2), as TRL pairs them.
    """
    return {"KL_completion_ids": [batch["completion_ids"][-1], *batch["completion_ids"][:-1]]}


def labelled(row: dict[str, Any], index: int) -> dict[str, Any]:
    """
    A row of `prompt`, `completion` and `label` as one of `completions` and `scores`.

    Raises:
        ValueError: `label` is none of True, False, 1 and 0.
    """
    if row["label"] not in (True, False):
        raise ValueError(
            f"Row {index}: column 'label' must be true (good) or false, or 1 or 0, got {row['label']!r:.40}."
        )
    return {"completions": [row["completion"]], "scores": [1.0 if row["label"] else 0.0]}


def _columns(names, rows) -> Columns:
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}
