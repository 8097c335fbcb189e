"""Odd settings, config files and manifests are taken or refused by name."""

import json
import math
import shutil
from dataclasses import fields, is_dataclass

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments

from tests.support.data import REPOSITORY
from tests.support.methods import all_but
from tests.support.odd import NESTED, NUMBERS, SCALARS, TEXT, cases, more_or_less, refused
from tests.support.stage_functions import look_around
from trl_ext import SLiCConfig
from trl_ext.cli.options import recipe_dataclasses
from trl_ext.cli.parse import parse_recipe_args
from trl_ext.cli.sample_and_rank_config import SampleAndRankConfig
from trl_ext.comparison.arguments import parse_comparison_args
from trl_ext.comparison.config import ComparisonConfig
from trl_ext.runs.config import RankingConfig, RoundsConfig
from trl_ext.runs.run import Run
from trl_ext.sampling.config import SamplingConfig

pytestmark = pytest.mark.usefixtures("no_cache")

CONFIGS = (
    *(config for _, config in all_but("dpo").values()),
    ComparisonConfig, SampleAndRankConfig, SamplingConfig, RankingConfig, RoundsConfig,
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
