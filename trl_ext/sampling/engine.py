"""The interface of a sampling engine."""

from dataclasses import dataclass
from typing import Protocol

from transformers import GenerationConfig, PreTrainedTokenizerBase


@dataclass
class Generated:
    """
    One sampled continuation.

    Attributes:
        token_ids (`list[int]`): its tokens, with the end-of-sequence token if it came to one.
        logps (`list[float]`): log-probability of each of them in nats, under the model as it is: before temperature
            and filters.
        finished (`bool`): whether it ended with an end-of-sequence token.
    """

    token_ids: list[int]
    logps: list[float]
    finished: bool


class Engine(Protocol):
    """
    What makes tokens.

    Attributes:
        max_model_len (`int`, *optional*): longest prompt and answer in tokens that it takes, if it has a limit beside
            the model's own.
    """

    max_model_len: int | None

    def generate(self, prompt_ids: list[list[int]], seeds: list[list[int]]) -> list[list[Generated]]:
        """Continuations of each prompt, one per seed. A seed is an integer below 2**63."""

    def close(self) -> None:
        """Give back what it holds."""


def end_token_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    The tokens that end an answer: the model's own, and the tokenizer's.

    Raises:
        ValueError: there are none, so that no answer would ever end.
    """
    found = getattr(generation_config, "eos_token_id", None)
    found = list(found) if isinstance(found, list | tuple) else [found]
    ids = [token for token in dict.fromkeys([*found, tokenizer.eos_token_id]) if token is not None]
    if not ids:
        raise ValueError(
            "The model's generation config or the tokenizer must have an end-of-sequence token, got none. No answer "
            "would ever end. Set `tokenizer.eos_token` and save the tokenizer with the model."
        )
    return ids
