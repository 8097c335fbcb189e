"""Rows to prepared rows to batches."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "CandidateCollator": "collator",
        "PreparationReport": "prepare",
        "REMEDIES": "row_error",
        "RowError": "row_error",
        "RowOptions": "rows",
        "extract_shared_prompt": "messages",
        "is_prepared": "prepare",
        "load_datasets": "load",
        "load_prompts": "load",
        "parse_row": "rows",
        "prepare_dataset": "prepare",
        "prepare_row": "prepare",
        "prompt_of": "rows",
        "tokenize_candidates": "tokens",
    },
)
