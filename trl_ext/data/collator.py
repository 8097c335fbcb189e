"""Prepared rows to the canonical padded batch."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from .._trl import pad


@dataclass
class CandidateCollator(DataCollatorMixin):
    """
    Collate B prompts with any number of completions each into one padded batch.

    Rows are prompt-major: all completions of the first prompt, then all of the second, and so on, N rows in all. A
    prompt's rows are its candidates in the order of the data and then, if it differs from every candidate, the target
    of the regulariser (`reference`).

    Each example needs the keys `data.prepare_dataset` makes:

    - `prompt_ids` (`list[int]`) and `completion_ids` (`list[list[int]]`, at least as long as `scores`),
    - `scores` (`list[float]`), one per candidate; completions beyond `len(scores)` are targets, not candidates,
    - `has_scores` (`bool`, *optional*, defaults to `True`): False where the scores only tell better from worse,
    - `target_index` (`int`): which of `completion_ids` the regulariser looks at.

    The returned batch holds, with L the longest row:

    - `prompt_weights` `(B,)`, float32: 1, or 0 once the trainer has recognised a prompt as a repeat that only fills up
      the last batch of a distributed run. It comes first because `transformers` reads the batch size off the first
      tensor, and a batch here is B prompts, not N rows.
    - `prompt_index` `(N,)`, int64: which prompt each row belongs to.
    - `candidate_index` `(B, K)`, int64: row of each candidate, -1 where a prompt has fewer than K.
    - `target_index` `(B,)`, int64: row of the regulariser's target.
    - `scores` `(B, K)`, float32: 0 where there is no candidate.
    - `has_scores` `(B,)`, bool: whether the scores mean more than better and worse.
    - `input_ids`, `attention_mask`, `completion_mask` `(N, L)`, int64, and `position_ids` when padding is on the left.

    Args:
        pad_token_id (`int`):
            Token id for padding.
        pad_to_multiple_of (`int`, *optional*):
            Pad L up to a multiple of this.
        padding_side (`str`, *optional*, defaults to `"right"`):
            `"right"` or `"left"`. The loss is the same; on the left, explicit positions are passed so that models
            with learned positions agree too.

    Example:
    ```python
    >>> from trl_ext import CandidateCollator

    >>> collator = CandidateCollator(pad_token_id=0)
    >>> collator(
    ...     [
    ...         {"prompt_ids": [1, 2], "completion_ids": [[3, 4], [5]], "scores": [1.0, 0.0], "target_index": 0},
    ...         {"prompt_ids": [6], "completion_ids": [[7], [8], [9]], "scores": [0.0, 2.0], "target_index": 2},
    ...     ]
    ... )
    {'prompt_weights': tensor([1., 1.]),
     'prompt_index': tensor([0, 0, 1, 1, 1]),
     'candidate_index': tensor([[0, 1],
                                [2, 3]]),
     'target_index': tensor([0, 4]),
     'scores': tensor([[1., 0.],
                       [0., 2.]]),
     'has_scores': tensor([True, True]),
     'input_ids': tensor([[1, 2, 3, 4],
                          [1, 2, 5, 0],
                          [6, 7, 0, 0],
                          [6, 8, 0, 0],
                          [6, 9, 0, 0]]),
     'attention_mask': tensor([[1, 1, 1, 1],
                               [1, 1, 1, 0],
                               [1, 1, 0, 0],
                               [1, 1, 0, 0],
                               [1, 1, 0, 0]]),
     'completion_mask': tensor([[0, 0, 1, 1],
                                [0, 0, 1, 0],
                                [0, 1, 0, 0],
                                [0, 1, 0, 0],
                                [0, 1, 0, 0]])}

    ```
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    padding_side: str = "right"
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids, completion_mask, prompt_index = [], [], []
        candidate_index, target_index = [], []
        for prompt, example in enumerate(examples):
            first_row = len(input_ids)
            prompt_ids = example["prompt_ids"]
            for completion_ids in example["completion_ids"]:
                input_ids.append(torch.tensor(prompt_ids + completion_ids, dtype=torch.long))
                completion_mask.append(torch.tensor([0] * len(prompt_ids) + [1] * len(completion_ids)))
                prompt_index.append(prompt)
            candidate_index.append(torch.arange(first_row, first_row + len(example["scores"])))
            target_index.append(first_row + example["target_index"])

        def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
            return pad(rows, value, self.padding_side, self.pad_to_multiple_of)

        batch = {
            "prompt_weights": torch.ones(len(examples)),
            "prompt_index": torch.tensor(prompt_index),
            "candidate_index": pad(candidate_index, padding_value=-1),
            "target_index": torch.tensor(target_index),
            "scores": pad([torch.tensor(example["scores"], dtype=torch.float32) for example in examples]),
            "has_scores": torch.tensor([example.get("has_scores", True) for example in examples]),
            "input_ids": padded(input_ids, self.pad_token_id),
            "attention_mask": padded([torch.ones_like(ids) for ids in input_ids], 0),
            "completion_mask": padded(completion_mask, 0),
        }
        if self.padding_side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return batch
