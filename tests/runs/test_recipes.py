"""The recipes as their users start them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import datetime

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DatasetMixtureConfig, ScriptArguments

from tests.support import warm
from tests.support.data import PAIRS, REPOSITORY, REWARDS, read_jsonl, real_data
from tests.support.methods import TRAINERS
from tests.support.processes import wait_until
from tests.support.recipes import RECIPES, run
from trl_ext.cli.options import recipe_dataclasses
from trl_ext.cli.parse import parse_recipe_args
from trl_ext.cli.start import in_rounds, start_rounds
from trl_ext.data.load import load_datasets, load_prompts
from trl_ext.data.prompts import check_prompts
from trl_ext.data.rows import RowOptions
from trl_ext.methods import METHODS
from trl_ext.runs.curves import plot_training_curves
from trl_ext.runs.run import Run

RECIPE = REPOSITORY / "recipes" / "slic.py"
PLAYGROUND = REPOSITORY / "recipes" / "configs" / "slic_playground.yaml"
# recipes whose name is not that of their configs
CONFIGS_OF = {"train_click": "click"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPE)]


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS * 4))
    return path


def arguments(**kwargs):
    return [item for key, value in kwargs.items() for item in (f"--{key}", str(value))]


def small_run(model_dir, data, output_dir, **kwargs):
    settings = {
        "model_name_or_path": model_dir, "dataset_name": data, "output_dir": output_dir, "bf16": False,
        "report_to": "none", "per_device_train_batch_size": 2, "num_train_epochs": 1,
        "learning_rate": 1e-3, "logging_steps": 1,
    }  # fmt: skip
    return [*LAUNCH, *arguments(**{**settings, **kwargs})]


# Arguments and data


def parse(*args, recipe="slic"):
    names = recipe_dataclasses(REPOSITORY / "recipes" / f"{recipe}.py")
    playground = PLAYGROUND.with_name(f"{CONFIGS_OF.get(recipe, recipe)}_playground.yaml")
    return parse_recipe_args(names, playground, list(args))


def test_no_arguments_mean_the_playground(tmp_path):
    script_args, training_args, model_args, _, sampling, rounds = parse("--seed", "7")
    assert script_args.dataset_name is None and model_args.model_name_or_path is None
    playground = yaml.safe_load(PLAYGROUND.read_text())
    assert training_args.delta == playground["delta"] and training_args.seed == 7
    assert sampling.num_candidates == playground["num_candidates"] and rounds.num_rounds == 1
    for model, data in (("--model_name_or_path", "--dataset_name"), ("--model-name-or-path", "--dataset-name")):
        _, training_args, _, _, _, rounds = parse(data, "x", model, "y", "--output_dir", str(tmp_path))
        assert training_args.delta == 1.0 and rounds.num_rounds == 0, "the playground's values are its own"
    parse("--config", str(PLAYGROUND))
    parse(f"--config={PLAYGROUND}")
    *_, rounds = parse("--num_rounds", "3", "--num_watched_prompts", "50", "--pair_rule", "best_worst")
    assert rounds.num_rounds == 3 and rounds.pair_rule == "best_worst" and rounds.rewards == playground["rewards"]
    config = tmp_path / "config.yaml"
    config.write_text("seed: 1\n")
    with pytest.raises(
        ValueError, match="The config file must name a model and data, got neither. Set `model_name_or_path`"
    ):
        parse("--config", str(config))
    with pytest.raises(ValueError, match="test_split_size, eval_strategy must not be set on the playground"):
        parse("--test_split_size", "0.1", "--eval_strategy", "epoch")


def test_unknown_keys_are_fatal(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model_name_or_path: x\ndataset_name: y\nbetta: 0.1\n")
    with pytest.raises(ValueError, match="betta"):
        parse("--config", str(config))
    with pytest.raises(ValueError, match="--gamma"):
        parse("--gamma", "1")
    for shortened, whole in (("--num_round", "num_rounds"), ("--model_name", "model_name_or_path")):
        with pytest.raises(ValueError, match=f"Unknown option `{shortened}`. Did you mean `--{whole}`"):
            parse(shortened, "1")


def test_flags_that_would_do_nothing_and_missing_models_are_refused(tmp_path, pairs):
    with pytest.raises(ValueError, match="`--model_name_or_path` must be set where data is given"):
        parse("--dataset_name", "x", "--output_dir", str(tmp_path))
    with pytest.raises(ValueError, match="`--ignore_bias_buffers` .* is not offered here"):
        parse(
            "--dataset_name", "x", "--model_name_or_path", "y", "--ignore_bias_buffers", "--output_dir", str(tmp_path)
        )
    with pytest.raises(ValueError, match="`--config` must be a YAML file, got nothing"):
        parse("--config")
    pairs.to_json(tmp_path / "rows.jsonl")
    pairs.save_to_disk(tmp_path / "saved")

    def load(name, with_eval=False, test_split_size=None, **kwargs):
        mixture = DatasetMixtureConfig(test_split_size=test_split_size)
        script_args = ScriptArguments(dataset_name=str(tmp_path / name), **kwargs)
        return load_datasets(script_args, mixture, with_eval=with_eval, seed=0)

    with pytest.raises(ValueError, match="`test_split_size` has no effect, got 0.5: evaluation is off"):
        load("rows.jsonl", test_split_size=0.5)
    with pytest.raises(ValueError, match="`dataset_config` must not be set with local data, got 'x'"):
        load("rows.jsonl", dataset_config="x")
    with pytest.raises(ValueError, match="`dataset_streaming` and `dataset_config` must not be set with `datasets`"):
        mixture = DatasetMixtureConfig(datasets=[{"path": "json"}])
        load_datasets(ScriptArguments(dataset_streaming=True), mixture, with_eval=False, seed=0)
    with pytest.raises(ValueError, match="cannot be streamed. Remove `--dataset_streaming`"):
        load("saved", dataset_streaming=True)


def test_mixture_is_split_the_same_way_every_time(tmp_path, pairs):
    pairs.to_json(tmp_path / "rows.jsonl")
    mixture = {"datasets": [{"path": "json", "data_files": str(tmp_path / "rows.jsonl")}], "test_split_size": 0.5}
    first, second = (
        load_datasets(ScriptArguments(), DatasetMixtureConfig(**mixture), with_eval=True, seed=3)[1]["chosen"]
        for _ in range(2)
    )
    assert len(first) == 4 and list(first) == list(second)


def test_a_forgotten_data_flag_deletes_nothing(tmp_path):
    """Without model and data the playground would run, but not over the checkpoints of another run."""
    (tmp_path / "checkpoint-500").mkdir()
    printed = run([*LAUNCH, "--output_dir", str(tmp_path)], fails=True)
    assert "it has no run.json and holds checkpoint-500" in printed
    assert (tmp_path / "checkpoint-500").is_dir()


def test_the_playground_starts_afresh_over_a_playground_only(tmp_path, monkeypatch):
    """A run on a model and data in the same folder is refused; prompts of another seed do not stay behind."""
    for model, is_kept in (("my-model", True), (None, False)):
        folder = tmp_path / str(model)
        settings = {"model_name_or_path": model, "dataset_name": model and "my-data"}
        kept = Run(folder, settings, resume=False).keep("prompts", {"train.jsonl": "those of an earlier run"})
        parsed = parse("--output_dir", str(folder))
        if is_kept:
            with pytest.raises(FileExistsError, match="holds an earlier run"):
                start_rounds(parsed, rows=RowOptions())
            assert (kept / "train.jsonl").read_text() == "those of an earlier run"
            continue
        monkeypatch.setattr(Run, "stage", lambda *args, **kwargs: {})  # the SFT model is not needed
        rounds = start_rounds(parsed, rows=RowOptions())
        assert len(read_jsonl(rounds.prompts)) == 1600 and len(read_jsonl(rounds.watched)) == 1000


def test_a_failed_start_does_not_hold_the_folder(model_dir, tmp_path):
    """What can be known to fail fails before anything is written, and the corrected command runs in the folder."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}? "}) + "\n" for n in range(8)))
    output = tmp_path / "out"

    def start(**changes):
        settings = {
            "model_name_or_path": model_dir, "dataset_name": tmp_path / "prompts.jsonl", "output_dir": output,
            "num_rounds": 1, "rewards": f"{REWARDS}:vowels", "num_watched_prompts": 2,
            "pair_rule": "best_worst", **changes,
        }  # fmt: skip
        return start_rounds(parse(*arguments(**settings)), rows=RowOptions())

    for changes, error, message in (
        ({"rewards": f"{REWARDS}:vovels"}, ImportError, "Did you mean vowels"),
        ({"judge": "tests/support/rewards.py:nothing"}, ImportError, "nothing"),
        ({"model_name_or_path": "./nowhere"}, FileNotFoundError, "existing folder, got './nowhere'"),
        ({"dataset_name": tmp_path / "prompt.jsonl"}, FileNotFoundError, "which is not there"),
        (
            {"num_watched_prompts": 5},
            ValueError,
            "`num_watched_prompts` must be at most half of the 8",
        ),
        ({"max_length": 2}, ValueError, "8 of 8 rows that cannot be used"),
        ({"eval_strategy": "steps"}, ValueError, "`eval_strategy` and `test_split_size` must be set together"),
        ({"test_split_size": 0.5}, ValueError, "`eval_strategy` and `test_split_size` must be set together"),
        ({"push_to_hub": True}, ValueError, "`push_to_hub` must not be set in rounds"),
        (
            {"load_in_4bit": True, "use_peft": True},
            ValueError,
            "must not be set in rounds, which sample",
        ),
        ({"resume_from_checkpoint": "checkpoint-3"}, ValueError, "They resume where they stopped"),
    ):
        with pytest.raises(error, match=message):
            start(**changes)
        assert not output.exists(), changes
    assert len(read_jsonl(start().prompts)) == 6
    with pytest.raises(ValueError, match="num_processes was 1 and is 2|was begun with other settings"):
        start(resume_from_checkpoint="true", temperature=0.3)


def test_prompts_of_every_format(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    answer = {"role": "assistant", "content": "Hello"}
    whole = {"chosen": [*chat, answer], "rejected": [*chat, {**answer, "content": "No"}]}
    for row, prompt in (
        ({"prompt": "Hi "}, "Hi "),
        ({"prompt": chat}, chat),
        ({"prompt": "Hi", **whole}, chat),  # UltraFeedback's
        (whole, chat),
        ({"chosen": "Q: a", "rejected": "Q: b"}, "Q:"),
    ):
        path = tmp_path / "rows.parquet"
        Dataset.from_list([row]).to_parquet(path)
        assert load_prompts(ScriptArguments(str(path)), DatasetMixtureConfig())[0]["prompt"] == prompt
    Dataset.from_list([{"prompt": "a", "when": datetime(2024, 1, 1)}]).to_parquet(path)
    with pytest.raises(ValueError, match="Row 0: column 'when' must hold what JSON can, got "):
        load_prompts(ScriptArguments(str(path)), DatasetMixtureConfig())
    Dataset.from_list([{"text": "a"}]).to_parquet(path)
    with pytest.raises(ValueError, match=r"must have a column `prompt` to sample answers for, got \['text'\]"):
        load_prompts(ScriptArguments(str(path)), DatasetMixtureConfig())


def test_mixed_in_answers_that_training_would_refuse_are_found_first(tokenizer):
    chat = [{"role": "user", "content": "Hi"}]
    rows = [
        {"prompt": chat, "chosen": [{"role": "assistant", "content": "Hello"}]},
        {"prompt": [{"role": "system", "content": "Be kind."}, *chat], "chosen": [*chat, *chat]},
    ]
    options = RowOptions(max_length=100)
    with pytest.raises(ValueError, match=r"1 of 2 rows that cannot be used:\n  row 1: column 'completions\[1\]'"):
        check_prompts(rows, tokenizer, options, ["chosen"], "error")
    assert check_prompts(rows, tokenizer, options, ["chosen"], "drop") == rows[:1]
    assert check_prompts(rows, tokenizer, options, [], "error") == rows


def test_sampling_settings_without_rounds_are_refused(tmp_path):
    settings = arguments(dataset_name="x", model_name_or_path="y", output_dir=tmp_path, num_candidates=8)
    with pytest.raises(ValueError, match="`num_rounds` must be at least 1 where num_candidates are set"):
        in_rounds(parse(*settings))


def test_every_config_is_parsed_whole():
    configs = sorted((REPOSITORY / "recipes" / "configs").rglob("*.yaml"))
    recipes = {CONFIGS_OF.get(path.stem, path.stem): path.stem for path in (REPOSITORY / "recipes").glob("*.py")}
    found = set()
    for config in configs:
        values = yaml.safe_load(config.read_text())
        method = next(name for name in sorted(recipes, key=len, reverse=True) if config.stem.startswith(f"{name}_"))
        found.add((method, config.stem.endswith("_playground")))
        parsed = parse("--config", str(config), "--bf16", "False", recipe=recipes[method])
        for key, value in values.items():
            if key == "datasets":
                assert [entry.path for entry in parsed[3].datasets] == [entry["path"] for entry in value]
            elif key not in ("bf16", "report_to"):  # one is overridden above, the other is turned into a list
                assert any(getattr(part, key, None) == value for part in parsed), f"{config.name}: {key}"
    without = {"sample_and_rank"}  # it has no playground, and nothing of it is published
    unpublished = {
        (CONFIGS_OF.get(method.recipe, method.recipe), False)
        for name, method in METHODS.items()
        if method.is_public and not TRAINERS[name]._paper
    }
    assert found | unpublished == {(method, kind) for method in set(recipes) - without for kind in (True, False)}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "folder", "saved", "saved dict"])
def test_local_data_of_every_kind(kind, tmp_path, pairs):
    from datasets import DatasetDict

    if kind == "saved":
        pairs.save_to_disk(path := tmp_path / "saved")
    elif kind == "saved dict":
        DatasetDict({"train": pairs, "test": pairs}).save_to_disk(path := tmp_path / "saved")
    elif kind == "folder":
        (path := tmp_path / "folder").mkdir()
        pairs.to_json(path / "train.jsonl")
        pairs.to_json(path / "test.jsonl")
    else:
        path = tmp_path / f"rows.{kind}"
        {"jsonl": pairs.to_json, "json": pairs.to_json, "parquet": pairs.to_parquet, "csv": pairs.to_csv}[kind](path)
    script_args = ScriptArguments(dataset_name=str(path))
    has_test = kind in ("folder", "saved dict")
    mixture = DatasetMixtureConfig(test_split_size=None if has_test else 0.25)
    train, test = load_datasets(script_args, mixture, with_eval=True, seed=0)
    assert (len(train), len(test)) == ((8, 8) if has_test else (6, 2))
    assert set(train.column_names) == {"prompt", "chosen", "rejected"}


def test_missing_data_is_said(tmp_path, pairs):
    pairs.to_json(tmp_path / "rows.jsonl")

    def load(name, **kwargs):
        script_args = ScriptArguments(dataset_name=name, **kwargs)
        return load_datasets(script_args, DatasetMixtureConfig(), with_eval=True, seed=0)

    with pytest.raises(ValueError, match="`--dataset_name` must be set where a model is given"):
        load(None)
    with pytest.raises(FileNotFoundError, match="a local file, got .*, which is not there"):
        load("nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="a local folder, got .*, which is not there"):
        load("./nowhere")
    with pytest.raises(ValueError, match=r"must be one of \['train'\], got 'test'. Set it, or `--test_split_size"):
        load(str(tmp_path / "rows.jsonl"))
    (tmp_path / "folder").mkdir()
    pairs.to_json(tmp_path / "folder" / "train.jsonl")
    with pytest.raises(ValueError, match=r"must be one of \['train'\], got 'validation'"):
        load(str(tmp_path / "folder"), dataset_train_split="validation")


def test_plot_draws_train_and_eval(tmp_path):
    history = [
        {"step": 1, "loss": 2.0, "logps/chosen": -1.0, "logps/reference": -1.0},
        {"step": 2, "eval_loss": 1.5},
        {"step": 2, "loss": 1.0, "logps/chosen": -0.5, "logps/reference": -0.5},
        {"step": 2, "train_runtime": 1.0},
    ]
    assert plot_training_curves(history, tmp_path / "curves.png", title="t").stat().st_size > 5000
    assert plot_training_curves([], tmp_path / "empty.png", title="nothing yet").is_file()


# Whole runs


def test_train_evaluate_save_on_local_files(model_dir, pairs_file, tmp_path):
    output = tmp_path / "out"
    command = small_run(model_dir, pairs_file, output, eval_strategy="steps", eval_steps=4, test_split_size=0.25)
    printed = run([*command, "--use_peft", "--lora_target_modules", "q_proj", "v_proj"])
    assert "train data: 24 rows -> 24 prompts, 48 completions" in printed
    results = json.loads((output / "all_results.json").read_text())
    assert results["train_loss"] > 0 and results["eval_rewards/accuracies"] >= 0 and results["eval_loss"] > 0
    assert (output / "training_curves.png").stat().st_size > 5000
    assert (output / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(model_dir, pairs_file, tmp_path):
    """kill -9 in mid-training; the resumed run ends where an uninterrupted one does."""
    settings = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 30, "max_steps": 300}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(small_run(model_dir, pairs_file, whole, **{**settings, "save_steps": 300}))

    command = small_run(model_dir, pairs_file, broken, **settings)
    with warm.Popen(
        command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_until((broken / "checkpoint-12").is_dir, process)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (broken / "all_results.json").exists(), "it was too late to kill it"
    checkpoints = sorted(broken.glob("checkpoint-*"))
    assert checkpoints
    printed = run([*command, "--resume_from_checkpoint", "true"])

    histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (whole, broken)]
    losses = [{log["step"]: log["loss"] for log in history if "loss" in log} for history in histories]
    assert losses[0] == losses[1] and len(losses[0]) == 300
    weights = [load_file(folder / "model.safetensors") for folder in (whole, broken)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    assert "train data" in printed


@pytest.mark.slow
def test_real_preference_data(tmp_path, model_dir):
    """Train, evaluate, save, reload and resume on 235 real chats."""
    data = real_data("preference.jsonl")
    output = tmp_path / "out"
    settings = {
        "max_steps": 4, "max_length": 512, "on_invalid_row": "drop", "eval_strategy": "steps", "eval_steps": 2,
        "test_split_size": 0.1, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    printed = run(small_run(model_dir, data, output, **settings))
    assert "train data: 211 rows -> " in printed and "cut at max_length=512: " in printed
    first = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in first if "eval_loss" in log][:2] == [2, 4]

    shutil.rmtree(output / "checkpoint-4")
    run([*small_run(model_dir, data, output, **settings), "--resume_from_checkpoint", "true"])
    again = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [log.get("loss") for log in again if "loss" in log] == [log.get("loss") for log in first if "loss" in log]
    model = AutoModelForCausalLM.from_pretrained(output)
    saved = load_file(output / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())


@pytest.mark.slow
def test_sampled_and_ranked_data_train_any_recipe(model_dir, tmp_path):
    """`sample_and_rank.py`, twice the same command; what it makes is read by RRHF as lists and by SLiC-HF as pairs."""
    prompts, data = tmp_path / "prompts.jsonl", tmp_path / "data"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    rewards = f"{REWARDS}:vowels"
    script = str(REPOSITORY / "recipes" / "sample_and_rank.py")
    command = [*LAUNCH[:-1], script, *arguments(
        model_name_or_path=model_dir, dataset_name=prompts, output_dir=data, rewards=rewards, max_new_tokens=8,
        pair_rule="best_worst",
    ), "--mix_in", "chosen", "rejected"]  # fmt: skip
    assert "sampled 32 candidates" in run(command)
    made = (data / "ranked.jsonl").read_text()
    row = json.loads(made.splitlines()[0])
    assert row["sources"][-2:] == ["chosen", "rejected"] and len(row["scores"]) == len(row["completions"]) > 2
    stamp = (data / "shards" / "00000.jsonl").stat().st_mtime_ns
    run(command)
    assert (data / "ranked.jsonl").read_text() == made
    assert (data / "shards" / "00000.jsonl").stat().st_mtime_ns == stamp
    for recipe, rows in (("rrhf", "ranked"), ("slic", "pairs")):
        words = small_run(model_dir, data / f"{rows}.jsonl", tmp_path / recipe, max_steps=2)
        run([*words[:3], str(RECIPES[recipe]), *words[4:]])
        assert json.loads((tmp_path / recipe / "all_results.json").read_text())["train_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "processes"),
    [(True, 1), (True, 2), (False, 1), (False, 2)],
)
def test_a_process_of_several_ends_before_the_interpreter_is_torn_down(fails, processes):
    """Exit handlers and threads of the recipe still come to their end, and a failed recipe has failed."""
    script = (
        "import atexit, threading, time\n"
        "from trl_ext.cli.run import run_recipe\n"
        "class Last:\n"
        "    def __del__(self): print('torn down', flush=True)\n"
        "def main(arguments):\n"
        "    global last\n"
        "    last = Last()\n"
        "    atexit.register(print, 'handled', arguments)\n"
        "    threading.Thread(target=lambda: (time.sleep(0.2), print('thread through'))).start()\n"
        f"    if {fails}: raise ValueError('for a reason')\n"
        "run_recipe(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--beta", "1"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "WORLD_SIZE": str(processes)},
    )  # fmt: skip
    torn_down = ["torn down"] if fails or processes == 1 else []
    threads, *others = done.stdout.splitlines()
    assert threads.startswith("CPU threads of each process: ")
    assert others == ["thread through", "handled ['--beta', '1']", *torn_down]
    assert done.returncode == fails
    assert ("for a reason" in done.stderr) == fails
