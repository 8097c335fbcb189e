"""All methods of a comparison on one seed."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from ..cli.options import recipe_dataclasses
from ..cli.parse import parse_recipe_args
from ..cli.start import start_rounds
from ..data.messages import as_text
from ..data.rows import RowOptions
from ..methods.spin.pairs import generate_stage
from ..runs.rounds import Rounds, replaced
from ..runs.settings import is_playground, unset_value
from ..runs.stages import merged_model
from ..runtime.headings import Headings, count
from ..runtime.jsonl import read_jsonl
from ..runtime.settings import changes, did_you_mean
from ..sampling.config import NEUTRAL
from .arguments import _options, check_shared, shared_settings
from .config import IDLE, ComparisonConfig
from .measures import FinishedRun, measured
from .methods import METHODS, Method
from .results import ComparisonResults, MethodResult
from .stages import NAMED, checkpoint_evals_stage, likelihood_near_stage, pairs_stage, sample_rank_stage, train_stage

NUM_EXAMPLES = 6


def _prompts_per_update(config: ComparisonConfig) -> int:
    processes = PartialState().num_processes
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * processes


class SeedRun:
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
            raise ValueError(
                f"{', '.join(idle)} must not be set in a comparison. Remove {'it' if len(idle) == 1 else 'them'}."
            )
        if "rrhf_two_rounds" in self.methods and sampling.num_candidates < 4:
            raise ValueError(
                f"`num_candidates` must be at least 4 for RRHF in two rounds, got {sampling.num_candidates}: each "
                "round ranks half of them. Set it to 4 or more, or choose other `--methods`."
            )
        self.models_resident = {}
        every = {"sft": METHODS["sft"], **self.methods, "reward_model": REWARD_MODEL}
        for name, method in every.items():  # before anything is begun
            read = self._check(name, method)
            self.models_resident[name] = "–" if read is None else models_resident(method.recipe, read)
            if read is not None and config.num_checkpoints and read[2].use_peft:
                raise ValueError(
                    f"`num_checkpoints` must be 0 with `use_peft`, got {config.num_checkpoints} for {name}: "
                    "checkpoints of adapters are not evaluated. Remove one of them."
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
                    f"The dataset must have a column `{method.needs}` for {name!r} of `methods`, got "
                    f"{sorted(columns)}. Add the column, or remove the method."
                )
            PartialState().print(f"{method.label} is skipped: the dataset has no column `{method.needs}`.")
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
            rounds.run.stage(
                "near", likelihood_near_stage, inputs={"ranked": ranked}, positive_above=above, seed=self.seed
            )
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
            values |= {"num_generations": answers, "max_completion_length": self.sampling.max_new_tokens}
            values |= {name: getattr(self.sampling, name) for name in NEUTRAL}
        if method.recipe == "reward":  # RLOO cannot score with an adapter, and looks at it when it is trained
            values |= {"use_peft": False, "save_strategy": "no"}
            values.pop("save_steps", None)
        given = {*config.settings.get(name, {}), *config.settings.get(self._made_of(name), {})} - {"method", "label"}
        unknown = sorted(given - options)
        if unknown:
            raise ValueError(
                f"Unknown options {', '.join(f'`{option}`' for option in unknown)} in `settings` of {name!r}. "
                + did_you_mean(unknown[0], options, otherwise="Remove them.")
            )
        return {key: value for key, value in values.items() if key in options}

    def _made_of(self, name: str) -> str:
        return self.config.settings.get(name, {}).get("method", name)

    def _check(self, name: str, method: Method) -> tuple[Any, ...] | None:
        """What the recipe reads of its options, before anything is begun; nothing where nothing is trained."""
        if method.recipe is None:
            if self.config.settings.get(name):
                raise ValueError(f"`settings` of {name!r} must be empty, as it is not trained. Remove them.")
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
        self._refuse_other_options(name, method, values)
        return self.rounds.run.stage(
            f"{name}/model",
            train_stage,
            title=f"training, {count(options['updates'], 'update')}{self.rounds.of(name)}",
            inputs={"model": Path(model), "data": data},
            shards_models=True,
            recipe=self.recipes / f"{method.recipe}.py",
            values=values,
        )

    def _refuse_other_options(self, name: str, method: Method, values: dict[str, Any]) -> None:
        """What is trained stays as it is: other options would not reach it."""
        folder = self.rounds.run.path(name, "model")
        if not (folder / "manifest.json").is_file():
            return
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        read = self._check(name.partition("/")[0], method)
        changed = changes(before, values, lambda key: NEUTRAL.get(key, unset_value(read, key)), apart_from=NAMED)
        if changed:
            raise ValueError(
                f"{name} must have the options that it was trained with: {changed}. Set them back, or remove "
                f"{folder.parent} to train it again."
            )

    def _reward_model(self) -> Path:
        """A reward model of the candidates, for RLOO."""
        rounds, updates = self.rounds, self.config.max_steps
        self.train("reward_model", REWARD_MODEL, rounds.model, self._candidates(), updates=updates, answers=1)
        return rounds.run.path("reward_model", "model")

    def _train_in_halves(self, name: str, method: Method) -> tuple[list[dict], Path, int, float]:
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
                PartialState().print(f"{method.label} failed and is skipped: {error}")
            yield result

    def _play(self, name: str, method: Method) -> MethodResult:
        rounds, before = self.rounds, 0.0
        if method.recipe is None:
            trainings, model, sampled, parts, sampling = [], Path(rounds.model), 0, [], math.nan
        elif method.data in ("rounds", "self_play"):
            trainings, model, sampled, sampling = self._train_in_halves(name, method)
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
        evaluation = rounds.evaluate("start" if method.recipe is None else name, model)
        answers = rounds.answers("start" if method.recipe is None else name)
        finished = FinishedRun(answers, evaluation, trainings, sampled, sampling, before, self.models_resident[name])
        scorers = [scorer for scorer in ("reward", "judge") if scorer in answers[0]]
        return MethodResult(
            method=name,
            label=method.label,
            seed=self.seed,
            status="done",
            scores={scorer: [one[scorer] for one in answers] for scorer in scorers},
            measured=measured(finished),
            examples=[
                {"prompt": as_text(one["prompt"]), "answer": as_text(one["answer"]), "reward": one["reward"]}
                for one in answers[:NUM_EXAMPLES]
            ],
            curve=self._curve(parts, trainings),
            notes=[] if method.note is None else [method.note],
            prompts_key=f"seed-{self.seed}",
        )

    def _curve(self, parts: list[str], trainings: list[dict]) -> list[dict[str, Any]]:
        """Log-likelihoods as they were logged, and reward and KL of the checkpoints."""
        points, before = [], 0
        for part, figures in zip(parts, trainings, strict=True):
            steps = {step: {"chosen_logps": chosen, "rejected_logps": rejected}
                     for step, chosen, rejected in figures["logps"]}  # fmt: skip
            for step, found in self._checkpoint_evals(part, figures["updates"]).items():
                steps[step] = steps.get(step, {}) | found
            for step in sorted(steps):
                updates = before + step
                point = {"share": updates / self.config.max_steps, "updates": updates}
                points.append(point | {key: steps[step].get(key) for key in LOOKED_AT})
            before += figures["updates"]
        return points

    def _checkpoint_evals(self, part: str, updates: int) -> dict[int, dict[str, float]]:
        if not self.config.num_checkpoints:
            return {}
        rounds = self.rounds
        steps = [int(path.name.split("-")[1]) for path in rounds.run.path(part, "model").glob("checkpoint-*")]
        steps = sorted(step for step in rounds.run.first_from_any_rank(steps) or [] if step < updates)
        if not steps:
            return {}
        figures = rounds.run.stage(
            f"{part}/looks",
            checkpoint_evals_stage,
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


LOOKED_AT = ("reward", "kl", "chosen_logps", "rejected_logps")


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


def has_failed(comparison: ComparisonResults) -> bool:
    """Whether a method is among the results that failed."""
    return any(result.status == "failed" for result in comparison.results)
