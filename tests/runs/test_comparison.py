"""Whole comparisons on a tiny model."""

import json
import sys

import pytest
import yaml
from datasets import Dataset
from peft import PeftModel
from trl import get_peft_config

from tests.support.comparing import RECIPE, one_seed
from tests.support.data import PAIRS, REPOSITORY, REWARDS, read_jsonl
from tests.support.methods import TRAINERS
from tests.support.processes import stages_are_numbered
from tests.support.recipes import run
from trl_ext import SLiCConfig, SLiCTrainer, methods
from trl_ext.comparison.methods import METHODS
from trl_ext.comparison.results import ComparisonResults
from trl_ext.comparison.seed_run import models_resident
from trl_ext.comparison.stages import pairs_stage
from trl_ext.runtime.jsonl import write_jsonl

ROWS = [{**row, "reference": row["chosen"]} for row in PAIRS * 2]
ROWS = [{**row, "prompt": f"{number}. {row['prompt']}"} for number, row in enumerate(ROWS)]


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def command(model_dir, data, output_dir, *methods, **settings):
    values = {
        "model_name_or_path": model_dir, "dataset_name": data, "output_dir": output_dir, "bf16": False,
        "rewards": f"{REWARDS}:vowels", "max_steps": 2, "per_device_train_batch_size": 2,
        "num_candidates": 4, "max_new_tokens": 8, "num_watched_prompts": 4, "click_threshold": 0.1,
        "temperature": 1.0, **settings,
    }  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "accelerate.commands.launch", str(RECIPE), *words, "--methods", *methods]


BY_RECIPE = {methods.METHODS[name].recipe: trainer for name, trainer in TRAINERS.items()}
BY_LINE = {
    name: BY_RECIPE[line.recipe]
    for name, line in METHODS.items()
    if name not in ("sft", "slic_sample_rank", "rrhf_two_rounds")
}


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        *((name, {}, "1") for name in BY_LINE if name not in ("dpo", "kto", "rl")),
        ("slic_direct", {"reg_type": "kl"}, "2"),
        ("slic_direct", {"reg_type": "kl", "use_peft": True}, "1 + LoRA"),
        ("rrhf", {"use_peft": True}, "1 + LoRA"),
        ("dpo", {}, "2"),
        ("dpo", {"use_peft": True}, "1 + LoRA"),
        ("dpo", {"precompute_ref_log_probs": True}, "1"),
        ("kto", {}, "2"),
        ("kto", {"precompute_ref_log_probs": True}, "1"),
        ("rl", {}, "3"),
        ("rl", {"beta": 0.0}, "2"),
        ("rl", {"use_peft": True}, "2 + LoRA"),
    ],
)
def test_models_in_memory_are_those_that_the_trainer_has(method, options, expected, model_dir, tmp_path):
    game = one_seed("--output_dir", str(tmp_path), "--settings", json.dumps({method: options}))
    read = game._check(method, METHODS[method])
    assert models_resident(METHODS[method].recipe, read) == expected
    args = read[1]
    args.output_dir = str(tmp_path)
    if method == "rl":
        args.rewards = [f"{REWARDS}:vowels"]  # in place of a reward model
    trainer = BY_LINE[method](
        model=model_dir, args=args, train_dataset=Dataset.from_list(ROWS), peft_config=get_peft_config(read[2])
    )
    there = 1 + (getattr(trainer, "ref_model", None) is not None) + (method == "rl")
    assert expected == f"{there}{' + LoRA' if isinstance(trainer.model, PeftModel) else ''}"


@pytest.mark.slow
def test_every_method_is_compared_and_more_can_be_added(model_dir, prompts_file, tmp_path):
    output = tmp_path / "compared"
    further = {"dpo_low": {"method": "dpo", "label": "DPO, low beta", "beta": 0.01}}
    first = ["best_of_n", "slic_direct", "slic_sample_rank", "rrhf", "rrhf_two_rounds", "spin", "click", "dpo", "ipo"]
    extra = {"settings": json.dumps(further), "num_checkpoints": 1}
    printed = run(command(model_dir, prompts_file, output, *first, "dpo_low", **extra))
    assert "comparison.html, .md, .csv and .json are in" in printed and stages_are_numbered(printed)
    found = ComparisonResults.load(output / "comparison.json")
    assert [result.method for result in found.results] == ["sft", *first, "dpo_low"]
    for result in found.results:
        assert result.status == "done" and len(result.scores["reward"]) == len(result.measured["kl"]) == 4
        assert result.measured["updates"] == (0 if result.method == "sft" else 2)
    prompts = {result.method: result.measured["training_prompts"] for result in found.results}
    assert prompts["sft"] is None and prompts["slic_direct"] == 12
    assert all(1 <= prompts[method] <= 12 for method in first)
    # what is dropped for a method is counted: CLICK's pairs are of prompts alone that have a good and a bad answer
    assert prompts["click"] == len(read_jsonl(output / "seed-1" / "near" / "pairs.jsonl"))
    sampled = {result.method: result.measured["completions_sampled"] for result in found.results}
    assert sampled["slic_direct"] == sampled["sft"] == 0 and sampled["dpo"] == sampled["rrhf"] == 12 * 4
    assert sampled["rrhf_two_rounds"] == 2 * 12 * 2 and sampled["spin"] == 2 * 12
    (pair, *_) = read_jsonl(output / "seed-1" / "spin" / "round-1" / "generated" / "pairs.jsonl")
    assert set(pair) == {"prompt", "chosen", "rejected", "rejected_is_cut"}
    assert all(kl >= 0 for result in found.results for kl in result.measured["kl"])
    curve = next(result.curve for result in found.results if result.method == "dpo")
    assert [point["updates"] for point in curve] == [1, 2] and curve[0]["reward"] is not None
    page = (output / "comparison.html").read_text()
    assert "DPO, low beta" in page and "RRHF, two rounds" in page
    trained = yaml.safe_load((output / "seed-1" / "dpo_low" / "model" / "config.yaml").read_text())
    assert trained["beta"] == 0.01 and trained["max_steps"] == 2
    stamps = {path: path.stat().st_mtime_ns for path in (output / "seed-1").rglob("manifest.json")}

    # what is trained stays, what is added is trained
    again = {**extra, "resume_from_checkpoint": True}
    assert stages_are_numbered(run(command(model_dir, prompts_file, output, "dpo", "orpo", "kto", "rl", **again)))
    found = ComparisonResults.load(output / "comparison.json")
    asked = ["sft", "dpo", "orpo", "kto", "rl"]
    kept = [name for name in (*first, "dpo_low") if name not in asked]
    assert [result.method for result in found.results] == [*asked, *kept], "what was there before stays in the report"
    assert all(result.status == "done" for result in found.results)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())

    # what reinforcement learning costs
    result = {one.method: one for one in found.results}["rl"]
    costs = result.measured
    assert result.error is None and costs["models_resident"] == "3"
    candidates = 12 * 4  # prompts that are not held out, and answers to each
    assert costs["completions_sampled"] == candidates + 2 * 2 * 4  # updates, prompts in each, answers to each
    manifest = output / "seed-1" / "candidates" / "candidates" / "manifest.json"
    assert costs["sampling_seconds"] == json.loads(manifest.read_text())["seconds"]

    # other options do not pass for those it was trained with
    again |= {"settings": json.dumps({**further, "slic_direct": {"delta": 2.0}})}
    printed = run(command(model_dir, prompts_file, output, "slic_direct", **again), fails=True)
    assert "slic_direct must have the options that it was trained with: delta was 1.0 and is 2.0" in printed


@pytest.mark.slow
def test_a_method_that_fails_does_not_take_the_others_with_it(model_dir, prompts_file, tmp_path):
    output = tmp_path / "compared"
    broken = {"rl": {"reward_max_length": 100_000}}  # more than the reward model has positions
    printed = run(command(model_dir, prompts_file, output, "rl", "dpo", settings=json.dumps(broken)), fails=True)
    assert "RLOO failed and is skipped" in printed and "Some methods failed" in printed
    found = {result.method: result for result in ComparisonResults.load(output / "comparison.json").results}
    assert found["rl"].status == "failed" and found["dpo"].status == "done"
    assert "RLOO" in (output / "comparison.md").read_text()


@pytest.mark.slow
def test_two_processes(model_dir, prompts_file, tmp_path):
    results = []
    for processes, batch in ((1, 4), (2, 2)):
        output = tmp_path / str(processes)
        words = command(model_dir, prompts_file, output, "slic_direct", "rl",
                        per_device_train_batch_size=batch)  # fmt: skip
        cpu = str(REPOSITORY / "accelerate_configs" / "cpu.yaml")
        run([*words[:3], "--config_file", cpu, "--num_processes", str(processes), *words[3:]])
        results.append(ComparisonResults.load(output / "comparison.json").results)
        assert all(result.status == "done" and result.measured["updates"] in (0, 2) for result in results[-1])
    for one, two in zip(*results, strict=True):
        assert one.method == two.method
        assert one.measured["completions_sampled"] == two.measured["completions_sampled"]
    start = [read_jsonl(tmp_path / n / "seed-1" / "start" / "evaluation" / "answers.jsonl") for n in ("1", "2")]
    assert [row["answer"] for row in start[0]] == [row["answer"] for row in start[1]]
    # without sampling in between, training is the same
    one, two = (next(result.measured for result in found if result.method == "slic_direct") for found in results)
    assert one["nll"] == pytest.approx(two["nll"], rel=1e-3) and one["kl"] == pytest.approx(two["kl"], abs=1e-3)


def test_pairs_of_the_dataset_keep_their_scores(model_dir, tmp_path):
    scored = [{**row, "score_chosen": 3.0, "score_rejected": 1.0, "source": "web"} for row in PAIRS]
    write_jsonl(tmp_path / "prompts.jsonl", scored)
    pairs_stage(tmp_path, prompts=tmp_path / "prompts.jsonl", on_playground=False, seed=1)
    rows = read_jsonl(tmp_path / "pairs.jsonl")
    assert rows == [{key: value for key, value in row.items() if key != "source"} for row in scored]
    # which this loss cannot do without
    args = SLiCConfig(str(tmp_path / "out"), calibration="margin", max_steps=1, report_to="none")
    trainer = SLiCTrainer(model_dir, args=args, train_dataset=Dataset.from_list(rows))
    assert trainer.train_dataset[0]["scores"] == [3.0, 1.0]
