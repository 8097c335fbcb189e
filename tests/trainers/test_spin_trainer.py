"""SPINTrainer on pairs: one iteration, against the slow reference and TRL."""

import math
import shutil
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from tests.support import methods, reference
from tests.support.data import PAIRS
from tests.support.methods import LORA
from tests.support.training import (
    Losses,
    assert_same_gradients,
    copy_of,
    move,
    one_batch,
    perturbed,
    weights,
)
from trl_ext import SPINConfig, SPINTrainer
from trl_ext.losses import spin_loss
from trl_ext.sampling.config import SamplingOptions
from trl_ext.trainers.reference import refuse_fsdp

build = partial(methods.build, "spin")
run = partial(methods.run, "spin")
START = {"sigmoid": math.log(2), "hinge": 1.0}


# The loss


def test_loss_by_hand():
    """S = -10 and -12, -11 under the opponent each: h = 2. At h = 0: ln 2, and 1."""
    real, generated = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    torch.testing.assert_close(spin_loss(real, generated, beta=0.1), torch.tensor([0.598139, 0.693147]))
    torch.testing.assert_close(spin_loss(real, generated, beta=0.1, loss="hinge"), torch.tensor([0.8, 1.0]))
    assert spin_loss(torch.tensor([-1e4]), torch.tensor([1e4]), beta=5.0).isfinite()


@pytest.mark.parametrize(
    ("form", "loss", "beta"),
    [("plain", "sigmoid", 0.1), ("plain", "hinge", 2.0), ("chat", "sigmoid", 2.0), ("chat", "hinge", 0.1)],
)
def test_compute_loss_equals_slow_reference_and_trl(
    form, loss, beta, model, tokenizer, pairs, chat_pairs, config_kwargs
):
    rows = {"plain": pairs, "chat": chat_pairs}[form]
    opponent = copy_of(model)
    trainer = build(model, tokenizer, rows, config_kwargs, loss=loss, beta=beta)
    trainer._checks_first_loss = False  # the weights are moved behind its back
    move(trainer.model)
    slow_model = copy_of(trainer.model)
    prepared = list(trainer.train_dataset)
    slow = reference.spin_loss(slow_model, opponent, prepared, beta=beta, loss=loss)
    fast = trainer.compute_loss(trainer.model, one_batch(trainer))
    slow.backward()
    fast.backward()
    assert abs(slow.item() - START[loss]) > 2e-4, "it is not the first step"
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    assert_same_gradients(trainer.model, slow_model)

    trl_trainer = DPOTrainer(
        model=copy_of(slow_model),
        ref_model=opponent,
        args=DPOConfig(**config_kwargs, loss_type=loss, beta=beta),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    rows = list(trl_trainer.train_dataset)
    assert [row["chosen_ids"] for row in rows] == [row["completion_ids"][0] for row in prepared]
    theirs = trl_trainer.compute_loss(trl_trainer.model, trl_trainer.data_collator(rows))
    theirs.backward()
    torch.testing.assert_close(fast, theirs, rtol=1e-4, atol=1e-4)
    assert_same_gradients(trainer.model, trl_trainer.model)


# The reference is the model that training starts from


def first_loss(trainer):
    losses = Losses()
    trainer.add_callback(losses)
    trainer.train()
    assert len(losses.series()) == 4
    return losses.logs[0]["loss"]


@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
@pytest.mark.parametrize("how", ["name", "in memory", "lora", "adapter"])
def test_first_loss(how, loss, model_dir, model, tokenizer, pairs, config_kwargs):
    """Also where the weights in memory are not those on disk, and with an adapter that is not the identity."""
    settings = {"loss": loss, "beta": 1.0, "learning_rate": 1e-2}
    if how == "name":
        trainer = build(model_dir, tokenizer, pairs, config_kwargs, **settings)
    elif how == "in memory":
        assert model.config._name_or_path == model_dir
        trainer = build(model, tokenizer, pairs, config_kwargs, **settings)
    elif how == "lora":
        trainer = build(model, tokenizer, pairs, config_kwargs, peft_config=LORA, **settings)
    else:
        adapted = get_peft_model(model, LORA)
        move(adapted, 0.1)
        trainer = build(adapted, tokenizer, pairs, config_kwargs, **settings)
        assert list(trainer.model.peft_config) == ["default"], "TRL's copy of the adapter is not kept"
    assert first_loss(trainer) == pytest.approx(START[loss], abs=2e-5)
    assert trainer.ref_model is None


def test_trl_itself_would_take_the_weights_on_disk(model, tokenizer, pairs, config_kwargs):
    """Why the reference is not TRL's: with a model that was changed in memory it is another one."""
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**config_kwargs, beta=1.0, disable_dropout=True),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    assert abs(loss.item() - math.log(2)) > 0.1


def test_only_one_model_is_loaded(model_dir, tokenizer, pairs, config_kwargs, monkeypatch):
    loaded = []
    load = LlamaForCausalLM.from_pretrained.__func__
    monkeypatch.setattr(
        LlamaForCausalLM, "from_pretrained", classmethod(lambda cls, *a, **k: loaded.append(a) or load(cls, *a, **k))
    )
    build(model_dir, tokenizer, pairs, config_kwargs).train()
    assert len(loaded) == 1


def test_training_stops_if_the_reference_is_another_model(model, tokenizer, pairs, config_kwargs):
    trainer = build(model, tokenizer, pairs, config_kwargs)
    move(trainer.model, 0.2)
    before = weights(trainer)
    with pytest.raises(RuntimeError, match=r"The first loss is .*, where ln 2 = 0.6931 is right.* construct it anew"):
        trainer.train()
    assert trainer.state.global_step == 0 and torch.equal(weights(trainer), before)


@pytest.mark.parametrize("beta", [0.1, 5.0])
@pytest.mark.parametrize("precision", ["bf16 weights", "autocast"])
def test_half_precision_tells_rounding_from_another_model(precision, beta, model_dir, tokenizer, pairs, config_kwargs):
    """What is allowed does not grow with beta, and a model whose weights have moved is found out."""
    settings = {**config_kwargs, "bf16": precision == "autocast"}
    dtype = torch.float32 if precision == "autocast" else torch.bfloat16
    for moved in (False, True):
        loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        trainer = build(loaded, tokenizer, pairs, settings, beta=beta, output_dir=f"{settings['output_dir']}-{moved}")
        if not moved:
            trainer.train()
            continue
        move(trainer.model)
        with pytest.raises(RuntimeError, match="nats / sqrt\\(tokens\\) off the reference's"):
            trainer.train()


def test_dropout_is_off_wherever_it_is(model_dir, tokenizer, pairs, config_kwargs):
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attention_dropout=0.5, attn_implementation="eager"
    )
    assert model.model.layers[0].self_attn.attention_dropout == 0.5
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    trainer = build(model, tokenizer, pairs, config_kwargs, peft_config=lora, beta=1.0, learning_rate=1e-2)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=2e-5)


@pytest.mark.parametrize("as_object", [True, False])
def test_initial_model_as_reference(as_object, model_dir, model, tokenizer, pairs, config_kwargs):
    initial = perturbed(model)
    if not as_object:
        initial = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    given = copy_of(initial) if as_object else model_dir
    trainer = build(model, tokenizer, pairs, config_kwargs, reference="initial", ref_model=given, beta=0.5)
    slow = reference.spin_loss(model, initial, list(trainer.train_dataset), beta=0.5)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, one_batch(trainer)), slow, rtol=1e-4, atol=1e-4)
    assert abs(slow.item() - math.log(2)) > 1e-3 and trainer.ref_model is None
    trainer.train()


def test_eval_set_has_the_reference_of_the_start(model, tokenizer, pairs, config_kwargs):
    opponent = copy_of(model)
    rows = Dataset.from_list(PAIRS[:3])
    trainer = build(model, tokenizer, pairs, config_kwargs, eval_dataset=rows, beta=1.0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=2e-5)
    assert trainer.evaluate(Dataset.from_list(PAIRS[3:]))["eval_loss"] == pytest.approx(math.log(2), abs=2e-5)
    trainer.train()
    with torch.no_grad():
        slow = reference.spin_loss(trainer.model, opponent, list(trainer.eval_dataset), beta=1.0)
    logged = trainer.evaluate()
    assert logged["eval_loss"] == pytest.approx(slow.item(), abs=1e-4) and slow < math.log(2) - 1e-3
    with pytest.raises(ValueError, match="no reference log-probabilities: the reference ran once"):
        trainer.evaluate(Dataset.from_list(PAIRS[3:]))


# Training


def test_logged_metrics_are_the_plain_averages(model, tokenizer, pairs, config_kwargs):
    opponent = copy_of(model)
    trainer = build(model, tokenizer, pairs, config_kwargs, eval_dataset=pairs, per_device_eval_batch_size=3, beta=0.5)
    move(trainer.model)
    logged = trainer.evaluate()
    sums = {name: [] for name in ("chosen", "rejected")}
    ratios = {name: [] for name in sums}
    with torch.no_grad():
        for row in trainer.train_dataset:
            for name, ids in zip(sums, row["completion_ids"], strict=True):
                sums[name].append(reference.sequence_logp(model, row["prompt_ids"], ids).item())
                opponents = reference.sequence_logp(opponent, row["prompt_ids"], ids).item()
                ratios[name].append(sums[name][-1] - opponents)
    margins = [0.5 * (a - b) for a, b in zip(ratios["chosen"], ratios["rejected"], strict=True)]
    expected = {
        "rewards/chosen": 0.5 * sum(ratios["chosen"]) / 8,
        "rewards/rejected": 0.5 * sum(ratios["rejected"]) / 8,
        "rewards/margins": sum(margins) / 8,
        "rewards/accuracies": sum(margin > 0 for margin in margins) / 8,
        "logps/chosen": sum(sums["chosen"]) / 8,
        "logps/rejected": sum(sums["rejected"]) / 8,
        "lengths/chosen": sum(len(row["completion_ids"][0]) for row in trainer.train_dataset) / 8,
        "lengths/rejected": sum(len(row["completion_ids"][1]) for row in trainer.train_dataset) / 8,
    }
    assert 0 < expected["rewards/accuracies"] < 1
    for name, value in expected.items():
        assert logged[f"eval_{name}"] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
@pytest.mark.parametrize("lora", [False, True])
def test_training_tells_real_from_generated(lora, loss, model_dir, tokenizer, pairs, config_kwargs):
    kwargs = {**config_kwargs, "num_train_epochs": 10, "learning_rate": 1e-2 if lora else 1e-3, "loss": loss}
    trainer, losses = run(model_dir, tokenizer, pairs, kwargs, beta=0.5, peft_config=LORA if lora else None)
    last = [log for log in losses.logs if "loss" in log][-1]
    assert losses.logs[0]["loss"] == pytest.approx(START[loss], abs=2e-5)
    assert last["loss"] < START[loss] - 0.1 and last["rewards/margins"] > 0.2 and last["rewards/accuracies"] == 1
    assert ("hinge/active" in last) == (loss == "hinge")


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_iteration_keeps_its_reference(lora, model_dir, tokenizer, pairs, config_kwargs):
    """The reference is that of the start, not of the checkpoint, and is not computed again."""
    kwargs = {**config_kwargs, "num_train_epochs": 2, "learning_rate": 1e-2, "beta": 1.0}
    kwargs |= {"save_strategy": "steps", "save_steps": 3, "peft_config": LORA if lora else None}
    whole, whole_losses = run(model_dir, tokenizer, pairs, kwargs)
    stamp = Path(kwargs["output_dir"], "reference_train.npz").stat().st_mtime_ns
    for step in (6, 8):
        shutil.rmtree(Path(kwargs["output_dir"]) / f"checkpoint-{step}")
    resumed, losses = run(model_dir, tokenizer, pairs, kwargs, resume=True)
    assert Path(kwargs["output_dir"], "reference_train.npz").stat().st_mtime_ns == stamp
    assert resumed.train_dataset["reference_logps"][:] == whole.train_dataset["reference_logps"][:]
    assert len(losses.series()) == 5 and losses.series() == whole_losses.series()[3:]
    assert torch.equal(weights(resumed), weights(whole))


def test_what_another_model_left_behind_is_not_taken(model_dir, model, tokenizer, pairs, config_kwargs):
    other = build(model_dir, tokenizer, pairs, config_kwargs)
    ours = build(model, tokenizer, pairs, config_kwargs)
    assert other.train_dataset["reference_logps"][0] != ours.train_dataset["reference_logps"][0]
    changed = build(copy_of(model), tokenizer, Dataset.from_list(PAIRS[1:]), config_kwargs)
    assert changed.train_dataset["reference_logps"][0] == pytest.approx(ours.train_dataset["reference_logps"][1])


def test_lora_adapter_is_saved_alone(model_dir, tokenizer, pairs, config_kwargs):
    kwargs = {**config_kwargs, "save_strategy": "steps", "save_steps": 4}
    trainer, _ = run(model_dir, tokenizer, pairs, kwargs, peft_config=LORA)
    assert isinstance(trainer.model, PeftModel)
    checkpoint = Path(kwargs["output_dir"]) / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "ref").exists()


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_iterations": 0}, "`num_iterations` must be at least 1, got 0"),
        ({"history": -1}, "`history` must be 0 .*got -1"),
        ({"loss": "ipo"}, "`loss` must be one of sigmoid, hinge.*got 'ipo'"),
        ({"reference": "best"}, "`reference` must be one of .*got 'best'"),
        ({"beta": 0.0}, "`beta` must be above 0, got 0.0"),
        ({"beta": [0.1, 5.0]}, r"`beta` must be one value, or 3 values .*got \[0.1, 5.0\]: 2 values"),
        ({"beta": [0.1, 0.1, -1.0]}, "`beta` must be above 0, got .*-1.0"),
        ({"learning_rate": [1e-6, 1e-7]}, "`learning_rate` must be one value, or 3 values .* 2 values"),
        ({"learning_rate": -1.0}, "`learning_rate` must be at least 0, got -1.0"),
        ({"early_stop": "reward"}, "`rewards` must name at least one scorer with early_stop='reward'"),
        ({"num_watched_prompts": -1}, "`num_watched_prompts` must be 0 .*got -1"),
        ({"precompute_ref_batch_size": 0}, "`precompute_ref_batch_size` must be at least 1, got 0"),
        ({"temperature": -1.0}, "`temperature` must be 0 .greedy. or a positive number, got -1.0"),
        ({"min_p": 2.0}, "`min_p` must be from 0 to 1"),
        ({"sampling_engine": "vllm"}, "`vllm_python` must be set where"),
        ({"loss_type": "hinge"}, "loss_type='hinge': set `loss`"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True: they always are"),
        ({"sync_ref_model": True}, "sync_ref_model=True: the reference is the opponent"),
        ({"disable_dropout": False}, "disable_dropout=False: the reference is the same model without dropout"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ({"prefix_sharing": "maybe"}, "`prefix_sharing` must be 'auto', True or False, got 'maybe'"),
    ],
)
def test_settings_that_cannot_be_honoured(settings, message, config_kwargs):
    with pytest.raises(ValueError, match=message):
        SPINConfig(**{**config_kwargs, **settings})


def test_the_opponent_answers_as_is_set(config_kwargs):
    config = SPINConfig(**{**config_kwargs, "min_p": 0.2, "sampling_seed": 3, "stop_strings": ["END"]})
    sampling, ours = asdict(config.sampling()), {entry.name for entry in fields(SamplingOptions)}
    assert {name: sampling[name] for name in ours} == {name: getattr(config, name) for name in ours}
    assert (sampling["min_p"], sampling["temperature"], sampling["max_new_tokens"]) == (0.2, 1.0, 256)


def test_one_value_or_one_for_each_iteration(config_kwargs):
    config = SPINConfig(**{**config_kwargs, "beta": [0.1, 0.1, 5], "learning_rate": ["1e-3"]})
    assert config.beta == [0.1, 0.1, 5.0] and config.learning_rate == 1e-3
    last = config.for_iteration(2, output_dir="elsewhere")
    assert (last.beta, last.learning_rate, last.output_dir, last.max_length) == (5.0, 1e-3, "elsewhere", 1024)
    config = SPINConfig("x", bf16=False, use_cpu=True)
    assert (config.output_dir, config.beta) == ("x", 0.1)
    for name, value in (("learning_rate", 10**400), ("beta", [0.1, 10**400, 5])):
        with pytest.raises(ValueError, match=f"`{name}` must be a number that a float can hold"):
            SPINConfig(**{**config_kwargs, name: value})
    with pytest.raises(TypeError, match="`weight_decay` must be float, got .*, too large a number"):
        SPINConfig(**{**config_kwargs, "weight_decay": 10**400})
    with pytest.raises(ValueError, match="`lr_scheduler_kwargs` must be JSON, got '{'"):
        SPINConfig(**{**config_kwargs, "lr_scheduler_kwargs": "{"})
    with pytest.raises(TypeError, match="`fsdp` must not hold None, got .None."):
        SPINConfig(**{**config_kwargs, "fsdp": [None]})


def test_fsdp_is_refused_by_name(config_kwargs, monkeypatch):
    config = SPINConfig(**config_kwargs)
    refuse_fsdp(config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NotImplementedError, match="before FSDP has sharded the model. Use DDP or DeepSpeed"):
        refuse_fsdp(config)


def test_refused_before_any_weight_is_loaded(model_dir, tokenizer, pairs, config_kwargs, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights loaded"))

    def refused(rows=pairs, **settings):
        return build(model_dir, tokenizer, rows, config_kwargs, **settings)

    with pytest.raises(ValueError, match="`ref_model` must not be set with reference='previous'"):
        refused(ref_model=model_dir)
    with pytest.raises(ValueError, match="must be the model that started the first iteration"):
        refused(reference="initial")
    with pytest.raises(NotImplementedError, match="`eval_dataset` must be a `Dataset` for SPINTrainer, got a stream"):
        refused(eval_dataset=IterableDataset.from_generator(lambda: iter(PAIRS)))
    with pytest.raises(ValueError, match="`beta` must be one value for rows of `chosen`"):
        refused(beta=[0.1, 0.1, 5.0])
    with pytest.raises(NotImplementedError, match="must be a `Dataset` for SPINTrainer, got a stream"):
        refused(IterableDataset.from_generator(lambda: iter(PAIRS)))
    with pytest.raises(ValueError, match="for one iteration of SPIN, got the columns"):
        refused(Dataset.from_list([{"prompt": "a", "completions": ["b", "c"], "scores": [1.0, 0.0]}]))
    with pytest.raises(ValueError, match=r"to run all iterations.* Got the columns \['prompt'\]"):
        refused(Dataset.from_list([{"prompt": "a"}]))
    with pytest.raises(ValueError, match="column 'rejected' is the same as 'chosen'"):
        refused(Dataset.from_list([{**PAIRS[0], "rejected": PAIRS[0]["chosen"]}]))
    with pytest.raises(NotImplementedError, match="`compute_metrics` must be None"):
        refused(compute_metrics=len)
    with pytest.raises(TypeError, match="`args` must be a SPINConfig, got DPOConfig"):
        SPINTrainer(model=model_dir, args=DPOConfig(**config_kwargs), train_dataset=pairs)
