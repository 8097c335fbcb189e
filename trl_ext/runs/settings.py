"""The settings of a run: those that identify it, and those that each stage gets."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..sampling.config import WITHOUT_EFFECT


def changed_fields(part: Any) -> list[str]:
    """Names of a dataclass's fields that do not have their default values."""
    return [
        entry.name
        for entry in dataclasses.fields(part)
        if getattr(part, entry.name)
        != (entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory())
    ]


def is_playground(script_args, training_args, model_args, dataset_args, *others) -> bool:
    """Whether neither a model nor data is given, in what [`parse_recipe_args`] returns."""
    return model_args.model_name_or_path is None and script_args.dataset_name is None and not dataset_args.datasets


def model_init_kwargs(model_args, training_args) -> dict[str, Any]:
    """Keyword arguments for loading the model, from the flags that TRL's own scripts have."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


# settings that change nothing about the results of a run, or may grow
MAY_CHANGE = (
    "resume_from_checkpoint",
    "on_invalid_row",  # whatever is finished had no such row
    "num_rounds",
    "methods",  # of a comparison, which compares itself what a finished one was trained with
    "seeds",
    "settings",
    "report_to",
    "run_name",
    "disable_tqdm",
    "ddp_timeout",
    "log_level",
    "logging_dir",
    "logging_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "dataset_num_proc",
    "dataloader_num_workers",
    "reward_batch_size",
    *WITHOUT_EFFECT,
)


def run_settings(parsed: Sequence[Any]) -> dict[str, Any]:
    """
    Every setting of a run by name, but for secrets, for its [`Run`]; `parsed` is what [`parse_recipe_args`] returns.
    """
    settings: dict[str, Any] = {}
    for part in parsed:
        names = [entry.name for entry in dataclasses.fields(part) if entry.init and not entry.name.endswith("_token")]
        settings.update({name: getattr(part, name) for name in names})
    return _in_json(settings)


def _in_json(value: Any) -> Any:
    # objects without a JSON form say what they hold
    return json.loads(json.dumps(value, default=lambda one: getattr(one, "__dict__", None) or str(one)))


def unset_value(parsed: Sequence[Any], name: str) -> Any:
    """
    The value of a setting that nobody sets, in JSON's types, the others being as they are; `None` of one that is not a
    field of `parsed`. A config may replace a default, `bf16=None` for example.
    """
    for part in reversed(parsed):
        for entry in dataclasses.fields(part):
            if entry.name == name and entry.init:
                value = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
                try:
                    value = getattr(dataclasses.replace(part, **{name: value}), name)
                except Exception:  # a config that refuses to be without it raises what it likes
                    value = None if value is dataclasses.MISSING else value
                return _in_json(value)
    return None


def use_for_stage(parsed: Sequence[Any], *, model: str, data: str, output_dir: str) -> None:
    """
    Let parsed arguments train `model` on `data`, a local file, in `output_dir`, going on where an interrupted attempt
    there stopped.
    """
    script_args, training_args, model_args, dataset_args, *_ = parsed
    script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming = data, None, False
    script_args.dataset_train_split = "train"
    dataset_args.datasets = []
    model_args.model_name_or_path, model_args.model_revision = model, "main"
    training_args.output_dir, training_args.resume_from_checkpoint = output_dir, "true"


def loading_for_sampling(model_args, training_args) -> dict[str, Any]:
    """How to load the models that sample: as for training, in bfloat16 where training computes in it."""
    kwargs = model_init_kwargs(model_args, training_args)
    kwargs.pop("revision")  # see `local_model`
    if training_args.bf16:
        kwargs["dtype"] = "bfloat16"
    return {"model_init_kwargs": kwargs, "trust_remote_code": training_args.trust_remote_code}


def local_model(model_args, *, trust_remote_code: bool = False) -> str:
    """
    The folder of the model, downloaded once if it is one of the Hub, so that all stages start from the same weights
    even if somebody changes it there.
    """
    from accelerate import PartialState
    from huggingface_hub import snapshot_download

    name = model_args.model_name_or_path
    if os.path.isdir(name):
        return name
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"`model_name_or_path` must be a model's name or an existing folder, got {name!r}: there is no such "
            "folder."
        )
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
    patterns += ["*.py"] if trust_remote_code else []
    with PartialState().local_main_process_first():
        folder = snapshot_download(name, revision=model_args.model_revision, allow_patterns=patterns)
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, revision=model_args.model_revision, allow_patterns=[*patterns, "*.bin"])
    return folder
