"""Prompts to candidates."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Engine": "engine",
        "Generated": "engine",
        "SamplingConfig": "config",
        "SamplingReport": "candidates",
        "TransformersEngine": "transformers_engine",
        "VllmEngine": "vllm_engine",
        "sample_candidates": "candidates",
    },
)
