"""Tokens of texts, the same for training, sampling, scoring and evaluation. Chat templates bring their own start."""

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .._trl import _tokenize, common_prefix_length


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


def tokenize_candidates(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt: str | list,
    completions: list,
    *,
    eos_token: str | None = None,
    **chat_template_kwargs,
) -> tuple[list[int], list[list[int]], bool]:
    """
    Tokenise a prompt with its completions.

    Prompt and completion are tokenised together, and the completions start where the first of them leaves the
    tokenised prompt: the shortest common prefix over all of them. With two completions these are exactly the ids of
    TRL's `DPOTrainer`.

    Returns:
        `tuple`: prompt ids, one list of ids per completion, and whether the prompt lost tokens at its end because
        alone it is tokenised differently.
    """
    if isinstance(prompt, list):
        prompt_ids = _tokenize(processing_class, prompt, add_generation_prompt=True, **chat_template_kwargs)[
            "input_ids"
        ]
        full_ids = [_tokenize(processing_class, prompt + c, **chat_template_kwargs)["input_ids"] for c in completions]
    else:
        if eos_token is not None:
            completions = [c if c.endswith(eos_token) else c + eos_token for c in completions]
        prompt_ids = text_ids(processing_class, prompt)
        full_ids = [text_ids(processing_class, prompt + c) for c in completions]
    prompt_length = min(common_prefix_length(prompt_ids, ids) for ids in full_ids)
    return prompt_ids[:prompt_length], [ids[prompt_length:] for ids in full_ids], prompt_length < len(prompt_ids)


def without_end(completion_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Tokens of an answer without the special tokens at its end (of the end token's or the chat template's), and without
    white space between and behind these.
    """
    # those of the template alone need not be among the tokenizer's named ones
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    end = len(completion_ids)
    for index in range(len(completion_ids) - 1, -1, -1):
        if completion_ids[index] in special:
            end = index
        elif tokenizer.decode(completion_ids[index]).strip():
            break
    return completion_ids[:end]
