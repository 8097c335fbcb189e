"""All iterations of SPIN, as their users start them."""

import json
import os
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import reference
from tests.support.data import PAIRS, REPOSITORY, real_data
from tests.support.processes import stages_are_numbered
from tests.support.recipes import launcher, run, start, start_and_kill
from tests.support.self_play import ROWS, assert_same_weights, manifest, weights
from trl_ext.runtime.fingerprints import model_fingerprint
from trl_ext.runtime.jsonl import read_jsonl


@pytest.fixture
def sft_file(tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def command(model_dir, data, output_dir, launcher=(sys.executable,), **kwargs):
    settings = {
        "model_name_or_path": model_dir, "dataset_name": data, "output_dir": output_dir, "bf16": False,
        "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 4, "num_train_epochs": 2,
        "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "num_iterations": 2,
        "num_watched_prompts": 4, "max_new_tokens": 8, "max_length": 128, "activation_checkpointing": False, **kwargs,
    }  # fmt: skip
    arguments = [item for key, value in settings.items() if value is not None for item in (f"--{key}", str(value))]
    return [*launcher, str(REPOSITORY / "recipes" / "spin.py"), *arguments]


def slow_logps(folder, pairs):
    """Log-likelihood of both answers of each pair under a saved model, one sequence at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for pair in pairs:
        prompt = tokenizer(pair["prompt"])["input_ids"]
        answers = [tokenizer(pair[side])["input_ids"] + [tokenizer.eos_token_id] for side in ("chosen", "rejected")]
        answers[1] = answers[1][:-1] if pair["rejected_is_cut"] else answers[1]
        found.append([reference.sequence_logp(model, prompt, ids).item() for ids in answers])
    return torch.tensor(found)


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """`finished(how, strategy)`: the folder of a run of one process or of two, which tests share."""
    made = tmp_path_factory.mktemp("finished")
    data = made / "sft.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def folder(how="all", strategy=None):
        output = made / f"{how}-{strategy}"
        if not output.exists():
            settings = {"reference": "initial"} if how == "initial" else {}
            settings |= {} if strategy is None else {"launcher": launcher(strategy), "per_device_train_batch_size": 2}
            lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"] if how == "lora" else []
            run([*command(model_dir, data, output, **settings), *lora])
        return output

    return folder


@pytest.mark.slow
def test_two_iterations_by_hash(model_dir, sft_file, tmp_path):
    whole = tmp_path / "whole"
    printed = run(command(model_dir, sft_file, whole))
    assert "margin over the opponent" in printed and "SPIN iteration 1" in printed and stages_are_numbered(printed)
    report = json.loads((whole / "spin.json").read_text())
    assert list(report["models"]) == ["start", "iteration-0", "iteration-1"]
    assert report["model"] == str(whole / "iteration-1" / "model") and (whole / "spin.png").stat().st_size > 5000
    assert report["models"]["iteration-1"]["nll"] < report["models"]["start"]["nll"] - 0.1
    assert (
        len(read_jsonl(whole / "rows" / "train.jsonl")) == 20
        and len(read_jsonl(whole / "rows" / "watched.jsonl")) == 4
    )

    # what each iteration starts from is what the one before has saved; policy and reference are one load of it
    start, first, second = (whole / name / "model" for name in ("start", "iteration-0", "iteration-1"))
    assert not start.exists(), "a model on disk is not copied"
    hashes = [manifest(whole, f"iteration-{n}", "model")["inputs"]["model"] for n in (0, 1)]
    assert hashes[1] == model_fingerprint(first) != model_fingerprint(second)
    assert hashes[0] == manifest(whole, "start", "evaluation")["inputs"]["model"] != hashes[1]
    for number in (0, 1):
        assert manifest(whole, f"iteration-{number}", "generated")["inputs"]["model"] == hashes[number]
        assert report["training"][f"iteration-{number}"]["first_loss"] == pytest.approx(0.6931, abs=1e-4)

    # iteration 1 trains on both sets of answers, each of them another file with another content
    inputs = manifest(whole, "iteration-1", "model")["inputs"]
    assert inputs["generated_000"] == manifest(whole, "iteration-0", "model")["inputs"]["generated_000"]
    sets = [read_jsonl(whole / f"iteration-{n}" / "generated" / "pairs.jsonl") for n in (0, 1)]
    assert [pair["chosen"] for pair in sets[0]] == [pair["chosen"] for pair in sets[1]]
    assert [pair["rejected"] for pair in sets[0]] != [pair["rejected"] for pair in sets[1]]
    assert report["training"]["iteration-1"]["num_pairs"] == len(sets[0]) + len(sets[1])

    # and the reference of all of them is the model that iteration 0 has saved
    with np.load(second / "reference_train.npz") as kept:
        used = torch.tensor(kept["logps"]).view(-1, 2)
    pairs = [*sets[0], *sets[1]]
    torch.testing.assert_close(used, slow_logps(first, pairs).to(used), rtol=1e-4, atol=1e-3)
    assert (used - slow_logps(model_dir, pairs).to(used)).abs().min() > 0.01

    # what must not go on does not, and changes nothing
    arguments = command(model_dir, sft_file, whole)
    resume = [*arguments, "--resume_from_checkpoint", "true"]
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert "holds an earlier run. Add `--resume_from_checkpoint true`" in run(arguments, fails=True)
    changed = run([*resume, "--beta", "0.5"], fails=True)
    assert "was begun with other settings: beta of iteration 0 was 0.1 and is 0.5" in changed
    sft_file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    assert "was begun with other settings: data was" in run(resume, fails=True)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.slow
def test_killed_at_any_point_and_played_further(finished, model_dir, sft_file, tmp_path):
    """While it generates, trains iteration 0, and in mid-training of iteration 1: the weights are the same."""
    whole, broken = finished(), tmp_path / "broken"
    arguments = command(model_dir, sft_file, broken)
    resume = [*arguments, "--resume_from_checkpoint", "true"]
    start_and_kill(arguments, lambda: (broken / "iteration-0" / "generated" / "sampling.json").exists())
    start_and_kill(resume, lambda: (broken / "iteration-0" / "model" / "reference_train.npz").exists())
    generated = broken / "iteration-0" / "generated" / "manifest.json"
    stamp = generated.stat().st_mtime_ns
    start_and_kill(resume, lambda: list((broken / "iteration-1" / "model").glob("checkpoint-*")))
    assert not (broken / "iteration-1" / "model" / "manifest.json").exists()
    run(resume)
    assert generated.stat().st_mtime_ns == stamp
    assert_same_weights(whole / "iteration-0" / "model", broken / "iteration-0" / "model")
    assert_same_weights(whole / "iteration-1" / "model", broken / "iteration-1" / "model")
    reports = [json.loads((folder / "spin.json").read_text()) for folder in (whole, broken)]
    assert reports[0]["models"] == reports[1]["models"] and reports[0]["training"] == reports[1]["training"]

    # a third iteration may be added later
    run([*resume, "--num_iterations", "3"])
    assert manifest(broken, "iteration-2", "model")["inputs"]["model"] == model_fingerprint(
        broken / "iteration-1" / "model"
    )
    assert {"generated_001", "generated_002"} < set(manifest(broken, "iteration-2", "model")["inputs"])
    assert "generated_000" not in manifest(broken, "iteration-2", "model")["inputs"]

    # a model that somebody has replaced is noticed
    first, second = (broken / f"iteration-{number}" / "model" / "model.safetensors" for number in (0, 1))
    first.write_bytes(second.read_bytes())
    replaced = run([*resume, "--num_iterations", "3"], fails=True)
    assert f"{first} holds something else than stage 'iteration-0/model' had written" in replaced


def test_a_folder_of_something_else_is_left_alone(model_dir, sft_file, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    printed = run(command(model_dir, sft_file, output), fails=True)
    assert "it has no run.json and holds notes.txt" in printed
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_a_single_iteration_on_pairs(model_dir, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    run(command(model_dir, pairs, tmp_path / "out", num_watched_prompts=None, num_iterations=None, beta=1.0))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_lora_and_initial_reference(model_dir, sft_file, tmp_path):
    output = tmp_path / "out"
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    arguments = [*command(model_dir, sft_file, output, reference="initial"), *lora]
    run(arguments)
    report = json.loads((output / "spin.json").read_text())
    losses = [report["training"][f"iteration-{number}"]["first_loss"] for number in (0, 1)]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert manifest(output, "iteration-1", "model")["inputs"]["initial"] == hash_of_weights_of_start(output)
    assert abs(losses[1] - 0.6931) > 0.01, "the reference is behind the policy"
    merged = output / "iteration-0" / "merged"
    assert manifest(output, "iteration-1", "model")["inputs"]["model"] == model_fingerprint(merged)
    before, after = load_file(f"{model_dir}/model.safetensors"), weights(merged)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
    assert report["model"] == str(output / "iteration-1" / "merged")
    # another process sees sets in another order, and the same settings
    run([*arguments, "--resume_from_checkpoint", "true"], PYTHONHASHSEED="2")


def hash_of_weights_of_start(output):
    return manifest(output, "start", "evaluation")["inputs"]["model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "how"), [("ddp", "all"), ("zero2", "all"), ("zero3", "lora"), ("zero3", "initial")]
)
def test_two_processes_equal_one(strategy, how, finished):
    one, two = finished(how), finished(how, strategy)
    first = "iteration-0/generated/pairs.jsonl"
    assert (one / first).read_text() == (two / first).read_text()
    model = "merged" if how == "lora" else "model"
    assert_same_weights(one / "iteration-0" / model, two / "iteration-0" / model, exactly=False)
    reports = [json.loads((folder / "spin.json").read_text()) for folder in (one, two)]
    for number in (0, 1):
        losses = [report["training"][f"iteration-{number}"]["first_loss"] for report in reports]
        if how == "initial" and number:
            assert abs(losses[1] - 0.6931) > 0.01 and losses[1] == pytest.approx(losses[0], abs=0.02)
        else:
            assert losses[1] == pytest.approx(0.6931, abs=1e-4)


DROP_IN = """
import json, sys
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl_ext import SPINConfig, SPINTrainer
from trl_ext.cli.run import run_recipe

def main(arguments):
    model, data, output = arguments
    rows = [json.loads(line) for line in open(data)]
    trainer = SPINTrainer(
        model=model,
        args=SPINConfig(
            output, num_iterations=2, num_watched_prompts=4, max_new_tokens=8, max_length=128, learning_rate=3e-3,
            per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none", eval_strategy="epoch",
        ),
        train_dataset=Dataset.from_list(rows[:20]),
        eval_dataset=Dataset.from_list(rows[20:]),
    )
    trainer.train()
    trainer.save_model(output + "-taken")

if __name__ == "__main__":
    run_recipe(main)
"""


@pytest.mark.slow
def test_the_trainer_by_itself_on_two_processes(model_dir, sft_file, tmp_path):
    script, output = tmp_path / "script.py", tmp_path / "out"
    script.write_text(DROP_IN)
    run([*launcher("zero3"), str(script), model_dir, str(sft_file), str(output)])
    report = json.loads((output / "spin.json").read_text())
    assert report["models"]["start"]["num_answers"] == 4, "the rows of the eval dataset"
    for number in (0, 1):
        assert report["training"][f"iteration-{number}"]["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert_same_weights(output / "iteration-1" / "model", tmp_path / "out-taken")
    assert not list((tmp_path / "out-taken").glob("checkpoint*"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out-taken").num_parameters() > 0


@pytest.mark.slow
def test_two_processes_killed_between_stages_go_on(finished, model_dir, sft_file, tmp_path):
    whole, broken = finished(strategy="ddp"), tmp_path / "broken"
    arguments = command(model_dir, sft_file, broken, launcher("ddp"), per_device_train_batch_size=2)
    start_and_kill(arguments, lambda: (broken / "iteration-0" / "generated" / "manifest.json").exists())
    run([*arguments, "--resume_from_checkpoint", "true"])
    assert_same_weights(whole / "iteration-1" / "model", broken / "iteration-1" / "model")


@pytest.mark.slow
def test_memory_stays_flat_over_iterations(model_dir, sft_file, tmp_path):
    """Of the process that lives through all of them; the others end with their stage."""
    output = tmp_path / "out"
    arguments = command(model_dir, sft_file, output, num_iterations=5)
    resident = {}
    with start(arguments) as process:
        while process.poll() is None:
            for number in (1, 4):
                if number not in resident and (output / f"iteration-{number}/evaluation/manifest.json").exists():
                    pages = int(open(f"/proc/{process.pid}/statm").read().split()[1])
                    resident[number] = pages * os.sysconf("SC_PAGE_SIZE")
            time.sleep(0.01)
    assert process.returncode == 0 and resident[4] < 1.05 * resident[1], resident


@pytest.mark.slow
def test_real_instruction_answers(model_dir, tmp_path):
    data = real_data("sft.jsonl")
    output = tmp_path / "out"
    settings = {"max_new_tokens": 16, "max_length": 384, "on_invalid_row": "drop", "max_steps": 6}
    printed = run(command(model_dir, data, output, launcher("zero3"), num_watched_prompts=16, **settings))
    assert "dropped: " in printed
    report = json.loads((output / "spin.json").read_text())
    assert report["training"]["iteration-1"]["num_pairs"] > 1000
    assert report["models"]["iteration-1"]["margin"] > 0
    for number in (0, 1):
        assert report["training"][f"iteration-{number}"]["first_loss"] == pytest.approx(0.6931, abs=1e-3)
