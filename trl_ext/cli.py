"""What all recipes share: reading arguments, loading data, and writing down what came out."""

import argparse
import atexit
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from .arguments import (
    INSTEAD_OF,
    explained,
    read_config,
    refuse_unknown_options,
    typed_options,
    with_config_apart,
)
from .load import _load_file, load_datasets, load_prompts  # noqa: F401  (importable from here as well)
from .mistakes import is_known, print_mistake
from .preflight import check_before_imports
from .signals import end_simple_launcher, on_stop, watch_signals_and_launcher
from .threads import settle_threads


def imported(dataclass_types: Sequence[str | type]) -> tuple[type, ...]:
    """
    The classes that dotted names such as `"trl.ModelConfig"` stand for; classes stay what they are.

    A recipe names its dataclasses, so that its `--help` does not have to wait until they are imported.
    """

    def one(path: str) -> type:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)

    return tuple(one(entry) if isinstance(entry, str) else entry for entry in dataclass_types)


def parse_recipe_args(
    dataclass_types: Sequence[str | type], playground_config: str | Path, args: list[str] | None = None
) -> tuple[Any, ...]:
    """
    Parse a recipe's command line, with `--config file.yaml` for values kept in a file.

    Without a dataset, a model and a config file, the values of `playground_config` become the defaults, so that the
    recipe runs on the playground; anything given on the command line still wins. Unknown arguments, on the command
    line or in the file, are fatal.

    Args:
        dataclass_types (`Sequence[str | type]`): as for [`~trl.TrlParser`], or dotted names of them:
            [`~trl.ScriptArguments`], the trainer's config, [`~trl.ModelConfig`] and [`~trl.DatasetMixtureConfig`], in
            this order, and any further ones.
        playground_config (`str` or `Path`): YAML file of the playground's values.
        args (`list[str]`, *optional*): arguments, by default those of the command line.

    Returns:
        `tuple`: one object per dataclass.

    Raises:
        FileNotFoundError, ValueError, TypeError: see [`read_config`]; unknown arguments, data without a model, or a
            flag that would do nothing.
    """
    dataclass_types = imported(dataclass_types)
    args = with_config_apart(sys.argv[1:] if args is None else args)
    refuse_unknown_options(option_hints(dataclass_types), args)
    model, data, config = _model_data_and_config(args, dataclass_types)
    if not (model or data):
        if config is None:
            args = ["--config", str(playground_config), *args]
        elif Path(config).resolve() != Path(playground_config).resolve():
            raise ValueError(
                "The config file names neither a model nor data. Set `model_name_or_path` and `dataset_name`, or "
                "leave `--config` out to run the playground."
            )
        parsed = parse_args(dataclass_types, args)
        script_args, training_args, _, dataset_args, *_ = parsed
        meaningless = [name for part in (script_args, dataset_args) for name in changed_fields(part)]
        meaningless += ["eval_strategy"] if training_args.eval_strategy != "no" else []
        if meaningless:
            raise ValueError(
                f"{', '.join(meaningless)} would do nothing on the playground, which makes its own data and evaluates "
                "at the end. Leave them out, or set `--model_name_or_path` and `--dataset_name`."
            )
        return parsed
    if not model:
        raise ValueError(
            "Data is given but no model. Set `--model_name_or_path` to a Hub name or a folder; with neither a model "
            "nor data the recipe runs its playground."
        )
    parsed = parse_args(dataclass_types, args)
    if parsed[0].ignore_bias_buffers:
        raise ValueError("`--ignore_bias_buffers` is a debugging switch of TRL's scripts that is not offered here.")
    return parsed


def parse_args(
    dataclass_types: Sequence[str | type], args: Sequence[str], values: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    """
    One object per dataclass, given as such or by its dotted name. The command line wins over the config file.

    Args:
        dataclass_types (`Sequence[str | type]`): classes, or dotted names of them.
        args (`Sequence[str]`): command line that [`with_config_apart`] has been over.
        values (`dict`, *optional*): in place of what the file behind `--config` holds.

    Raises:
        FileNotFoundError, ValueError, TypeError: see [`read_config`]; or unknown arguments on the command line.
    """
    from trl import TrlParser

    dataclass_types, args = imported(dataclass_types), list(args)
    hints = option_hints(dataclass_types)
    refuse_unknown_options(hints, args)
    if "--config" in args:
        index = args.index("--config")
        file = args[index + 1]
        del args[index : index + 2]
        values = read_config(file, hints) if values is None else values
    values = dict(values or {})
    for name, others in INSTEAD_OF.items():
        if name in typed_options(args):
            values = {key: value for key, value in values.items() if key not in others}
    os.environ.update({key: str(value) for key, value in values.pop("env", {}).items()})

    class Parser(TrlParser):
        def error(self, message: str):
            raise ValueError(explained(message, hints))

    parser = Parser(dataclass_types)
    parser.set_defaults_with_config(**values)
    return parser.parse_args_into_dataclasses(args)


def option_hints(dataclass_types: Sequence[type]) -> dict[str, Any]:
    """Types of the options of dataclasses, by name."""
    hints = {one: get_type_hints(one) for one in dataclass_types}
    return {
        entry.name: of_one[entry.name]
        for one, of_one in hints.items()
        for entry in dataclasses.fields(one)
        if entry.init
    }


def _model_data_and_config(args: Sequence[str], dataclass_types: Sequence[type]) -> tuple[Any, Any, str | None]:
    """What the command line or its config file names as model and data, and the config file."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("model_name_or_path", "dataset_name"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    given, _ = parser.parse_known_args(args)
    config = args[args.index("--config") + 1] if "--config" in args else None
    values = {} if config is None else read_config(config, option_hints(dataclass_types))
    data = given.dataset_name or values.get("dataset_name") or values.get("datasets")
    return given.model_name_or_path or values.get("model_name_or_path"), data, config


def changed_fields(part: Any) -> list[str]:
    """Names of a dataclass's fields that do not have their default values."""
    return [
        entry.name
        for entry in dataclasses.fields(part)
        if getattr(part, entry.name)
        != (entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory())
    ]


def given_options(args: Sequence[str], config_file: str | Path | None = None) -> set[str]:
    """
    Names of the options that are set, whatever to: on the command line, or in the file behind its `--config`, or else
    in `config_file`.
    """
    import yaml

    args = with_config_apart(args)
    file = args[args.index("--config") + 1] if "--config" in args else config_file
    given = typed_options(args)
    return given if file is None else given | set(yaml.safe_load(Path(file).read_text(encoding="utf-8")))


def is_playground(script_args, training_args, model_args, dataset_args, *others) -> bool:
    """Whether neither a model nor data is given, in what [`parse_recipe_args`] returns."""
    return model_args.model_name_or_path is None and script_args.dataset_name is None and not dataset_args.datasets


def refuse_all_but(used: Sequence[str], *parts: Any) -> None:
    """
    Refuse arguments that would do nothing.

    Args:
        used (`Sequence[str]`): names of those that do something.
        parts: parsed dataclasses.

    Raises:
        ValueError: others are set.
    """
    idle = [name for part in parts for name in changed_fields(part) if name not in used]
    if idle:
        raise ValueError(f"{', '.join(idle)} would do nothing here. Leave them out.")


def model_init_kwargs(model_args, training_args) -> dict[str, Any]:
    """Keyword arguments for loading the model, from the flags that TRL's own scripts have."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def run_recipe(
    main: Callable[[list[str]], Any], dataclass_types: Sequence[str] = (), docstring: str | None = None
) -> None:
    """
    Call a recipe's `main` with the command line, or print the recipe's help if that is asked for. End on SIGTERM, on
    Ctrl-C and when the launcher is gone, with what is finished kept. End a process that is one of several as soon as
    all else is done.

    Under DDP on CPU, gloo's threads outlive `destroy_process_group` (torch 2.13 never frees the group of a
    `DistributedDataParallel`). If one of them lets go of a tensor while the interpreter is being torn down, the
    process ends with SIGABRT after everything was saved, and the launcher reports a failed run. So it ends before
    that, after its threads and the exit handlers of what `main` has imported.

    Args:
        main (`Callable`): takes the arguments of the command line. A known mistake that it raises is printed as one
            line (see `mistakes.py`) and the exit code is 1; anything else is raised. Accelerate's launcher of a single
            process ends with 143 then (see [`end_simple_launcher`]).
        dataclass_types (`Sequence[str]`, *optional*): dotted names of the dataclasses whose fields are the recipe's
            options. Without them `--help` is left to `main`.
        docstring (`str`, *optional*): of the recipe, for its help.
    """
    if dataclass_types and asks_for_help(sys.argv[1:]):
        _print_help(dataclass_types, docstring or "")
        return
    if dataclass_types:
        try:
            check_before_imports(dataclass_types, sys.argv[1:])
        except Exception as error:
            if not is_known(error):
                raise
            if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a machine find the same
                print_mistake(error, wait=False)
            end_simple_launcher()
            sys.exit(1)
    threads = settle_threads()
    if os.environ.get("RANK", "0") == "0":
        print(f"CPU threads of each process: {threads} (OMP_NUM_THREADS)", flush=True)
    from . import library_warnings  # noqa: F401  (before the libraries)

    exit_codes: list[int] = []

    def leave():
        if exit_codes and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_codes[0])

    atexit.register(leave)  # the first to be registered is the last to be called
    try:
        with on_stop():
            watch_signals_and_launcher()
            main(sys.argv[1:])
    except SystemExit as ending:
        if isinstance(ending.code, int):
            exit_codes.append(ending.code)
        raise
    except Exception as error:
        if not is_known(error):
            raise
        print_mistake(error)
        end_simple_launcher()
        sys.exit(1)
    exit_codes.append(0)


def asks_for_help(args: Sequence[str]) -> bool:
    """Whether `-h` or `--help` is among the arguments, and neither the name of a config file nor behind `--`."""
    for before, arg in zip(["", *args], args, strict=False):
        if arg == "--":
            return False
        if arg in ("-h", "--help") and before != "--config":
            return True
    return False


def _print_help(dataclass_types: Sequence[str], docstring: str) -> None:
    from .recipe_help import recipe_help

    if os.environ.get("RANK", "0") != "0":  # one process of several is enough
        return
    try:
        print(recipe_help(os.path.basename(sys.argv[0]), docstring, dataclass_types), end="", flush=True)
    except BrokenPipeError:  # whoever reads it has seen enough, as `head` has; the interpreter flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    "sampling_batch_size",
    "reward_batch_size",
    "vllm_python",
    "vllm_args",
)


def run_settings(parsed: Sequence[Any]) -> dict[str, Any]:
    """
    Every setting of a run by name, but for secrets, for its [`Run`]; `parsed` is what [`parse_recipe_args`] returns.
    """
    settings: dict[str, Any] = {}
    for part in parsed:
        names = [entry.name for entry in dataclasses.fields(part) if entry.init and not entry.name.endswith("_token")]
        settings.update({name: getattr(part, name) for name in names})
    # objects without a JSON form say what they hold
    return json.loads(json.dumps(settings, default=lambda value: getattr(value, "__dict__", None) or str(value)))


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
        raise FileNotFoundError(f"model_name_or_path={name!r} looks like a local folder, and there is none.")
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
    patterns += ["*.py"] if trust_remote_code else []
    with PartialState().local_main_process_first():
        folder = snapshot_download(name, revision=model_args.model_revision, allow_patterns=patterns)
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, revision=model_args.model_revision, allow_patterns=[*patterns, "*.bin"])
    return folder


def train_and_save(
    trainer_class: type,
    parsed: Sequence[Any],
    *,
    panels: dict[str, dict[str, str]],
    model: str | None = None,
    data: str | None = None,
    output_dir: str | None = None,
) -> dict[str, float]:
    """
    Train with a trainer, evaluate if asked to, and save the model, the figures and the curves.

    Args:
        trainer_class (`type`): the trainer.
        parsed (`Sequence`): what [`parse_recipe_args`] returned.
        panels (`dict`): for [`plot_training_curves`].
        model, data, output_dir (`str`, *optional*): as a stage of rounds, see [`use_for_stage`].

    Returns:
        `dict`: the figures, which are also in `all_results.json`.
    """
    from trl import get_peft_config, get_quantization_config

    from .checkpoints import checkpoint_to_resume
    from .next_commands import after_training, print_next
    from .plots import plot_training_curves

    if output_dir is not None:
        use_for_stage(parsed, model=model, data=data, output_dir=output_dir)
    script_args, training_args, model_args, dataset_args, *_ = parsed
    resume_from = checkpoint_to_resume(training_args)
    train_dataset, eval_dataset = load_datasets(
        script_args, dataset_args, with_eval=training_args.eval_strategy != "no", seed=training_args.seed
    )
    columns = train_dataset.column_names or []
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    for report in getattr(trainer, "data_reports", {}).values():
        if not report.worth_a_warning:  # the others were said already
            trainer.accelerator.print(report)
    results = trainer.train(resume_from_checkpoint=resume_from).metrics
    report = getattr(trainer, "data_reports", {}).get("train")
    if report is not None:
        results["train_prompts"] = report.num_prompts  # without the rows that were dropped
    if getattr(trainer, "prefix_sharing", None) is not None:
        trainer.accelerator.print(trainer.prefix_sharing.statistics)
    if eval_dataset is not None:
        results.update(trainer.evaluate())
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.save_metrics("all", results, combined=False)
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        picture = plot_training_curves(
            trainer.state.log_history,
            folder / "training_curves.png",
            title=f"{trainer._name}, {folder.name if output_dir is None else folder.parent.name}",
            panels=panels,
        )
        print(f"Model, all_results.json and {picture.name} are in {folder}")
        if output_dir is None:
            print_next(after_training(script_args, model_args.model_name_or_path, str(folder), columns))
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.wait_for_everyone()  # or one tears the group down while another still uses it
    if output_dir is None:  # a stage has to wait for all processes itself, when it has written what it found
        trainer.end()
    return results
