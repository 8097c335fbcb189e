"""All iterations of SPIN, as their users start them."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.support import reference, warm
from tests.support.data import PAIRS, REPOSITORY, real_data
from tests.support.processes import stages_are_numbered
from trl_ext import SPINConfig, SPINTrainer
from trl_ext.methods.spin.rows import as_dataset, is_sft_data, sft_rows
from trl_ext.methods.spin.self_play import SelfPlay
from trl_ext.runs.run import Run
from trl_ext.runtime.fingerprints import model_fingerprint
from trl_ext.runtime.jsonl import read_jsonl

ROWS = [
    {"prompt": f"{row['prompt']}{number} ", "completion": row["chosen"], "note": number}
    for number in range(3)
    for row in PAIRS
]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


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


def run(arguments, expect_failure=False, hash_seed=0):
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(hash_seed),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "DS_ACCELERATOR": "cpu",
    }
    done = warm.run(arguments, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == expect_failure, done.stdout[-4000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def manifest(output, *stage):
    return json.loads(output.joinpath(*stage, "manifest.json").read_text())


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other, exactly=True):
    expected, found = weights(folder), weights(other)
    for name, weight in expected.items():
        if exactly:
            assert torch.equal(found[name], weight), name
        else:
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


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


def start_and_kill(arguments, when):
    """kill -9 the run, and it alone, as soon as `when()`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with warm.Popen(
        arguments, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.time() + 300
        while not when() and time.time() < deadline:
            assert process.poll() is None, "it was too late to kill it"
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(2)  # what it started has to end by itself


def launcher(strategy):
    if strategy == "ddp":
        return TORCHRUN
    pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    config = str(REPOSITORY / "accelerate_configs" / f"{strategy}.yaml")
    return (sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2")


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


# The recipe


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
    assert "holds an earlier run. Add `--resume_from_checkpoint true`" in run(arguments, expect_failure=True)
    changed = run([*resume, "--beta", "0.5"], expect_failure=True)
    assert "was begun with other settings: beta of iteration 0 was 0.1 and is 0.5" in changed
    sft_file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    assert "was begun with other settings: data was" in run(resume, expect_failure=True)
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
    replaced = run([*resume, "--num_iterations", "3"], expect_failure=True)
    assert f"{first} holds something else than stage 'iteration-0/model' had written" in replaced


def test_a_folder_of_something_else_is_left_alone(model_dir, sft_file, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    printed = run(command(model_dir, sft_file, output), expect_failure=True)
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
    run([*arguments, "--resume_from_checkpoint", "true"], hash_seed=2)


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
    start = command(model_dir, sft_file, broken, launcher("ddp"), per_device_train_batch_size=2)
    start_and_kill(start, lambda: (broken / "iteration-0" / "generated" / "manifest.json").exists())
    run([*start, "--resume_from_checkpoint", "true"])
    assert_same_weights(whole / "iteration-1" / "model", broken / "iteration-1" / "model")


@pytest.mark.slow
def test_memory_stays_flat_over_iterations(model_dir, sft_file, tmp_path):
    """Of the process that lives through all of them; the others end with their stage."""
    output = tmp_path / "out"
    arguments = command(model_dir, sft_file, output, num_iterations=5)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    resident = {}
    with warm.Popen(
        arguments, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
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


# The trainer


def self_play(model, rows, config_kwargs, **settings):
    trainer_keys = ("eval_dataset", "quantization_config", "peft_config", "callbacks", "ref_model", "processing_class")
    trainer_kwargs = {key: settings.pop(key) for key in trainer_keys if key in settings}
    defaults = {"num_watched_prompts": 4, "max_new_tokens": 8, "max_length": 128, "num_iterations": 2}
    return SPINTrainer(
        model=model,
        args=SPINConfig(**{**config_kwargs, **defaults, **settings}),
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        **trainer_kwargs,
    )


def test_train_plays_all_iterations_from_a_model_in_memory(model, model_dir, tokenizer, config_kwargs, capsys):
    """The weights in memory are not those of the folder the model came from."""
    settings = {"learning_rate": [3e-3, 1e-3], "loss": "hinge", "num_train_epochs": 2, "processing_class": tokenizer}
    trainer = self_play(model, ROWS, config_kwargs, **settings)
    with pytest.raises(AttributeError, match="has no 'model' before `train\\(\\)` has played the iterations"):
        trainer.model  # noqa: B018
    result = trainer.train()
    assert stages_are_numbered(capsys.readouterr().out)
    output = Path(config_kwargs["output_dir"])
    saved = weights(output / "start" / "model")
    assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items() if name in saved)
    assert any(not torch.equal(weight, saved[name]) for name, weight in weights(Path(model_dir)).items())
    assert manifest(output, "iteration-0", "model")["inputs"]["model"] == model_fingerprint(output / "start" / "model")
    used = [manifest(output, f"iteration-{n}", "model")["arguments"]["settings"] for n in (0, 1)]
    assert [each["learning_rate"] for each in used] == [3e-3, 1e-3] and used[0]["beta"] == 0.1
    report = json.loads((output / "spin.json").read_text())
    assert all(report["training"][f"iteration-{n}"]["first_loss"] == pytest.approx(1, abs=1e-4) for n in (0, 1))
    assert set(result.metrics["models"]) == {"start", "iteration-0", "iteration-1"}
    final = weights(output / "iteration-1" / "model")
    assert all(torch.equal(p, final[name]) for name, p in trainer.model.named_parameters() if name in final)
    trainer.save_model(str(output / "taken"))
    assert_same_weights(output / "taken", output / "iteration-1" / "model")

    # again, going on: nothing is left to do; and not with another model
    again = self_play(model, ROWS, config_kwargs, **settings)
    stamp = (output / "iteration-1" / "model" / "manifest.json").stat().st_mtime_ns
    again.train(resume_from_checkpoint=True)
    assert (output / "iteration-1" / "model" / "manifest.json").stat().st_mtime_ns == stamp
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    other = self_play(model, ROWS, config_kwargs, **settings)
    with pytest.raises(ValueError, match="has other weights than the one this run was begun with"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_tokenizer_is_saved_with_the_start_and_an_adapter_is_merged(model_dir, tokenizer, config_kwargs, tmp_path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}own {{ m.content }}{% endfor %}"
    once = {"num_iterations": 1, "num_watched_prompts": 0, "max_steps": 1}
    for name, model, processing_class, start in (
        ("named", model_dir, own, "start/model"),
        ("adapter", str(tmp_path / "adapter"), None, "start/merged"),
        ("both", str(tmp_path / "adapter"), own, "start/model"),
    ):
        output = tmp_path / "runs" / name
        kwargs = {**config_kwargs, "output_dir": str(output)}
        self_play(model, ROWS, kwargs, processing_class=processing_class, **once).train()
        folder = output / start
        inputs = manifest(output, "iteration-0", "model")["inputs"]
        assert inputs["model"] == model_fingerprint(folder)
        saved = AutoTokenizer.from_pretrained(folder)
        assert saved.chat_template == (processing_class or tokenizer).chat_template
        if name != "named":
            found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
            torch.testing.assert_close(found, merged)
    with pytest.raises(ValueError, match="that loading the adapter repeats, got 'pissa_niter_4'"):
        adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_4", task_type="CAUSAL_LM")
        self_play(model_dir, ROWS, config_kwargs, peft_config=adapter)


def test_early_stop_takes_the_model_before(model_dir, config_kwargs):
    """With a step that is far too large the likelihood of held-out answers falls, and the start is the one to take."""
    trainer = self_play(model_dir, ROWS, config_kwargs, learning_rate=1.0, early_stop="nll", num_train_epochs=2)
    trainer.train()
    saved = load_file(f"{model_dir}/model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in trainer.model.named_parameters() if name in saved)


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]


def test_messages_are_split(tokenizer, config_kwargs):
    rows = Dataset.from_list([{"messages": MESSAGES, "prompt": "hi"}])
    assert is_sft_data(rows) and not is_sft_data(Dataset.from_list(PAIRS))
    config = SPINConfig(**config_kwargs)
    (row,) = sft_rows(rows, tokenizer, config, None, "train")
    assert (row["prompt"], row["completion"]) == (MESSAGES[:4], MESSAGES[4:])
    (row,) = sft_rows(rows, tokenizer, SPINConfig(**config_kwargs, first_turn_only=True), None, "train")
    assert (row["prompt"], row["completion"]) == (MESSAGES[:2], MESSAGES[2:3])


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "a"}], {}, r"has the columns \['prompt'\]. SPIN plays all iterations on `prompt` and `compl"),
        ([{"completion": "a"}], {}, r"has the columns \['completion'\]. SPIN needs `prompt` and `completion`"),
        ([*ROWS, {**ROWS[0], "completion": " "}], {}, "row 24: column 'completion' is empty. Leave out rows"),
        ([*ROWS, {**ROWS[0], "completion": None}], {}, r"row 24: column 'completion' is missing \(None\)"),
        ([*ROWS, {**ROWS[0], "prompt": ""}], {}, "row 24: column 'prompt' is missing or empty"),
        ([{"messages": MESSAGES}, {"messages": MESSAGES[:4]}], {}, "row 1: column 'messages' ends with a message"),
        (
            [{"prompt": MESSAGES[:2], "completion": MESSAGES[1:2]}], {},
            "row 0: column 'completion' ends with a message of the user",
        ),
        ([*ROWS, {**ROWS[0], "prompt": "x" * 200}], {}, "row 24: column 'prompt' has 200 tokens and fills max_l"),
        (
            [*ROWS, {**ROWS[0], "prompt": "x" * 510}], {"max_length": None},
            "row 24: column 'prompt' has 510 tokens and with max_new_tokens=8 exceeds the model's window of 512",
        ),
        (ROWS, {"first_turn_only": True}, "first_turn_only=True would do nothing"),
        (ROWS, {"num_watched_prompts": 20}, "num_watched_prompts=20 of 24 different prompts"),
        (ROWS, {"num_watched_prompts": 0, "early_stop": "nll"}, "early_stop='nll' watches held-out rows"),
        (ROWS, {"num_watched_prompts": 0, "rewards": ["f.py:f"]}, "would do nothing: there are no held-out rows"),
        ([{**row, "label": True} for row in ROWS], {}, "has a column `label`"),
        ([{"messages": ["hi", "ho"]}], {}, "row 0: column 'messages' is not a list of messages"),
        ([{**row, "note": datetime(2026, 1, 1)} for row in ROWS], {}, "Row 0: column 'note' holds"),
        (ROWS, {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}, "load_best_mod"),
        (ROWS, {"save_only_model": True}, "save_only_model=True would let an interrupted iteration"),
        (ROWS, {"push_to_hub": True}, "push_to_hub would push the model of every iteration"),
        (ROWS, {"quantization_config": 4}, "Leave the quantisation out"),
        (ROWS, {"rewards": ["trl_ext.playground:nothing"]}, "trl_ext.playground has no .nothing."),
        (ROWS, {"callbacks": [1]}, "callbacks cannot go to the processes"),
        (ROWS, {"ref_model": "x"}, "ref_model cannot go to the processes"),
    ],
)  # fmt: skip
def test_wrong_input_is_named_before_any_weight_is_loaded(
    rows, settings, message, model_dir, config_kwargs, monkeypatch
):
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights loaded"))
    with pytest.raises((ValueError, ImportError), match=message):
        self_play(model_dir, rows, config_kwargs, **settings)
    assert not Path(config_kwargs["output_dir"]).exists()


def test_rows_that_cannot_be_used_may_be_dropped(tokenizer, config_kwargs, capsys):
    rows = Dataset.from_list([*ROWS, {**ROWS[0], "completion": ""}, {**ROWS[0], "prompt": "x" * 2000}])
    kept = sft_rows(rows, tokenizer, SPINConfig(**config_kwargs, on_invalid_row="drop"), None, "train")
    assert kept == ROWS and "26 rows, 2 dropped: empty 1, too long 1" in capsys.readouterr().out


def test_fewer_iterations_and_more_again(model_dir, config_kwargs):
    """What was played with one value stays bound to it, however often the number of iterations changes."""
    folder = Path(config_kwargs["output_dir"])

    def resume(number, beta=0.1):
        config = SPINConfig(**{**config_kwargs, "num_iterations": number, "beta": beta})
        game = SelfPlay(config, ROWS[:4], ROWS[4:8], trainer_class=SPINTrainer)
        run = Run(folder, game.settings(), resume=True, may_change=game.may_change())
        run.keep("rows", {})

    for number in (3, 1, 1, 2, 3, 4):
        resume(number)
    with pytest.raises(ValueError, match="beta of iteration 2 was 0.1 and is 5.0"):
        resume(3, [0.1, 0.1, 5.0])
    resume(5, [0.1, 0.1, 0.1, 0.1, 5.0])
    with pytest.raises(ValueError, match="beta of iteration 4 was 5.0 and is 0.1"):
        resume(5)


def test_rows_of_the_eval_dataset_are_not_trained_on(model_dir, config_kwargs, capsys):
    trainer = self_play(model_dir, ROWS, config_kwargs, eval_dataset=Dataset.from_list(ROWS[:3]))
    game = trainer._self_play
    assert [row["prompt"] for row in game.watched] == [row["prompt"] for row in ROWS[:3]]
    assert [row["prompt"] for row in game.rows] == [row["prompt"] for row in ROWS[3:]]
    assert "3 rows are left out: their prompts are in the eval dataset" in capsys.readouterr().out


def test_rows_with_and_without_tools_are_trained_on_together(tmp_path):
    """The first row's columns are not those of all."""
    plain, tools = {"prompt": "a"}, {"prompt": "b", "tools": '[{"name": "f"}]'}
    found = as_dataset([plain, tools])
    assert found["tools"][:] == [None, tools["tools"]] and found["prompt"][:] == ["a", "b"]


def test_an_answer_that_was_cut_gets_no_end(model_dir, tokenizer, config_kwargs):
    pair = {"prompt": "a? ", "chosen": "yes", "rejected": "no, for"}
    chat = {
        "prompt": [{"role": "user", "content": "a?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no, for"}],
    }
    for row in (pair, chat):
        rows = [{**row, "rejected_is_cut": False}, {**row, "rejected_is_cut": True}]
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        trainer = SPINTrainer(
            model=model,
            args=SPINConfig(**config_kwargs),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        whole, cut = trainer.train_dataset["completion_ids"][:]
        assert cut[0] == whole[0] and whole[1] == [*cut[1], tokenizer.eos_token_id]
