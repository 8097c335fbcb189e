"""
What a comparison of methods has measured: one entry per method and seed, written to JSON and read back.

Every method and every seed answered the same held-out prompts, one sampled answer each, in the same order, so that
the n-th figures of two methods belong to the same prompt. See [`~trl_ext.comparison.page.write_report`] for what is
made of it.
"""

import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..runtime.files import write_atomically
from ..runtime.settings import has_type, shown_hint
from .measures import MEASURES

VERSION = 2
STATUSES = ("done", "failed")
CURVE_KEYS = {
    "share": float,
    "updates": int,
    "reward": float | None,
    "kl": float | None,
    "chosen_logps": float | None,
    "rejected_logps": float | None,
}
EXAMPLE_KEYS = {"prompt": str, "answer": str, "reward": float | None}


@dataclass
class MethodResult:
    """
    What one method came to with one seed.

    Attributes:
        method (`str`): its key. All seeds of a method share it.
        label (`str`): what readers see; one for each `method`.
        seed (`int`): of training and sampling.
        status (`str`): `"done"`, or `"failed"`. What has failed has no figures.
        error (`str`, *optional*): why it failed.
        scores (`dict[str, list[float]]`): scorer to scores, one for each held-out prompt. `"reward"` is what methods
            train towards, others are only watched.
        measured (`dict`): values of the [`MEASURES`], by the key under which they are stored, such as `"lengths"`: a
            list with one number for each held-out prompt, one number, or a text. What was not measured is missing,
            empty, NaN or `None`; in JSON `null`.
        examples (`list[dict]`): a few answers to read: `prompt`, `answer`, `reward`.
        curve (`list[dict]`): along training: `share` of it (0 is the SFT model, 1 the end), `updates`, and `reward`,
            `kl`, `chosen_logps`, `rejected_logps`, each of which may be `None`.
        notes (`list[str]`): what a reader has to know about it.
        prompts_key (`str`, defaults to `"held-out"`): seeds with the same key answered the same prompts; two methods
            are compared only where seed and key are the same.
    """

    method: str
    label: str
    seed: int
    status: str
    error: str | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prompts_key: str = "held-out"


@dataclass
class ComparisonResults:
    """
    A comparison: what was asked, and what each method came to with each seed.

    Attributes:
        title (`str`): above the report.
        base (`str`): `method` that the others are compared with, such as `"sft"`.
        prompts (`int`): held-out prompts.
        results (`list[MethodResult]`): in any order; one per method and seed.
        settings (`dict`): what the comparison was run with, in JSON's types.
        notes (`list[str]`): what a reader has to know about all of them.
        command (`str`): that makes it again.
    """

    title: str
    base: str
    prompts: int
    results: list[MethodResult]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    command: str = ""

    def check(self) -> None:
        """
        Refuse what no report can be made of.

        Raises:
            ValueError: names the entry and what is wrong with it.
        """
        _check_types(self, "The comparison", apart_from=("results",))
        if not self.results:
            raise ValueError("`results` must have at least one result, got none.")
        labels: dict[str, str] = {}
        keys: dict[int, str] = {}
        seen = set()
        for result in self.results:
            name = f"Method {result.method!r}, seed {result.seed}"
            _check_types(result, name)
            if (result.method, result.seed) in seen:
                raise ValueError(f"{name} must have one result, got two.")
            seen.add((result.method, result.seed))
            if labels.setdefault(result.method, result.label) != result.label:
                raise ValueError(
                    f"{name} must have the label {labels[result.method]!r} as with other seeds, got {result.label!r}. "
                    "Give a variant of a method a key of its own."
                )
            if result.status not in STATUSES:
                raise ValueError(f"{name}: `status` must be one of {', '.join(STATUSES)}, got {result.status!r}.")
            if result.status == "failed":
                continue
            if keys.setdefault(result.seed, result.prompts_key) != result.prompts_key:
                raise ValueError(
                    f"{name} must have answered the prompts {keys[result.seed]!r}, as other methods with this seed, "
                    f"got {result.prompts_key!r}. Ask all methods the same prompts."
                )
            self._check_figures(result, name)
        if len(set(labels.values())) < len(labels):
            twice = next(label for label in labels.values() if list(labels.values()).count(label) > 1)
            raise ValueError(f"Methods must have different labels, got {twice!r} for several.")
        if self.base not in labels:
            raise ValueError(f"`base` must be one of {', '.join(labels)}, got {self.base!r}.")

    def _check_figures(self, result: MethodResult, name: str) -> None:
        lists = {f"scores[{scorer!r}]": values for scorer, values in result.scores.items()}
        for measure in MEASURES:
            value = result.measured.get(measure.stored)
            if measure.statistic is not None:
                lists[measure.stored] = [] if value is None else value
            elif not has_type(value, float | str | None):
                raise ValueError(f"{name}: `{measure.stored}` must be a number, got {value!r:.80}.")
        for key, values in lists.items():
            if not isinstance(values, list) or not all(has_type(value, float) for value in values):
                raise ValueError(
                    f"{name}: `{key}` must be a list of numbers, got {values!r:.80}. Use NaN for a missing value."
                )
            if values and len(values) != self.prompts:
                raise ValueError(
                    f"{name}: `{key}` must have {self.prompts} values, one for each prompt, got {len(values)}. Use "
                    "NaN for a missing value, or an empty list."
                )
        for point in result.curve:
            _check_entry(point, CURVE_KEYS, f"{name} has an entry of `curve` that")
        for example in result.examples:
            _check_entry(example, EXAMPLE_KEYS, f"{name} has an entry of `examples` that")

    def save(self, path: str | Path) -> None:
        """
        Write it as JSON, whole or not at all. NaN and infinities become `null`.

        Raises:
            ValueError: see [`~ComparisonResults.check`].
        """
        self.check()
        content = {"version": VERSION, **asdict(self)}
        for row in content["results"]:
            row |= row.pop("measured")  # flat
        content = _finite(content)
        write_atomically(Path(path), json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "ComparisonResults":
        """
        Read what [`~ComparisonResults.save`] wrote.

        Raises:
            ValueError: it is no such file, of another version, or what it holds makes no report.
            FileNotFoundError: there is no such file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} must be JSON: {reason}. Pass the file of a comparison.") from None
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION or isinstance(version, bool):
            raise ValueError(
                f"{path} must have version {VERSION}, got {version!r:.80}. Pass the file of a comparison, read it "
                "with the program that wrote it, or run the comparison again."
            )
        del content["version"]
        rows = content.get("results")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} must have a list of `results`. Pass the file of a comparison.")
        try:
            results = [_built(MethodResult, _nested(row), f"Result {number}") for number, row in enumerate(rows)]
            comparison = _built(cls, {**content, "results": results}, "The comparison")
            comparison.check()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return comparison


def _built(kind: type, content: Mapping[str, Any], name: str) -> Any:
    wanted = [entry.name for entry in fields(kind)]
    missing, unknown = [key for key in wanted if key not in content], sorted(set(content) - set(wanted))
    if missing or unknown:
        said = [f"lacks {', '.join(missing)}"] if missing else []
        said += [f"has {', '.join(unknown)}, which is not known"] if unknown else []
        raise ValueError(f"{name} {' and '.join(said)}. Its entries must be {', '.join(wanted)}.")
    return kind(**content)


def _check_entry(entry: dict[str, Any], keys: Mapping[str, Any], name: str) -> None:
    if set(entry) != set(keys) or not all(has_type(entry[key], hint) for key, hint in keys.items()):
        wanted = ", ".join(f"{key}: {shown_hint(hint)}" for key, hint in keys.items())
        raise ValueError(f"{name} must be {{{wanted}}}, got {entry!r:.200}.")


def _check_types(one: Any, name: str, apart_from: tuple[str, ...] = ()) -> None:
    for entry in fields(one):
        value = getattr(one, entry.name)
        if entry.name not in apart_from and not has_type(value, entry.type):
            raise ValueError(f"{name}: `{entry.name}` must be {shown_hint(entry.type)}, got {value!r:.80}.")


def _finite(value: Any) -> Any:
    """What JSON can hold: it has no NaN and no infinities."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = int(value) if isinstance(value, numbers.Integral) else float(value)  # of NumPy's, too
        return number if math.isfinite(number) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _nested(row: dict[str, Any]) -> dict[str, Any]:
    """A result as it is in the file, with its measures in `measured`, and NaN for each `null` in a list."""

    def with_nan(values: Any) -> Any:
        return [math.nan if value is None else value for value in values] if isinstance(values, list) else values

    stored = {measure.stored for measure in MEASURES}
    measured = {key: with_nan(value) for key, value in row.items() if key in stored}
    row = {key: value for key, value in row.items() if key not in stored}
    if isinstance(row.get("scores"), dict):
        row["scores"] = {scorer: with_nan(values) for scorer, values in row["scores"].items()}
    return {**row, "measured": measured}
