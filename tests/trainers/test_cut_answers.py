"""Answers that `max_new_tokens` has cut get no end token: whoever trains on them, reads them or measures them."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.support.methods import all_but
from trl_ext.comparison.stages import pairs_stage
from trl_ext.data.prepare import prepare_row
from trl_ext.data.prompts import prompt_token_ids
from trl_ext.data.rows import RowOptions
from trl_ext.methods.spin.pairs import spin_pairs
from trl_ext.runs.config import RankingConfig
from trl_ext.runs.evaluation_stage import evaluation_stage
from trl_ext.runs.stages import rank_stage, sample_stage
from trl_ext.runtime.jsonl import read_jsonl, write_jsonl
from trl_ext.runtime.models import load_tokenizer
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig
from trl_ext.scoring.lists import rank_rows
from trl_ext.scoring.pairs import PAIR_RULES, make_pairs, pair_rows
from trl_ext.scoring.rewards_of_trl import reward_functions

# one of each kind in each half, best first
SCORED = {
    "prompt": "p? ",
    "completions": ["cut one", "whole one", "cut two", "whole two"],
    "scores": [3.0, 2.0, 1.0, 0.0],
    "logps": [-4.0, -3.0, -2.0, -1.0],
    "num_tokens": [7, 10, 7, 10],
    "ends": ["length", "stop", "length", "role_marker"],
    "sources": ["sampled"] * 4,
}
TRAINERS = all_but("rloo")


def as_chat(row):
    messages = {"prompt": [{"role": "user", "content": row["prompt"]}]}
    messages["completions"] = [[{"role": "assistant", "content": text}] for text in row["completions"]]
    return {**row, **messages}


def sequences(dataset):
    """Every list of token ids in a dataset."""
    found = []
    for row in dataset:
        for name, value in row.items():
            if name.endswith("_ids") and value:
                found += value if isinstance(value[0], list) else [value]
    return found


def check_ends(dataset, tokenizer):
    """Whole answers end; cut ones do not. Returns how many of each there are."""
    counts = {"cut": 0, "whole": 0}
    for ids in sequences(dataset):
        text = tokenizer.decode(ids)
        kind = next((kind for kind in counts if f"{kind} " in text), None)
        if kind is None:  # the prompt alone
            continue
        behind = text.rpartition(f"{kind} ")[2]
        assert behind.startswith(("one", "two"))
        assert (tokenizer.eos_token in behind) == (kind == "whole"), text
        counts[kind] += 1
    return counts


ON_PAIRS = ("ipo", "spin")  # alone


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in TRAINERS
        for kind in ("ranked", "pairs")
        if (name, kind) not in [(n, "ranked") for n in ON_PAIRS]
    ],
)
def test_no_trainer_gives_them_an_end(name, kind, model_dir, tokenizer, config_kwargs):
    for row in (SCORED, as_chat(SCORED)):
        both = [row, {**row, "scores": row["scores"][::-1]}]
        rows, _ = rank_rows(both) if kind == "ranked" else pair_rows(both, "best_worst")
        trainer_class, config_class = TRAINERS[name]
        trainer = trainer_class(
            model_dir,
            args=config_class(**config_kwargs),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        counts = check_ends(trainer.train_dataset, tokenizer)
        assert counts["cut"] > 0 and counts["whole"] > 0


@pytest.mark.parametrize("rule", PAIR_RULES)
def test_no_rule_for_pairs_loses_who_was_cut(rule, tokenizer):
    for row in (SCORED, as_chat(SCORED)):
        both = [row, {**row, "scores": row["scores"][::-1]}]
        pairs, _ = pair_rows(both, rule, positive_above=1.5, best_as_reference=True)
        options = RowOptions(eos_token=tokenizer.eos_token, reference=True)
        counts = check_ends([prepare_row(pair, tokenizer, options) for pair in pairs], tokenizer)
        assert counts["cut"] > 0 and counts["whole"] > 0


def test_equal_answers_of_which_one_ended_by_itself_are_whole(sampler_dir, tmp_path):  # noqa: F811
    row = {**SCORED, "completions": ["same", "same", "b", "b"], "ends": ["length", "stop", "length", "length"]}
    (pair,) = make_pairs({**row, "scores": [1.0, 1.0, 0.0, 0.0]}, "best_worst")
    assert (pair["chosen_is_cut"], pair["rejected_is_cut"]) == (False, True)
    # the answer of the dataset is whole, though the same was sampled and cut
    config = SamplingConfig(num_candidates=1, max_new_tokens=3)
    (first,), _ = sample_candidates(sampler_dir, [{"prompt": "What is 2 + 2? "}], config, tmp_path / "a")
    assert first["ends"] == ["length"]
    rows = [{"prompt": "What is 2 + 2? ", "known": first["completions"][0]}]
    (mixed,), _ = sample_candidates(sampler_dir, rows, config, tmp_path / "b", mix_in="known")
    assert mixed["completions"] == first["completions"]
    assert (mixed["ends"], mixed["sources"]) == ([None], ["sampled"])


def test_pairs_that_are_taken_up_again_keep_who_was_cut(sampler_dir, tmp_path):  # noqa: F811
    (pair,) = make_pairs({**SCORED, "ends": ["length"] * 4}, "best_worst", best_as_reference=True)
    cut = {f"{name}_is_cut": True for name in ("chosen", "rejected", "reference")}
    assert pair.items() >= cut.items()
    write_jsonl(tmp_path / "prompts.jsonl", [pair])
    pairs_stage(tmp_path, prompts=tmp_path / "prompts.jsonl", on_playground=False, seed=1)
    assert read_jsonl(tmp_path / "pairs.jsonl") == [pair]
    config = SamplingConfig(num_candidates=1, max_new_tokens=3)
    rows, _ = sample_candidates(sampler_dir, [{**pair, "known": "x"}], config, tmp_path, mix_in=["chosen", "known"])
    assert rows[0]["completions"][1:] == ["cut one", "x"] and rows[0]["ends"][1:] == ["length", None]


def test_ends_of_another_length_are_refused(tokenizer):
    with pytest.raises(ValueError, match="column 'ends' has 1 entries for 4 completions"):
        prepare_row({**SCORED, "ends": ["length"]}, tokenizer, RowOptions())


def test_files_of_sample_and_rank_say_who_was_cut(sampler_dir, tmp_path):  # noqa: F811
    tokenizer = load_tokenizer(sampler_dir)
    config = SamplingConfig(num_candidates=12, temperature=1.0, max_new_tokens=24, role_markers=None)
    prompts = [{"prompt": f"{text}? "} for text in ("a", "What is 2 + 2", "Say yes")]
    load = {"model_init_kwargs": {}, "trust_remote_code": False}
    sample_stage(tmp_path, model=sampler_dir, prompts=prompts, config=config, mix_in=(), load=load)
    ranking = RankingConfig(rewards=["tests.support.rewards:length_reward"], pair_rule="all")
    rank_stage(tmp_path, candidates=tmp_path / "candidates.jsonl", config=ranking, seed=1, min_completions=2)
    cut = {}
    for row in read_jsonl(tmp_path / "ranked.jsonl"):
        prepared = prepare_row(row, tokenizer, RowOptions(eos_token=tokenizer.eos_token))
        for completion, end, ids in zip(row["completions"], row["ends"], prepared["completion_ids"], strict=True):
            cut[row["prompt"], completion] = end == "length"
            assert (ids[-1] == tokenizer.eos_token_id) == (end != "length")
    assert set(cut.values()) == {True, False}
    pairs = read_jsonl(tmp_path / "pairs.jsonl")
    assert pairs and all(
        p[f"{side}_is_cut"] == cut[p["prompt"], p[side]] for p in pairs for side in ("chosen", "rejected")
    )


def test_a_reward_model_reads_them_without_an_end(model_dir, tokenizer):
    read = []

    def scorer(rows):
        read.extend(rows)
        return [[0.0] for _ in rows]

    scorer.name = "scorer"
    (function,) = reward_functions([scorer], lambda ids: ids[-1] != 9)
    function(prompts=["p", "p"], completions=["a", "b"], completion_ids=[[5, 9], [5, 5]], wanted=[1, 2])
    assert [(row["ends"], row["wanted"]) for row in read] == [(["stop"], 1), (["length"], 2)]


# SPIN's pairs


def test_pairs_of_spin_by_hand():
    rows = [
        {"prompt": "a", "reference": "one", "completions": ["one\n"], "ends": ["stop"], "tools": "[]"},
        {"prompt": "b", "reference": "one", "completions": [" "], "ends": ["stop"]},
        {"prompt": "c", "reference": "one", "completions": ["two"], "ends": ["length"], "tools": "[]", "other": 1},
        {"prompt": "d", "reference": "one", "completions": ["two"], "ends": ["stop"]},
    ]
    pairs, num_equal, num_empty = spin_pairs(rows, "reference")
    assert (num_equal, num_empty) == (1, 1)
    assert pairs == [
        {"prompt": "c", "tools": "[]", "chosen": "one", "rejected": "two", "rejected_is_cut": True},
        {"prompt": "d", "chosen": "one", "rejected": "two", "rejected_is_cut": False},
    ]
    with pytest.raises(ValueError, match="of 2, 1 equal the real answer and 1 are empty"):
        spin_pairs(rows[:2], "reference")


# Evaluation


@pytest.fixture(scope="module")
def models(sampler_dir, tmp_path_factory):  # noqa: F811
    """A model and another near it, in folders."""
    moved = tmp_path_factory.mktemp("models") / "moved"
    model, generator = AutoModelForCausalLM.from_pretrained(sampler_dir), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(moved)
    load_tokenizer(sampler_dir).save_pretrained(moved)
    return str(sampler_dir), str(moved)


PROMPTS = [{"prompt": text} for text in ("What is 2 + 2? ", "a", "Say yes. ", "Colour of grass? ", "Bye! ")]


def evaluated(folder, model, fixed, prompts=PROMPTS, **settings):
    folder.mkdir()
    write_jsonl(folder / "prompts.jsonl", prompts)
    settings = {"max_new_tokens": 12, "role_markers": None, **settings}
    figures = evaluation_stage(
        folder,
        model=model,
        prompts=folder / "prompts.jsonl",
        config=SamplingConfig(**settings),
        load={"model_init_kwargs": {}, "trust_remote_code": False},
        fixed_model=fixed,
    )
    return figures, read_jsonl(folder / "answers.jsonl")


def by_hand(own, other, ids, token_ids):
    """Log-likelihood under the other model, and KL from it summed over the tokens, one sequence at a time."""
    own, other = (model(torch.tensor([ids + token_ids])).logits[0, len(ids) - 1 : -1] for model in (own, other))
    own, other = own.double().log_softmax(-1), other.double().log_softmax(-1)
    logp = other.gather(1, torch.tensor(token_ids)[:, None]).sum().item()
    return logp, (own.exp() * (own - other)).sum(-1).sum().item()


@torch.no_grad()
@pytest.mark.parametrize("stop_strings", [None, ["e", "\u00e9", " "]])
def test_what_is_measured_is_what_was_sampled(models, stop_strings, tmp_path):
    """Not text that is tokenised again, of which this model writes much that is not text; nor an added end."""
    fixed, model = models
    prompts = [{"prompt": f"{row['prompt']}{number}"} for row in PROMPTS for number in range(6)]
    figures, answers = evaluated(tmp_path / "e", model, fixed, prompts, stop_strings=stop_strings)
    config = SamplingConfig(
        num_candidates=1, keep_duplicates=True, temperature=1.0, max_new_tokens=12, role_markers=None,
        stop_strings=stop_strings,
    )  # fmt: skip
    sampled, _ = sample_candidates(model, prompts, config, tmp_path / "s", keep_empty=True)
    tokenizer, loaded = load_tokenizer(model), [AutoModelForCausalLM.from_pretrained(name) for name in (model, fixed)]
    eos = tokenizer.eos_token_id
    for row, one in zip(sampled, answers, strict=True):
        (token_ids,) = row["token_ids"]
        logp, kl = by_hand(*loaded, prompt_token_ids(tokenizer, row), token_ids)
        assert one["answer"] == row["completions"][0] and one["num_tokens"] == len(token_ids)
        assert one["fixed_logp"] == pytest.approx(logp, rel=1e-4) and one["kl"] == pytest.approx(kl, rel=1e-3)
        assert one["is_cut"] == (row["ends"] == ["length"]) and one["kl"] >= 0
        if stop_strings is None:
            assert (token_ids[-1] == eos) != one["is_cut"]
    assert len({one["is_cut"] for one in answers}) == 2
    assert figures["length"] == sum(one["num_tokens"] for one in answers) / len(answers)
    assert figures["kl"] == pytest.approx(sum(one["kl"] for one in answers) / len(answers))
    total = sum(one["fixed_logp"] for one in answers) / sum(one["num_tokens"] for one in answers)
    assert figures["perplexity"] == pytest.approx(math.exp(-total))


def test_the_sampling_of_candidates_does_not_change_what_is_measured(models, tmp_path):
    fixed, model = models
    plain, answers = evaluated(tmp_path / "plain", model, fixed, temperature=1.0)
    other = {"temperature": 0.2, "top_k": 2, "top_p": 0.5, "min_p": 0.9, "num_candidates": 4}
    assert evaluated(tmp_path / "other", model, fixed, **other) == (plain, answers)
    assert evaluated(tmp_path / "itself", fixed, fixed, temperature=0.0, num_candidates=1)[0]["kl"] == 0


def test_the_divergence_is_without_bias(models, tmp_path):
    """Of many short answers to one prompt the mean is the sum over all answers, which one or two tokens can be."""
    fixed, model = models
    prompts = [{"prompt": "What is 2 + 2? "}] * 400
    figures, answers = evaluated(tmp_path / "e", model, fixed, prompts, max_new_tokens=2)
    ids = prompt_token_ids(load_tokenizer(model), prompts[0])
    eos = load_tokenizer(model).eos_token_id
    own, other = (AutoModelForCausalLM.from_pretrained(name) for name in (model, fixed))
    with torch.no_grad():
        first = [m(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for m in (own, other)]
        every = torch.tensor([[*ids, token] for token in range(len(first[0]))])
        second = [m(every).logits[:, -1].double().log_softmax(-1) for m in (own, other)]
    expected = [(pair[0].exp() * (pair[0] - pair[1])).sum(-1) for pair in (first, second)]
    expected[1][eos] = 0  # nothing comes behind the end
    exact = (expected[0] + (first[0].exp() * expected[1]).sum()).item()
    spread = torch.tensor([one["kl"] for one in answers]).std().item() / len(answers) ** 0.5
    assert spread > 0 and abs(figures["kl"] - exact) < 4 * spread


def test_a_fixed_model_with_other_tokens_has_a_perplexity_and_no_divergence(models, model_dir, tmp_path):
    tokenizer = load_tokenizer(model_dir)
    tokenizer.add_tokens(["What"])
    other = AutoModelForCausalLM.from_pretrained(model_dir)
    other.resize_token_embeddings(len(tokenizer))
    for part in (other, tokenizer):
        part.save_pretrained(tmp_path / "other")
    figures, _ = evaluated(tmp_path / "e", models[1], str(tmp_path / "other"))
    assert "kl" not in figures and figures["perplexity"] > 1
