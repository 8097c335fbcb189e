"""Files that are written whole or not at all, with a checksum where it matters."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sealed(content: dict[str, Any]) -> str:
    """JSON with a hash over itself, by which [`read_sealed`] sees that it was changed. No proof of who wrote it."""
    content = json.loads(json.dumps(content, default=str))
    return json.dumps({**content, "digest": checksum(content)}, indent=2)


def checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_sealed(file: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    """
    Read what [`sealed`] has made, less its hash.

    Args:
        file (`Path`): the file.
        keys (`dict[str, type]`): what it must hold, and of which type.

    Raises:
        ValueError: it was changed or damaged since; names the file and the reason.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(
            f"{file} is damaged: it cannot be read as JSON ({' '.join(str(error).split())[:200]})."
        ) from None
    if not isinstance(content, dict) or "digest" not in content:
        raise ValueError(f"{file} is damaged or of another version: it has no digest of itself.")
    digest = content.pop("digest")
    if digest != checksum(content):
        raise ValueError(f"{file} was changed after it was written: it does not match its own digest.")
    for key, kind in keys.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{file} is damaged or of another version: {key!r} is {content.get(key)!r:.80}.")
    return content


def unfinished_path(path: Path) -> Path:
    """What a file is called until [`write_atomically`] puts it in its place."""
    return path.with_name(path.name + ".unfinished")


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either whole or not there, whenever the process or the machine ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_path(path).open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    unfinished_path(path).replace(path)
