"""The loop of SPIN: generate, train, and again with the model just trained.

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
      spin.json, spin.png             the figures side by side, and which model to take"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput
from trl import ModelConfig

from ..._trl import get_config_model_id
from ...data.limits import Limits
from ...runs.evaluation_stage import evaluation_stage
from ...runs.intervals import TIE_RULE
from ...runs.manifest import STAGE_MARKER, settings_of
from ...runs.next_commands import after_self_play, print_next
from ...runs.run import Run, all_processes
from ...runs.settings import MAY_CHANGE, local_model, run_settings, unset_value
from ...runs.stages import merged_model, merged_start
from ...runs.watch import change, format_change, format_wins, wins_over
from ...runtime.files import write_atomically
from ...runtime.fingerprints import model_fingerprint
from ...runtime.headings import Headings, count
from ...runtime.jsonl import as_jsonl, read_jsonl
from ...runtime.models import copy_model, is_adapter, load_tokenizer, repair_generation_config, save_merged
from ...scoring.build import check_scorers
from ...trainers.adapter_checks import check_adapter
from ...trainers.reference import refuse_fsdp
from .config import BY_ITERATION, SPINConfig
from .pairs import generate_stage
from .rows import as_dataset, train_and_watched
from .stages import train_stage


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
                f"early_stop={config.early_stop!r} needs held-out rows, got none. Set `num_watched_prompts`, or pass "
                "an eval dataset."
            )
        idle = [name for name in ("load_best_model_at_end", "eval_on_start") if getattr(config, name)]
        if idle or config.lr_scheduler_type == "reduce_lr_on_plateau":
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in idle or ['lr_scheduler_type'])} must keep the default in "
                "self-play: each model is evaluated after its iteration, not during training. Remove it. "
                "`early_stop` compares the iterations."
            )
        if config.save_only_model:
            raise ValueError(
                "`save_only_model` must be False in self-play, got True: an interrupted iteration would resume with "
                "a new optimizer. Remove it. The last checkpoints can be deleted after the run."
            )
        refuse_fsdp(config)
        if config.push_to_hub:
            raise ValueError(
                "`push_to_hub` must be False in self-play, got True: each iteration would overwrite the one before. "
                "Remove it, and push the final model: `hf upload NAME OUTPUT_DIR/iteration-N/model`."
            )
        if (trainer_kwargs or {}).get("quantization_config") is not None:
            raise ValueError(
                "Self-play must have a model without quantisation: it samples from whole models and merges adapters "
                "into them. Remove the quantisation. LoRA works."
            )
        if config.rewards and not watched:
            raise ValueError(
                "`rewards` needs held-out rows whose answers it scores, got none. Set `num_watched_prompts`, or pass "
                "an eval dataset."
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
                PartialState().print(f"Self-play ends here. Take the model before {name}: {self.stopped}")
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
        from ...runs.curves import plot_self_play

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
                f"{', '.join(f'`{name}`' for name in given)} cannot be passed on to the processes that train the "
                f"iterations. Remove {'it' if len(given) == 1 else 'them'} and use `optim`, `lr_scheduler_type` and "
                "`report_to`. Or train one iteration at a time, on rows of `prompt`, `chosen` and `rejected`."
            )
        is_object = not isinstance(model, str | Path)
        model_id = get_config_model_id(model.config) if is_object else str(model)
        config = args or SPINConfig(f"{model_id.rstrip('/').split('/')[-1]}-SPIN")
        if not isinstance(config, SPINConfig):
            raise TypeError(
                f"`args` must be a SPINConfig, got {type(config).__name__}. A SPINConfig takes the same fields."
            )
        if not isinstance(train_dataset, Dataset) or not isinstance(eval_dataset, Dataset | None):
            raise TypeError(
                f"`train_dataset` and `eval_dataset` must be a `Dataset` each, got {type(train_dataset).__name__} and "
                f"{type(eval_dataset).__name__}: self-play reads all rows in every iteration."
            )
        if is_object and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                "`model` must be whole, got a model in ZeRO-3's shards. Pass its name or folder, or load it before "
                "the SPINConfig is made."
            )
        if is_object and hasattr(model, "peft_config"):
            raise ValueError(
                "`model` must not be a PeftModel: each iteration trains an adapter of its own. Pass the base model, "
                "or the result of `merge_and_unload()`, and a `peft_config`."
            )
        hub = {
            "revision": (config.model_init_kwargs or {}).get("revision") or "main",
            "trust_remote_code": config.trust_remote_code,
        }
        tokenizer = processing_class or load_tokenizer(model_id, **hub)
        check_adapter(model if is_object else model_id, config, trainer_kwargs.get("peft_config"))
        limits = Limits(model if is_object else model_id, config)
        rows, watched = train_and_watched(train_dataset, eval_dataset, tokenizer, config, limits)
        game = cls(config, rows, watched, trainer_class=trainer_class, trainer_kwargs=trainer_kwargs)
        game._given = (model, processing_class, hub["revision"])
        return game

    def play_for_trainer(self, resume_from_checkpoint: str | bool | None) -> tuple[TrainOutput, str, dict[str, Any]]:
        """Open the folder, play, and say which model to take and how to construct a trainer with it."""
        if resume_from_checkpoint not in (None, True, False):
            raise ValueError(
                f"`resume_from_checkpoint` must be True, False or None in self-play, got {resume_from_checkpoint!r}: "
                "it resumes in its own folder. Set it to True."
            )
        model, processing_class, revision = self._given
        is_object = not isinstance(model, str | Path)
        run = Run(
            self.config.output_dir,
            self.settings(model=type(model).__name__ if is_object else f"{model}@{revision}"),
            resume=bool(resume_from_checkpoint),
            may_change=self.may_change(),
            default_of=partial(unset_value, [self.config]),
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


def _save_start(
    run: Run, model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
) -> Path:
    """Save a model, in memory or in a folder, with the tokenizer; on a resume both must be the same."""
    start, unfinished, problem = run.path("start", "model"), run.path("start", "model.unfinished"), None
    if run.state.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        start.parent.mkdir(exist_ok=True)
        (start.parent / STAGE_MARKER).touch()
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
    problem = run.first_from_any_rank(problem)
    if problem is not None:
        raise ValueError(problem)
    return start
