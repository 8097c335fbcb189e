"""Columns that people have: tool calls, metadata, files, nulls that Arrow filled in, prompts with a start token."""

import json

import pytest
import trl
from datasets import Dataset, Features, Image, IterableDataset, Json, List, Value, load_dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from trl import DatasetMixtureConfig, ScriptArguments

from tests.support.data import PAIRS
from tests.support.methods import all_but
from trl_ext import (
    IPOConfig,
    IPOTrainer,
    SPINConfig,
    share_prefixes,
)
from trl_ext.data.columns import as_given, without_nulls
from trl_ext.data.load import load_prompts
from trl_ext.data.prepare import prepare_dataset, prepare_row
from trl_ext.data.prompts import prompt_token_ids
from trl_ext.data.rows import RowOptions
from trl_ext.data.tokens import num_repeated_start_tokens, text_ids, without_repeated_start
from trl_ext.methods.dpo.config import DPOConfig
from trl_ext.methods.dpo.trainer import DPOTrainer
from trl_ext.methods.kto.config import KTOConfig
from trl_ext.methods.kto.trainer import KTOTrainer
from trl_ext.methods.rloo.config import RLOOConfig
from trl_ext.methods.rloo.trainer import RLOOTrainer
from trl_ext.methods.spin.rows import as_dataset, sft_rows
from trl_ext.runs.evaluation import answer_logps
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig
from trl_ext.scoring.functions import FunctionScorer
from trl_ext.scoring.models import RewardModelScorer
from trl_ext.scoring.pairs import pair_rows
from trl_ext.scoring.score import score_rows
from trl_ext.scoring.tournament import PairwiseScorer

# shows everything that reaches it
TEMPLATE = (
    "{{ tools | tojson }}{{ mood }}{% for m in messages %}<{{ m | tojson }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name, **arguments):
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "tool_calls": calls}


def tool_row(question, tools, good, bad, **columns):
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [good],
        "rejected": [bad],
        "tools": tools,
        **columns,
    }


NO = {"role": "assistant", "content": "no"}
TEXT = {"type": "string"}
# keys differ from row to row, at every depth, and so do the types of one argument
TOOL_ROWS = [
    tool_row("Go", [tool("move", x={"type": "integer"})], call("move", x=1), call("move", x="far")),
    tool_row("Talk", [tool("say", text={**TEXT, "default": None})], call("say", text="hi"), NO),
    tool_row("Wait", [tool("wait", until=TEXT)], call("wait", until={"hour": 1}), call("wait", until={"day": [2]})),
    tool_row("Stay", [], {"role": "assistant", "content": "yes"}, call("wait", until=None)),
]
# the same kind of rows, of types that Arrow holds without `Json`: it fills every key in everywhere
FILLED_ROWS = [
    tool_row("Go", [tool("move", x={"type": "integer"})], call("move", x=1), call("turn", left=True)),
    tool_row("Talk", [tool("say", text=TEXT)], call("say", text="hi"), NO),
]


@pytest.fixture
def tool_tokenizer(tokenizer, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def tool_model_dir(model, tool_tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tool_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def as_file(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))


def rendered(tokenizer, row):
    """Prompt and answers of a row in the template, as they were written."""
    kwargs = {"tools": row["tools"]}
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True, **kwargs)
    whole = [
        tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False, **kwargs)
        for side in ("chosen", "rejected")
    ]
    return prompt, whole


def shown(tokenizer, prepared):
    return [tokenizer.decode(prepared["prompt_ids"] + ids) for ids in prepared["completion_ids"]]


def losses_of(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_tool_calls_train_like_trl_and_in_every_trainer(tool_model_dir, tool_tokenizer, config_kwargs, tmp_path):
    rows = as_file(TOOL_ROWS, tmp_path / "tools.jsonl")
    assert "Json" in str(rows.features["tools"]) and "Json" in str(rows.features["chosen"])
    kwargs = {**config_kwargs, "learning_rate": 1e-4, "max_length": 500, "per_device_eval_batch_size": 2}
    common = {"train_dataset": rows, "processing_class": tool_tokenizer}

    expected = losses_of(trl.DPOTrainer(tool_model_dir, args=trl.DPOConfig(**kwargs), **common))
    assert len(expected) == 2
    with share_prefixes(True):
        shared = losses_of(trl.DPOTrainer(tool_model_dir, args=trl.DPOConfig(**kwargs), **common))
    assert shared == pytest.approx(expected, rel=1e-5)
    assert losses_of(DPOTrainer(tool_model_dir, args=DPOConfig(**kwargs), **common)) == pytest.approx(
        expected, rel=1e-5
    )
    ipo = losses_of(trl.DPOTrainer(tool_model_dir, args=trl.DPOConfig(**kwargs, loss_type="ipo", beta=0.1), **common))
    ours = losses_of(IPOTrainer(tool_model_dir, args=IPOConfig(**kwargs, beta=0.1), **common))
    assert ours == pytest.approx(ipo, rel=1e-5)

    scored = rows.add_column("score_chosen", [1.0] * 4).add_column("score_rejected", [0.0] * 4)
    ids = None
    for trainer_class, config_class in all_but("dpo", "ipo", "rloo").values():
        trainer = trainer_class(tool_model_dir, args=config_class(**kwargs), **{**common, "train_dataset": scored})
        losses = losses_of(trainer)
        assert losses and all(abs(loss) < 1e4 for loss in losses), trainer_class
        if "completion_ids" in trainer.train_dataset.column_names and trainer_class is not KTOTrainer:
            ids = trainer.train_dataset["completion_ids"][:]
            assert [len(both) for both in ids] == [2] * 4
    assert ids


@pytest.mark.parametrize("streamed", [False, True])
def test_tool_calls_reach_the_template_as_they_were_written(streamed, tool_tokenizer, tmp_path):
    """Also as ranked lists, as rows of KTO, and with a null that `Json` holds because somebody wrote it."""
    rows = as_file(TOOL_ROWS, tmp_path / "tools.jsonl")
    expected = [rendered(tool_tokenizer, row)[1] for row in TOOL_ROWS]
    given = rows.to_iterable_dataset() if streamed else rows
    prepared, _ = prepare_dataset(given, tool_tokenizer, RowOptions(), name="train")
    assert [shown(tool_tokenizer, row) for row in prepared] == expected

    lists = []
    for row in TOOL_ROWS:
        answers = {"completions": [row["chosen"], row["rejected"]], "scores": [1.0, 0.0]}
        lists.append({"prompt": row["prompt"], "tools": row["tools"], **answers})
    lists = as_file(lists, tmp_path / "lists.jsonl")
    given = lists.to_iterable_dataset() if streamed else lists
    prepared, _ = prepare_dataset(given, tool_tokenizer, RowOptions(), name="train")
    assert [shown(tool_tokenizer, row) for row in prepared] == expected


def test_labelled_answers_with_tool_calls(tool_model_dir, tool_tokenizer, config_kwargs, tmp_path):
    single = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen", "tools": row["tools"]}
        for row in TOOL_ROWS
        for side in ("chosen", "rejected")
    ]
    rows = as_file(single, tmp_path / "labelled.jsonl")
    args = KTOConfig(**config_kwargs, max_length=500, loss_type="apo_zero_unpaired")
    trainer = KTOTrainer(tool_model_dir, args=args, train_dataset=rows, processing_class=tool_tokenizer)
    expected = sorted(text for row in TOOL_ROWS for text in rendered(tool_tokenizer, row)[1])
    decoded = sorted(tool_tokenizer.decode(r["prompt_ids"] + r["completion_ids"]) for r in trainer.train_dataset)
    assert decoded == expected


def test_files_are_refused_only_where_they_are_read(tokenizer, tmp_path):
    """Columns that nothing reads are left alone, unopened; `Json` is no file."""
    rows = [{**row, "meta": {"a": 1} if number % 2 else {"b": "x"}} for number, row in enumerate(PAIRS)]
    (tmp_path / "seen.png").write_text("no image")
    rows = as_file(rows, tmp_path / "meta.jsonl").add_column("seen", [str(tmp_path / "seen.png")] * len(PAIRS))
    rows = rows.cast_column("seen", Image())
    expected, _ = prepare_dataset(Dataset.from_list(PAIRS), tokenizer, RowOptions(), name="train")
    for given in (rows, rows.to_iterable_dataset()):
        for keep in (False, True):
            prepared, _ = prepare_dataset(given, tokenizer, RowOptions(), name="train", keep_columns=keep)
            assert [row["completion_ids"] for row in prepared] == expected["completion_ids"][:]
    rows.save_to_disk(tmp_path / "rows")
    loaded = load_prompts(ScriptArguments(str(tmp_path / "rows")), DatasetMixtureConfig())
    assert [row["prompt"] for row in loaded] == [row["prompt"] for row in PAIRS] and "seen" not in loaded[0]
    assert loaded[0]["meta"] == {"b": "x"}
    for given in (rows, rows.to_iterable_dataset()):
        with pytest.raises(NotImplementedError, match="`prompt` of the train dataset must hold text, .*got .*Image"):
            prepare_dataset(
                given.remove_columns("prompt").rename_column("seen", "prompt"), tokenizer, RowOptions(), name="train"
            )


def test_nulls_of_arrow_reach_no_template(tool_tokenizer):
    """In tools, arguments, fields of messages and template arguments, on the way to training."""
    rows = [
        {**row, "chat_template_kwargs": kwargs}
        for row, kwargs in zip(FILLED_ROWS, ({"mood": "!"}, {"other": 1}), strict=True)
    ]
    filled = Dataset.from_list(rows)
    assert filled[0]["rejected"][0]["content"] is None and filled[0]["chat_template_kwargs"]["other"] is None
    assert filled[1]["tools"][0]["function"]["parameters"]["properties"]["x"] is None
    expected = []
    for row in rows:
        kwargs = {"tools": row["tools"], **row["chat_template_kwargs"]}
        texts = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        expected.append([tool_tokenizer.apply_chat_template(text, tokenize=False, **kwargs) for text in texts])
    for given in (filled, filled.to_iterable_dataset()):
        prepared, _ = prepare_dataset(given, tool_tokenizer, RowOptions(), name="train")
        assert [shown(tool_tokenizer, row) for row in prepared] == expected
    for row, wanted in zip(filled, expected, strict=True):  # a row by itself, as a list of rows has it
        assert shown(tool_tokenizer, prepare_row(row, tool_tokenizer, RowOptions())) == wanted
        prompt = tool_tokenizer.decode(prompt_token_ids(tool_tokenizer, row))
        assert "null" not in prompt and wanted[0].startswith(prompt.removesuffix("<a>"))


def test_without_nulls_keeps_what_json_holds():
    features = Features({"a": {"b": Json(), "c": List({"d": Value("string")})}})
    value = {"a": {"b": {"kept": None}, "c": [{"d": None}, None], "e": None}}
    assert without_nulls(value["a"], features["a"]) == {"b": {"kept": None}, "c": [{}, None]}
    assert without_nulls(value) == {"a": {"b": {}, "c": [{}, None]}}
    assert as_given({"meta": {"a": None}, "tools": [{"a": None}]}) == {"meta": {"a": None}, "tools": [{}]}


@pytest.fixture
def reward_model_dir(tool_model_dir, tool_tokenizer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tool_model_dir, num_labels=1)
    model.save_pretrained(tmp_path / "reward_model")
    tool_tokenizer.save_pretrained(tmp_path / "reward_model")
    return str(tmp_path / "reward_model")


def test_nulls_of_arrow_reach_no_sampler_judge_or_reward(tool_model_dir, reward_model_dir, tool_tokenizer, tmp_path):
    """Sampling, scoring, judging, evaluation and the rows of self-play see what was written."""
    written = [{**row, "completions": [row["chosen"], row["rejected"]]} for row in FILLED_ROWS]
    filled = list(Dataset.from_list(written))
    assert filled != written

    config = SamplingConfig(num_candidates=1, max_new_tokens=2)
    one = sample_candidates(tool_model_dir, written, config, tmp_path / "one", mix_in="chosen")[0]
    other = sample_candidates(tool_model_dir, filled, config, tmp_path / "other", mix_in="chosen")[0]
    assert one == other and one[0]["completions"][1] == FILLED_ROWS[0]["chosen"]
    assert answer_logps(tool_model_dir, filled) == answer_logps(tool_model_dir, written)

    seen = []

    def reward(prompts, completions, tools, **_):
        seen.append([prompts, completions, tools])
        return [float("tool_calls" in str(one)) for one in completions]

    def judge(prompts, completions):
        seen.append([prompts, completions])
        return [0] * len(prompts)

    scorers = [FunctionScorer(reward), PairwiseScorer(judge), RewardModelScorer(reward_model_dir)]
    assert [scorer(filled) for scorer in scorers] == [scorer(written) for scorer in scorers]
    assert score_rows(filled, scorers) == score_rows(written, scorers) and "None" not in str(seen)
    assert pair_rows(score_rows(filled, [scorers[0]]), "all") == pair_rows(score_rows(written, [scorers[0]]), "all")

    answers = [{"prompt": row["prompt"], "completion": row["chosen"], "tools": row["tools"]} for row in FILLED_ROWS]
    config = SPINConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert sft_rows(Dataset.from_list(answers), tool_tokenizer, config, None, "train") == answers
    conversations = [{"messages": row["prompt"] + row["chosen"], "tools": row["tools"]} for row in FILLED_ROWS]
    ours = sft_rows(Dataset.from_list(conversations), tool_tokenizer, config, None, "train")
    assert [{key: row[key] for key in ("prompt", "completion", "tools")} for row in ours] == answers
    # arguments of one name and different types
    assert as_dataset(TOOL_ROWS)[2]["chosen"] == TOOL_ROWS[2]["chosen"]


@pytest.fixture(params=["start", "start and end", "two"])
def starting_tokenizer(request, model_dir):
    """A tokenizer that puts special tokens around a text."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"bos_token": "<s>", "cls_token": "<c>"})
    special = [
        ("<s>", tokenizer.bos_token_id),
        ("<c>", tokenizer.cls_token_id),
        (tokenizer.eos_token, tokenizer.eos_token_id),
    ]
    single = {"start": "<s> $A", "start and end": f"<s> $A {tokenizer.eos_token}", "two": "<s> <c> $A"}[request.param]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.start = "<s><c>" if request.param == "two" else "<s>"
    return tokenizer


def test_a_prompt_that_brings_its_start_token_has_one(starting_tokenizer):
    tokenizer, start = starting_tokenizer, starting_tokenizer.start
    plain = [dict(row) for row in PAIRS]
    rendered = [{**row, "prompt": start + row["prompt"]} for row in PAIRS]
    options = RowOptions(eos_token=tokenizer.eos_token)
    expected, report = prepare_dataset(Dataset.from_list(plain), tokenizer, options, name="train")
    assert "start token" not in str(report)
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rendered]
    for rows in (rendered, implicit):
        ours, report = prepare_dataset(Dataset.from_list(rows), tokenizer, options, name="train")
        assert [r["prompt_ids"] + r["completion_ids"][0] for r in ours] == [
            r["prompt_ids"] + r["completion_ids"][0] for r in expected
        ]
        assert report.num_start_repeated == 8 and "adds as well: 8 prompts; it is kept once" in str(report)
    streamed, _ = prepare_dataset(IterableDataset.from_generator(lambda: rendered), tokenizer, options, name="train")
    assert [row["prompt_ids"] for row in streamed] == expected["prompt_ids"][:]
    for ours, theirs in zip(rendered, plain, strict=True):
        assert prompt_token_ids(tokenizer, ours) == prompt_token_ids(tokenizer, theirs)
        assert without_repeated_start(tokenizer, ours["prompt"]) == theirs["prompt"]
    # what the tokenizer does not add stays, also twice, and so does a start token somewhere else
    assert text_ids(tokenizer, "a<s>") == tokenizer("a<s>")["input_ids"]
    assert num_repeated_start_tokens(tokenizer, start + start + "a") == len(start) // 3
    assert text_ids(tokenizer, tokenizer.eos_token + "a") == tokenizer(tokenizer.eos_token + "a")["input_ids"]


def test_start_tokens_in_sampling_scoring_and_rloo(
    model, model_dir, reward_model_dir, tmp_path, caplog, config_kwargs
):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    for folder in (tmp_path / "model", tmp_path / "reward_model"):
        tokenizer.save_pretrained(folder)
    model.save_pretrained(tmp_path / "model")
    plain = [{"prompt": row["prompt"], "completions": [row["chosen"]]} for row in PAIRS[:2]]
    rendered = [{**row, "prompt": tokenizer.bos_token + row["prompt"]} for row in plain]
    config = SamplingConfig(num_candidates=1, max_new_tokens=3)
    one = sample_candidates(tmp_path / "model", plain, config, tmp_path / "one")[0]
    other = sample_candidates(tmp_path / "model", rendered, config, tmp_path / "other")[0]
    assert [row["completions"] for row in one] == [row["completions"] for row in other]
    assert "2 of 2 prompts begin with the start token" in caplog.text
    assert answer_logps(tmp_path / "model", plain) == answer_logps(tmp_path / "model", rendered)
    scorer = RewardModelScorer(reward_model_dir)
    assert scorer(plain) == scorer(rendered)

    args = RLOOConfig(
        **{**config_kwargs, "per_device_train_batch_size": 2},
        rewards=["tests.support.rewards:vowels"],
        num_generations=2,
    )
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rendered])
    trainer = RLOOTrainer(str(tmp_path / "model"), args=args, train_dataset=prompts)
    assert trainer.train_dataset["prompt"][:] == [row["prompt"] for row in plain]


def test_scores_that_are_text_are_refused_in_one_line(tokenizer):
    ranked = {"prompt": "a? ", "completions": ["x", "y"], "scores": ["0.1", "0.9"]}
    scored = {**PAIRS[0], "score_chosen": "1", "score_rejected": "0"}
    values = RowOptions(score_values=True)
    for row, options, column in ((ranked, RowOptions(), "scores"), (scored, values, "score_chosen")):
        with pytest.raises(ValueError) as refused:
            prepare_dataset(Dataset.from_list([row]), tokenizer, options, name="train")
        expected = f"`{column}` of the train dataset must hold numbers, got text. Convert the column."
        assert str(refused.value) == expected
    # where the size of the scores is not read, they are no matter
    prepare_dataset(Dataset.from_list([scored]), tokenizer, RowOptions(), name="train")
    mixed = [{**ranked, "scores": ["high", 1]}, {**ranked, "scores": [1, 2]}]
    with pytest.raises(
        ValueError, match="1 of 2 .*\n.*'scores' must hold finite numbers, got the text 'high'. Convert"
    ):
        prepare_dataset(Dataset.from_list(mixed, on_mixed_types="use_json"), tokenizer, RowOptions(), name="train")
