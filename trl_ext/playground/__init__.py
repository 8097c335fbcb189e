"""A task small enough for a CPU, on which every recipe runs without data."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Playground": "task",
        "accuracy": "task",
        "byte_level_tokenizer": "model",
        "continue_sft": "stages",
        "friendly_number_reward": "task",
        "is_polite": "task",
        "number_to_words": "task",
        "preference_rows": "task",
        "read_answer": "task",
        "save_byte_level_model": "model",
        "sft_stage": "stages",
        "spin_playground": "task",
    },
)
