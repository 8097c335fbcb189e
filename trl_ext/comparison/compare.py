"""All methods on the same data, with the same budget, side by side.

Each seed is a run of stages (see `runs/run.py`), so a comparison goes on where it was interrupted, and a method that
fails does not take the others with it.

    OUTPUT_DIR/
      seed-1/run.json               settings it was begun with
      seed-1/prompts/               to train on, and held out
      seed-1/sft/                   on the playground: the model that all start from
      seed-1/candidates/            answers of that model, and the same with scores: what most methods train on
      seed-1/METHOD/model/          the trained model, and config.yaml, with which its recipe trained it
      seed-1/METHOD/evaluation/     how it answers the held-out prompts
      comparison.json               every figure
      comparison.csv, .md, .html    the report, see `comparison/page.py`"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..runs.manifest import without_secrets
from ..runs.next_commands import after_comparison, print_next
from ..runs.run import all_processes
from ..runs.settings import is_playground
from ..runtime.checkpoints import wants_to_resume
from ..runtime.headings import Headings
from ..runtime.run_lock import hold_folder
from .config import ComparisonConfig
from .methods import METHODS, refuse_equal_labels
from .page import write_report
from .results import ComparisonResults, MethodResult
from .seed_run import SeedRun, _prompts_per_update

# options of sampling that change the speed alone, or are the seed's
NOT_RECORDED = ("sampling_batch_size", "vllm_python", "sampling_seed")


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
            game = SeedRun(parsed, recipes, seed, given, headings)
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
        raise ValueError(f"The results in {file} stay in the report: {error}") from None
    return earlier


def _results(parsed: Sequence[Any], num_held_out: int, results: list[MethodResult]) -> ComparisonResults:
    _, config, model_args, _, sampling, ranking = parsed
    settings = {
        "data": "the playground" if is_playground(*parsed) else parsed[0].dataset_name,
        "model": model_args.model_name_or_path or "trained on the playground",
        "rewards": ranking.rewards or [ranking.ranker],
        "judge": ranking.judge,
        **{name: value for name, value in dataclasses.asdict(sampling).items() if name not in NOT_RECORDED},
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
        "Answers to held-out prompts are sampled at temperature 1 without filters such as top-p, whatever the "
        "candidates were sampled with. KL is that from the SFT model: the divergence of the next-token distributions, "
        "added up over the tokens of an answer, as a mean over answers.",
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
