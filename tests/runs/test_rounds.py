"""The loop as its users start it, and its parts."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.data import PAIRS, REWARDS
from tests.support.processes import stages_are_numbered
from tests.support.recipes import command, launcher, run, start_and_kill
from trl_ext.data.prompts import hold_out
from trl_ext.runs.config import RoundsConfig
from trl_ext.runs.watch import reward_hacking
from trl_ext.runtime.jsonl import read_jsonl

PROMPTS = [{"prompt": f"{row['prompt']}{number} "} for number in range(3) for row in PAIRS]


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """The folder of two rounds on one process, and what they printed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return folder / "whole", run(command("rrhf.py", model_dir, folder / "prompts.jsonl", folder / "whole"))


@pytest.mark.slow
def test_killed_rounds_go_on_to_the_same_model(finished, model_dir, prompts_file, tmp_path):
    """kill -9 while round 2 trains; then the same command with resume. Finished stages are left as they are."""
    (whole, printed), broken = finished, tmp_path / "broken"
    assert "wins over the first" in printed and "sampled 60 candidates" in printed and stages_are_numbered(printed)
    report = json.loads((whole / "rounds.json").read_text())
    assert list(report["models"]) == ["start", "round-1", "round-2"] and report["stopped"] is None
    assert report["model"] == str(whole / "round-2" / "model")
    assert report["models"]["round-2"]["perplexity"] != report["models"]["round-1"]["perplexity"]
    assert (whole / "rounds.png").stat().st_size > 5000
    manifest = json.loads((whole / "round-2" / "model" / "manifest.json").read_text())
    assert manifest["arguments"]["train_with"] == "__mp_main__:train" and manifest["versions"]["trl"]
    kept = whole / "prompts"
    assert len(read_jsonl(kept / "watched.jsonl")) == 4 and len(read_jsonl(kept / "train.jsonl")) == 20

    arguments = command("rrhf.py", model_dir, prompts_file, broken)
    start_and_kill(arguments, lambda: list((broken / "round-2" / "model").glob("checkpoint-*")))
    assert not (broken / "round-2" / "model" / "manifest.json").exists()
    sampled = broken / "round-2" / "candidates" / "manifest.json"
    stamp = sampled.stat().st_mtime_ns
    run([*arguments, "--resume_from_checkpoint", "true"])
    assert sampled.stat().st_mtime_ns == stamp
    expected, found = weights(whole / "round-2" / "model"), weights(broken / "round-2" / "model")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert json.loads((broken / "rounds.json").read_text())["models"] == report["models"]

    refused = run(arguments, fails=True)
    assert "holds an earlier run. Add `--resume_from_checkpoint true`" in refused
    changed = [*arguments, "--resume_from_checkpoint", "true", "--temperature", "0.5"]
    assert "was begun with other settings: temperature was 1.0 and is 0.5" in run(changed, fails=True)


@pytest.mark.slow
def test_a_failing_reward_loses_no_candidates(model_dir, prompts_file, tmp_path, monkeypatch):
    """The reward function breaks down; once it works again, the run goes on with what was sampled."""
    output, breakdown = tmp_path / "out", tmp_path / "breakdown"
    monkeypatch.setenv("SCORING_BREAKDOWN", str(breakdown))
    breakdown.touch()
    arguments = command("rrhf.py", model_dir, prompts_file, output, rewards=f"{REWARDS}:from_a_service", num_rounds=1)
    printed = run(arguments, fails=True)
    assert "the scoring service is down" in printed and "What is finished is kept" in printed
    candidates = output / "round-1" / "candidates"
    stamps = {path: path.stat().st_mtime_ns for path in candidates.rglob("*") if path.is_file()}
    assert len(read_jsonl(candidates / "candidates.jsonl")) == 20

    breakdown.unlink()
    run([*arguments, "--resume_from_checkpoint", "true"])
    assert stamps == {path: path.stat().st_mtime_ns for path in candidates.rglob("*") if path.is_file()}
    assert list(json.loads((output / "rounds.json").read_text())["models"]) == ["start", "round-1"]


@pytest.mark.slow
def test_two_processes_equal_one(finished, model_dir, prompts_file, tmp_path):
    one, two = finished[0], tmp_path / "two"
    run(command("rrhf.py", model_dir, prompts_file, two, launcher("ddp"), per_device_train_batch_size=1))
    name = "round-1/ranked/ranked.jsonl"
    for expected, found in zip(read_jsonl(one / name), read_jsonl(two / name), strict=True):
        assert found["logps"] == pytest.approx(expected["logps"], rel=1e-5)  # computed in batches of another shape
        assert {**found, "logps": None} == {**expected, "logps": None}
    expected, found = weights(one / "round-1" / "model"), weights(two / "round-1" / "model")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
    assert (two / "rounds.json").exists()


@pytest.mark.slow
def test_zero3_trains_and_samples_in_turn(finished, model_dir, prompts_file, tmp_path):
    one, two = finished[0], tmp_path / "two"
    run(
        command(
            "rrhf.py", model_dir, prompts_file, two, launcher("zero3"), num_rounds=1, per_device_train_batch_size=1
        )
    )
    expected, found = weights(one / "round-1" / "model"), weights(two / "round-1" / "model")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_lora_is_merged_before_and_between_rounds(model_dir, tokenizer, prompts_file, tmp_path):
    """What the rounds start from is an adapter, too."""
    output, adapter = tmp_path / "out", tmp_path / "adapter"
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir),
        LoraConfig(target_modules=["k_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    run([*command("rrhf.py", adapter, prompts_file, output), *lora])
    before, merged = weights(output / "start" / "merged"), weights(output / "round-1" / "merged")
    start = adapted.merge_and_unload().state_dict()
    torch.testing.assert_close(before, {name: start[name] for name in before})
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
    manifest = json.loads((output / "round-2" / "candidates" / "manifest.json").read_text())
    assert manifest["inputs"]["model"].startswith("sha256:")
    assert json.loads((output / "rounds.json").read_text())["model"] == str(output / "round-2" / "merged")


@pytest.mark.slow
def test_slic_sample_rank_and_click_on_pairs(model_dir, prompts_file, tmp_path):
    slic = {"num_rounds": 1, "pair_rule": "tournament", "rewards": None, "ranker": f"{REWARDS}:more_vowels"}
    run(command("slic.py", model_dir, prompts_file, tmp_path / "slic", **slic))
    pairs = read_jsonl(tmp_path / "slic" / "round-1" / "ranked" / "pairs.jsonl")
    assert pairs and set(pairs[0]) >= {"prompt", "chosen", "rejected"}
    click = {"num_rounds": 1, "pair_rule": "likelihood_near", "positive_above": 0.05, "num_candidates": 6}
    run(command("train_click.py", model_dir, prompts_file, tmp_path / "click", **click))
    assert (tmp_path / "click" / "round-1" / "model" / "model.safetensors").is_file()


# Parts

GOOD = {"reward": 0.5, "perplexity": 10.0, "distinct_1": 0.8, "distinct_2": 0.9}


@pytest.mark.parametrize(
    ("now", "judged", "reason"),
    [
        ({}, None, None),
        ({"reward": 0.4, "perplexity": 90.0}, None, None),  # no gain to be suspicious of
        ({"reward": 0.6, "perplexity": 14.9}, None, None),
        ({"reward": 0.6, "perplexity": 15.1}, None, "perplexity went from 10.0 at the start to 15.1"),
        ({"reward": 0.6, "distinct_2": 0.5}, None, "distinct-2 fell from 0.90 at the start to 0.50"),
        ({"reward": 0.6, "distinct_2": None}, None, None),  # answers of one word each
        ({"reward": 0.6, "distinct_1": None, "distinct_2": None}, None, "the answers lost all words"),
        ({"reward": 0.6}, -0.1, "the judge's score changed by -0.100"),
        ({"reward": 0.6}, 0.1, None),
    ],
)
def test_reward_hacking_by_hand(now, judged, reason):
    before = None if judged is None else {n: 0.5 + 0.01 * n for n in range(20)}
    after = None if judged is None else {n: value + judged + 0.001 * (-1) ** n for n, value in before.items()}
    config = RoundsConfig(num_rounds=1, rewards=["f.py:f"])
    found = reward_hacking(GOOD, GOOD, {**GOOD, **now}, before, after, config)
    assert (found is None) if reason is None else reason in found


def test_prompts_are_set_apart_whole():
    rows = [{"prompt": f"p{number % 10}", "number": number} for number in range(30)]
    train, watched = hold_out(rows, 4, seed=1)
    assert len(watched) == 4 and len(train) == 18
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in watched}
    assert hold_out(rows, 4, seed=1) == (train, watched) != hold_out(rows, 4, seed=2)
    with pytest.raises(ValueError, match="`num_watched_prompts` must be at most half of the 10 .*, got 6"):
        hold_out(rows, 6, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rounds": -1}, "`num_rounds` must be 0 .*got -1"),
        ({"num_rounds": 1}, "Neither `rewards` nor `ranker` is given"),
        ({"num_rounds": 1, "rewards": ["a"], "ranker": "b"}, "Both `rewards` and `ranker` are given"),
        ({"rewards": ["a"], "judge": "b"}, "`rewards`, `judge` has no effect with num_rounds=0"),
        ({"num_rounds": 1, "rewards": ["a"], "pairs_per_prompt": 2}, "`pairs_per_prompt` needs `pair_rule`, got 2"),
        (
            {"num_rounds": 1, "rewards": ["a"], "positive_above": 0.1},
            "'likelihood_near', got 0.1 with None",
        ),
        ({"num_rounds": 1, "rewards": ["a"], "max_perplexity_ratio": 1.0}, "an unchanged model counts"),
        (
            {"num_rounds": 1, "rewards": ["a"], "num_watched_prompts": 1},
            "must be at least 2, got 1",
        ),
    ],
)
def test_settings_that_cannot_be_honoured(settings, message):
    with pytest.raises(ValueError, match=message):
        RoundsConfig(**settings)
