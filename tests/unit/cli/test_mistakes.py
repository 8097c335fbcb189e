"""A known mistake is one line and comes before torch is imported; a true fault keeps its traceback."""

import json
from pathlib import Path

import pytest

from tests.support.data import PAIRS, REPOSITORY
from tests.support.recipes import DATACLASSES, RECIPES
from trl_ext.cli.mistakes import is_known
from trl_ext.cli.parse import parse_recipe_args
from trl_ext.cli.preflight import check_before_imports

BOTH = ["--model_name_or_path", "org/model", "--dataset_name", "org/data"]


@pytest.fixture(autouse=True)
def in_a_folder_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {
        "rows.jsonl": [json.dumps(row) for row in PAIRS],
        "prompts.jsonl": ['{"prompt": "a"}'],
        "later.jsonl": ['{"prompt": "a"}', '{"chosen": "b", "rejected": "c"}'],
        "broken.jsonl": ['{"prompt": "a"}', '{"prompt": '],
        "empty.jsonl": [],
        "sft.jsonl": ['{"prompt": "a", "completion": "b"}'],
        "labelled.jsonl": ['{"prompt": "a", "completion": "b", "label": true}'],
        "rows.csv": ["prompt,chosen", "a,b"],
        "broken.yaml": ["a: ["],
        "unknown.yaml": ["lerning_rate: 1"],
        "type.yaml": ["seed: [1]"],
    }
    for name, lines in rows.items():
        Path(name).write_text("".join(line + "\n" for line in lines))
    Path("folder").mkdir()
    Path("no_tokenizer").mkdir()
    Path("no_tokenizer", "config.json").write_text("{}")


def with_(model="org/model", data="org/data"):
    return ["--model_name_or_path", model, "--dataset_name", data]


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("slic", ["--lerning_rate", "1"], "Unknown option `--lerning_rate`. Did you mean `--learning_rate`?"),
        ("slic", ["--lerning-rate=1"], "Unknown option `--lerning-rate`. Did you mean `--learning_rate`?"),
        ("slic", ["--xyzzy"], "Unknown option `--xyzzy`. `--help` lists the options."),
        ("slic", ["--bf16"], "`--bf16` must be true or false, got nothing. Write `--bf16 true`."),
        ("slic", ["--bf16", "--seed", "1"], "`--bf16` must be true or false, got nothing. Write `--bf16 true`."),
        ("slic", ["--use_peft", "maybe"], "`--use_peft` must be true or false, got 'maybe'."),
        ("slic", ["--max_steps", "ten"], "`--max_steps` must be int or None, got 'ten'."),
        ("slic", ["--learning_rate", "1e-5e"], "`--learning_rate` must be float"),
        ("slic", ["--output_dir"], "`--output_dir` must be str or None, got nothing. Write `--output_dir VALUE`."),
        ("slic", ["--rewards"], "`--rewards` must be list[str] or None, got nothing."),
        ("slic", ["--on_invalid_row", "skip"], "`--on_invalid_row` must be one of 'error', 'drop', got 'skip'."),
        ("slic", ["mine.jsonl"], "The command line must hold options, got the word 'mine.jsonl'."),
        ("compare", ["--seeds", "1", "a"], "`--seeds` must be list[int] or None, got 'a'."),
        ("slic", ["--config", "gone.yaml"], "`--config` must be a YAML file, got 'gone.yaml', which is not there."),
        ("slic", ["--config"], "`--config` must be a YAML file, got nothing."),
        ("slic", ["--config", "broken.yaml"], "broken.yaml cannot be read as YAML"),
        ("slic", ["--config", "unknown.yaml"], "Unknown option 'lerning_rate' in the config file unknown.yaml. Did"),
        ("slic", ["--config", "type.yaml"], "`seed` in the config file type.yaml must be int or None, got [1]."),
        ("slic", ["--dataset_name", "rows.jsonl"], "`--model_name_or_path` must be set where data is given."),
        ("dpo", ["--model_name_or_path", "org/model"], "`--dataset_name` must be set where a model is given."),
        ("sample_and_rank", [], "`--model_name_or_path` and `--dataset_name` must be set"),
        ("slic", with_(model="./gone"), "`model_name_or_path` must be a Hub name or a local folder, got './gone'"),
        ("slic", with_(model="runs/a/model"), "got 'runs/a/model', which is not there. Correct the path."),
        ("slic", with_(model="folder"), "which has neither config.json nor adapter_config.json"),
        ("slic", with_(model="no_tokenizer"), "The folder no_tokenizer has no tokenizer. Save one there with"),
        ("slic", with_(data="gone.jsonl"), "`dataset_name` must be a Hub name or a local file or folder, got 'gone.j"),
        (
            "slic",
            [*with_(), "--num_rounds", "1", "--rewards", "gone.py:score"],
            "`rewards` must name a file that exists, got 'gone.py:score'",
        ),
        ("slic", [*with_(), "--deepspeed", "gone.json"], "`deepspeed` must be a JSON file, got 'gone.json'"),
        ("slic", with_(data="empty.jsonl"), "must hold rows, got empty.jsonl, which is empty"),
        ("slic", with_(data="broken.jsonl"), "Line 2 of broken.jsonl must be JSON"),
        ("rrhf", with_(data="prompts.jsonl"), "got the columns ['prompt'], without `chosen` and `rejected`"),
        ("ipo", with_(data="rows.csv"), "got the columns ['chosen', 'prompt'], without `rejected`"),
        ("rl", with_(data="sft.jsonl")[:2] + ["--dataset_name", "empty.jsonl"], "which is empty"),
        ("spin", with_(data="prompts.jsonl"), "must have `prompt` and `completion` (the real answer)"),
    ],
)
def test_mistakes_are_found_without_imports(recipe, words, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as raised:
        check_before_imports(DATACLASSES[recipe], words)
    assert message in str(raised.value) and is_known(raised.value)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        *((name, []) for name in RECIPES if name != "sample_and_rank"),
        ("slic", with_(data="later.jsonl")),  # whose first row has fewer columns
        ("slic", [*with_(data="rows.jsonl"), "--bf16", "false", "--use_peft", "--lora_target_modules", "a", "b"]),
        (
            "slic",
            [*with_(data="prompts.jsonl"), "--num_rounds", "1", "--rewards", "package.module:f", "--delta", "-1"],
        ),
        ("spin", with_(data="sft.jsonl")),
        ("kto", with_(data="labelled.jsonl")),
        ("spin", with_(data="rows.jsonl")),
        ("dpo", [*BOTH, "--report_to", "none", "--loss_type", "sigmoid", "--model_init_kwargs", '{"a": 1}']),
        ("compare", ["--seeds", "1", "2", "--settings", '{"dpo": {"beta": 1}}', "--no_remove_unused_columns"]),
    ],
)
def test_what_is_right_passes(recipe, words):
    check_before_imports(DATACLASSES[recipe], words)


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "recipes" / "configs").glob("*.yaml")), ids=lambda file: file.stem
)
def test_shipped_configs_pass(file):
    recipe = next((name for name in sorted(RECIPES, key=len, reverse=True) if file.stem.startswith(name)), None)
    recipe = (
        recipe or {"click": "train_click", "best": "best_of_n", "sample": "sample_and_rank"}[file.stem.split("_")[0]]
    )
    words = [] if "playground" in file.stem else BOTH  # some have a path to fill in
    check_before_imports(DATACLASSES[recipe], ["--config", str(file), *words])


def test_what_the_real_parser_refuses_is_one_sentence_too(tmp_path):
    playground = REPOSITORY / "recipes" / "configs" / "slic_playground.yaml"
    for words, message in (
        (["--bf16"], "`--bf16` must be true or false, got nothing. Write `--bf16 true`."),
        (["--max_steps", "ten"], "`--max_steps` must be int, got 'ten'."),
        (["--lr_scheduler_type", "odd"], "`--lr_scheduler_type` must be one of"),
    ):
        with pytest.raises(ValueError) as raised:
            parse_recipe_args(DATACLASSES["slic"], playground, words)
        assert str(raised.value).startswith(message) and is_known(raised.value)


def test_faults_are_not_mistakes():
    from trl_ext.losses import rrhf_loss
    from trl_ext.runtime.settings import has_type

    for fault in (lambda: rrhf_loss(None), lambda: has_type(1, None)()):  # TypeErrors that nobody raises by statement
        with pytest.raises(TypeError) as raised:
            fault()
        assert not is_known(raised.value)
    with pytest.raises(ValueError) as raised:
        raise ValueError("of somebody else's code")
    assert not is_known(raised.value)
