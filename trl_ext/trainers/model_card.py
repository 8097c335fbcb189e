"""Model cards of models that are on this machine alone."""

from pathlib import Path


def name_local_folders(card: str | Path, base_model: str | None, model: str | Path) -> None:
    """
    Put local folders in a model card of TRL's, which has links to `None` in their place. The card's metadata stays:
    the Hub accepts names of its own there only.

    Args:
        card (`str` or `Path`): the file.
        base_model (`str`, *optional*): folder of the model that was trained; empty or `None` where it has no name.
        model (`str` or `Path`): folder of the result.
    """
    card = Path(card)
    text = card.read_text(encoding="utf-8")
    base = f"the model in `{base_model}`" if base_model else "a model without a name"
    changed = text.replace("[None](https://huggingface.co/None)", base).replace('model="None"', f'model="{model}"')
    if changed != text:
        card.write_text(changed, encoding="utf-8")
