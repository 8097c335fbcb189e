"""What holds for the trainer of every method, whatever its loss."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from tests.support.data import LISTS, PAIRS
from tests.support.methods import LORA, OWN, build, run
from tests.support.training import SGD, assert_same_movement, copy_of, counting, gradients, move, one_batch, weights

# with rows that have no pair, which are not spread evenly over micro-batches
SAMPLES = [
    {"prompt": "a? ", "completions": ["x", "yy", "zzz"], "scores": [0.0, 1.0, 0.0], "reference": "the task"},
    {"prompt": "bb? ", "completions": ["one", "two"], "scores": [1.0, 0.0], "reference": "one"},
    {"prompt": "c ", "completions": ["p", "qq"], "scores": [1.0, 1.0], "reference": "both are good"},
    {"prompt": "dd ", "completions": ["alone"], "scores": [1.0], "reference": "no sample"},
    {"prompt": "once more ", "completions": ["one", "two"], "scores": [1.0, 0.0], "reference": "one"},
    {"prompt": "task ", "completions": ["alone"], "scores": [1.0], "reference": "no sample"},
]
ROWS = defaultdict(lambda: PAIRS, {"rrhf": LISTS, "click": SAMPLES})
SETTINGS = {"spin": {"beta": 1.0}}


@pytest.mark.parametrize(
    ("method", "rows", "settings"),
    [
        ("slic", PAIRS, {}),
        ("slic", PAIRS[:7], {}),
        ("rrhf", LISTS, {}),
        ("rrhf", LISTS, {"arithmetic": "official"}),
        ("rrhf", LISTS, {"rank_weight": 0.0}),
        ("click", SAMPLES, {}),
        ("spin", PAIRS, {"beta": 1.0}),
        ("ipo", PAIRS, {}),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, list) else str(value),
)
def test_any_split_into_micro_batches_gives_the_same_training(
    method, rows, settings, model_dir, tokenizer, config_kwargs
):
    """1 x 8 = 8 x 1, and in 3 x 3 the last micro-batch is smaller."""
    runs = []
    for batch_size, accumulation in ((8, 1), (1, 8), (3, 3)):
        kwargs = {**config_kwargs, **SGD, "per_device_train_batch_size": batch_size, "num_train_epochs": 3}
        kwargs |= {"per_device_eval_batch_size": batch_size, "eval_on_start": True, "eval_strategy": "steps"}
        kwargs |= {"gradient_accumulation_steps": accumulation, "eval_steps": 100}
        eval_dataset = Dataset.from_list(rows)
        trainer, losses = run(method, model_dir, tokenizer, rows, kwargs, eval_dataset=eval_dataset, **settings)
        runs.append((trainer, losses, next(log["eval_loss"] for log in losses.logs if "eval_loss" in log)))
    (first, first_losses, first_eval), others = runs[0], runs[1:]
    start = build(method, model_dir, tokenizer, rows, config_kwargs, **settings)
    with torch.no_grad():
        assert first_eval == pytest.approx(start.compute_loss(start.model, one_batch(start)).item(), rel=1e-5)
    assert len(first_losses.series()) == 3 and first_losses.series()[-1] < first_losses.series()[0]
    names = {name for log in first_losses.logs if "loss" in log for name in log}
    names = {name for name in names if "/" in name or name in ("loss", "entropy", "num_tokens")}
    rough = method in ("spin", "ipo")
    if rough:  # before the first step all rewards are 0 up to rounding, and so is which of them is larger
        names.remove("rewards/accuracies")
    assert len(names) > 5 and ("rank/kendall_tau" in names) == (method == "rrhf" and "rank_weight" not in settings)
    # the margin is a difference of float32 sums of about 100 nats, whose last digit is 8e-6
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if rough else {"rtol": 1e-4, "atol": 1e-5}
    for trainer, losses, evaluated in others:
        assert evaluated == pytest.approx(first_eval, rel=1e-5)
        for name in names:
            torch.testing.assert_close(losses.series(name), first_losses.series(name), **tolerance)
        assert_same_movement(weights(trainer), weights(first), weights(start), share=5e-5 if rough else 1e-5)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("method", OWN)
def test_padding_and_the_order_of_rows_do_not_matter(method, official, model, tokenizer, config_kwargs):
    if official and method != "rrhf":
        pytest.skip("a setting of RRHF")
    settings = {"arithmetic": "official"} if official else {}
    trainer = build(method, model, tokenizer, ROWS[method], config_kwargs, **settings)
    trainer._checks_first_loss = False  # the weights are moved behind its back
    move(trainer.model)
    results = []
    for turned, collator_kwargs in (
        (False, {}),
        (True, {"padding_side": "left"}),
        (False, {"pad_to_multiple_of": 64}),
    ):
        trainer.model.zero_grad()
        trainer.train_dataset = trainer.train_dataset.select(range(len(ROWS[method]))[:: -1 if turned else 1])
        loss = trainer.compute_loss(trainer.model, one_batch(trainer, **collator_kwargs))
        loss.backward()
        results.append((loss, gradients(trainer.model)))
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads, results[0][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", OWN)
def test_layouts_change_nothing(method, model, tokenizer, config_kwargs):
    """Prompts shared or not, and a batch in parts of one completion; of the reference as well."""
    results = []
    layouts = ({"prefix_sharing": False}, {"prefix_sharing": True, "check_prefix_sharing": True})
    for number, layout in enumerate((*layouts, {"prefix_sharing": "auto", "max_completions_per_forward": 1})):
        config_kwargs["output_dir"] += str(number)  # where the reference's values are kept
        trainer = build(method, copy_of(model), tokenizer, ROWS[method], config_kwargs, **layout)
        trainer._checks_first_loss = False
        move(trainer.model)
        loss = trainer.compute_loss(trainer.model, one_batch(trainer))
        loss.backward()
        results.append((loss, gradients(trainer.model), trainer))
    statistics = results[1][2].prefix_sharing.statistics
    # of a reference the pass over the data is shared as well
    assert statistics.batches_shared == (2 if method in ("spin", "ipo") else 1)
    assert statistics.positions_computed < statistics.positions_padded
    for loss, grads, trainer in results[1:]:
        if method in ("spin", "ipo"):
            found, expected = (each.train_dataset["reference_logps"] for each in (trainer, results[0][2]))
            torch.testing.assert_close(torch.tensor(found[:]), torch.tensor(expected[:]), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(loss, results[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads, results[0][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["slic", "rrhf", "click"])
def test_stream_trains_like_the_same_rows_in_a_list(method, model_dir, tokenizer, config_kwargs):
    kwargs = {**config_kwargs, "max_steps": 4, "train_sampling_strategy": "sequential"}
    rows = ROWS[method]
    streamed, found = run(method, model_dir, tokenizer, IterableDataset.from_generator(lambda: iter(rows)), kwargs)
    listed, expected = run(method, model_dir, tokenizer, rows, kwargs)
    assert len(found.series()) == 4 and found.series() == expected.series()
    assert torch.equal(weights(streamed), weights(listed))


@pytest.mark.parametrize(
    ("method", "how", "rows_forwarded"),
    [  # 4 batches of 2 pairs, and y_ref, which is the chosen answer, is not forwarded a second time
        *(("slic", how, 16) for how in ("name", "object", "lora", "peft_model")),
        *(("rrhf", how, 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8) for how in ("name", "lora")),
    ],
)
def test_one_model_one_forward_per_batch(method, how, rows_forwarded, model_dir, tokenizer, config_kwargs):
    config_kwargs["prefix_sharing"] = False
    with counting() as counts:
        model = model_dir
        if how in ("object", "peft_model"):
            model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        if how == "peft_model":
            model = get_peft_model(model, LORA)
        adapter = LORA if how == "lora" else None
        trainer = build(method, model, tokenizer, ROWS[method], config_kwargs, peft_config=adapter)
        trainer.train()
    assert trainer.ref_model is None
    assert counts == {"models": 1, "forwards": 4, "rows": rows_forwarded}
    if how in ("lora", "peft_model"):
        assert list(trainer.model.peft_config) == ["default"], "no copy of the adapter either"
        assert not any(".ref." in name for name, _ in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("method", "cited"),
    [
        ("slic", ("SLiC-HF", "2305.10425", "zhao2023slichf", "slic-hf")),
        ("rrhf", ("RRHF", "2304.05302", "yuan2023rrhf", "rrhf")),
        ("click", ("CLICK", "2306.03350", "zheng2023click", "click")),
        ("spin", ("SPIN", "2401.01335", "chen2024spin", "spin")),
        ("ipo", ("IPO", "2310.12036", "azar2024general", "ipo")),
    ],
)
def test_the_model_card_cites_the_method(method, cited, model_dir, tokenizer, config_kwargs):
    run(method, model_dir, tokenizer, ROWS[method], {**config_kwargs, "save_strategy": "steps", "save_steps": 2})
    card = (Path(config_kwargs["output_dir"]) / "README.md").read_text()
    assert not [word for word in cited if word not in card]
    assert "Rafailov" not in card.split("Cite TRL")[0] and "None" not in card
    assert f"fine-tuned version of the model in `{model_dir}`" in card
    assert f'model="{config_kwargs["output_dir"]}"' in card


@pytest.mark.parametrize("method", OWN)
def test_drop_in_without_args_and_tokenizer(method, model_dir, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    trainer, config = OWN[method]
    built = trainer(model=model_dir, train_dataset=Dataset.from_list(ROWS[method]))
    assert isinstance(built.args, config) and built.args.output_dir.endswith(f"-{trainer._name}")


@pytest.mark.parametrize("method", OWN)
def test_what_has_no_part_in_the_method_is_refused(method, model_dir, model, tokenizer, config_kwargs):
    with pytest.raises(TypeError, match=f"`args` must be an? {OWN[method][1].__name__}, got DPOConfig"):
        OWN[method][0](model_dir, args=DPOConfig(**config_kwargs), train_dataset=Dataset.from_list(PAIRS))
    with pytest.raises(NotImplementedError, match="`compute_metrics` must be None"):
        build(method, model_dir, tokenizer, ROWS[method], config_kwargs, compute_metrics=len)
    if method in ("slic", "rrhf", "click"):
        with pytest.raises(ValueError, match="`ref_model` must be None for"):
            build(method, model_dir, tokenizer, ROWS[method], config_kwargs, ref_model=model)
