"""`recipes/compare.py`: what it refuses, how the budget is shared out, and what each method gets."""

import json
from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest
import yaml

from tests.support.comparing import PLAYGROUND, RECIPE, RECIPES, one_seed, parsed_from
from trl_ext.cli.options import recipe_dataclasses
from trl_ext.cli.parse import given_options, parse_recipe_args
from trl_ext.comparison.arguments import shared_settings
from trl_ext.comparison.compare import NOT_RECORDED, _results, _with_labels_of_now, compare
from trl_ext.comparison.config import ComparisonConfig
from trl_ext.comparison.methods import METHODS
from trl_ext.comparison.results import ComparisonResults, MethodResult
from trl_ext.comparison.seed_run import REWARD_MODEL, SeedRun
from trl_ext.playground.task import Playground, preference_rows, read_answer
from trl_ext.sampling.config import NEUTRAL

CIRCLE = {}


CIRCLE["circle"] = CIRCLE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["dpoo"]}, "got 'dpoo'. Did you mean `dpo`"),
        ({"seeds": [1, 1]}, "each once, got .1, 1."),
        ({"max_steps": 1}, "`max_steps` must be at least 2, got 1: methods that train twice"),
        ({"settings": "{"}, "`settings` must be JSON, got .{.*Correct it"),
        ({"settings": "[1]"}, "must be options by name of a method"),
        ({"settings": {"dpo": 3}}, "'dpo' must be options by name, got 3"),
        ({"settings": {"dpo": {1: 3}}}, "'dpo' must be options by name, got {1: 3}"),
        ({"settings": {"dpo": {"model_init_kwargs": CIRCLE}}}, "'dpo' must be values of JSON .Circular"),
        ({"settings": {"dpo": {"max_steps": 3}}}, "'dpo' must not set `max_steps`: the comparison sets"),
        ({"settings": {"all": {"output_dir": "x"}}}, "'all' must not set `output_dir`"),
        ({"settings": {"rl": {"min_p": 0.1}}}, "'rl' must not set `min_p`: the comparison sets"),
        ({"settings": {"dpo": {"label": "x"}}}, "must be new, got 'dpo'"),
        ({"settings": {"mine": {"beta": 1.0}}}, "must be one of .*, got 'mine'"),
        ({"settings": {"../x": {"method": "dpo"}}}, "got '../x': a folder has the same name"),
        ({"settings": {"candidates": {"method": "dpo"}}}, "got 'candidates': a folder"),
        ({"settings": {"mine": {"method": "dpo", "label": 3}}}, "`label` of 'mine' in `settings` must be text, got 3"),
        (
            {"settings": {"a": {"method": "dpo", "label": "x"}, "b": {"method": "ipo", "label": "x"}}},
            "got 'x' for 'a' and 'b'",
        ),
        ({"settings": {"mine": {"method": "dpo", "label": "DPO"}}}, "got 'DPO' for 'dpo' and 'mine'"),
        (
            {"methods": ["mine"], "settings": {"mine": {"method": "dpo", "label": "SFT"}}},
            "got 'SFT' for 'sft' and 'mine'",
        ),
        ({"num_checkpoints": -1}, "got -1 and 128"),
        ({"num_train_epochs": 2.0}, "num_train_epochs=2.0: set `max_steps`"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ComparisonConfig(str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dpo": {"betta": 1.0}}, "Unknown options `betta` in `settings` of 'dpo'. Did you mean `beta`"),
        ({"dpo": {"learning_rate": [1]}}, "dpo: "),
        ({"sft": {"beta": 1.0}}, "'sft' must be empty, as it is not trained"),
        ({"slic_direct": {"delta": -1.0}}, "slic_direct: `delta` must be above 0, got -1.0"),
    ],
)
def test_options_of_methods_are_checked_before_anything_is_begun(settings, message, tmp_path):
    arguments = ["--output_dir", str(tmp_path / "out"), "--settings", json.dumps(settings)]
    parsed = parse_recipe_args(recipe_dataclasses(RECIPE), PLAYGROUND, arguments)
    with pytest.raises((ValueError, TypeError), match=message):
        SeedRun(parsed, RECIPES, 1, given_options(arguments, PLAYGROUND))
    assert not (tmp_path / "out").exists()


def test_a_label_of_what_is_not_compared_is_free(tmp_path):
    settings = {"mine": {"method": "dpo", "label": "DPO"}}
    assert ComparisonConfig(str(tmp_path), methods=["mine"], settings=settings).labels == {"sft": "SFT", "mine": "DPO"}


def test_labels_of_earlier_results(tmp_path):
    """They follow the label of now, and none is that of another method, before anything is run."""
    names = {"sft": "SFT", "low": "low beta", "gone": "an earlier one"}
    results = [MethodResult(name, label, seed, "failed") for name, label in names.items() for seed in (1, 2)]
    ComparisonResults("title", "sft", 4, results).save(tmp_path / "comparison.json")
    for label, message in (("DPO, beta 0.01", None), ("an earlier one", "stay in the report: .*'low' and 'gone'")):
        words = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "true", "--methods", "low",
                 "--settings", json.dumps({"low": {"method": "dpo", "label": label}})]  # fmt: skip
        parsed = parse_recipe_args(recipe_dataclasses(RECIPE), PLAYGROUND, words)
        if message is None:
            found = _with_labels_of_now(tmp_path / "comparison.json", parsed[1])
            assert {one.method: one.label for one in found} == {**names, "low": label}
            continue
        with pytest.raises(ValueError, match=message):
            compare(parsed, RECIPES, given_options(words, PLAYGROUND))
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.json"]


def test_the_help_names_every_method():
    text = next(entry for entry in fields(ComparisonConfig) if entry.name == "methods").metadata["help"]
    assert text.startswith(f"Of {', '.join(METHODS)} and those of `settings`")


def test_every_method_has_the_same_budget(tmp_path):
    game = one_seed("--output_dir", str(tmp_path), "--max_steps", "7", "--gradient_accumulation_steps", "3")
    for name, method in METHODS.items():
        if method.recipe is None:
            continue
        values = game.values_for(name, method, updates=7, answers=8)
        rows = {"kto": 2, "rl": 8}.get(name, 1)  # rows of a prompt
        assert values["max_steps"] == 7 and values["per_device_train_batch_size"] == 32 * rows
        assert values["gradient_accumulation_steps"] == 3 and values["seed"] == 1
        wanted = yaml.safe_load(PLAYGROUND.read_text())["settings"]
        assert all(values[key] == value for key, value in wanted[name].items())
        assert values["lr_scheduler_type"] == "linear", "what is for all reaches all"
    assert game.values_for("rl", METHODS["rl"], updates=7, answers=8)["num_generations"] == 8


def test_rloo_samples_as_the_candidates_were(tmp_path):
    drawing = {"temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": 0.2}
    assert drawing.keys() == NEUTRAL.keys()
    words = [word for name, value in drawing.items() for word in (f"--{name}", str(value))]
    run = one_seed("--output_dir", str(tmp_path), *words)
    assert run.values_for("rl", METHODS["rl"], updates=4, answers=8).items() >= drawing.items()
    args = run._check("rl", METHODS["rl"])[1]
    assert {name: getattr(args, name) for name in drawing} == drawing


def test_what_was_trained_before_an_option_was_added_stays(tmp_path):
    run = one_seed("--output_dir", str(tmp_path))
    run.rounds = SimpleNamespace(run=SimpleNamespace(path=tmp_path.joinpath))
    values = run.values_for("rl", METHODS["rl"], updates=4, answers=8)
    folder = tmp_path / "rl" / "model"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    of_then = {name: value for name, value in values.items() if name not in ("min_p", "logging_steps")}
    (folder / "config.yaml").write_text(yaml.safe_dump({**of_then, "model_name_or_path": "elsewhere"}))
    with pytest.raises(ValueError, match="rl must have the options .*: logging_steps was 10 and is 1. Set"):
        run._refuse_other_options("rl", METHODS["rl"], values)
    run._refuse_other_options("rl", METHODS["rl"], {**values, "logging_steps": 10})
    with pytest.raises(ValueError, match="min_p was 0.0 and is 0.3"):
        run._refuse_other_options("rl", METHODS["rl"], {**values, "logging_steps": 10, "min_p": 0.3})


def test_what_is_set_for_the_comparison_reaches_the_methods(tmp_path):
    settings = json.dumps({"dpo_low": {"method": "dpo", "label": "low", "beta": 0.01}, "dpo": {"beta": 0.5}})
    words = ["--output_dir", str(tmp_path), "--settings", settings, "--weight_decay", "0.1", "--use_peft",
             "--attn_implementation", "eager", "--lora_r", "4"]  # fmt: skip
    game = one_seed(*words)
    low, plain = (game.values_for(name, METHODS["dpo"], updates=4, answers=8) for name in ("dpo_low", "dpo"))
    assert low["beta"] == 0.01 and plain["beta"] == 0.5
    for name in ("dpo", "slic_direct", "rl"):
        values = game.values_for(name, METHODS[name], updates=4, answers=8)
        assert (values["weight_decay"], values["use_peft"], values["lora_r"]) == (0.1, True, 4)
        assert values["attn_implementation"] == "eager"
    assert game.config.variants["dpo_low"].label == "low"
    # what is given is handed on whatever it is, and what is set for a method in the file stays
    game = one_seed("--output_dir", str(tmp_path), "--adam_beta1", "0.8", "--hub_token", "secret",
                    "--settings", '{"dpo": {"beta": 0.3}, "all": {"weight_decay": 0.2}}')  # fmt: skip
    shared = shared_settings(game.config, game.model_args, game.given)
    assert shared == {"adam_beta1": 0.8, "bf16": False}
    values = game.values_for("dpo", METHODS["dpo"], updates=4, answers=8)
    assert (values["beta"], values["learning_rate"], values["weight_decay"]) == (0.3, 2e-4, 0.2)
    assert values["lr_scheduler_type"] == "linear" and "hub_token" not in values
    reward = game.values_for("reward_model", REWARD_MODEL, updates=4, answers=1)
    assert reward["learning_rate"] == 1e-3 and reward["use_peft"] is False and reward["save_strategy"] == "no"


@pytest.mark.parametrize("name", [*METHODS, "reward_model"])
@pytest.mark.parametrize("config", ["playground", "tldr"])
def test_recipes_can_read_what_the_shipped_files_have_for_them(config, name, tmp_path):
    file = RECIPES / "configs" / f"compare_{config}.yaml"
    game = one_seed("--config", str(file), "--bf16", "false", "--output_dir", str(tmp_path))
    method = METHODS.get(name, REWARD_MODEL)
    read = game._check(name, method)
    if method.recipe is None:
        assert read is None
        return
    settings = yaml.safe_load(file.read_text())["settings"]
    wanted = {**settings["all"], **settings.get(name, {})}
    found = {key: getattr(part, key) for part in read for key in wanted if hasattr(part, key)}
    assert {key: getattr(value, "value", value) for key, value in found.items()} == wanted
    assert (read[1].max_steps, read[1].bf16, read[1].seed) == (2, False, 1)


SETTINGS = {"all": {"weight_decay": 0.3}, "dpo": {"learning_rate": 2e-4}, "low": {"method": "dpo", "max_length": 64}}


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["--learning_rate", "1e-9"], {"dpo": {"learning_rate": 1e-9}}),
        (["--learning_rate=1e-9", "--methods", "dpo"], {"dpo": {"learning_rate": 1e-9}}),
        (["--weight-decay", "0"], {name: {"weight_decay": 0.0} for name in ("dpo", "ipo", "low", "reward_model")}),
        (["--max_length", "32"], {name: {"max_length": 32} for name in ("dpo", "low")}),
        (["--bf16", "false"], {"ipo": {"bf16": False}}),
        (["--settings", '{"all": {"learning_rate": 1e-9}}'], {"dpo": {"learning_rate": 1e-9}}),
        # on the command line what is for one method wins over what is for all
        (["--settings", '{"dpo": {"learning_rate": 0.5}}', "--learning_rate", "1e-9"],
         {"dpo": {"learning_rate": 0.5}, "low": {"learning_rate": 0.5}, "ipo": {"learning_rate": 1e-9}}),
        # which of a further method the file says itself
        (["--settings", '{"dpo": {"max_length": 16}}'], {"dpo": {"max_length": 16}, "low": {"max_length": 64}}),
        (["--reward_batch_size", "3"], {"rl": {"reward_batch_size": 5}}),  # of the comparison's own scoring
    ],
)  # fmt: skip
def test_the_command_line_wins_over_settings_of_the_file(words, changed, tmp_path):
    settings = {**SETTINGS, "ipo": {"bf16": True}, "rl": {"reward_batch_size": 5}}
    values = {"model_name_or_path": "model", "dataset_name": "data", "learning_rate": 1e-3, "output_dir": "out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**values, "rewards": ["scorer"], "settings": settings}))
    game = one_seed("--config", str(tmp_path / "config.yaml"), *words)
    known = {**METHODS, **game.config.variants, "reward_model": REWARD_MODEL}
    for name, wanted in changed.items():
        found = game.values_for(name, known[name], updates=2, answers=4)
        assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("config", ["playground", "tldr"])
def test_the_command_line_wins_over_settings_of_the_shipped_files(config):
    file = ["--config", str(RECIPES / "configs" / f"compare_{config}.yaml")]
    for words in (file, []) if config == "playground" else (file,):
        game = one_seed(*words, "--learning_rate", "1e-9", "--bf16", "false", "--output_dir", "out")
        rates = [
            game.values_for(name, method, updates=2, answers=4)["learning_rate"]
            for name, method in METHODS.items()
            if method.recipe is not None
        ]
        assert set(rates) == {1e-9}


def test_settings_of_a_file_may_be_json(tmp_path):
    values = {"model_name_or_path": "model", "dataset_name": "data", "rewards": ["scorer"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**values, "settings": json.dumps(SETTINGS)}))
    words = ["--config", str(tmp_path / "config.yaml"), "--settings", '{"dpo": {"beta": 0.3}}']
    assert parsed_from(words)[1].settings == {**SETTINGS, "dpo": {"learning_rate": 2e-4, "beta": 0.3}}


@pytest.mark.parametrize("nothing", ["{}", "null"])
def test_empty_settings_on_the_command_line_leave_those_of_the_file(nothing, tmp_path):
    values = {"model_name_or_path": "model", "dataset_name": "data", "rewards": ["scorer"], "settings": SETTINGS}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    words = ["--config", str(tmp_path / "config.yaml"), "--settings", nothing]
    assert parsed_from(words)[1].settings == SETTINGS
    assert parsed_from(["--settings", nothing])[1].settings == yaml.safe_load(PLAYGROUND.read_text())["settings"]


def test_methods_of_a_file_may_be_those_that_its_settings_define(tmp_path):
    values = {"model_name_or_path": "model", "dataset_name": "data", "rewards": ["scorer"], "methods": ["dpo", "low"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**values, "settings": SETTINGS}))
    config = ["--config", str(tmp_path / "config.yaml")]
    assert parsed_from(config)[1].methods == ["dpo", "low"]
    for words in (["--settings", '{"low": {"beta": 0.3}}'], ['--settings={"low": {"beta": 0.3}}']):
        parsed = parsed_from([*config, *words])
        assert parsed[1].methods == ["dpo", "low"]
        assert parsed[1].settings == {**SETTINGS, "low": {**SETTINGS["low"], "beta": 0.3}}
    # and on the command line they may be of either
    words = ["--settings", '{"mine": {"method": "ipo"}}', "--methods", "low", "mine"]
    assert parsed_from([*config, *words])[1].methods == ["low", "mine"]


@pytest.mark.parametrize(("updates", "looks", "steps"), [(50, 3, [13, 26, 39]), (7, 3, [2, 4, 6]), (2, 1, [1])])
def test_so_many_checkpoints_as_are_asked_for(updates, looks, steps, tmp_path):
    game = one_seed("--output_dir", str(tmp_path), "--num_checkpoints", str(looks))
    every = game.values_for("dpo", METHODS["dpo"], updates=updates, answers=8)["save_steps"]
    assert list(range(every, updates, every)) == steps


def test_settings_of_a_file_may_name_code(tmp_path):
    """A config file is the user's own: what may stand on the command line may stand in it, and reaches the recipe."""
    loading = {"weights_only": False}
    settings = {
        "all": {"trust_remote_code": True},
        "dpo": {"attn_implementation": "some/kernel", "model_init_kwargs": loading},
    }
    values = {"model_name_or_path": "model", "dataset_name": "data", "rewards": ["scorer"], "output_dir": "out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**values, "bf16": False, "settings": settings}))
    _, args, model_args, *_ = one_seed("--config", str(tmp_path / "config.yaml"))._check("dpo", METHODS["dpo"])
    assert args.trust_remote_code and args.model_init_kwargs == loading
    assert model_args.attn_implementation == "some/kernel"


def test_what_two_rounds_and_the_report_need(tmp_path):
    for words, message in (
        (["--num_candidates", "3"], "must be at least 4 for RRHF in two rounds, got 3"),
        (["--num_checkpoints", "1", "--use_peft"], "checkpoints of adapters are not evaluated"),
        (["--settings", '{"ipo": {"use_peft": true}}'], "got 3 for ipo: checkpoints of adapters are not"),
        (["--eval_strategy", "no"], "models are evaluated on held-out prompts"),
        (["--save_steps", "7", "--logging_steps", "1"], "logging_steps .*save_steps .* must not be set"),
    ):
        words = ["--output_dir", str(tmp_path / "out"), *words]
        parsed = parse_recipe_args(recipe_dataclasses(RECIPE), PLAYGROUND, words)
        with pytest.raises(ValueError, match=message):
            SeedRun(parsed, RECIPES, 1, given_options(words, PLAYGROUND))
    with pytest.raises(ValueError, match="`perplexity_model` must not be set: the fixed model of a comparison"):
        parse_recipe_args(recipe_dataclasses(RECIPE), PLAYGROUND, ["--perplexity_model", "x"])


def test_preferences_of_the_playground_are_right_and_friendlier():
    rows = Playground(num_sft=10, num_prompts=20, num_held_out=5).rows("train")
    made = preference_rows(rows, seed=1)
    for row in made:
        chosen, rejected = (read_answer(row[name], row["answer"]) for name in ("chosen", "rejected"))
        assert chosen[0] and rejected[0] and chosen[2] > rejected[2]
    assert made == preference_rows(rows, seed=1) != preference_rows(rows, seed=2)


def test_candidates_are_counted_for_the_method_whose_reward_model_has_them(tmp_path, monkeypatch):
    game = one_seed("--output_dir", str(tmp_path))
    game.rounds = SimpleNamespace(prompts=tmp_path / "prompts.jsonl")
    monkeypatch.setattr(game, "_candidates", lambda: tmp_path / "ranked.jsonl", raising=False)  # seconds of sampling
    monkeypatch.setattr(game, "_num_sampled", lambda name: {"candidates": 48}[name], raising=False)
    assert game._data(METHODS["rl"]) == (tmp_path / "prompts.jsonl", 48)
    assert game._data(METHODS["dpo"]) == (tmp_path / "ranked.jsonl", 48)


def test_the_report_has_every_setting_of_sampling(tmp_path):
    words = ["--output_dir", str(tmp_path / "out"), "--top_p", "0.9", "--min_p", "0.05", "--stop_strings", "END"]
    parsed = parse_recipe_args(recipe_dataclasses(RECIPE), PLAYGROUND, words)
    settings = _results(parsed, 4, []).settings
    of_sampling = asdict(parsed[4])
    assert {"temperature", "top_k", "role_markers", "sampling_engine"} < set(of_sampling)
    assert set(of_sampling) - set(settings) == set(NOT_RECORDED)
    assert (settings["top_p"], settings["min_p"], settings["stop_strings"]) == (0.9, 0.05, ["END"])
