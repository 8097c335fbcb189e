"""The stage that lets a model answer held-out prompts, for rounds, self-play and comparisons alike."""

from collections.abc import Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data.messages import as_text, same_answer
from ..runtime.jsonl import read_jsonl, write_jsonl
from ..sampling.candidates import sample_candidates
from ..sampling.config import NEUTRAL, SamplingConfig
from ..scoring.build import build_scorers
from ..scoring.functions import CANDIDATE_COLUMNS
from ..scoring.score import score_rows
from .evaluation import answer_logps, distinct_n, has_same_tokens, perplexity, score_sampled


def evaluation_stage(
    folder: Path,
    *,
    model: Path,
    prompts: Path,
    config: SamplingConfig,
    load: dict,
    rewards: Sequence[str] = (),
    reward_weights: Sequence[float] | None = None,
    ranker: str | None = None,
    judge: str | None = None,
    scorer_options: dict[str, Any] | None = None,
    first_answers: Path | None = None,
    fixed_model: str | None = None,
    real: str | None = None,
    opponent: Path | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> dict[str, Any]:
    """
    Sample one answer to each held-out prompt, and measure it. `answers.jsonl` has one row for each.

    Whatever the settings, answers are sampled at temperature 1 without filters such as top-p. They are draws from the
    model's own distribution, and so the KL divergence is that of the model.

    Args:
        folder (`Path`): of the stage.
        model (`Path`), prompts (`Path`): who answers, and the file of prompts.
        config ([`SamplingConfig`]): all else about the sampling.
        load (`dict`): keyword arguments with which models are loaded: `model_init_kwargs` and `trust_remote_code`.
        rewards, reward_weights, ranker, judge: as in [`RoundsConfig`]; figures `reward` and `judge`. With a `ranker`
            the reward is 1 where the answer beats that in `first_answers`, 0 where it loses, 0.5 where they are equal.
        scorer_options (`dict`, *optional*): see [`ScorerConfig`].
        first_answers (`Path`, *optional*): `answers.jsonl` of the first model.
        fixed_model (`str`, *optional*): a model that is not trained. Figures: `perplexity` of the answers under it,
            and where both models have the same tokens `kl`, the divergence from it in nats per answer (see
            [`score_sampled`]).
        real (`str`, *optional*): column of the real answers. Figures: `nll` (per token), `real_logp`, `real_length`,
            and `equal`, the share of answers that are the real one.
        opponent (`Path`, *optional*): with `real`, `answers.jsonl` of SPIN's opponent. Figures: `margin` and
            `margin_accuracy`, over prompts where the opponent's answer is not the real one. The margin is h of the
            loss, in nats: how much more likely the model finds the real answer than the opponent does, less the same
            for the opponent's answer.
        batch_size (`int`, defaults to 32): answers per forward.
        max_length (`int`, *optional*): with `real`: where answers are cut, as in training.

    Returns:
        `dict`: those figures as means over answers, `length` (tokens sampled, the end token included), `truncated` (a
        share), `distinct_1`, `distinct_2` (`None` where no answer has so many words), `num_answers` and `num_prompts`.
    """
    asked = [{**row, "_number": number} for number, row in enumerate(read_jsonl(prompts))]
    config = replace(config, num_candidates=1, keep_duplicates=True, **NEUTRAL)
    answered, report = sample_candidates(
        model, asked, config, folder, keep_empty=True, desc="Answering held-out prompts", **load
    )
    answers = [
        {
            "number": row["_number"],
            "prompt": row["prompt"],
            "answer": row["completions"][0],
            "is_cut": row["ends"][0] == "length",
            "num_tokens": len(row["token_ids"][0]),
        }
        for row in answered
    ]
    figures = {}

    def keep(name: str, values: Sequence[float]) -> None:
        for one, value in zip(answers, values, strict=True):
            one[name] = value
        figures[name] = fmean(values)

    options, kept = scorer_options or {}, {"folder": folder / "scores"}
    if ranker is not None:
        keep("reward", _beats(answered, first_answers, ranker, options))
    elif rewards:
        scored = score_rows(answered, build_scorers(rewards, reward_weights, **options), reward_weights, **kept)
        keep("reward", [row["scores"][0] for row in scored])
    if judge is not None:
        keep("judge", [row["scores"][0] for row in score_rows(answered, build_scorers([judge], **options), **kept)])
    loading = {**load["model_init_kwargs"], "trust_remote_code": load["trust_remote_code"], "batch_size": batch_size}
    if fixed_model is not None:
        hub = {"revision": loading.get("revision") or "main", "trust_remote_code": loading["trust_remote_code"]}
        if has_same_tokens(model, fixed_model, **hub):
            found = score_sampled(model, fixed_model, answered, **loading)
            keep("kl", [one.kl for one in found])
            logps = [(one.fixed_logp, answer["num_tokens"]) for one, answer in zip(found, answers, strict=True)]
        else:
            rows = [{**row, "are_cut": [one["is_cut"]]} for row, one in zip(answered, answers, strict=True)]
            logps = [of_row[0] for of_row in answer_logps(fixed_model, rows, **loading)]
        for one, (logp, num_tokens) in zip(answers, logps, strict=True):
            one["fixed_logp"], one["fixed_tokens"] = logp, num_tokens
        figures["perplexity"] = perplexity(logps)
    if real is not None:
        before = None if opponent is None else {one["number"]: one for one in read_jsonl(opponent)}
        figures |= _compare_with_real(answered, answers, real, before, model, {**loading, "max_length": max_length})
    write_jsonl(folder / "answers.jsonl", answers)
    texts = [as_text(one["answer"]) for one in answers]
    distinct = {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}
    return {
        **figures,
        **{name: None if isnan(share) else share for name, share in distinct.items()},
        "length": fmean(one["num_tokens"] for one in answers),
        "truncated": report.truncated,
        "num_answers": len(answers),
        "num_prompts": len(asked),
    }


def _compare_with_real(
    answered: Sequence[dict], answers: Sequence[dict], real: str, before: dict[int, dict] | None, model, loading: dict
) -> dict[str, float]:
    """Add to `answers` how likely the model finds them, the real ones and the opponent's; returns the figures."""
    compared = []
    for row, one in zip(answered, answers, strict=True):
        one["real"], one["equal"] = row[real], same_answer(row[real], one["answer"])
        theirs = [] if before is None else [before[one["number"]]]
        completions = [one["real"], one["answer"], *(then["answer"] for then in theirs)]
        are_cut = [False, one["is_cut"], *(then["is_cut"] for then in theirs)]
        compared.append({**row, "completions": completions, "are_cut": are_cut})
    margins = []
    for one, found in zip(answers, answer_logps(model, compared, **loading), strict=True):
        one["real_logp"], one["real_tokens"] = found[0]
        one["logp"] = found[1][0]
        if before is not None:
            then = before[one["number"]]
            one["margin"] = (one["real_logp"] - then["real_logp"]) - (found[2][0] - then["logp"])
            if not then["equal"]:  # as in training, where answers equal to the real one make no pair
                margins.append(one["margin"])
    figures = {
        "nll": -sum(one["real_logp"] for one in answers) / sum(one["real_tokens"] for one in answers),
        "real_logp": fmean(one["real_logp"] for one in answers),
        "equal": fmean(one["equal"] for one in answers),
        "real_length": fmean(one["real_tokens"] for one in answers),
    }
    if margins:
        figures["margin"] = fmean(margins)
        figures["margin_accuracy"] = fmean(margin > 0 for margin in margins)
    return figures


def _beats(answered: Sequence[dict], first_answers: Path | None, ranker: str, options: dict[str, Any]) -> list[float]:
    """1 where the answer beats the first model's, 0 where it loses, 0.5 where they are equal."""
    if first_answers is None:
        return [0.5] * len(answered)
    first = {one["number"]: one["answer"] for one in read_jsonl(first_answers)}
    met = [
        {
            **{key: value for key, value in row.items() if key not in CANDIDATE_COLUMNS},
            "completions": [row["completions"][0], first[row["_number"]]],
        }
        for row in answered
        if row["_number"] in first and first[row["_number"]] != row["completions"][0]
    ]
    played = {}
    if met:
        for row in score_rows(met, build_scorers(judge=ranker, **options)):
            played[row["_number"]] = float(row["scores"][0] > row["scores"][1])
    return [played.get(row["_number"], 0.5) for row in answered]
