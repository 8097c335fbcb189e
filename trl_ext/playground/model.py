"""The playground's model and tokenizer: bytes, 0.6 M parameters."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed

# ChatML, without the line break after the last message that would be scored behind the end-of-sequence token
CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, a ChatML template, and nothing that has to be downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special_tokens = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special_tokens, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_byte_level_model(
    directory: str | Path,
    *,
    hidden_size: int = 128,
    num_layers: int = 3,
    max_position_embeddings: int = 4096,
    seed: int = 42,
) -> Path:
    """
    Save an untrained byte-level Llama with its tokenizer, an ordinary local checkpoint.

    Args:
        directory (`str` or `Path`): where to.
        hidden_size (`int`, defaults to 128): a multiple of 32, the size of a head.
        num_layers (`int`, defaults to 3): 0.63 M parameters with the default width.
        max_position_embeddings (`int`, defaults to 4096): longest sequence in bytes.
        seed (`int`, defaults to 42): of the weights.

    Returns:
        `Path`: `directory`.
    """
    tokenizer = byte_level_tokenizer()
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
