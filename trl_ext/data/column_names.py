"""Which columns a dataset must have. Imports nothing, so that a recipe can look at them before it imports torch."""


def check_columns(columns: list[str], name: str) -> None:
    """
    Check that the columns make a format we know.

    Raises:
        ValueError: columns are missing or contradict each other.
        NotImplementedError: rows with images.
    """
    has = set(columns)
    dataset, given = f"The {name} dataset", f"got the columns {sorted(has)}"
    if has & {"image", "images"}:
        raise NotImplementedError(f"{dataset} must not have images, {given}. Use text rows.")
    if "completions" in has and has & {"chosen", "rejected"}:
        raise ValueError(
            f"{dataset} must have `completions`, or `chosen` and `rejected`, not both, {given}. Remove one of them."
        )
    if "completions" in has:
        if "scores" not in has:
            raise ValueError(
                f"{dataset} must have `scores` beside `completions`, one per completion, {given}. Add the column."
            )
        return
    missing = {"chosen", "rejected"} - has
    if missing:
        raise ValueError(
            f"{dataset} must have `prompt`, `chosen` and `rejected`, or `prompt`, `completions` and `scores`, "
            f"{given}, without {' and '.join(f'`{column}`' for column in sorted(missing))}. Rename or add the columns."
        )
