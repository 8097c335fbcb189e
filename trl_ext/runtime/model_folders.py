"""Contents of a model's folder. Imports nothing heavy, so that a recipe can check it before it imports torch."""

from pathlib import Path

# one of them is in a folder that has a tokenizer
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "processor_config.json")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any(any(Path(folder).glob(pattern)) for pattern in TOKENIZER_FILES)


def refuse_without_tokenizer(folder: str | Path) -> None:
    """Raise a `FileNotFoundError` of one line for a folder without a tokenizer."""
    if not has_tokenizer(folder):
        raise FileNotFoundError(
            f"The folder {folder} has no tokenizer. Save one there with `tokenizer.save_pretrained({str(folder)!r})`, "
            "or pass one to the trainer as `processing_class`."
        )
