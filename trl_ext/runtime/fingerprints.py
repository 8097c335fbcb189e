"""Fingerprints of files and of models."""

import functools
import hashlib
import json
import os
from pathlib import Path

from .models import adapter_config

# files of a model's folder, besides its weights, that can change what it answers
CONFIG_FILES = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")


MODEL_FILES = (
    *CONFIG_FILES, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken",
    "*.py",
)  # fmt: skip


NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


# what configs say about where they came from, which is another thing after a move or another save
ORIGIN_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version")


def model_fingerprint(model_name_or_path: str | Path) -> str:
    """
    What identifies a model: for a local one a hash over its weights, its configuration and its tokenizer, and those of
    its base if it is an adapter; for one of the Hub its name.

    The same for equal files in another folder, and different once something changes that its answers depend on.
    """
    folder = Path(model_name_or_path)
    if not os.path.isdir(folder):
        return str(model_name_or_path)
    digest = hashlib.sha256()
    files = {file for pattern in ("*.safetensors", "*.bin", *MODEL_FILES) for file in folder.glob(pattern)}
    for file in sorted(file for file in files if file.name not in NO_WEIGHTS):
        digest.update(f"{file.name} {file_digest(file)}\n".encode())
    if (folder / "adapter_config.json").is_file():
        base = adapter_config(folder)["base_model_name_or_path"]
        if base is not None and Path(base).resolve() != folder.resolve():
            digest.update(f"base {model_fingerprint(base)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def file_digest(file: Path) -> str:
    """The SHA-256 of a file; of a model's config without what it says about where the model came from."""
    status = file.stat()
    return _file_digest(str(file.absolute()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)  # stages come back to the same models again and again
def _file_digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as opened:
        if Path(path).name in CONFIG_FILES:
            try:
                content = {key: value for key, value in json.load(opened).items() if key not in ORIGIN_KEYS}
            except (ValueError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{path} must be a model's config in JSON: {error}. Correct it, or use another model."
                ) from None
            return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return hashlib.file_digest(opened, "sha256").hexdigest()
