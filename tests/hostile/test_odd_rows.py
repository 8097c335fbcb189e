"""Rows, settings, config files and manifests that nobody in their right mind would write.

Whatever comes in, it works, and what was left out is counted, or it is refused by an exception that a caller can
expect, with a message that names what is wrong. The default run has some hundred cases, `-m slow` thousands."""

import contextlib
import io
import json
import math

import pytest
from datasets import Dataset
from hypothesis import assume, example, given
from hypothesis import strategies as st
from trl import DatasetMixtureConfig, ScriptArguments

from tests.support.odd import NESTED, NUMBERS, SCALARS, TEXT, cases, more_or_less, refused
from trl_ext import SPINConfig
from trl_ext.data.limits import Limits
from trl_ext.data.load import load_prompts
from trl_ext.data.prepare import prepare_dataset, prepare_row
from trl_ext.data.prompts import check_prompts
from trl_ext.data.row_error import RowError
from trl_ext.data.rows import RowOptions, parse_row
from trl_ext.methods.spin.rows import sft_rows
from trl_ext.scoring.functions import FunctionScorer
from trl_ext.scoring.lists import rank_rows
from trl_ext.scoring.pairs import PAIR_RULES, pair_rows
from trl_ext.scoring.score import score_rows
from trl_ext.scoring.score_report import score_report

pytestmark = pytest.mark.usefixtures("no_cache")

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | TEXT, "content": TEXT | NESTED},
        optional={"tool_calls": NESTED, "name": SCALARS},
    ),
    max_size=3,
)
SOUND = st.text("abc ", min_size=1, max_size=8)
SAID = st.one_of(SOUND, SOUND, TEXT, MESSAGES, NESTED)
COLUMNS = [
    "prompt", "chosen", "rejected", "completions", "scores", "reference", "score_chosen", "score_rejected", "tools",
    "chat_template_kwargs", "rejected_is_cut",
]  # fmt: skip
SOUND_ROWS = st.fixed_dictionaries({"prompt": SOUND, "chosen": st.just("b"), "rejected": SOUND})
ODD_ROWS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": SAID,
        "chosen": SAID,
        "rejected": SAID,
        "completions": st.lists(SAID, max_size=4) | NESTED,
        "scores": st.lists(NUMBERS, max_size=4) | NESTED,
        "reference": SAID,
        "score_chosen": SCALARS,
        "score_rejected": SCALARS,
        "tools": NESTED,
        "chat_template_kwargs": NESTED | st.sampled_from([{"chat_template": "x"}, {"tokenize": False}]),
        "rejected_is_cut": SCALARS,
    },
)
# one that is sound, but for a column or two; or nonsense throughout
ROWS = st.one_of(ODD_ROWS, st.builds(lambda row, odd, keys: {**row, **{k: odd[k] for k in sorted(odd) if k in keys}},
                                     SOUND_ROWS, ODD_ROWS, st.sets(st.sampled_from(COLUMNS), max_size=2)))  # fmt: skip
LISTS = st.integers(0, 4).flatmap(
    lambda k: st.fixed_dictionaries(
        {
            "prompt": SOUND | SAID,
            "completions": st.lists(SOUND, min_size=k, max_size=k) | st.lists(SAID, min_size=k, max_size=k),
            "scores": st.one_of(
                *2 * [st.lists(st.integers(0, 3), min_size=k, max_size=k)],
                st.lists(NUMBERS, min_size=k, max_size=k),
                NESTED,
            ),  # fmt: skip
        },
        optional={
            "logps": st.lists(st.none() | NUMBERS, min_size=k, max_size=k) | NESTED,
            "num_tokens": NESTED,
            "games": st.lists(st.lists(st.integers(-1, 5), max_size=3), max_size=3) | NESTED,
            "sources": NESTED,
        },
    )
)
OPTIONS = st.builds(
    RowOptions,
    min_completions=st.integers(1, 3),
    score_values=st.booleans(),
    score_columns=st.booleans(),
    reference=st.booleans(),
    best_only=st.booleans(),
    max_length=st.none() | st.integers(1, 40),
    eos_token=st.sampled_from([None, "<|im_end|>"]),
)


@more_or_less(150, 4000)
def test_a_row_is_read_or_refused_by_column(number, tokenizer):
    seen = set()

    @cases(number)
    @given(ROWS, OPTIONS)
    def check(row, options):
        try:
            prepared = prepare_row(row, tokenizer, options)
        except RowError as error:
            seen.add(error.problem)
            assert repr(error.column) in str(error) and len(str(error)) < 2000
            return
        seen.add("usable")
        assert prepared["prompt_ids"] is not None and all(prepared["completion_ids"])
        assert all(math.isfinite(score) for score in prepared["scores"])
        parse_row(row, options)

    check()
    assert "usable" in seen and len(seen) > 4, "the rows are not only nonsense, and not of one kind"


def as_table(rows):
    """A dataset, where Arrow can hold the rows."""
    try:
        return Dataset.from_list([json.loads(json.dumps(row)) for row in rows])
    except Exception:
        assume(False)


@more_or_less(25, 400)
def test_no_row_of_a_dataset_is_lost_silently(number, tokenizer):
    seen = []
    sound = {"prompt": "a", "chosen": "b", "rejected": "c"}

    @cases(number)
    @given(st.lists(ROWS, min_size=1, max_size=4), st.booleans(), OPTIONS)
    @example([{"tools": {"": None, "\x00": None}}], True, RowOptions(min_completions=1))
    def check(rows, with_sound, options):
        table = as_table([{**sound, **row} if with_sound else row for row in rows])
        with refused("row ", "column", "dataset must have rows") as errors:
            prepared, report = prepare_dataset(table, tokenizer, options, name="train", on_invalid_row="drop")
            assert report.num_rows == len(table) == len(prepared) + sum(report.dropped.values())
            seen.append(len(prepared))
        with refused("row ", "column", "dataset must have rows") as again:
            prepared, report = prepare_dataset(table, tokenizer, options, name="train", on_invalid_row="error")
            assert len(prepared) == len(table) and not report.dropped
        assert not errors or again, "what is refused although rows may be dropped is refused in any case"

    check()
    assert sum(seen) > 1


@more_or_less(8, 80)
def test_prompts_from_a_file_are_read_or_refused(number, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    counter, read = iter(range(10**6)), []

    @cases(number)
    @given(st.lists(ROWS, min_size=1, max_size=3), st.booleans())
    def check(rows, with_prompt):
        rows = [{**row, **({"prompt": "a"} if with_prompt else {})} for row in rows]
        file = tmp_path / f"{next(counter)}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with refused(
            "Row ", "must have a column", "cannot be read", "must hold one JSON object", "must hold rows"
        ) as errors:
            loaded = load_prompts(ScriptArguments(str(file)), DatasetMixtureConfig())
            assert len(loaded) == len(rows) and all("prompt" in row for row in loaded)
        read.append(not errors)

    check()


@more_or_less(25, 300)
def test_rows_of_sft_are_read_or_refused(number, tokenizer):
    kept = []

    @cases(number)
    @given(
        st.lists(
            st.fixed_dictionaries(
                {}, optional={"prompt": SAID, "completion": SAID, "messages": MESSAGES | NESTED, "tools": NESTED}
            ),
            min_size=1,
            max_size=3,
        ),
        st.booleans(),
        st.sampled_from(["error", "drop"]),
    )
    def check(rows, with_sound, on_invalid_row):
        rows = [{"prompt": "a", "completion": "b"}, *rows] if with_sound else rows
        table = as_table(rows)
        config = SPINConfig("out", on_invalid_row=on_invalid_row, max_length=60, max_new_tokens=4)
        with refused("row ", "Row ", "columns"), contextlib.redirect_stdout(io.StringIO()) as said:
            limits = Limits(tokenizer.name_or_path, config)
            limits.made_for = 64
            found = sft_rows(table, tokenizer, config, limits, "train")
            kept.append(len(found))
            assert len(found) == len(table) or f"{len(table) - len(found)} dropped" in said.getvalue()
            assert on_invalid_row == "drop" or len(found) == len(table)
            json.dumps(found)

    check()
    assert sum(kept) > 1


@more_or_less(60, 1000)
def test_prompts_are_checked_before_anything_is_sampled(number, tokenizer):
    taken = []

    @cases(number)
    @given(st.lists(ROWS, min_size=1, max_size=3), st.sampled_from(["error", "drop"]))
    def check(rows, on_invalid_row):
        rows = [{**row, "prompt": row.get("prompt", "a")} for row in rows]
        with refused("row ", "Row "), contextlib.redirect_stdout(io.StringIO()) as said:
            usable = check_prompts(rows, tokenizer, RowOptions(max_length=50), (), on_invalid_row)
            assert len(usable) == len(rows) or (on_invalid_row == "drop" and "dropped" in said.getvalue())
            taken.append(len(usable))

    check()
    assert sum(taken)


@more_or_less(60, 1000)
def test_scored_lists_are_ranked_or_refused(number):
    made = []

    @cases(number)
    @given(st.lists(LISTS, min_size=1, max_size=3), st.sampled_from(PAIR_RULES))
    @example([{"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 0.0]}], "all")  # chance may bring none
    def check(rows, rule):
        with refused("Row ", "rows"):
            report = score_report(rows)
            assert math.isfinite(report.mean) and str(report)
        with refused("Row ", "rows"):
            ranked, report = rank_rows(rows)
            assert len(ranked) + sum(report.dropped.values()) == len(rows)
        with refused("Row ", "rows"):
            pairs, report = pair_rows(rows, rule)
            assert report.num_used + sum(report.dropped.values()) == len(rows)
            assert all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
            made.append(len(pairs))

    check()
    assert sum(made)


@more_or_less(40, 500)
def test_rewards_of_any_kind_are_scores_or_refused(number):
    taken = []

    @cases(number)
    @given(st.lists(LISTS, min_size=1, max_size=3), st.lists(SCALARS | NESTED, min_size=1, max_size=5))
    def check(rows, values):
        def reward(completions, **kwargs):
            return [values[index % len(values)] for index in range(len(completions))]

        with refused("row ", "Row ", "completion", "reward"):
            scored = score_rows(rows, [FunctionScorer(reward)])
            assert len(scored) == len(rows)
            assert all(math.isfinite(score) for row in scored for score in row["scores"])
            taken.append(len(scored))

    check()
    assert sum(taken)
