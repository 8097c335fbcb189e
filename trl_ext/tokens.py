"""Tokens of texts, the same for training, sampling, scoring and evaluation. Chat templates bring their own start."""

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ._trl import _tokenize


def text_ids(processing_class: PreTrainedTokenizerBase | ProcessorMixin, text: str) -> list[int]:
    """
    Tokens of a text. Start tokens that the tokenizer would add are left out if the text, a conversation in a chat
    template for instance, begins with them.
    """
    ids = _tokenize(processing_class, text)["input_ids"]
    return ids[_num_repeated(processing_class, text, ids) :]


def num_repeated_start_tokens(processing_class: PreTrainedTokenizerBase | ProcessorMixin, text: str | list) -> int:
    """Number of start tokens that a text begins with and the tokenizer adds as well; 0 for messages."""
    if not isinstance(text, str) or not _begins_specially(processing_class, text):
        return 0
    return _num_repeated(processing_class, text, _tokenize(processing_class, text)["input_ids"])


def without_repeated_start(processing_class: PreTrainedTokenizerBase | ProcessorMixin, text: str) -> str:
    """A text without the start tokens in front that the tokenizer adds as well."""
    for _ in range(num_repeated_start_tokens(processing_class, text)):
        tokens = _special_tokens(processing_class)
        text = text.removeprefix(next((token for token in tokens if text.startswith(token)), ""))
    return text


def _num_repeated(processing_class, text: str, ids: list[int]) -> int:
    if not _begins_specially(processing_class, text):
        return 0
    plain = tokenizer_of(processing_class)(text=text, add_special_tokens=False)["input_ids"]
    added = next((count for count in range(len(ids)) if ids[count : count + len(plain)] == plain), 0)
    return added if plain[:added] == ids[:added] else 0


def _begins_specially(processing_class, text: str) -> bool:
    return text.startswith(_special_tokens(processing_class))


def _special_tokens(processing_class) -> tuple[str, ...]:
    return tuple(getattr(tokenizer_of(processing_class), "all_special_tokens", ()))


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or that of a processor."""
    return getattr(processing_class, "tokenizer", processing_class)
