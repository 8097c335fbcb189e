"""The methods of a comparison."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import methods
from ..sampling.config import NEUTRAL


@dataclass(frozen=True)
class Method:
    """
    One line of the comparison.

    Args:
        label (`str`): what readers see.
        recipe (`str`, *optional*): whose training it is; none for the SFT model as it is.
        data (`str`): what it is trained on: `"pairs"` (the dataset's `chosen` and `rejected`), `"ranked"` (sampled
            answers with scores), `"likelihood_near"` (CLICK's pairs of them), `"rounds"` (sampled in two rounds),
            `"self_play"` (the dataset's `reference` against sampled ones), or `"prompts"`.
        batch (`Callable`): rows in a batch, of prompts in a batch and answers per prompt.
        values (`dict`, *optional*): of the recipe's options, where the method is one of its modes.
        needs (`str`, *optional*): column of the dataset without which there is nothing to train on.
        note (`str`, *optional*): what readers have to know about its figures.
    """

    label: str
    recipe: str | None = None
    data: str = "ranked"
    batch: Callable[[int, int], int] = lambda prompts, answers: prompts
    values: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    note: str | None = None


# Folder of a method -> its lines by their names, where it has others than one of its own name with the defaults.
LINES: dict[str, dict[str, dict[str, Any]]] = {
    "slic": {
        "slic_direct": {"label": "SLiC-HF direct", "data": "pairs", "needs": "chosen"},
        "slic_sample_rank": {"label": "SLiC-HF sample-rank"},
    },
    "rrhf": {"rrhf": {}, "rrhf_two_rounds": {"label": "RRHF, two rounds", "data": "rounds"}},
    "spin": {"spin": {"data": "self_play", "needs": "reference", "values": {"num_iterations": 1}}},
    "click": {"click": {"data": "likelihood_near", "needs": "reference"}},
    "orpo": {"orpo": {"note": "its log-probabilities over training are means per token"}},
    "kto": {"kto": {"batch": lambda prompts, answers: 2 * prompts}},
    "reward": {},
    "rloo": {
        "rl": {
            "data": "prompts",
            "batch": lambda prompts, answers: prompts * answers,
            "note": "its answers sampled are the candidates that its reward model was trained on and those that it "
            "samples itself; the sampling time is of the candidates, as its own sampling is part of its training "
            "time, which has the training of the reward model in it too",
        }
    },
}


def _lines(folder: str) -> dict[str, Method]:
    method = methods.METHODS[folder]
    lines = LINES.get(folder, {folder: {}})
    return {name: Method(**{"label": method.label, "recipe": method.recipe, **line}) for name, line in lines.items()}


METHODS = {"sft": Method("SFT"), **_lines("best_of_n")}  # what imitates comes first
for _folder in methods.METHODS:
    METHODS |= _lines(_folder)


# that the comparison sets itself, so that the budget is equal and everything lands where it is looked for
RESERVED = (
    "output_dir", "seed", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "resume_from_checkpoint", "rewards", "num_rounds", "num_iterations", "save_steps",
    "save_strategy", "save_total_limit", "eval_strategy", "push_to_hub", "model_name_or_path", "dataset_name",
    "num_generations", "max_completion_length", *NEUTRAL,
)  # fmt: skip


def refuse_equal_labels(labels: Mapping[str, str]) -> None:
    """
    Args:
        labels (`Mapping[str, str]`): method to what readers see of it.

    Raises:
        ValueError: two have the same, and no reader could tell them apart.
    """
    owners: dict[str, str] = {}
    for name, label in labels.items():
        other = owners.setdefault(label, name)
        if other != name:
            raise ValueError(
                f"Methods must have different labels, got {label!r} for {other!r} and {name!r}. Give one of them "
                "another `label` in `settings`."
            )


def settings_by_name(settings: Any) -> dict[str, dict[str, Any]]:
    """
    `settings`, as they are in a config file or in JSON, in a form that can be looked into.

    Raises:
        ValueError: it is no JSON, cannot be JSON, or not options by name.
    """
    if isinstance(settings, str):
        try:
            settings = json.loads(settings)
        except ValueError as error:
            raise ValueError(f"`settings` must be JSON, got {settings!r:.80} ({error}).") from None
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ValueError(f"`settings` must be options by name of a method, got {settings!r:.80}.")
    for name, values in settings.items():
        if not isinstance(values, dict) or not all(isinstance(option, str) for option in values):
            raise ValueError(f"`settings` of {name!r} must be options by name, got {values!r:.60}.")
        try:
            json.dumps(values, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"`settings` of {name!r} must be values of JSON ({error}).") from None
    return settings
