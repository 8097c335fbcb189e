"""What a model cannot train on is found before rounds and self-play sample, and before they leave a folder behind."""

import json

import pytest
from datasets import Dataset
from peft import LoraConfig

from tests.support.data import REPOSITORY, REWARDS
from trl_ext import SPINConfig, SPINTrainer
from trl_ext.cli.options import recipe_dataclasses
from trl_ext.cli.parse import parse_recipe_args
from trl_ext.cli.start import start_rounds
from trl_ext.cli.start_spin import start_self_play
from trl_ext.data.load import load_datasets
from trl_ext.data.rows import RowOptions

LONG = "a word or two more than it has places"
TOO_LONG = r"dataset has a row of \d\d tokens, and .* has 24 positions \(`max_length` is 1024\). Set .* to 24"
UNKNOWN = r"has the id \d+, and .* has 40 token embeddings. Use the model's own tokenizer"


@pytest.fixture
def small_vocabulary(model, tokenizer, tmp_path):
    """The folder of a model whose tokenizer has more tokens than it has embeddings."""
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


def start(recipe, model, rows, tmp_path, **settings):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model_name_or_path": model, "dataset_name": file, "output_dir": out, "bf16": False, **settings}
    if recipe == "spin":
        given = {"max_new_tokens": 4, "num_watched_prompts": 2, **given}
    else:
        rewards = f"{REWARDS}:vowels"
        rounds = {"num_rounds": 1, "num_watched_prompts": 2, "max_new_tokens": 4, "rewards": rewards}
        given = {**rounds, **given}
    options = [part for key, value in given.items() for part in (f"--{key}", *str(value).split())]
    path = REPOSITORY / "recipes" / f"{recipe}.py"
    parsed = parse_recipe_args(recipe_dataclasses(path), path, options)
    try:
        if recipe == "spin":
            script_args, config, _, dataset_args = parsed
            train, _ = load_datasets(script_args, dataset_args, with_eval=False, seed=0)
            return start_self_play(parsed, SPINTrainer, train)
        return start_rounds(parsed, rows=RowOptions(reference=True))
    finally:
        assert not out.exists()


PROMPTS = [{"prompt": f"{number} ", "completion": "yes", "chosen": "yes", "rejected": "no"} for number in range(6)]


@pytest.mark.parametrize(
    ("recipe", "row", "settings"),
    [
        ("slic", {"reference": LONG}, {}),
        ("rrhf", {"chosen": LONG}, {"mix_in": "chosen rejected"}),
        ("spin", {"completion": LONG}, {}),
    ],
)
def test_rows_longer_than_the_positions(recipe, row, settings, gpt2, tmp_path):
    with pytest.raises(ValueError, match=TOO_LONG):
        start(recipe, gpt2, [*PROMPTS, {**PROMPTS[0], **row}], tmp_path, max_length=1024, **settings)


@pytest.mark.parametrize("recipe", ["slic", "spin"])
def test_prompts_that_leave_no_place_for_an_answer(recipe, gpt2, tmp_path):
    rows = [*PROMPTS, {**PROMPTS[0], "prompt": "twenty-one characters"}]
    message = r"row 6: column 'prompt' has \d\d tokens and with max_new_tokens=4 exceeds the model's window of 24"
    with pytest.raises(ValueError, match=message):
        start(recipe, gpt2, rows, tmp_path)


@pytest.mark.parametrize("recipe", ["kto", "spin"])
def test_tokens_beyond_the_embeddings(recipe, small_vocabulary, tmp_path):
    with pytest.raises(ValueError, match=UNKNOWN):
        start(recipe, small_vocabulary, PROMPTS, tmp_path)


@pytest.mark.parametrize("recipe", ["slic", "spin"])
def test_adapters_that_do_not_fit(recipe, model_dir, tmp_path):
    with pytest.raises(ValueError, match="`target_modules` must name modules of LlamaForCausalLM"):
        start(recipe, model_dir, PROMPTS, tmp_path, use_peft=True, lora_target_modules="nothing")


def test_self_play_of_a_trainer(gpt2, small_vocabulary, model_dir, tmp_path):
    def build(model, rows, **kwargs):
        args = SPINConfig(str(tmp_path / "out"), max_new_tokens=4, num_watched_prompts=2, bf16=False, max_length=1024)
        SPINTrainer(model, args=args, train_dataset=Dataset.from_list(rows), **kwargs)

    rows = [{key: row[key] for key in ("prompt", "completion")} for row in PROMPTS]
    with pytest.raises(ValueError, match=TOO_LONG):
        build(gpt2, [*rows, {**rows[0], "completion": LONG}])
    with pytest.raises(ValueError, match=UNKNOWN):
        build(small_vocabulary, rows)
    with pytest.raises(ValueError, match="`target_modules` must name modules of LlamaForCausalLM"):
        build(model_dir, rows, peft_config=LoraConfig(target_modules=["nothing"], task_type="CAUSAL_LM"))
    assert not (tmp_path / "out").exists()
