"""Which columns a dataset must have. Imports nothing, so that a recipe can look at them before it imports torch."""


def check_columns(columns: list[str], name: str) -> None:
    """
    Check that the columns make a format we know.

    Raises:
        ValueError: columns are missing or contradict each other.
        NotImplementedError: rows with images.
    """
    has = set(columns)
    given = f"The {name} dataset has the columns {sorted(has)}"
    if has & {"image", "images"}:
        raise NotImplementedError(f"{given}: rows with images are not supported. Use text rows.")
    if "completions" in has and has & {"chosen", "rejected"}:
        raise ValueError(
            f"{given}: `completions` and `chosen`/`rejected` say the same thing twice. Remove one of them."
        )
    if "completions" in has:
        if "scores" not in has:
            raise ValueError(
                f"{given}: `completions` cannot be ranked without scores. Add the column `scores`, one per completion."
            )
        return
    missing = {"chosen", "rejected"} - has
    if missing:
        raise ValueError(
            f"{given}, without {' and '.join(f'`{column}`' for column in sorted(missing))}. Needed are `prompt`, "
            "`chosen` and `rejected`, or `prompt`, `completions` and `scores`: rename or add the columns."
        )
