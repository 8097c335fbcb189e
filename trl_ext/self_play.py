"""
The loop of SPIN: generate, train, and again with the model just trained.

Each step is a stage of a [`Run`], in fresh processes; iterations are counted from 0, as in the paper
(https://huggingface.co/papers/2401.01335, section 6.1).

    OUTPUT_DIR/
      run.json                        settings the run was begun with
      rows/                           train.jsonl: to train on; watched.jsonl: set apart to evaluate each model with
      start/model/                    the first model, if it was given as an object
      start/evaluation/               how it does on the watched rows
      iteration-0/generated/          its answer to every prompt; pairs.jsonl: real and generated answers
      iteration-0/model/              the model trained on them, the next opponent
      iteration-0/merged/             with LoRA: the adapter merged into its base, which then is the next opponent
      iteration-0/evaluation/         how it does on the watched rows
      spin.json, spin.png             the figures side by side, and which model to take
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput
from trl import ModelConfig

from ._trl import get_config_model_id
from .adapter_checks import check_adapter
from .checkpoints import RESUME_LAST, checkpoint_to_resume, wants_to_resume
from .checks import Limits
from .cli import (
    MAY_CHANGE,
    is_playground,
    local_model,
    model_init_kwargs,
    run_settings,
)
from .columns import TEMPLATE_COLUMNS, as_given, check_features, without_files
from .data import RowError, RowOptions, parse_row, prepare_row, refusal, refuse_outside_window
from .evaluation_stage import evaluation_stage
from .headings import Headings, count
from .intervals import TIE_RULE
from .jsonl import as_jsonl, read_jsonl
from .load import refuse_unless_json
from .machines import from_all
from .next_commands import after_self_play, print_next
from .pretrained import copy_model, is_adapter, repair_generation_config, save_merged
from .reference import refuse_fsdp
from .rounds import (
    SFT_TITLE,
    change,
    format_change,
    format_wins,
    merged_model,
    merged_start,
    set_apart,
    wins_over,
)
from .sampling import (
    load_tokenizer,
    model_fingerprint,
    prompt_key,
    prompt_token_ids,
    write_atomically,
)
from .scoring import check_scorers
from .spin_config import BY_ITERATION, SPINConfig
from .spin_pairs import generate_stage
from .stages import MARK, Run, all_processes, settings_of, start_afresh

# Rows


def is_sft_data(dataset: Dataset | IterableDataset) -> bool:
    """Whether rows hold real answers alone, on which all iterations are played."""
    columns = set(dataset.column_names or next(iter(dataset), {}))
    return bool(columns & {"completion", "messages"}) and not columns & {"chosen", "rejected", "prompt_ids"}


def sft_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: SPINConfig, limits: Limits | None, name: str
) -> list[dict[str, Any]]:
    """
    Check rows of SFT, and give them one form.

    Args:
        dataset ([`~datasets.Dataset`]): rows of `prompt` and `completion`, text or messages, or of `messages`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's.
        config ([`SPINConfig`]): for `max_length`, `max_new_tokens`, `first_turn_only` and `on_invalid_row`.
        limits ([`Limits`], *optional*): of the model.
        name (`str`): how messages call the dataset.

    Returns:
        `list[dict]`: the rows that can be used, with `prompt` and `completion`, both text or both messages, and
        whatever other columns there are.

    Raises:
        ValueError: a column is missing, or rows cannot be used, unless `on_invalid_row="drop"`; nothing is left; a row
            that the model has too few positions or token embeddings for.
    """
    dataset = without_files(dataset, name)
    check_features(dataset.features, name)
    columns = set(dataset.column_names)
    if "messages" not in columns and not {"prompt", "completion"} <= columns:
        raise ValueError(
            f"The {name} dataset has the columns {sorted(columns)}. SPIN needs `prompt` and `completion` (the real "
            "answer), or `messages` that end with it: rename or add the columns."
        )
    if "label" in columns:
        raise ValueError(
            f"The {name} dataset has a column `label`, as rows for KTO have, and SPIN would imitate its bad answers "
            "too. Keep the rows with good ones, and remove the column."
        )
    if "messages" not in columns and config.first_turn_only:
        raise ValueError(
            "first_turn_only=True would do nothing: it cuts `messages`, and the rows have `prompt` and `completion`. "
            "Leave it out."
        )
    options = RowOptions(min_completions=1, max_length=config.max_length, eos_token=tokenizer.eos_token)
    check_row = None if limits is None else limits.row_check(name, tokenizer, config.max_length)
    rows, problems = [], {}
    for index, row in enumerate(dataset):
        try:
            refuse_unless_json(row, index)
            sft_row, prepared = _sft_row(as_given(row), tokenizer, config, options)
            if limits is not None:
                num_tokens = len(prompt_token_ids(tokenizer, sft_row))
                refuse_outside_window(num_tokens, config.max_new_tokens, limits.made_for)
                check_row(prepared)
            rows.append(sft_row)
        except RowError as error:
            answer = "messages" if "messages" in columns else "completion"
            detail = str(error).replace("'completions[0]'", repr(answer))
            problems.setdefault(error.problem, []).append((index, detail))
    if not rows or (problems and config.on_invalid_row == "error"):
        raise ValueError(refusal(name, len(dataset), problems) if problems else f"The {name} dataset has no rows.")
    if problems:
        count = sum(map(len, problems.values()))
        PartialState().print(
            f"{name} data: {len(dataset)} rows, {count} dropped: "
            + ", ".join(f"{problem} {len(found)}" for problem, found in sorted(problems.items()))
        )
    return rows


def _sft_row(row, tokenizer, config: SPINConfig, options: RowOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row in one form, and what training would make of its real answer."""
    row = {key: value for key, value in row.items() if value is not None or key not in TEMPLATE_COLUMNS}
    if "messages" in row:
        row["prompt"], row["completion"] = _split(row.pop("messages"), config.first_turn_only)
    if not row.get("prompt"):
        raise RowError("missing", "prompt", "is missing or empty")
    candidate = {**row, "completions": [row["completion"]], "scores": [0.0]}
    row["prompt"], (row["completion"],), *_ = parse_row(candidate, options)
    if isinstance(row["completion"], list) and len(row["completion"]) > 1:
        raise RowError("not an answer", "completion", f"has {len(row['completion'])} messages, where one is wanted")
    return row, prepare_row(candidate, tokenizer, options)


def _split(messages: Any, first_turn_only: bool) -> tuple[list, list]:
    """Prompt and answer of a conversation."""
    if not isinstance(messages, list) or not messages:
        raise RowError("missing", "messages", "is missing or empty")
    if not all(isinstance(message, dict) for message in messages):
        raise RowError("missing", "messages", "is not a list of messages with `role` and `content`")
    roles = [message.get("role") for message in messages]
    if first_turn_only and "assistant" in roles:
        messages = messages[: roles.index("assistant") + 1]
    last = messages[-1].get("role")
    if last != "assistant":
        raise RowError("not an answer", "messages", f"ends with a message of the {last}, not with an answer")
    if len(messages) == 1:
        raise RowError("missing", "messages", "has an answer and no question before it")
    return messages[:-1], messages[-1:]


# Stages


def train_stage(
    folder: Path,
    *,
    model: Path,
    trainer_class: type,
    settings: dict[str, Any],
    trainer_kwargs: dict[str, Any],
    initial: Path | None = None,
    **generated: Path,
) -> dict[str, Any]:
    """
    One iteration of [`SPINTrainer`] on the pairs of one or more files, going on where an interrupted attempt stopped.

    The rows stay in memory: nothing of them can be found in a cache by another iteration.
    """
    from .plots import SPIN_PANELS, plot_training_curves

    config = SPINConfig(**{**settings, "output_dir": str(folder), "resume_from_checkpoint": "true"})
    resume_from = checkpoint_to_resume(config)
    trainer = trainer_class(
        model=str(model),
        ref_model=None if initial is None else str(initial),
        args=config,
        train_dataset=as_dataset([row for name in sorted(generated) for row in read_jsonl(generated[name])]),
        **trainer_kwargs,
    )
    results = trainer.train(resume_from_checkpoint=resume_from).metrics
    trainer.save_model(str(folder))
    trainer.save_state()
    trainer.save_metrics("all", results, combined=False)
    logged = [log for log in trainer.state.log_history if "loss" in log]
    if trainer.is_world_process_zero():
        plot_training_curves(
            trainer.state.log_history,
            folder / "training_curves.png",
            title=f"SPIN, {folder.parent.name}",
            panels=SPIN_PANELS,
        )
    figures = {
        "num_pairs": len(trainer.train_dataset),
        "steps": trainer.state.global_step,
        "first_loss": logged[0]["loss"],
        "train_loss": fmean(log["loss"] for log in logged),  # `Trainer`'s begins anew where a run goes on
        **{name: logged[-1][f"rewards/{name}"] for name in ("margins", "accuracies")},
    }
    return figures  # without `trainer.end()`: the stage itself still has to wait for all processes


def as_dataset(rows: Sequence[dict]) -> Dataset:
    """Rows of which some have a column that others lack; `Dataset.from_list` would take the first row's columns."""
    columns = dict.fromkeys(column for row in rows for column in row)
    filled = [{column: row.get(column) for column in columns} for row in rows]
    return Dataset.from_list(filled, on_mixed_types="use_json")  # arguments of tool calls differ in type


# The loop


class SelfPlay:
    """
    All iterations of SPIN.

    Args:
        config ([`SPINConfig`]): how.
        rows, watched (`Sequence[dict]`): what [`sft_rows`] returned: rows to train on, and rows to evaluate with.
        trainer_class (`type`): [`SPINTrainer`], or a subclass that can be imported.
        trainer_kwargs (`dict`, *optional*): further arguments of it: `peft_config`, `quantization_config`.
    """

    def __init__(
        self,
        config: SPINConfig,
        rows: Sequence[dict],
        watched: Sequence[dict],
        *,
        trainer_class: type,
        trainer_kwargs: dict[str, Any] | None = None,
    ):
        if config.early_stop != "none" and not watched:
            raise ValueError(
                f"early_stop={config.early_stop!r} watches held-out rows, and there are none. Set "
                "`num_watched_prompts`, or give an eval dataset."
            )
        idle = [name for name in ("load_best_model_at_end", "eval_on_start") if getattr(config, name)]
        if idle or config.lr_scheduler_type == "reduce_lr_on_plateau":
            raise ValueError(
                f"{', '.join(idle) or 'lr_scheduler_type'} would need evaluations during training, and each model is "
                "evaluated after its iteration. Leave it out; `early_stop` compares the iterations."
            )
        if config.save_only_model:
            raise ValueError(
                "save_only_model=True would let an interrupted iteration go on with a fresh optimizer, to other "
                "weights. Leave it out; the last checkpoints can be removed when all is done."
            )
        refuse_fsdp(config)
        if config.push_to_hub:
            raise ValueError(
                "push_to_hub would push the model of every iteration, each over the one before. Leave it out, and "
                "push the model to take at the end: `hf upload NAME OUTPUT_DIR/iteration-N/model`."
            )
        if (trainer_kwargs or {}).get("quantization_config") is not None:
            raise ValueError(
                "Self-play samples from whole models, and merges adapters into them, which is not what a quantised "
                "model would answer. Leave the quantisation out; LoRA works."
            )
        if config.rewards and not watched:
            raise ValueError(
                f"rewards={config.rewards} would do nothing: there are no held-out rows whose answers they could "
                "score. Set `num_watched_prompts`, or give an eval dataset."
            )
        if config.rewards:
            check_scorers(config.rewards, columns=list(watched[0]), **config.scorer_options())
        self.config, self.rows, self.watched = config, rows, watched
        self.trainer_class, self.trainer_kwargs = trainer_class, trainer_kwargs or {}
        self.start_name = "start"
        self.figures: dict[str, dict[str, Any]] = {}
        self.training: dict[str, dict[str, Any]] = {}
        self.stopped: str | None = None
        kwargs = {key: value for key, value in (config.model_init_kwargs or {}).items() if key != "revision"}
        secrets = ("hub_token", "push_to_hub_token")
        names = [entry.name for entry in fields(config) if entry.init and entry.name not in secrets]
        self._settings = {name: getattr(config, name) for name in names}
        self._settings.update(
            model_init_kwargs=dict(kwargs) or None,
            logging_first_step=True,
            eval_strategy="no",  # each model is evaluated after its iteration
            on_invalid_row="drop",  # rows were checked; what is left are pairs that are equal once they are cut
        )
        if config.bf16:
            kwargs["dtype"] = "bfloat16"
        self._load = {"model_init_kwargs": kwargs, "trust_remote_code": config.trust_remote_code}

    def settings(self, **others: Any) -> dict[str, Any]:
        """What determines the results, for [`Run`]."""
        data = hashlib.sha256(json.dumps([self.rows, self.watched], default=str).encode()).hexdigest()
        kwargs = {
            name: {key: sorted(part) if isinstance(part, set) else part for key, part in value.to_dict().items()}
            for name, value in self.trainer_kwargs.items()
            if value is not None
        }
        processes = {"num_processes": all_processes().num_processes}
        settings = {**run_settings([self.config]), **kwargs, **processes, "data": data, **others}
        before = self._settings_before()
        for name in BY_ITERATION:  # by iteration, so that a finished run can be given more of them
            del settings[name]
            # of iterations played before and not wanted now they stay as they were
            settings.update({key: value for key, value in before.items() if key.startswith(f"{name} of iteration ")})
            for number in range(self.config.num_iterations):
                settings[f"{name} of iteration {number}"] = getattr(self.config.for_iteration(number), name)
        return settings

    def _settings_before(self) -> dict[str, Any]:
        """Of the run in the output folder, if it has got anywhere."""
        folder = Path(self.config.output_dir)
        return (settings_of(folder) or {}) if (folder / "rows").is_dir() else {}

    def may_change(self) -> list[str]:
        """
        Settings that may be different in a run that goes on: what has no effect on results, and how many iterations
        there are, with what those have that were never to be played before.
        """
        known = self._settings_before()
        keys = [f"{name} of iteration {n}" for name in BY_ITERATION for n in range(self.config.num_iterations)]
        return [*MAY_CHANGE, "num_iterations", *(key for key in keys if key not in known)]

    def headings(self, more_stages: int = 0) -> Headings:
        """Headings of all iterations, and of so many stages beside them."""
        evaluates, iterations = bool(self.watched), self.config.num_iterations
        total = evaluates + iterations * (2 + evaluates) + more_stages
        return Headings(total, at_most=self.config.early_stop != "none" and iterations > 1)

    def open(self, run: Run, model: str | Path) -> "SelfPlay":
        """Begin in a run's folder, or go on there, from the model in a folder of its own."""
        if is_adapter(model):
            model = merged_start(run, model, trust_remote_code=self.config.trust_remote_code)
        self.run, self.model = run, str(model)
        self.model_to_take, self.iteration_to_take = self.model, None
        run.keep("rows", {"train.jsonl": as_jsonl(self.rows), "watched.jsonl": as_jsonl(self.watched)})
        return self

    def generate(self, number: int, model: str | Path) -> Path:
        """Let the opponent answer all prompts; returns the file of pairs. Every iteration draws other numbers."""
        sampling = self.config.sampling()
        sampling.sampling_seed += number
        self.training[f"iteration-{number}"] = self.run.stage(
            f"iteration-{number}/generated",
            generate_stage,
            title=f"sampling an answer to {count(len(self.rows), 'prompt')}, iteration {number}",
            inputs={"model": Path(model), "rows": self.run.path("rows", "train.jsonl")},
            config=sampling,
            load=self._load,
        )
        return self._pairs(number)

    def _pairs(self, number: int) -> Path:
        return self.run.path(f"iteration-{number}", "generated", "pairs.jsonl")

    def train(self, number: int, model: str | Path) -> Path:
        """Train against the opponent on its answers and those of `history` earlier ones; returns the new model."""
        name = f"iteration-{number}"
        used = range(max(number - self.config.history, 0), number + 1)
        inputs = {f"generated_{earlier:03d}": self._pairs(earlier) for earlier in used}
        if self.config.reference == "initial" and number > 0:
            inputs["initial"] = Path(self.model)
        each = {key: getattr(self.config.for_iteration(number), key) for key in BY_ITERATION}
        each["reference"] = "initial" if "initial" in inputs else "previous"  # at first they are the same
        figures = self.run.stage(
            f"{name}/model",
            train_stage,
            title=f"training, iteration {number}",
            inputs={"model": Path(model), **inputs},
            shards_models=True,
            trainer_class=self.trainer_class,
            settings={**self._settings, **each},
            trainer_kwargs=self.trainer_kwargs,
        )
        self.training[name] = {**self.training[name], **figures}
        return merged_model(self.run, name, trust_remote_code=self._load["trust_remote_code"])

    def evaluate(self, name: str, model: str | Path, opponent: str | None = None) -> dict[str, Any]:
        """Let a model answer the watched prompts; its figures are kept as `name`. `opponent` was evaluated before."""
        if not self.watched:
            return {}
        inputs = {"model": Path(model), "prompts": self.run.path("rows", "watched.jsonl")}
        if opponent is not None:
            inputs["opponent"] = self._answers_file(opponent)
        called = f"the {self.start_name} model" if name == "start" else f"the model of {name.replace('-', ' ')}"
        self.figures[name] = self.run.stage(
            f"{name}/evaluation",
            evaluation_stage,
            title=f"evaluating {called} on {count(len(self.watched), 'held-out prompt')}",
            inputs=inputs,
            config=self.config.sampling(),  # the same random numbers for every model: what differs is the model
            rewards=self.config.rewards or (),
            scorer_options=self.config.scorer_options(),
            load=self._load,
            real="completion",
            batch_size=self.config.per_device_eval_batch_size,
            max_length=self.config.max_length,
        )
        return self.figures[name]

    def play(self) -> Path:
        """Play all iterations, or as many as improve the figure of `early_stop`; returns the model to take."""
        model, before = self.model, "start"
        self.evaluate("start", model)
        for number in range(self.config.num_iterations):
            name = f"iteration-{number}"
            self.generate(number, model)
            model = self.train(number, model)
            self.evaluate(name, model, opponent=before)
            self.stopped = self._no_better(before, name)
            if self.stopped is None:
                self.model_to_take, self.iteration_to_take, before = str(model), number, name
            self.write_report()
            if self.stopped is not None:
                PartialState().print(
                    f"The game ends here, and the model before {name} is the one to take: {self.stopped}"
                )
                break
        return Path(self.model_to_take)

    def _no_better(self, before: str, now: str) -> str | None:
        figure = self.config.early_stop
        if figure == "none":
            return None
        old, new = self.figures[before][figure], self.figures[now][figure]
        improved = new < old if figure == "nll" else new > old
        return None if improved else f"held-out {figure} went from {old:.4f} to {new:.4f}"

    # What came out

    def _answers_file(self, name: str) -> Path:
        return self.run.path(name, "evaluation", "answers.jsonl")

    def write_report(self) -> None:
        """`spin.json`, and `spin.png` if there are figures to draw."""
        if not PartialState().is_main_process:
            return
        from .plots import plot_self_play

        report = {
            "model": self.model_to_take,
            "stopped": self.stopped,
            "models": self.figures,
            "training": self.training,
        }
        write_atomically(self.run.path("spin.json"), json.dumps(report, indent=2))
        if self.figures:
            plot_self_play(self.figures, self.training, self.run.path("spin.png"))

    def report(self, controls: dict[str, str] | None = None) -> None:
        """
        Print the figures of the start and of each iteration side by side.

        Args:
            controls (`dict[str, str]`, *optional*): models that were evaluated under these names, each to be compared
                with an iteration.
        """
        self.write_report()
        if not PartialState().is_main_process or not self.figures:
            return
        controls = controls or {}
        names = [name for name in self.figures if name not in controls]
        answers = {name: {one["number"]: one for one in read_jsonl(self._answers_file(name))} for name in self.figures}
        first, console = answers["start"], Console(width=max(110, 34 + 19 * len(names)))
        table = Table(title=f"{len(first)} held-out prompts, one answer each at temperature 1", title_justify="left")
        table.add_column("", no_wrap=True)
        for name in names:
            called = self.start_name if name == "start" else name.replace("iteration-", "SPIN iteration ")
            table.add_column(called, justify="right")

        def row(label: str, key: str, form: str, found: dict[str, dict] = self.figures) -> None:
            if any(key in found.get(name, {}) for name in names):
                values = (found.get(name, {}).get(key) for name in names)
                table.add_row(label, *("" if value is None else format(value, form) for value in values))

        has_reward = "reward" in self.figures["start"]
        row("reward", "reward", ".3f")
        if has_reward:
            steps = zip(names, names[1:], strict=False)
            table.add_row(
                "change from the left", "", *(format_change(change(answers[b], answers[a])) for a, b in steps)
            )
            over_first = ("" if name == "start" else format_wins(wins_over(answers[name], first)) for name in names)
            table.add_row(f"wins over the first\n({TIE_RULE})", *over_first)
        row("NLL of real answers, per token", "nll", ".4f")
        row("margin over the opponent, nats", "margin", "+.2f")
        row("margin > 0", "margin_accuracy", ".1%")
        row("generated = real", "equal", ".1%")
        row("tokens, generated", "length", ".1f")
        row("tokens, real", "real_length", ".1f")
        row("updates", "steps", "d", self.training)
        row("first loss", "first_loss", ".4f", self.training)
        console.print(table)
        if controls and has_reward:
            table = Table(title="SFT going on for as many updates", title_justify="left")
            table.add_column("after", no_wrap=True)
            for heading in ("reward, SPIN", "reward, SFT", "SPIN less SFT, same prompts", "NLL, SPIN", "NLL, SFT"):
                table.add_column(heading, justify="right")
            for control, name in controls.items():
                reward, nll = ([self.figures[one][key] for one in (name, control)] for key in ("reward", "nll"))
                table.add_row(
                    name.replace("-", " "), *(f"{value:.3f}" for value in reward),
                    str(change(answers[name], answers[control])), *(f"{value:.4f}" for value in nll),
                )  # fmt: skip
            console.print(table)
        print(f"The model is {self.model_to_take}; spin.json and spin.png are in {self.run.folder}")
        print_next(after_self_play(self))

    # For a trainer

    @classmethod
    def for_trainer(
        cls,
        trainer_class: type,
        model: str | PreTrainedModel,
        args: SPINConfig | None,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase | None,
        objects: dict[str, Any],
        trainer_kwargs: dict[str, Any],
    ) -> "SelfPlay":
        """What [`SPINTrainer`] does in its constructor with rows of SFT: check everything, write and load nothing."""
        given = [name for name, value in objects.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} cannot go to the processes in which the iterations are trained. Leave "
                f"{'it' if len(given) == 1 else 'them'} out (there are the settings `optim`, `lr_scheduler_type` and "
                "`report_to`), or train one iteration at a time, on rows of `prompt`, `chosen` and `rejected`."
            )
        is_object = not isinstance(model, str | Path)
        model_id = get_config_model_id(model.config) if is_object else str(model)
        config = args or SPINConfig(f"{model_id.rstrip('/').split('/')[-1]}-SPIN")
        if not isinstance(config, SPINConfig):
            raise TypeError(
                f"SPINTrainer got `args` of type {type(config).__name__}, which lacks its settings. Pass a "
                "SPINConfig; it takes the same fields."
            )
        if not isinstance(train_dataset, Dataset) or not isinstance(eval_dataset, Dataset | None):
            raise TypeError(
                "Self-play goes over all rows in every iteration. Pass `train_dataset` and `eval_dataset` as a "
                "`Dataset` each, not as a stream or a dict."
            )
        if is_object and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                "The model was loaded in ZeRO-3's shards, of which each process holds a part. Pass its name or "
                "folder, or load it before the SPINConfig is made."
            )
        if is_object and hasattr(model, "peft_config"):
            raise ValueError(
                "The model is a PeftModel, and each iteration trains an adapter of its own. Pass the base model, or "
                "the result of `merge_and_unload()`, and a `peft_config`."
            )
        hub = {
            "revision": (config.model_init_kwargs or {}).get("revision") or "main",
            "trust_remote_code": config.trust_remote_code,
        }
        tokenizer = processing_class or load_tokenizer(model_id, **hub)
        check_adapter(model if is_object else model_id, config, trainer_kwargs.get("peft_config"))
        limits = Limits(model if is_object else model_id, config)
        rows, watched = _train_and_watched(train_dataset, eval_dataset, tokenizer, config, limits)
        game = cls(config, rows, watched, trainer_class=trainer_class, trainer_kwargs=trainer_kwargs)
        game._given = (model, processing_class, hub["revision"])
        return game

    def play_for_trainer(self, resume_from_checkpoint: str | bool | None) -> tuple[TrainOutput, str, dict[str, Any]]:
        """Open the folder, play, and say which model to take and how to construct a trainer with it."""
        if resume_from_checkpoint not in (None, True, False):
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: self-play goes on in its own folder and has no "
                "checkpoint to name. Set it to True."
            )
        model, processing_class, revision = self._given
        is_object = not isinstance(model, str | Path)
        run = Run(
            self.config.output_dir,
            self.settings(model=type(model).__name__ if is_object else f"{model}@{revision}"),
            resume=bool(resume_from_checkpoint),
            may_change=self.may_change(),
            patience=self.config.ddp_timeout,
            headings=self.headings(),
        )
        path = model
        if not is_object:
            source = ModelConfig(model_name_or_path=str(model), model_revision=revision)
            path = local_model(source, trust_remote_code=self.config.trust_remote_code)
        if is_object or processing_class is not None:
            tokenizer = processing_class or load_tokenizer(
                get_config_model_id(model.config), trust_remote_code=self.config.trust_remote_code
            )
            path = _save_start(run, path, tokenizer, self.config.trust_remote_code)
        self.open(run, path).play()
        self.report()
        last = self.iteration_to_take or 0
        figures = self.training[f"iteration-{last}"]
        output = TrainOutput(figures["steps"], figures["train_loss"], {"models": self.figures})
        names = ("model_init_kwargs", "eval_strategy", "on_invalid_row")
        return (
            output,
            self.model_to_take,
            {
                "model": self.model_to_take,
                "args": self.config.for_iteration(last, **{name: self._settings[name] for name in names}),
                "train_dataset": as_dataset(read_jsonl(self._pairs(last))),
            },
        )


def _train_and_watched(train_dataset, eval_dataset, tokenizer, config: SPINConfig, limits: Limits | None):
    rows = sft_rows(train_dataset, tokenizer, config, limits, "train")
    if eval_dataset is not None:
        watched = sft_rows(eval_dataset, tokenizer, config, limits, "eval")
        prompts = set(map(prompt_key, watched))
        train = [row for row in rows if prompt_key(row) not in prompts]
        if not train:
            raise ValueError(
                "All prompts of the train dataset are in the eval dataset, and nothing is left to train on."
            )
        if len(train) < len(rows):
            PartialState().print(f"{len(rows) - len(train)} rows are left out: their prompts are in the eval dataset")
        return train, watched
    if config.num_watched_prompts == 0:
        return rows, []
    return set_apart(rows, config.num_watched_prompts, config.seed)


def _save_start(
    run: Run, model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
) -> Path:
    """Save a model, in memory or in a folder, with the tokenizer; on a resume both must be the same."""
    start, unfinished, problem = run.path("start", "model"), run.path("start", "model.unfinished"), None
    if run.state.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        start.parent.mkdir(exist_ok=True)
        (start.parent / MARK).touch()
        if isinstance(model, PreTrainedModel):
            repair_generation_config(model)
            model.save_pretrained(unfinished)
        elif is_adapter(model):
            save_merged(model, unfinished, trust_remote_code=trust_remote_code)
        else:
            copy_model(model, unfinished)
        tokenizer.save_pretrained(unfinished)
        if not start.exists():
            unfinished.rename(start)
        else:
            if model_fingerprint(unfinished) != model_fingerprint(start):
                problem = (
                    f"The model has other weights than the one this run was begun with, which is in {start}. Pass the "
                    "same, or set another `output_dir`."
                )
            shutil.rmtree(unfinished)
    problem = run.first(problem)
    if problem is not None:
        raise ValueError(problem)
    return start


# For the recipe


def start_self_play(
    parsed: Sequence[Any],
    trainer_class: type,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    *,
    more_stages: int = 0,
) -> SelfPlay:
    """
    Begin the game of the recipe, or take it up where it was interrupted.

    Args:
        parsed (`Sequence`): what [`parse_recipe_args`] returned. Without a model and data, on the playground, an SFT
            model is trained first.
        trainer_class (`type`): [`SPINTrainer`], or a subclass that can be imported.
        train_dataset, eval_dataset: what [`load_datasets`] returned; the playground has its own.
        more_stages (`int`, defaults to 0): stages with a heading that the recipe adds.

    Raises:
        FileExistsError, ValueError: see [`Run`] and [`sft_rows`].
    """
    from trl import get_peft_config, get_quantization_config

    _, config, model_args, _ = parsed
    if wants_to_resume(config) and str(config.resume_from_checkpoint).lower() not in RESUME_LAST:
        raise ValueError(
            f"resume_from_checkpoint={config.resume_from_checkpoint!r}: self-play goes on where it stopped. Set it to "
            "'true'."
        )
    on_playground, resume = is_playground(*parsed), wants_to_resume(config)
    if on_playground:
        from .playground import byte_level_tokenizer, spin_playground

        playground = spin_playground(config.seed)
        tokenizer, limits = byte_level_tokenizer(), None
        train_dataset = playground.sft_dataset()
        eval_dataset = Dataset.from_list(
            [{**row, "completion": row["reference"]} for row in playground.rows("held_out", reference=True)]
        )
    else:
        config.model_init_kwargs = model_init_kwargs(model_args, config)
        model = local_model(model_args, trust_remote_code=config.trust_remote_code)
        tokenizer = load_tokenizer(model, trust_remote_code=config.trust_remote_code)
        check_adapter(model, config, get_peft_config(model_args))
        limits = Limits(model, config)
        if not isinstance(train_dataset, Dataset):
            raise ValueError("Self-play goes over all rows in every iteration. Leave `--dataset_streaming` out.")
        # with it the loop evaluates each model; the pairs it trains on have no held-out part
        config.eval_strategy = "no"
    rows, watched = _train_and_watched(train_dataset, eval_dataset, tokenizer, config, limits)
    game = SelfPlay(
        config,
        rows,
        watched,
        trainer_class=trainer_class,
        trainer_kwargs={
            "peft_config": get_peft_config(model_args),
            "quantization_config": get_quantization_config(model_args),
        },
    )
    before = from_all(settings_of(config.output_dir))[0]  # the same decision on all processes
    if on_playground and not resume and before is not None:
        if not any(before.get(name) for name in ("model_name_or_path", "dataset_name", "model")):  # a playground
            start_afresh(config.output_dir)
    others = run_settings([part for part in parsed if part is not config])
    settings, may_change = game.settings(**others), game.may_change()
    run = Run(
        config.output_dir,
        settings,
        resume=resume,
        may_change=may_change,
        patience=config.ddp_timeout,
        headings=game.headings(on_playground + more_stages),
    )
    if on_playground:
        from .playground import sft_stage

        run.stage("sft", sft_stage, title=SFT_TITLE, playground=playground)
        model = run.path("sft")
    game.start_name = "SFT" if on_playground else "start"
    return game.open(run, model)
