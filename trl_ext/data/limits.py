"""Limits that a model sets to rows: lengths by its positions, token ids by its embeddings."""

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from torch import nn

from ..runtime.models import load_config, without_weights

logger = logging.getLogger(__name__)


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of each row's longest sequence, `(rows,)`: of prepared rows, or of rows in TRL's columns."""
    names = [name for name in dataset.column_names if name.endswith("ids")]
    lengths = [np.zeros(0, dtype=np.int64)]
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        found = {name: table[name].combine_chunks() for name in names}
        prompt = _lengths(found["prompt_ids"]) if "prompt_ids" in found else 0
        others = []
        for name, column in found.items():
            if name == "prompt_ids":
                continue
            if name == "completion_ids" and str(column.type.value_type).startswith(("list", "large_list")):
                counts, inner = _lengths(column), _lengths(pc.list_flatten(column))
                others.append(np.maximum.reduceat(inner, np.concatenate([[0], counts.cumsum()[:-1]])))
            else:
                others.append(_lengths(column))
        lengths.append(prompt + np.max(others, axis=0) if others else prompt)
    return np.concatenate(lengths)


def _lengths(column: Any) -> np.ndarray:
    return pc.list_value_length(column).to_numpy(zero_copy_only=False)


def _largest_id(dataset: Dataset) -> int:
    names, largest = [name for name in dataset.column_names if name.endswith("ids")], 0
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            column = table[name].combine_chunks()
            while str(column.type).startswith(("list", "large_list")):
                column = pc.list_flatten(column)
            largest = max(largest, pc.max(column).as_py() or 0)
    return largest


class Limits:
    """
    What a model can be fed with: how many positions it has, and how many token embeddings.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): as given to the trainer.
        args: the trainer's settings.

    Attributes:
        positions (`int`, *optional*): longest sequence that it can compute at all; `None` where positions are computed
            and not looked up.
        made_for (`int`, *optional*): longest sequence that its config declares.
        embeddings (`int`): token embeddings.
    """

    def __init__(self, model: Any, args: Any):
        self.name = model if isinstance(model, str) else type(model).__name__
        self._source = (model, args)
        config = (load_config(model, args) if isinstance(model, str) else model.config).get_text_config()
        self.made_for = getattr(config, "max_position_embeddings", None)
        self.embeddings = config.vocab_size
        if not isinstance(model, str):
            self.embeddings = _rows_of(model.get_input_embeddings()) or self.embeddings

    @cached_property  # a sequence longer than `made_for` asks for it, and the modules have to be built
    def positions(self) -> int | None:
        model, args = self._source
        modules = without_weights(model, args) if isinstance(model, str) else model
        return self.made_for if modules is not None and _looks_positions_up(modules, self.made_for) else None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "positions": self.positions if self.made_for else None, "_source": None}

    def check(self, dataset: Any, name: str, tokenizer: Any, max_length: int | None) -> Any:
        """
        Refuse rows that are too long for the model, or have tokens that it does not know. A stream is checked as it
        is read, and returned with the check.
        """
        check_row = self.row_check(name, tokenizer, max_length)
        if isinstance(dataset, IterableDataset):
            return dataset.map(check_row, features=dataset.features)
        largest = _largest_id(dataset)
        if largest >= self.embeddings:
            self._refuse_token(largest, f"in the {name} dataset", tokenizer)
        longest = int(row_lengths(dataset).max(initial=0))
        self.check_length(longest, f"The {name} dataset has a row of {longest} tokens", max_length)
        return dataset

    def row_check(
        self, name: str, tokenizer: Any, max_length: int | None
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What refuses a prepared row that is too long for the model, or has tokens that it does not know."""
        if (tokenizer.pad_token_id or 0) >= self.embeddings:
            self._refuse_token(tokenizer.pad_token_id, "padding", tokenizer)
        return _CheckRow(self, name, tokenizer, max_length)

    def check_length(self, longest: int, what: str, max_length: int | None, setting: str = "max_length") -> None:
        """Refuse, or warn of, a sequence that is longer than the model's positions."""
        if self.made_for is None or longest <= self.made_for:
            return
        if self.positions is not None:
            raise ValueError(
                f"{what}, and {self.name} has {self.positions} positions (`{setting}` is {max_length}). Set "
                f"`{setting}` to {self.positions} or less, or use a model with more positions."
            )
        logger.log(
            logging.WARNING,
            f"{what}, and {self.name} was made for {self.made_for} (`{setting}` is {max_length}). Its answers may "
            f"degrade beyond that. Set `{setting}` to {self.made_for} or less if that is not intended.",
        )

    def _refuse_token(self, token: int, where: str, tokenizer: Any) -> None:
        raise ValueError(
            f"The token {tokenizer.convert_ids_to_tokens(token)!r} ({where}) has the id {token}, and {self.name} has "
            f"{self.embeddings} token embeddings. Use the model's own tokenizer, or pass the model as an object after "
            f"`model.resize_token_embeddings({len(tokenizer)})`."
        )


class _CheckRow:
    """Checks one prepared row; a class, so that it can go to other processes."""

    def __init__(self, limits: Limits, name: str, tokenizer: Any, max_length: int | None):
        self.limits, self.name, self.tokenizer, self.max_length = limits, name, tokenizer, max_length

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        sequences = [row["prompt_ids"], *row["completion_ids"]]
        largest = max((max(ids, default=0) for ids in sequences), default=0)
        if largest >= self.limits.embeddings:
            self.limits._refuse_token(largest, f"in the {self.name} dataset", self.tokenizer)
        longest = len(row["prompt_ids"]) + max(map(len, row["completion_ids"]), default=0)
        if longest > (self.limits.made_for or longest) and self.limits.positions is not None:
            what = f"The {self.name} dataset has a row of {longest} tokens"
            self.limits.check_length(longest, what, self.max_length)
        return row


def _rows_of(embeddings: nn.Module) -> int | None:
    weight = getattr(embeddings, "weight", None)
    shape = getattr(weight, "ds_shape", None) or getattr(weight, "shape", None)  # of ZeRO-3's shards
    return int(shape[0]) if shape else None


def _looks_positions_up(model: nn.Module, positions: int) -> bool:
    """
    Whether a model has a table with a row for each position: learned embeddings (GPT-2, OPT), or a buffer (GPT-J,
    GPT-Neo).
    """
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            if positions <= module.num_embeddings <= positions + 8:
                return True
        for buffer in module.buffers(recurse=False):
            if buffer.dim() >= 2 and positions in buffer.shape[-2:]:
                return True
    return False
