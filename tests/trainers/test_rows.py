"""Rows as TRL prepares them."""

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from tests.support.data import PAIRS
from tests.support.scoring import CANDIDATES, chat, save_reward_model
from trl_ext.data.prepare import prepare_dataset
from trl_ext.data.rows import RowOptions
from trl_ext.scoring.models import RewardModelScorer


@pytest.mark.parametrize("form", ["pairs", "chat_pairs", "implicit", "implicit_chat"])
def test_pairs_have_the_ids_of_dpo_trainer(form, pairs, chat_pairs, tokenizer, model, config_kwargs):
    if form == "implicit":
        rows = Dataset.from_list([{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in pairs])
    elif form == "implicit_chat":
        rows = Dataset.from_list([{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in chat_pairs])
    else:
        rows = {"pairs": pairs, "chat_pairs": chat_pairs}[form]
    ours, _ = prepare_dataset(rows, tokenizer, RowOptions(eos_token=tokenizer.eos_token), name="train")
    theirs = DPOTrainer(
        model=model,
        ref_model=None,
        args=DPOConfig(**config_kwargs, precompute_ref_log_probs=False),
        train_dataset=rows,
        processing_class=tokenizer,
    ).train_dataset
    assert len(ours) == len(theirs) == len(PAIRS)
    for our_row, their_row in zip(ours, theirs, strict=True):
        assert our_row["prompt_ids"] == their_row["prompt_ids"]
        assert our_row["completion_ids"] == [their_row["chosen_ids"], their_row["rejected_ids"]]
        assert our_row["scores"] == [1.0, 0.0] and our_row["target_index"] == 0


def test_a_reward_model_reads_what_trl_trains_it_on(tmp_path):
    from trl import RewardConfig, RewardTrainer

    rows = [{"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": "x"} for row in CANDIDATES]
    chats = [{**chat({"prompt": row["prompt"], "completions": [row["chosen"], "x"]})} for row in rows]
    pairs = [{"prompt": c["prompt"], "chosen": c["completions"][0], "rejected": c["completions"][1]} for c in chats]
    scorer = RewardModelScorer(str(save_reward_model(tmp_path / "tiny-rm")))
    for data in (rows, pairs):
        args = RewardConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", activation_checkpointing=False, max_length=None
        )
        theirs = RewardTrainer(
            scorer.model, args, train_dataset=Dataset.from_list(data), processing_class=scorer.tokenizer
        )
        ours = [scorer._token_ids(row, row["chosen"]) for row in data]
        assert ours == list(theirs.train_dataset["chosen_ids"])
