"""Errors of rows: the problems by name, and the remedy for each."""

# what can be wrong with a row -> what to do about it
REMEDIES = {
    "missing": "Fill it in, or remove the row.",
    "not text": "Convert it to a string, or to a list of {'role': ..., 'content': ...} messages.",
    "mixed": "Give prompt and completions the same form: all strings, or all lists of messages.",
    "empty": "Remove rows whose answer is empty.",
    "not an answer": "Let each completion be the assistant's turn, or let all of them repeat the whole prompt.",
    "ambiguous": "Add a `prompt` column, and remove the prompt from the answers.",
    "identical": "Remove pairs without a preference.",
    "length": "Give one score per completion.",
    "ends": "Give one entry per completion, or remove the column.",
    "too few": "Remove prompts with fewer completions.",
    "text score": "Convert the column to numbers.",
    "not a number": "Scores must be finite numbers; remove completions that could not be scored.",
    "out of order": "Let `chosen` be the one with the higher score.",
    "no target": "Add a `reference`, the task's own answer, or remove the row.",
    "too long": "Raise `max_length` (None: no limit), or shorten the prompt.",
    "outside the window": "Lower `max_new_tokens`, or shorten the prompt.",
    "not renderable": "Check the row against the chat template.",
}


class RowError(ValueError):
    """
    A row that cannot be used.

    Attributes:
        problem (`str`): a key of `REMEDIES`.
        column (`str`): the column at fault.
    """

    def __init__(self, problem: str, column: str, what: str):
        self.problem, self.column = problem, column
        super().__init__(f"column {column!r} {what}")


def refusal(name: str, num_rows: int | None, problems: dict[str, list[tuple[int, str]]]) -> str:
    """The message about rows that cannot be used: for each problem their numbers and details."""
    count = sum(len(rows) for rows in problems.values())
    of_all = f"{count} of {num_rows} rows" if num_rows is not None else "a row"
    lines = [f"The {name} dataset has {of_all} that cannot be used:"]
    for problem, rows in problems.items():
        index, detail = rows[0]
        others = ", ".join(str(other) for other, _ in rows[1:10]) + (", ..." if len(rows) > 10 else "")
        more = f" ({len(rows) - 1} more like it: {others})" if len(rows) > 1 else ""
        lines.append(f"  row {index}: {detail}{more}. {REMEDIES[problem]}")
    lines.append('Correct the data, or set on_invalid_row="drop" to drop such rows; they are counted and reported.')
    return "\n".join(lines)
