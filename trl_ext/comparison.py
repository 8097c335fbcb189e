"""
All methods on the same data, with the same budget, side by side.

Each seed is a run of stages (see `stages.py`), so a comparison goes on where it was interrupted, and a method that
fails does not take the others with it.

    OUTPUT_DIR/
      seed-1/run.json               settings it was begun with
      seed-1/prompts/               to train on, and held out
      seed-1/sft/                   on the playground: the model that all start from
      seed-1/candidates/            answers of that model, and the same with scores: what most methods train on
      seed-1/METHOD/model/          the trained model, and config.yaml, with which its recipe trained it
      seed-1/METHOD/evaluation/     how it answers the held-out prompts
      comparison.json               every figure
      comparison.csv, .md, .html    the report, see `comparison_report.py`
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import os
import resource
import shlex
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from accelerate import PartialState

from .checkpoints import wants_to_resume
from .cli import (
    imported,
    is_playground,
    option_hints,
    parse_recipe_args,
    read_config,
    typed_options,
    with_config_apart,
)
from .comparison_config import IDLE, METHODS, RESERVED, ComparisonConfig, Method, refuse_equal_labels, settings_by_name
from .comparison_report import write_report
from .comparison_results import ComparisonResults, MethodResult
from .data import RowOptions
from .evaluation_stage import evaluation_stage
from .headings import Headings, count
from .jsonl import read_jsonl, write_jsonl
from .next_commands import after_comparison, print_next
from .ranking import CARRIED_COLUMNS, pair_rows
from .recipe_help import recipe_dataclasses
from .rounds import Rounds, merged_model, replaced, start_rounds
from .run_lock import hold_folder
from .safety import maybe_meant
from .sampling import write_atomically
from .scoring import as_text
from .spin_pairs import generate_stage
from .stages import all_processes, without_secrets

NUM_EXAMPLES = 6


def compare(parsed: Sequence[Any], recipes: Path, given: Collection[str]) -> ComparisonResults:
    """
    Train and evaluate every method with every seed, keep the figures after each, and write the report at the end,
    however that comes.

    Args:
        parsed (`Sequence`): what [`parse_recipe_args`] returned: [`~trl.ScriptArguments`], [`ComparisonConfig`],
            [`~trl.ModelConfig`], [`~trl.DatasetMixtureConfig`], [`SamplingConfig`] and [`ComparedRoundsConfig`].
        recipes (`Path`): folder of the recipes.
        given (`Collection[str]`): names of the options that were given, see [`given_options`]: those are handed on to
            the methods.

    Returns:
        [`ComparisonResults`]: every figure of what was asked for. What failed is among them, with its reason.

    Raises:
        ValueError, TypeError, FileNotFoundError: what can be known to fail, before a model is loaded.
    """
    config = parsed[1]
    folder, results, comparison = Path(config.output_dir), [], None
    file = folder / "comparison.json"
    all_processes()
    hold_folder(folder)
    earlier = _with_labels_of_now(file, config) if wants_to_resume(config) and file.is_file() else []
    headings = Headings()
    try:
        for seed in config.seeds:
            game = OneSeed(parsed, recipes, seed, given, headings)
            for result in game.play():
                results.append(result)
                known = {(one.method, one.seed) for one in results}
                kept = [one for one in earlier if (one.method, one.seed) not in known]  # not asked for this time
                comparison = _results(parsed, game.num_held_out, [*results, *kept])
                if PartialState().is_main_process:
                    folder.mkdir(parents=True, exist_ok=True)
                    comparison.save(file)
    finally:
        if PartialState().is_main_process and comparison is not None:
            write_report(comparison, folder)
            print((folder / "comparison.md").read_text(encoding="utf-8"))
            print(f"comparison.html, .md, .csv and .json are in {folder}")
            known = {**METHODS, **config.variants}
            print_next(after_comparison(config, results, {name: one.recipe for name, one in known.items()}))
    PartialState().wait_for_everyone()
    return dataclasses.replace(comparison, results=results)


def _with_labels_of_now(file: Path, config: ComparisonConfig) -> list[MethodResult]:
    """
    What an earlier run has found. A label is only for readers, so that one which has changed since is changed there
    too, rather than refused; what is no longer among `settings` keeps what it was called.

    Raises:
        ValueError: a method of this run and another of the earlier one have one label.
    """
    labels = {name: method.label for name, method in {**METHODS, **config.variants}.items()}
    earlier = ComparisonResults.load(file).results
    earlier = [dataclasses.replace(one, label=labels.get(one.method, one.label)) for one in earlier]
    try:
        refuse_equal_labels({**{one.method: one.label for one in earlier}, **config.labels})
    except ValueError as error:
        raise ValueError(f"What is in {file} stays in the report: {error}") from None
    return earlier


def _results(parsed: Sequence[Any], num_held_out: int, results: list[MethodResult]) -> ComparisonResults:
    _, config, model_args, _, sampling, ranking = parsed
    settings = {
        "data": "the playground" if is_playground(*parsed) else parsed[0].dataset_name,
        "model": model_args.model_name_or_path or "trained on the playground",
        "rewards": ranking.rewards or [ranking.ranker],
        "judge": ranking.judge,
        "num_candidates": sampling.num_candidates,
        "temperature": sampling.temperature,
        **{
            name: getattr(config, name) for name in ("seeds", "max_steps", "max_length", "settings", "click_threshold")
        },
        "prompts_per_update": _prompts_per_update(config),
    }
    notes = [
        "Equal for all that are trained: the prompts that they are given, the updates and the rows in each, one to a "
        "prompt. A prompt that gives a method no row, as where all answers have one score, is dropped for that method "
        "alone: how many prompts each trained on is under its costs.",
        "What was sampled for a method is under its name: nothing for SLiC-HF direct, as many answers as candidates "
        "for most, one for each prompt and iteration for SPIN; RLOO samples anew from the model it trains, beside the "
        "candidates of its reward model.",
        "Log-likelihoods over training are those of the method's own batches.",
        "Answers to held-out prompts are sampled at temperature 1 without top-p and top-k, whatever the candidates "
        "were sampled with. KL is that from the SFT model: the divergence of the next-token distributions, added up "
        "over the tokens of an answer, as a mean over answers.",
    ]
    return ComparisonResults(
        title="Methods on " + ("the playground" if is_playground(*parsed) else str(parsed[0].dataset_name)),
        base="sft",
        prompts=num_held_out,
        results=list(results),
        settings=json.loads(json.dumps(settings, default=str)),
        notes=notes,
        command=shlex.join(["accelerate", "launch", *without_secrets(sys.argv)]),
    )


def _prompts_per_update(config: ComparisonConfig) -> int:
    processes = PartialState().num_processes
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * processes


class OneSeed:
    """
    The comparison with one seed.

    Args:
        parsed, recipes, given: as in [`compare`].
        seed (`int`): of data, training and sampling.
        headings ([`Headings`], *optional*): number the stages of all seeds.
    """

    def __init__(
        self,
        parsed: Sequence[Any],
        recipes: Path,
        seed: int,
        given: Collection[str],
        headings: Headings | None = None,
    ):
        script_args, config, model_args, dataset_args, sampling, ranking = parsed
        self.recipes, self.seed, self.model_args, self.given = recipes, seed, model_args, given
        self.config = dataclasses.replace(config, output_dir=str(Path(config.output_dir) / f"seed-{seed}"), seed=seed)
        self.sampling = replaced(sampling, sampling_seed=seed)
        self.on_playground = is_playground(*parsed)
        known = {**METHODS, **config.variants}
        self.methods = {name: known[name] for name in config.methods or known}
        idle = [f"{name} ({why})" for name, why in IDLE.items() if name in given]
        if idle:
            raise ValueError(f"{', '.join(idle)} would do nothing in a comparison. Leave them out.")
        if "rrhf_two_rounds" in self.methods and sampling.num_candidates < 4:
            raise ValueError(
                f"num_candidates={sampling.num_candidates}: RRHF in two rounds has half of them in each, and needs "
                "two to rank. Set it to 4 or more, or leave the method out by `--methods`."
            )
        self.models_resident = {}
        every = {"sft": METHODS["sft"], **self.methods, "reward_model": REWARD_MODEL}
        for name, method in every.items():  # before anything is begun
            read = self._check(name, method)
            self.models_resident[name] = "–" if read is None else models_resident(method.recipe, read)
            if read is not None and config.num_checkpoints and read[2].use_peft:
                raise ValueError(
                    f"num_checkpoints={config.num_checkpoints} with use_peft, of {name}: checkpoints of adapters are "
                    "not looked at. Leave one of them out."
                )
        check_shared(config, recipes)
        parts = (script_args, self.config, model_args, dataset_args, self.sampling, ranking)
        headings = headings or Headings()
        headings.total = len(config.seeds) * self._num_stages()
        self.rounds: Rounds = start_rounds(parts, rows=RowOptions(reference=True), headings=headings)
        self.num_held_out = sum(1 for _ in self.rounds.watched.open())
        columns = set(read_jsonl(self.rounds.prompts)[0])
        if self.on_playground:
            columns |= {"chosen", "rejected"}
        for name, method in list(self.methods.items()):
            if method.needs is None or method.needs in columns:
                continue
            if config.methods:
                raise ValueError(
                    f"methods: {name} trains on the column `{method.needs}`, and the dataset has {sorted(columns)}. "
                    "Add the column, or leave the method out."
                )
            PartialState().print(f"{method.label} is left out: the dataset has no column `{method.needs}`.")
            del self.methods[name]
        headings.total = len(config.seeds) * self._num_stages()
        self.methods = {"sft": METHODS["sft"], **self.methods}

    def _num_stages(self) -> int:
        """How many stages of one seed have a heading."""
        number = self.on_playground + 1  # evaluating the model that all start from
        number += 2 * any(method.data in USE_CANDIDATES for method in self.methods.values())
        for method in self.methods.values():
            if method.recipe is not None:
                parts = 2 if method.data in STAGES_OF_PART else 1
                number += parts * STAGES_OF_PART.get(method.data, 1) + 1
        return number + any(method.data == "prompts" for method in self.methods.values())  # the reward model

    # What is trained on

    def _candidates(self) -> Path:
        """Sampled answers of the first model with scores, the same for all methods."""
        return self.rounds.make_candidates("candidates", self.rounds.model)

    def _data(self, method: Method) -> tuple[Path, int]:
        """What a method is trained on, and how many answers were sampled for it before."""
        rounds = self.rounds
        if method.data == "pairs":
            stage = {"prompts": rounds.prompts}
            rounds.run.stage("pairs", pairs_stage, inputs=stage, on_playground=self.on_playground, seed=self.seed)
            return rounds.run.path("pairs", "pairs.jsonl"), 0
        ranked = self._candidates()
        if method.data == "prompts":  # the candidates are its reward model's
            return rounds.prompts, self._num_sampled("candidates")
        if method.data == "likelihood_near":
            above = self.config.click_threshold
            rounds.run.stage("near", near_stage, inputs={"ranked": ranked}, positive_above=above, seed=self.seed)
            ranked = rounds.run.path("near", "pairs.jsonl")
        elif method.recipe == "slic":
            rounds.run.stage("sample_rank", sample_rank_stage, inputs={"ranked": ranked})
            ranked = rounds.run.path("sample_rank", "ranked.jsonl")
        return ranked, self._num_sampled("candidates")

    def _num_sampled(self, name: str) -> int:
        manifest = json.loads(self.rounds.run.path(name, "candidates", "manifest.json").read_text())
        return manifest["figures"]["num_candidates"]

    def _seconds(self, stage: str) -> float:
        """How long a stage took."""
        return json.loads((self.rounds.run.path(stage) / "manifest.json").read_text())["seconds"]

    # Training

    def values_for(self, name: str, method: Method, *, updates: int, answers: int) -> dict[str, Any]:
        """
        Every option that a method's recipe is called with, but for model and data.

        Args:
            name (`str`): key of the method, or of a variant that `settings` defines; or `"reward_model"`.
            method ([`Method`]): what is trained.
            updates (`int`): optimiser steps.
            answers (`int`): answers that are sampled to each prompt: a batch of RLOO holds them all.

        Returns:
            `dict[str, Any]`: in YAML's types.
        """
        config = self.config
        options = _options(self.recipes / f"{method.recipe}.py")
        shared = shared_settings(config, self.model_args, self.given)
        prompts = config.per_device_train_batch_size
        own = {**config.settings.get("all", {}), **method.values}
        own = {**own, **config.settings.get(self._made_of(name), {}), **config.settings.get(name, {})}
        save = math.ceil(updates / (config.num_checkpoints + 1)) if config.num_checkpoints else None
        values = {
            **shared,
            "max_length": config.max_length,
            "logging_steps": max(updates // 10, 1),
            "report_to": "none",
            # sampled answers may be equal
            "on_invalid_row": config.on_invalid_row if method.data == "pairs" else "drop",
            **{key: value for key, value in own.items() if key not in ("method", "label")},
            "seed": self.seed,
            "max_steps": updates,
            "per_device_train_batch_size": method.batch(prompts, answers),
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "save_strategy": "no" if save is None else "steps",
            **({} if save is None else {"save_steps": save}),
        }
        if method.recipe == "rl":
            sampling = self.sampling
            values |= {
                "num_generations": answers,
                "max_completion_length": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        if method.recipe == "reward":  # RLOO cannot score with an adapter, and looks at it when it is trained
            values |= {"use_peft": False, "save_strategy": "no"}
            values.pop("save_steps", None)
        given = {*config.settings.get(name, {}), *config.settings.get(self._made_of(name), {})} - {"method", "label"}
        unknown = sorted(given - options)
        if unknown:
            raise ValueError(
                f"settings: {name!r} has the unknown options {', '.join(unknown)}. Leave them out"
                + maybe_meant(unknown[0], options)
            )
        return {key: value for key, value in values.items() if key in options}

    def _made_of(self, name: str) -> str:
        return self.config.settings.get(name, {}).get("method", name)

    def _check(self, name: str, method: Method) -> tuple[Any, ...] | None:
        """What the recipe reads of its options, before anything is begun; nothing where nothing is trained."""
        if method.recipe is None:
            if self.config.settings.get(name):
                raise ValueError(f"settings: {name!r} is not trained, so there is nothing to set. Leave it out.")
            return None
        values = self.values_for(name, method, updates=2, answers=self.sampling.num_candidates)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.yaml"
            values |= {"model_name_or_path": "model", "dataset_name": "data", "output_dir": folder}
            file.write_text(yaml.safe_dump(values))
            recipe = self.recipes / f"{method.recipe}.py"
            try:
                return parse_recipe_args(recipe_dataclasses(recipe), recipe, ["--config", str(file)])
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from None

    def train(self, name: str, method: Method, model: str | Path, data: Path, **options: Any) -> dict[str, Any]:
        """
        Train with a method's recipe, if that is not done yet; the model is kept in `NAME/model` of the seed's folder.

        Args:
            name (`str`): key of the method, with `/PART` behind it where it is trained more than once.
            method ([`Method`]): what is trained.
            model (`str` or `Path`): folder of the model to start from.
            data (`Path`): file of rows.
            **options: see [`values_for`].

        Returns:
            `dict[str, Any]`: the stage's figures.

        Raises:
            ValueError: it was trained with other options.
        """
        values = self.values_for(name.partition("/")[0], method, **options)
        if method.recipe == "rl":
            values["rewards"] = [str(self._reward_model())]
        self._refuse_other_options(name, values)
        return self.rounds.run.stage(
            f"{name}/model",
            train_stage,
            title=f"training, {count(options['updates'], 'update')}{self.rounds.of(name)}",
            inputs={"model": Path(model), "data": data},
            shards_models=True,
            recipe=self.recipes / f"{method.recipe}.py",
            values=values,
        )

    def _refuse_other_options(self, name: str, values: dict[str, Any]) -> None:
        """What is trained stays as it is: other options would not reach it."""
        folder = self.rounds.run.path(name, "model")
        if not (folder / "manifest.json").is_file():
            return
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        changed = sorted(key for key in {*values, *before} - set(NAMED) if before.get(key) != values.get(key))
        if changed:
            raise ValueError(
                f"{name} is trained, with other options than there are now: "
                + ", ".join(f"{key} was {before.get(key)!r:.60} and is {values.get(key)!r:.60}" for key in changed)
                + f". Set them back, or remove {folder.parent} to train it anew."
            )

    def _reward_model(self) -> Path:
        """A reward model of the candidates, for RLOO."""
        rounds, updates = self.rounds, self.config.max_steps
        self.train("reward_model", REWARD_MODEL, rounds.model, self._candidates(), updates=updates, answers=1)
        return rounds.run.path("reward_model", "model")

    def _twice(self, name: str, method: Method) -> tuple[list[dict], Path, int, float]:
        """Two trainings of half the updates, each on answers of the model before it."""
        rounds, model, figures, sampled, seconds = self.rounds, self.rounds.model, [], 0, 0.0
        halves = [self.config.max_steps // 2, self.config.max_steps - self.config.max_steps // 2]
        half, whole = self.sampling.num_candidates // 2, rounds.sampling
        sizes = [half, self.sampling.num_candidates - half] if method.data == "rounds" else [1, 1]
        for number, (updates, answers) in enumerate(zip(halves, sizes, strict=True), start=1):
            part = f"{name}/round-{number}"
            if method.data == "self_play":
                stage = f"{part}/generated"
                sampled += self._generate(stage, model, number)
                data = rounds.run.path(stage, "pairs.jsonl")
            else:
                stage, rounds.sampling = f"{part}/candidates", replaced(whole, num_candidates=answers)
                try:
                    data = rounds.make_candidates(part, model, draw=number)
                finally:
                    rounds.sampling = whole
                sampled += self._num_sampled(part)
            seconds += self._seconds(stage)
            figures.append(self.train(part, method, model, data, updates=updates, answers=answers))
            model = merged_model(rounds.run, part, trust_remote_code=self.config.trust_remote_code)
        return figures, Path(model), sampled, seconds

    def _generate(self, stage: str, model: str | Path, draw: int) -> int:
        """Make SPIN's pairs of a model's answers, as `recipes/spin.py` does; returns how many were sampled."""
        rounds, seed = self.rounds, self.sampling.sampling_seed + draw
        changes = {"num_candidates": 1, "keep_duplicates": True, "role_markers": None, "sampling_seed": seed}
        figures = rounds.run.stage(
            stage,
            generate_stage,
            title=f"sampling an answer to {count(rounds.num_prompts, 'prompt')}{rounds.of(stage.rpartition('/')[0])}",
            inputs={"model": Path(model), "rows": rounds.prompts},
            config=replaced(self.sampling, **changes),
            load=rounds.load,
            real="reference",
        )
        return figures["num_prompts"]

    # The game

    def play(self):
        """
        Yields a [`MethodResult`] for each method. Where there are several processes a failure ends them all, as one of
        them may be waiting for another; what is finished is kept.
        """
        if any(method.data in USE_CANDIDATES for method in self.methods.values()):
            self.rounds.subject = f"seed {self.seed}"
            self._candidates()  # what fails here fails for all
        for name, method in self.methods.items():
            self.rounds.subject = f"{method.label}, seed {self.seed}"
            try:
                result = self._play(name, method)
            except RuntimeError as error:  # a stage that failed
                if PartialState().num_processes > 1:
                    raise
                result = MethodResult(name, method.label, self.seed, "failed", " ".join(str(error).split())[:500])
                PartialState().print(f"{method.label} failed and is left out: {error}")
            yield result

    def _play(self, name: str, method: Method) -> MethodResult:
        rounds, before = self.rounds, 0.0
        if method.recipe is None:
            trainings, model, sampled, parts, sampling = [], Path(rounds.model), 0, [], math.nan
        elif method.data in ("rounds", "self_play"):
            trainings, model, sampled, sampling = self._twice(name, method)
            parts = [f"{name}/round-1", f"{name}/round-2"]
        else:
            data, sampled = self._data(method)
            answers = self.sampling.num_candidates
            trainings = [self.train(name, method, rounds.model, data, updates=self.config.max_steps, answers=answers)]
            sampling = self._seconds("candidates/candidates") if sampled else math.nan
            if method.data == "prompts":
                before = self._seconds("reward_model/model")
                sampled += self.config.max_steps * _prompts_per_update(self.config) * answers
            model = Path(merged_model(rounds.run, name, trust_remote_code=self.config.trust_remote_code))
            parts = [name]
        rounds.evaluate("start" if method.recipe is None else name, model)
        answers = rounds.answers("start" if method.recipe is None else name)
        result = MethodResult(
            method=name,
            label=method.label,
            seed=self.seed,
            status="done",
            scores={"reward": [one["reward"] for one in answers]},
            lengths=[one["num_tokens"] for one in answers],
            kl=[one["kl"] for one in answers],
            nll=[-one["fixed_logp"] for one in answers],
            examples=[
                {"prompt": as_text(one["prompt"]), "answer": as_text(one["answer"]), "reward": one["reward"]}
                for one in answers[:NUM_EXAMPLES]
            ],
            updates=sum(figures["updates"] for figures in trainings),
            completions_sampled=sampled,
            sampling_seconds=sampling,
            models_resident=self.models_resident[name],
            notes=[] if method.note is None else [method.note],
            prompts_key=f"seed-{self.seed}",
        )
        if "judge" in answers[0]:
            result.scores["judge"] = [one["judge"] for one in answers]
        if trainings:
            seconds = sum(figures["seconds"] for figures in trainings)
            result.seconds = seconds + before
            result.peak_memory_mib = max(figures["peak_memory_mib"] for figures in trainings)
            counts = [figures.get("prompts") for figures in trainings]
            result.training_prompts = None if None in counts else fmean(counts)
            tokens = [figures["num_tokens"] for figures in trainings]
            result.tokens_per_second = None if None in tokens else sum(tokens) / seconds
            result.curve = self._curve(parts, trainings)
        return result

    def _curve(self, parts: list[str], trainings: list[dict]) -> list[dict[str, Any]]:
        """Log-likelihoods as they were logged, and reward and KL of the checkpoints."""
        points, before = [], 0
        for part, figures in zip(parts, trainings, strict=True):
            steps = {step: {"chosen_logps": chosen, "rejected_logps": rejected}
                     for step, chosen, rejected in figures["logps"]}  # fmt: skip
            for step, found in self._looks(part, figures["updates"]).items():
                steps[step] = steps.get(step, {}) | found
            for step in sorted(steps):
                updates = before + step
                point = {"share": updates / self.config.max_steps, "updates": updates}
                points.append(point | {key: steps[step].get(key) for key in LOOKED_AT})
            before += figures["updates"]
        return points

    def _looks(self, part: str, updates: int) -> dict[int, dict[str, float]]:
        if not self.config.num_checkpoints:
            return {}
        rounds = self.rounds
        steps = [int(path.name.split("-")[1]) for path in rounds.run.path(part, "model").glob("checkpoint-*")]
        steps = sorted(step for step in rounds.run.first(steps) or [] if step < updates)
        if not steps:
            return {}
        figures = rounds.run.stage(
            f"{part}/looks",
            looks_stage,
            inputs={"model": rounds.run.path(part, "model"), "prompts": rounds.watched},
            steps=steps,
            num_prompts=self.config.num_checkpoint_prompts,
            **rounds.evaluation_settings(),
        )
        return {int(step): found for step, found in figures.items()}


REWARD_MODEL = Method("reward model", "reward")
USE_CANDIDATES = ("ranked", "likelihood_near", "prompts")  # methods whose data is sampled from the first model
STAGES_OF_PART = {
    "rounds": 3,
    "self_play": 2,
}  # headings of each half of a training in two halves, its evaluation aside
# what a method's config.yaml has beside its options
NAMED = ("model_name_or_path", "dataset_name", "output_dir")
LOOKED_AT = ("reward", "kl", "chosen_logps", "rejected_logps")
# fields of the comparison that are no options of its methods, or are set one by one
NOT_HANDED_ON = (
    *RESERVED, *IDLE, "methods", "seeds", "settings", "click_threshold", "num_checkpoints", "num_checkpoint_prompts",
    "max_length", "on_invalid_row", "model_revision",
)  # fmt: skip


def models_resident(recipe: str, read: Sequence[Any]) -> str:
    """
    Models in memory during training: the one that is trained, a reference that is kept beside it, and the reward model
    of `rl`. With an adapter the model without it is the reference. Other references are run once, before training.

    Args:
        recipe (`str`): its name.
        read (`Sequence`): what [`parse_recipe_args`] made of its options.
    """
    _, args, model_args, *_ = read
    if recipe == "rl":
        reference = args.beta != 0
    elif recipe in ("dpo", "kto"):
        reference = not args.precompute_ref_log_probs
    else:
        reference = getattr(args, "uses_reference_model", False)
    number = 1 + (reference and not model_args.use_peft) + (recipe == "rl")
    return f"{number} + LoRA" if model_args.use_peft else str(number)


def shared_settings(config: ComparisonConfig, model_args: Any, given: Collection[str]) -> dict[str, Any]:
    """The training settings that were given, for all methods, in YAML's types."""
    found = {}
    for part in (config, model_args):
        for entry in dataclasses.fields(part):
            if entry.init and entry.name in given and entry.name not in NOT_HANDED_ON:
                value = getattr(part, entry.name)
                found[entry.name] = value.to_dict() if hasattr(value, "to_dict") else getattr(value, "value", value)
    return {name: value for name, value in found.items() if not name.endswith("_token")}


def parse_comparison_args(
    dataclass_types: Sequence[str | type], playground_config: str | Path, args: Sequence[str]
) -> tuple[Any, ...]:
    """
    Parse as [`parse_recipe_args`] does, and join `--settings` with those of the config file (the playground's, if
    there is neither a file nor a model). The command line wins: an option that it has for all methods replaces the
    one in the file's settings of a method.

    Raises:
        ValueError, TypeError, FileNotFoundError: see [`parse_recipe_args`].
    """
    types, words = imported(dataclass_types), with_config_apart(args)
    typed = typed_options(word for word in words if word != "--config")
    file = None if {"model_name_or_path", "dataset_name"} & typed else playground_config
    file = words[words.index("--config") + 1] if "--config" in words else file
    if file is None:
        return parse_recipe_args(types, playground_config, words)
    in_file = settings_by_name(read_config(file, option_hints(types)).get("settings"))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--settings", nargs="?")
    own = settings_by_name(parser.parse_known_args(words)[0].settings)
    shared = {entry.name for one in types[1:3] for entry in dataclasses.fields(one)} - set(NOT_HANDED_ON)
    replaced_by = {*own.get("all", {}), *(typed & {*shared, "max_length", "on_invalid_row"})}
    kept = {
        name: {key: value for key, value in values.items() if key not in replaced_by}
        for name, values in in_file.items()
    }
    settings = {name: {**kept.get(name, {}), **own.get(name, {})} for name in {**kept, **own}}
    return parse_recipe_args(types, playground_config, [*words, "--settings", json.dumps(settings, default=str)])


def check_shared(config: ComparisonConfig, recipes: Path) -> None:
    """
    Refuse options in `settings` that nobody reads.

    Raises:
        ValueError: an option of `all` that no method has.
    """
    known = set().union(
        *(_options(recipes / f"{method.recipe}.py") for method in METHODS.values() if method.recipe is not None)
    )
    unknown = sorted(set(config.settings.get("all", {})) - known)
    if unknown:
        raise ValueError(
            f"settings: 'all' has the options {', '.join(unknown)}, which no method has. Leave them out"
            + maybe_meant(unknown[0], known)
        )


@functools.cache
def _options(recipe: Path) -> set[str]:
    """Names of a recipe's options."""
    classes = imported(recipe_dataclasses(recipe))
    return {entry.name for one in classes for entry in dataclasses.fields(one) if entry.init}


# Stages


def train_stage(folder: Path, *, model: Path, data: Path, recipe: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's own training."""
    named = {**values, **dict(zip(NAMED, (str(model), str(data), str(folder)), strict=True))}
    content = yaml.safe_dump(named, sort_keys=False)
    if os.environ.get("RANK", "0") == "0":  # Accelerate's state is the trainer's to make
        write_atomically(folder / "config.yaml", content)
    spec = importlib.util.spec_from_file_location(f"trl_ext_recipe_{recipe.stem}", recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as own:  # each process has the file when it reads it
        file = Path(own) / "config.yaml"
        file.write_text(content, encoding="utf-8")
        results = module.train(["--config", str(file)], model=str(model), data=str(data), output_dir=str(folder))
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if entry.get("logps/chosen") is not None and "logps/rejected" in entry]
    if torch.accelerator.is_available():
        peak = torch.accelerator.memory.max_memory_allocated() / 2**20
    else:  # of the whole process, with the libraries
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "updates": max(entry["step"] for entry in history),
        "seconds": results["train_runtime"],
        "num_tokens": next((entry["num_tokens"] for entry in reversed(history) if "num_tokens" in entry), None),
        "peak_memory_mib": peak,
        "prompts": results.get("train_prompts"),
        "logps": [[entry["step"], entry["logps/chosen"], entry["logps/rejected"]] for entry in logged],
    }


def pairs_stage(folder: Path, *, prompts: Path, on_playground: bool, seed: int) -> dict[str, Any]:
    """Preferences that were not sampled from the model: the dataset's, or on the playground answers of the task."""
    rows = read_jsonl(prompts)
    if on_playground:
        from .playground import preference_rows

        rows = preference_rows(rows, seed)
    columns = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "chosen_is_cut", "rejected_is_cut",
               *CARRIED_COLUMNS)  # fmt: skip
    write_jsonl(folder / "pairs.jsonl", [{key: row[key] for key in columns if key in row} for row in rows])
    return {"num_rows": len(rows)}


def sample_rank_stage(folder: Path, *, ranked: Path) -> dict[str, Any]:
    """Scored answers without the dataset's `reference`: the best of them is the target of SLiC-HF's regulariser."""
    rows = [{key: value for key, value in row.items() if key != "reference"} for row in read_jsonl(ranked)]
    write_jsonl(folder / "ranked.jsonl", rows)
    return {"num_rows": len(rows)}


def near_stage(folder: Path, *, ranked: Path, positive_above: float, seed: int) -> dict[str, Any]:
    """CLICK's pairs of scored answers."""
    rows = read_jsonl(ranked)
    # one pair to a prompt, as every method has one row to a prompt
    pairs, report = pair_rows(rows, "likelihood_near", seed, max_pairs_per_prompt=1, positive_above=positive_above)
    PartialState().print(str(report))
    if not pairs:
        raise ValueError(
            f"No prompt has answers with rewards above and below click_threshold={positive_above}. Set it between the "
            "rewards that answers get."
        )
    write_jsonl(folder / "pairs.jsonl", pairs)
    return {"num_pairs": len(pairs)}


def looks_stage(
    folder: Path, *, model: Path, prompts: Path, steps: list[int], num_prompts: int, **evaluation: Any
) -> dict[str, Any]:
    """Reward and KL of the checkpoints of a training, on some of the held-out prompts."""
    asked = folder / "prompts.jsonl"
    write_jsonl(asked, read_jsonl(prompts)[:num_prompts])
    PartialState().wait_for_everyone()
    figures = {}
    for step in steps:
        (folder / str(step)).mkdir(exist_ok=True)
        found = evaluation_stage(folder / str(step), model=model / f"checkpoint-{step}", prompts=asked, **evaluation)
        figures[str(step)] = {"reward": found["reward"], "kl": found["kl"]}
    return figures


def has_failed(comparison: ComparisonResults) -> bool:
    """Whether a method is among the results that failed."""
    return any(result.status == "failed" for result in comparison.results)
