"""Numbered headings of a run's stages: "3 of 7: sampling 8 answers to 1,600 prompts"."""

from accelerate import PartialState


class Headings:
    """
    Number the stages of a run and print a heading for each. Every process of the launch calls it; the main one prints.

    Args:
        total (`int`, *optional*): how many stages have a heading. `None`: not known.
        at_most (`bool`, defaults to `False`): whether the run may end before the last of them.
    """

    def __init__(self, total: int | None = None, *, at_most: bool = False):
        self.total, self.at_most = total, at_most
        self._names: set[str] = set()

    def print(self, name: str, title: str, *, is_finished: bool = False) -> None:
        """
        Print the heading of a stage, once.

        Args:
            name (`str`): of the stage; one that had a heading before gets no other.
            title (`str`): what the stage does.
            is_finished (`bool`, defaults to `False`): whether an earlier start of the run has finished it.
        """
        if name in self._names:
            return
        self._names.add(name)
        of = "" if self.total is None else f" of {'at most ' * self.at_most}{max(self.total, len(self._names))}"
        done = " (finished before)" if is_finished else ""
        PartialState().print(f"\n{len(self._names)}{of}: {title}{done}", flush=True)


def count(number: int, one: str, several: str | None = None) -> str:
    """A number and what it counts: `1 prompt`, `1,600 prompts`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"
