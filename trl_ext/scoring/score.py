"""Scoring: candidates in, the same with scores out.

A candidate row is what [`~trl_ext.sampling.candidates.sample_candidates`] gives: `prompt` (text or messages),
`completions` (K texts or lists of messages), and whatever other columns the prompts came with, such as `answer`.
Optional, with one entry per candidate: `logps` (log-likelihood under the sampler in nats, summed over tokens; `None`
where it is not known), `num_tokens` and `sources`.

    rows = score_rows(rows, build_scorers(["rewards.py:is_right"]))

A scorer is a reward function or a reward model, which look at one completion at a time, or a judge, who compares two.

Nothing here depends on the order of the rows, on how they are batched, or on the number of processes: whatever is
drawn at random is drawn from the seed and the row itself.

Paper: SLiC-HF (https://huggingface.co/papers/2305.10425) for the tournament of a pairwise judge."""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.columns import as_given
from ..runtime.files import read_sealed, sealed, write_atomically
from ..runtime.processes import all_gather_objects, barrier_without_timeout, process_state
from .build import _check_weights
from .candidate_rows import _check_row, _check_rows
from .functions import Scorer, ScoringError, _belongs_to_prompt
from .models import _check_batch_size
from .tournament import PairwiseScorer, tournament_scores

logger = logging.getLogger(__name__)


def combine(values: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[float]:
    """
    The weighted sum of several scorers' values for the completions of one row. `None` counts as 0, as in TRL.

    Args:
        values (`Sequence`): for each scorer, a value or `None` for each of the K completions.
        weights (`Sequence[float]`): one per scorer.

    Returns:
        `list[float]`: K scores.

    Raises:
        ScoringError: a completion for which every scorer gave `None`.
    """
    scores = []
    for index, column in enumerate(zip(*values, strict=True)):
        if all(value is None for value in column):
            raise ScoringError(
                "Scoring", 0, index,
                "one of the reward functions must return a number, got None from each. Change one, or remove the row.",
            )  # fmt: skip
        scores.append(
            math.fsum(weight * value for weight, value in zip(weights, column, strict=True) if value is not None)
        )
    return scores


def score_rows(
    rows: Sequence[Mapping[str, Any]],
    scorers: Sequence[Scorer],
    weights: Sequence[float] | None = None,
    *,
    batch_size: int = 64,
    folder: str | Path | None = None,
    desc: str = "Scoring",
) -> list[dict[str, Any]]:
    """
    Score the candidates of all rows, split over the processes of the run.

    Batches of rows go to the processes in turn. They are the same batches for any number of processes, so the result
    is the same to the last digit.

    With a `folder`, each batch is kept there once it is scored: when a later one fails, the same call goes on with
    what is left, with any number of processes. Other rows, scorers or batches begin anew, in another subfolder; other
    weights do not. If the file of a reward function has changed, a finished scoring begins anew, and an unfinished one
    goes on with a warning: it may be that the function was mended, and what it had scored was paid for.

    What scorers count (texts cut, games decided by a coin) is summed over the processes, kept in their `counts`, and
    logged.

    Args:
        rows (`Sequence[dict]`): candidate rows, the same on all processes. They are left as they are.
        scorers (`Sequence[Scorer]`): one or several; their names must differ.
        weights (`Sequence[float]`, *optional*): of the scorers; by default 1 each.
        batch_size (`int`, defaults to 64): rows a scorer sees at a time.
        folder (`str` or `Path`, *optional*): where scores are kept on the way; all processes must see it.
        desc (`str`): of the progress bar.

    Returns:
        `list[dict]`: the rows in their order with `scores`, the weighted sum ([`combine`]). With several scorers also
        `rewards/<name>`, each one's own values or `None`. With a [`PairwiseScorer`] alone also `games`, as
        [`~PairwiseScorer.play`] gives them; in a sum with others its games no longer tell who scores higher. The same
        on all processes.

    Raises:
        ValueError: unusable rows, scorers or weights, or a completion without a score ([`ScoringError`]).
        RuntimeError: a function raised, here (the cause is chained) or on another process.
    """
    rows, names = [as_given(row) for row in rows], [scorer.name for scorer in scorers]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`scorers` must be one or more with different names, got {names}.")
    judges = [scorer.name for scorer in scorers if isinstance(scorer, PairwiseScorer)]
    weights = _check_weights(weights, names, judges)
    _check_batch_size(batch_size)
    _check_rows(rows, _check_row)
    state = process_state()
    starts = range(0, len(rows), batch_size)
    files, scored = {}, {}
    if folder is not None:
        place = _open_scores(Path(folder), rows, scorers, batch_size)
        files = {start: _scores_file(place, number) for number, start in enumerate(starts)}
        scored = {start: _read_scores(file, place, start) for start, file in files.items() if file.exists()}
        state.wait_for_everyone()  # all processes have looked before one of them finishes a batch
    unfinished = [start for start in starts if start not in scored]
    counts_before = [Counter(getattr(scorer, "counts", {})) for scorer in scorers]
    done: list[tuple[int, dict]] = []
    failure = None
    try:
        for start in tqdm(
            unfinished[state.process_index :: state.num_processes],
            desc=desc,
            disable=not state.is_main_process,
            leave=False,
        ):
            done.append((start, _score_batch(rows[start : start + batch_size], start, scorers, weights)))
            if start in files:
                batch = json.loads(json.dumps(done[-1][1], default=float))
                write_atomically(files[start], sealed({"of": [place.name, start], **batch}))
    except Exception as error:  # the other processes wait for us below
        failure = error
    message = None if failure is None else f"process {state.process_index}, {type(failure).__name__}: {failure}"
    barrier_without_timeout()
    everything = all_gather_objects((done, message))
    if failure is not None:
        if folder is not None:
            failure.add_note(f"What was scored before is kept in {place}. The same call resumes from there.")
        raise failure
    for _, message in everything:
        if message is not None:
            raise RuntimeError(f"Scoring failed on another process ({message})")

    scored |= {start: batch for parts, _ in everything for start, batch in parts}
    for index, scorer in enumerate(scorers):
        total = sum((Counter(scored[start]["counts"][index]) for start in starts), Counter())
        if total:
            scorer.counts.clear()
            scorer.counts.update(counts_before[index] + total)
            if state.is_main_process:
                said = ", ".join(f"{count} {what}" for what, count in total.items())
                # the first counts what was done, any other what went wrong on the way
                logger.log(logging.WARNING if len(total) > 1 else logging.INFO, f"{scorer.name}: {said}")
    result = []
    for start in starts:
        values, games = scored[start]["values"], scored[start]["games"]
        for index, row in enumerate(rows[start : start + batch_size]):
            kept = {k: v for k, v in row.items() if k not in ("scores", "games") and not k.startswith("rewards/")}
            of_row = [column[index] for column in values]
            result.append({**kept, "scores": combine(of_row, weights)})
            if len(scorers) > 1:
                result[-1] |= {f"rewards/{name}": value for name, value in zip(names, of_row, strict=True)}
            elif games is not None:
                result[-1]["games"] = games[index]
    return result


def _score_batch(
    rows: list[Mapping[str, Any]], start: int, scorers: Sequence[Scorer], weights: list[float]
) -> dict[str, Any]:
    """Values of each scorer for each row, the last judge's games, and what each scorer counted; in JSON's types."""
    games, values = None, []
    before = [Counter(getattr(scorer, "counts", {})) for scorer in scorers]
    try:
        for scorer in scorers:
            if isinstance(scorer, PairwiseScorer):
                games = scorer.play(rows)
                values.append([tournament_scores(row, played) for row, played in zip(rows, games, strict=True)])
            else:
                values.append(scorer(rows))
        for index, of_row in enumerate(zip(*values, strict=True)):
            try:
                combine(of_row, weights)
            except ScoringError as error:
                error.row = index
                raise
    except ScoringError as error:
        error.prompt = rows[error.row]["prompt"]
        error.row += start
        raise
    except Exception as error:
        error.add_note(f"Rows {start} to {start + len(rows) - 1} were being scored.")
        raise
    counts = [Counter(getattr(scorer, "counts", {})) - b for scorer, b in zip(scorers, before, strict=True)]
    return {"values": values, "games": games, "counts": [dict(count) for count in counts]}


def _open_scores(folder: Path, rows: list, scorers: Sequence[Scorer], batch_size: int) -> Path:
    """The subfolder for the scores of these rows by these scorers; the same on all processes."""
    state, place = process_state(), None
    if state.is_main_process:
        of_completions = ("prompt", "completions", "completion_ids", "ends")
        said_to_scorers = [
            {k: v for k, v in row.items() if k in of_completions or _belongs_to_prompt(k)} for row in rows
        ]
        who = [
            [type(scorer).__name__, scorer.name, *(getattr(scorer, key, None) for key in ("spec", "identity"))]
            for scorer in scorers
        ]
        identity = json.dumps([said_to_scorers, who, batch_size], sort_keys=True, default=str)
        place = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        code, file = [getattr(scorer, "code", None) for scorer in scorers], place / "code.json"
        if file.exists() and file.read_text() != json.dumps(code):
            numbers = range(math.ceil(len(rows) / batch_size))
            kept = [_scores_file(place, number) for number in numbers if _scores_file(place, number).exists()]
            if len(kept) == len(numbers):
                logger.info(f"A reward function has changed since {place} was made: scoring again.")
                for portion in kept:
                    portion.unlink()
            elif kept:
                logger.warning(
                    f"A reward function has changed. What it had scored before is kept, {len(kept)} of {len(numbers)} "
                    f"portions in {place}; remove that folder to score everything again."
                )
        write_atomically(file, json.dumps(code))
    return all_gather_objects(place)[0]  # the main process's


def _read_scores(file: Path, place: Path, start: int) -> dict[str, Any]:
    try:
        batch = read_sealed(file, {"of": list, "values": list, "counts": list})
        if batch["of"] != [place.name, start]:
            raise ValueError(f"{file} holds the scores of other rows.")
    except ValueError as error:
        raise ValueError(f"{error} Restore it, or remove it to score its rows again.") from None
    return batch


def _scores_file(place: Path, number: int) -> Path:
    return place / f"{number:05d}.json"
