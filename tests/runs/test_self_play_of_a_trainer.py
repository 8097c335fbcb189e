"""All iterations of SPIN by `SPINTrainer.train`, in this process."""

import copy
import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.support.data import PAIRS
from tests.support.processes import stages_are_numbered
from tests.support.self_play import ROWS, assert_same_weights, manifest, weights
from trl_ext import SPINConfig, SPINTrainer
from trl_ext.methods.spin.rows import as_dataset, is_sft_data, sft_rows
from trl_ext.methods.spin.self_play import SelfPlay
from trl_ext.runs.run import Run
from trl_ext.runtime.fingerprints import model_fingerprint


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
    with pytest.raises(AttributeError, match="has no 'model' before `train\\(\\)` has run the iterations"):
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
        ([{"prompt": "a"}], {}, r"to run all iterations.* Got the columns \['prompt'\]"),
        ([{"completion": "a"}], {}, r"`prompt` and `completion` .*got the columns \['completion'\]"),
        ([*ROWS, {**ROWS[0], "completion": " "}], {}, "row 24: column 'completion' is empty. Remove rows"),
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
        (ROWS, {"first_turn_only": True}, "`first_turn_only` must be False"),
        (ROWS, {"num_watched_prompts": 20}, "`num_watched_prompts` must be at most half of the 24 "),
        (ROWS, {"num_watched_prompts": 0, "early_stop": "nll"}, "early_stop='nll' needs held-out rows, got none"),
        (ROWS, {"num_watched_prompts": 0, "rewards": ["f.py:f"]}, "`rewards` needs held-out rows"),
        ([{**row, "label": True} for row in ROWS], {}, "must not have a column `label`"),
        ([{"messages": ["hi", "ho"]}], {}, "row 0: column 'messages' is not a list of messages"),
        ([{**row, "note": datetime(2026, 1, 1)} for row in ROWS], {}, "Row 0: column 'note' must hold"),
        (ROWS, {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}, "load_best_mod"),
        (ROWS, {"save_only_model": True}, "`save_only_model` must be False in self-play"),
        (ROWS, {"push_to_hub": True}, "`push_to_hub` must be False in self-play"),
        (ROWS, {"quantization_config": 4}, "Remove the quantisation"),
        (ROWS, {"rewards": ["trl_ext.playground:nothing"]}, "trl_ext.playground has no .nothing."),
        (ROWS, {"callbacks": [1]}, "`callbacks` cannot be passed on"),
        (ROWS, {"ref_model": "x"}, "`ref_model` cannot be passed on"),
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
