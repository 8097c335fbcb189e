"""The stages of a round: sample, rank, merge, train."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..runtime.jsonl import read_jsonl, write_jsonl
from ..runtime.models import merge_adapter
from ..sampling.candidates import sample_candidates
from ..sampling.config import SamplingConfig
from ..scoring.build import build_scorers
from ..scoring.lists import rank_rows
from ..scoring.pairs import pair_rows
from ..scoring.score import score_rows
from ..scoring.score_report import score_report
from .config import RankingConfig
from .run import Run


def sample_stage(
    folder: Path, *, model: Path, prompts: Path | list[dict], config: SamplingConfig, mix_in: Sequence[str], load: dict
) -> dict[str, Any]:
    """Candidates for every prompt, a list of rows or a file of them: `candidates.jsonl`."""
    rows = prompts if isinstance(prompts, list) else read_jsonl(prompts)
    rows, report = sample_candidates(model, rows, config, folder, mix_in=mix_in, **load)
    _say(report)
    write_jsonl(folder / "candidates.jsonl", [{key: row[key] for key in row if key != "token_ids"} for row in rows])
    return asdict(report)


def rank_stage(
    folder: Path,
    *,
    candidates: Path,
    config: RankingConfig,
    seed: int,
    min_completions: int,
    best_as_reference: bool = False,
) -> dict[str, Any]:
    """Scores: `ranked.jsonl` of prompts with so many answers, and with a `pair_rule` `pairs.jsonl`."""
    names, weights, how = config.rewards or (), config.reward_weights, config.scorer_options()
    scorers = build_scorers(names, weights, judge=config.ranker, seed=seed, **how)
    scored = score_rows(read_jsonl(candidates), scorers, weights, folder=folder / "scores")
    report = score_report(scored)
    _say(report)
    ranked, ranked_report = rank_rows(scored, min_completions=min_completions, best_as_reference=best_as_reference)
    _say(ranked_report)
    write_jsonl(folder / "ranked.jsonl", ranked)
    if config.pair_rule is not None:
        pairs, pair_report = pair_rows(
            scored,
            config.pair_rule,
            seed,
            max_pairs_per_prompt=config.pairs_per_prompt,
            positive_above=config.positive_above,
            best_as_reference=best_as_reference,
        )
        _say(pair_report)
        write_jsonl(folder / "pairs.jsonl", pairs)
    return {
        "reward": report.mean,
        "reward_best": report.mean_of_best,
        "reward_worst": report.mean_of_worst,
        "all_equal": report.all_equal,
        "num_prompts": len(ranked),
    }


def merge_stage(folder: Path, *, adapter: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The adapter's weights added to its base, as an ordinary model."""
    if PartialState().is_main_process:
        merge_adapter(adapter, folder, trust_remote_code=trust_remote_code)
    return {}


def merged_start(run: Run, adapter: str | Path, *, trust_remote_code: bool) -> Path:
    """An adapter that a run starts from, merged into its base in the run's folder."""
    run.stage("start/merged", merge_stage, inputs={"adapter": Path(adapter)}, trust_remote_code=trust_remote_code)
    run.state.print(f"{adapter} is an adapter: the run starts from {run.path('start', 'merged')}, merged of its base")
    return run.path("start", "merged")


def merged_model(run: Run, name: str, *, trust_remote_code: bool) -> Path:
    """What was trained in a run's folder `name`, as an ordinary model: an adapter is merged into its base."""
    trained = run.path(name, "model")
    if not (trained / "adapter_config.json").is_file():
        return trained
    run.stage(f"{name}/merged", merge_stage, inputs={"adapter": trained}, trust_remote_code=trust_remote_code)
    return run.path(name, "merged")


def train_stage(
    folder: Path, *, model: Path, data: Path, train_with: Callable, arguments: list[str]
) -> dict[str, Any]:
    """A recipe's own training, on the stage's model, data and folder."""
    return train_with(arguments, model=str(model), data=str(data), output_dir=str(folder))


def _say(report: Any) -> None:
    PartialState().print(str(report))
