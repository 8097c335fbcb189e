"""
Rows, settings, config files and manifests that nobody in their right mind would write.

Whatever comes in, it works, and what was left out is counted, or it is refused by an exception that a caller can
expect, with a message that names what is wrong. The default run has some hundred cases, `-m slow` thousands.
"""

import contextlib
import io
import json
import math
import pickle
import shutil
from dataclasses import fields, is_dataclass

import pytest
import yaml
from datasets import Dataset, disable_caching, enable_caching
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments

from tests.support.data import REPOSITORY
from tests.support.stage_functions import look_around
from trl_ext import CLICKConfig, RRHFConfig, SLiCConfig, SPINConfig
from trl_ext.cli.help import recipe_dataclasses
from trl_ext.cli.parse import parse_recipe_args
from trl_ext.cli.sample_and_rank_config import SampleAndRankConfig
from trl_ext.comparison.arguments import parse_comparison_args
from trl_ext.comparison.config import ComparisonConfig
from trl_ext.data.limits import Limits
from trl_ext.data.load import load_prompts
from trl_ext.data.prepare import prepare_dataset, prepare_row
from trl_ext.data.prompts import check_prompts
from trl_ext.data.row_error import RowError
from trl_ext.data.rows import RowOptions, parse_row
from trl_ext.methods.best_of_n.config import BestOfNConfig
from trl_ext.methods.ipo.config import IPOConfig
from trl_ext.methods.kto.config import KTOConfig
from trl_ext.methods.orpo.config import ORPOConfig
from trl_ext.methods.reward.config import RewardConfig
from trl_ext.methods.rloo.config import RLOOConfig
from trl_ext.methods.spin.rows import sft_rows
from trl_ext.runs.config import RankingConfig, RoundsConfig
from trl_ext.runs.run import Run
from trl_ext.sampling.config import SamplingConfig
from trl_ext.scoring.functions import FunctionScorer
from trl_ext.scoring.lists import rank_rows
from trl_ext.scoring.pairs import PAIR_RULES, pair_rows
from trl_ext.scoring.score import score_rows
from trl_ext.scoring.score_report import score_report

EXPECTED = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotImplementedError, RuntimeError, ImportError)
# kinds of these that say nothing to somebody who has only made a mistake
BARE = (UnicodeError, RecursionError, json.JSONDecodeError, pickle.PickleError)


def cases(number):
    """So many cases by default; the same property with more of them is a slow test."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )


@contextlib.contextmanager
def refused(*names):
    """Lets exceptions through that are expected and name one of `names`; yields a list that is filled if one came."""
    found = []
    try:
        yield found
    except EXPECTED as error:
        assert not isinstance(error, BARE), f"{type(error).__name__}: {error}"
        message = str(error)
        assert len(message) > 15, repr(error)
        assert not names or any(str(name) in message for name in names), f"{names} not in: {message}"
        found.append(error)


TEXT = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(exclude_categories=()), max_size=6),  # with surrogates
    st.sampled_from(["", " ", "\x00", "\ud800", "a\u2028b", "<|im_end|>", "{{ x }}", "{%", "x" * 3000, "NaN", "null"]),
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([0, 1.5, math.nan, math.inf, -math.inf, 10**400, -(10**30), 1e39, True, False]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
NESTED = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


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


@pytest.fixture(scope="module", autouse=True)
def no_cache():
    disable_caching()
    yield
    enable_caching()


def more_or_less(default, thousands):
    """Parametrises a test with the number of cases: `default` ones, and `thousands` in the slow suite."""
    return pytest.mark.parametrize("number", [default, pytest.param(thousands, marks=pytest.mark.slow)])


# Rows


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
        with refused("row ", "column", "dataset has no rows") as errors:
            prepared, report = prepare_dataset(table, tokenizer, options, name="train", on_invalid_row="drop")
            assert report.num_rows == len(table) == len(prepared) + sum(report.dropped.values())
            seen.append(len(prepared))
        with refused("row ", "column", "dataset has no rows") as again:
            prepared, report = prepare_dataset(table, tokenizer, options, name="train", on_invalid_row="error")
            assert len(prepared) == len(table) and not report.dropped
        assert not errors or again, "what nothing can be made of is an error in any case"

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
        with refused("Row ", "columns", "cannot be read", "must hold one JSON object", "must hold rows") as errors:
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


# Settings

CONFIGS = (
    SLiCConfig, RRHFConfig, CLICKConfig, SPINConfig, IPOConfig, ORPOConfig, BestOfNConfig, KTOConfig, RewardConfig,
    RLOOConfig, ComparisonConfig, SampleAndRankConfig, SamplingConfig, RankingConfig, RoundsConfig,
)  # fmt: skip
OWN = {
    config: [entry.name for entry in fields(config) if entry.init and entry.name != "output_dir"] for config in CONFIGS
}
OF_DPO = {entry.name for entry in fields(DPOConfig)}
VALUES = st.one_of(
    NUMBERS, SCALARS, NESTED, st.lists(TEXT, max_size=2), st.sampled_from(["true", "auto", "none", "{"])
)


ODD_VALUES = (
    None, True, 0, -1, 1.5, math.nan, math.inf, 10**400, -(10**400), "", "'", "\t", "None", "auto", "true", "1e400",
    "a\x00b", "\ud800", "a\u2028b", "{", "{}", "{%", "[1", "~nobody/x", "x" * 3000, "x" * 300 + "/y", b"x", {1.5}, [],
    [None], [[1]], ["x" * 3000], ["\ud800"], {}, {"a": "x" * 3000}, {"x" * 3000: 1}, {"a": {"b": [None]}},
)  # fmt: skip


OF_EACH_KIND = (
    None, True, -1, 1.5, math.nan, 10**400, "", "auto", "a\x00b", "\ud800", "{", "[1", "x" * 3000, b"x", {1.5}, [None],
    {"a": {"b": [None]}},
)  # fmt: skip


def make(config, values):
    if config in (RankingConfig, SampleAndRankConfig):
        config(**{"rewards": ["a:b"], **values}).check()
    else:
        config(**{"output_dir": "out"} if "output_dir" in {entry.name for entry in fields(config)} else {}, **values)


def theirs(config):
    """Settings that TRL and transformers define."""
    parts = [part for part in config.__mro__ if is_dataclass(part) and not part.__module__.startswith("trl_ext.")]
    return {entry.name for part in parts for entry in fields(part)}


def expected_names(config, names):
    """What a refusal has to name: what TRL and transformers say of their own settings need not name them."""
    return () if set(names) & theirs(config) else (*names, "vllm", "JSON", "rewards")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_each_setting_takes_or_refuses_each_odd_value(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken, refusals, of_others = 0, 0, theirs(config)
    for name in OWN[config]:
        if name in OF_DPO and config is not SLiCConfig:
            continue  # most configs have them
        for value in OF_EACH_KIND if name in of_others else ODD_VALUES:
            with refused(*expected_names(config, [name])) as errors:
                make(config, {name: value})
            taken += not errors
            refusals += bool(errors)
    assert taken and refusals


@more_or_less(100, 1500)
def test_settings_are_taken_or_refused_by_name(number):
    seen = [0, 0]
    for config in CONFIGS:  # chance may bring some of them none that is taken, or none that is refused
        make(config, {})
        name = next((name for name in OWN[config] if name not in theirs(config)), "beta")
        with refused(name) as errors:
            make(config, {name: {1.5}})
        assert errors, config

    @cases(number)
    @given(st.data())
    def check(data):
        config = data.draw(st.sampled_from(CONFIGS))
        names = data.draw(st.lists(st.sampled_from(OWN[config]), min_size=1, max_size=2, unique=True))
        values = {name: data.draw(VALUES) for name in names}
        assume(not any(isinstance(value, str) and "/" in value for value in values.values()))  # no paths
        with refused(*expected_names(config, names)) as errors:
            make(config, values)
        seen[bool(errors)] += 1

    check()
    assert all(seen), "taken at times, and refused at others"


DATACLASSES = (ScriptArguments, SLiCConfig, ModelConfig, DatasetMixtureConfig, SamplingConfig, RoundsConfig)
KEYS = sorted({entry.name for one in DATACLASSES for entry in fields(one) if entry.init} - {"output_dir"})
PLAYGROUND = REPOSITORY / "recipes" / "configs" / "slic_playground.yaml"


@more_or_less(60, 500)
def test_config_files_are_read_or_refused(number, tmp_path):
    file = tmp_path / "config.yaml"
    base = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": str(tmp_path), "bf16": False}
    read = []

    @cases(number)
    @given(
        st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2).map(
            lambda values: yaml.dump({**base, **values}).encode("utf-8", "surrogatepass")
        )
        | st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@`\n 1"), max_size=30).map(str.encode)
        | st.binary(max_size=20)
    )
    def check(content):
        file.write_bytes(content)
        with refused():
            parse_recipe_args(DATACLASSES, PLAYGROUND, ["--config", str(file)])
            read.append(True)

    check()
    assert read


OF_METHODS = st.dictionaries(
    st.sampled_from(["method", "label", "beta", "learning_rate", "trust_remote_code", "model_init_kwargs"]) | TEXT,
    VALUES | st.sampled_from(["dpo", "ipo", "spin"]),
    max_size=3,
)
ODD_SETTINGS = VALUES | st.dictionaries(
    st.sampled_from(["all", "reward_model", "dpo", "rl", "mine"]) | TEXT, OF_METHODS | VALUES, max_size=2
)
SOUND_SETTINGS = st.fixed_dictionaries(
    {},
    optional={"all": st.just({"learning_rate": 1e-6}), "dpo": st.just({"beta": 0.3}),
              "mine": st.just({"method": "ipo", "label": "mine"})},
)  # fmt: skip
# of the file, and of the command line
BOTH_SETTINGS = st.one_of(
    st.tuples(SOUND_SETTINGS, st.none() | SOUND_SETTINGS),
    st.tuples(SOUND_SETTINGS, ODD_SETTINGS),
    st.tuples(ODD_SETTINGS, st.none() | SOUND_SETTINGS),
)
COMPARE = REPOSITORY / "recipes" / "compare.py"


@more_or_less(60, 500)
def test_settings_of_compared_methods_are_read_or_refused(number, tmp_path):
    file = tmp_path / "config.yaml"
    base = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": str(tmp_path), "rewards": ["model"]}
    playground, classes = COMPARE.parent / "configs" / "compare_playground.yaml", recipe_dataclasses(COMPARE)
    read = []

    @cases(number)
    @given(BOTH_SETTINGS, st.lists(st.sampled_from(["dpo", "rl", "mine"]), max_size=2))
    def check(settings, methods):
        of_file, typed = settings
        file.write_bytes(yaml.dump({**base, "bf16": False, "settings": of_file}).encode("utf-8", "surrogatepass"))
        words = ["--config", str(file), *(["--methods", *methods] if methods else [])]
        if typed is not None:
            words += ["--settings", typed if isinstance(typed, str) else json.dumps(typed)]
        with refused("settings", "methods"):
            found = parse_comparison_args(classes, playground, words)[1].settings
            for_all = typed.get("all", {}) if isinstance(typed, dict) else {}
            for part in (part for part in settings if isinstance(part, dict)):
                lost = {key for name in part for key in set(part[name]) - set(found.get(name, ()))}
                assert lost <= set(for_all), "nothing is lost but what the command line replaces"
            read.append(found)

    check()
    assert sum(map(bool, read)) > 3, "not all is nonsense"


# Manifests


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    run = Run(folder, {"seed": 1, "names": ["a", "b"]}, resume=False)
    run.stage("one", look_around, text="x")
    return folder


def paths_in(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from paths_in(value[key], (*path, key))


@st.composite
def edits(draw, content):
    """A JSON text with one thing changed, removed or damaged."""
    text = json.dumps(content, indent=2)
    if draw(st.booleans()):
        start = draw(st.integers(0, len(text) - 1))
        end = min(start + draw(st.integers(0, 5)), len(text))
        return text[:start].encode() + draw(st.binary(max_size=4)) + text[end:].encode()
    changed = json.loads(text)
    path = draw(st.sampled_from([path for path in paths_in(changed) if path]))
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    if draw(st.booleans()):
        del parent[path[-1]]
    else:
        parent[path[-1]] = draw(NESTED)
    return json.dumps(changed).encode()


@more_or_less(60, 800)
@pytest.mark.parametrize("name", ["run.json", "one/manifest.json"])
def test_changed_manifests_are_refused_or_say_the_same(name, number, finished, tmp_path):
    content = json.loads((finished / name).read_text())
    figures = json.loads((finished / "one" / "manifest.json").read_text())["figures"]
    shutil.copytree(finished, tmp_path / "run")
    found = []

    @cases(number)
    @given(edits(content))
    def check(text):
        (tmp_path / "run" / name).write_bytes(text)
        with refused(name, "run.json") as errors:
            run = Run(tmp_path / "run", {"seed": 1, "names": ["a", "b"]}, resume=True)
            assert run.stage("one", look_around, text="x") == figures
            assert json.loads(text) == content, "taken, and changed"
        found.extend(errors)
        shutil.copy(finished / "run.json", tmp_path / "run" / "run.json")

    check()
    assert len(found) > number / 2 and (tmp_path / "run" / "one" / "calls").read_text() == "x"
