"""Columns of a dataset: which of them are read, what they may hold, and what Arrow has put into their values."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, Value
from datasets.features.features import require_decoding

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "completions", "messages", "reference")
SCORE_COLUMNS = ("scores", "score_chosen", "score_rejected")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
CUT_COLUMNS = ("ends", "chosen_is_cut", "rejected_is_cut", "reference_is_cut")
READ_COLUMNS = (*TEXT_COLUMNS, *SCORE_COLUMNS, *TEMPLATE_COLUMNS, *CUT_COLUMNS, "label", "margin")


def _parts(feature: Any) -> list[Any]:
    """The features directly within a feature."""
    if isinstance(feature, Mapping):
        return list(feature.values())
    if isinstance(feature, list | tuple):
        return list(feature)
    return [feature.feature] if isinstance(feature, List | LargeList) else []


def _holds_files(feature: Any) -> bool:
    """Whether reading a value opens a file, as for images and sound. `Json` is decoded too, and opens nothing."""
    parts = _parts(feature)
    return any(map(_holds_files, parts)) if parts else not isinstance(feature, Json) and require_decoding(feature)


def _unopened(feature: Any) -> Any:
    """A feature whose values are not decoded, so that reading them opens no file."""
    if isinstance(feature, Mapping):
        return {name: _unopened(part) for name, part in feature.items()}
    if isinstance(feature, list | tuple):
        return [_unopened(part) for part in feature]
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_unopened(feature.feature))
    return replace(feature, decode=False) if _holds_files(feature) else feature


def without_files(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """
    Remove the columns of images, sound and other files that nothing here reads, and log their names. Otherwise
    `datasets` would open the files, on the disk or the net, as soon as a row is looked at.

    Raises:
        NotImplementedError: a column that is read holds files.
    """
    if dataset.features is None:
        return dataset
    files = sorted(column for column, feature in dataset.features.items() if _holds_files(feature))
    read = [column for column in files if column in READ_COLUMNS]
    if read:
        raise NotImplementedError(
            f"`{read[0]}` of the {name} dataset must hold text, messages or numbers, got "
            f"{dataset.features[read[0]]}: images, sound and other files are not supported. Replace it with text."
        )
    if not files:
        return dataset
    logger.warning(f"{name} data: not read, as they hold images, sound or other files: {', '.join(files)}")
    if isinstance(dataset, IterableDataset):  # it decodes what it removes
        for column in files:
            dataset = dataset.cast_column(column, _unopened(dataset.features[column]))
    return dataset.remove_columns(files)


def check_features(features: Features | None, name: str, scores: Sequence[str] = ()) -> None:
    """
    Refuse objects with two fields of one name, from which Arrow makes no row, and columns of scores that hold text.

    Args:
        features ([`~datasets.Features`], *optional*): of the dataset; a stream may have none.
        name (`str`): how messages call the dataset.
        scores (`Sequence[str]`): columns that are read as numbers.

    Raises:
        ValueError: naming the column.
    """
    for column in [] if features is None else features.arrow_schema:
        twice = _field_that_is_there_twice(column.type)
        if twice is not None:
            raise ValueError(
                f"The column {column.name!r} of the {name} dataset holds objects with two fields named {twice!r} "
                "(a null character ends a name), which cannot be read. Rename one of them, or remove the column."
            )
    for column in scores:
        if features is not None and column in features and _holds_text(features[column]):
            raise ValueError(f"`{column}` of the {name} dataset must hold numbers, got text. Convert the column.")


def _holds_text(feature: Any) -> bool:
    is_text = isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")
    return is_text or any(map(_holds_text, _parts(feature)))


def _field_that_is_there_twice(type_) -> str | None:
    """The name, anywhere within an Arrow type."""
    inner = [type_.field(index) for index in range(type_.num_fields)]
    names = [part.name for part in inner]
    twice = [name for name in names if names.count(name) > 1]
    twice += [name for part in inner if (name := _field_that_is_there_twice(part.type)) is not None]
    return twice[0] if twice else None


def without_nulls(value: Any, feature: Any = None) -> Any:
    """
    Drop the keys whose value is None, at any depth: Arrow fills them in wherever another row has such a key.

    Args:
        value: text, numbers, lists and dicts.
        feature (*optional*): the feature of `datasets` it was read with. What is of type `Json` stays as it is, for
            Arrow fills in nothing there.
    """
    if isinstance(feature, Json):
        return value
    if isinstance(value, Mapping):
        features = feature if isinstance(feature, Mapping) else {}
        return {key: without_nulls(part, features.get(key)) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        inner = next(iter(_parts(feature)), None)
        return [without_nulls(part, inner) for part in value]
    return value


def as_given(row: Mapping[str, Any], features: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    A row without what Arrow has filled in, see [`without_nulls`]: what its text columns, `tools` and
    `chat_template_kwargs` hold. Other columns stay as they are.

    Args:
        row (`dict`): as `datasets` reads it, or as it was written.
        features ([`~datasets.Features`], *optional*): of the dataset.
    """
    features = features or {}
    cleaned = {
        column: without_nulls(row[column], features.get(column))
        for column in (*TEXT_COLUMNS, *TEMPLATE_COLUMNS)
        if column in row
    }
    return {**row, **cleaned}
