"""Rows in, prepared rows out; and one message per thing that can be wrong."""

import copy
import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AddedToken
from trl import extract_prompt

from tests.support.data import PAIRS, read_jsonl, real_data
from trl_ext.data.messages import extract_shared_prompt
from trl_ext.data.prepare import prepare_dataset, prepare_row
from trl_ext.data.row_error import RowError
from trl_ext.data.rows import RowOptions
from trl_ext.data.tokens import tokenize_candidates, without_end


def prepare(rows, tokenizer, options=None, **kwargs):
    dataset = rows if not isinstance(rows, list) else Dataset.from_list(rows)
    options = options or RowOptions(eos_token=tokenizer.eos_token)
    return prepare_dataset(dataset, tokenizer, options, name="train", **kwargs)


def decode(tokenizer, row):
    return tokenizer.decode(row["prompt_ids"]), [tokenizer.decode(ids) for ids in row["completion_ids"]]


def test_plain_text_gets_the_end_token_and_chat_text_gets_it_from_the_template(pairs, chat_pairs, tokenizer):
    prompt, (chosen, rejected) = decode(tokenizer, prepare(pairs, tokenizer)[0][0])
    assert (prompt, chosen, rejected) == ("What is 2 + 2? ", "4<|im_end|>", "22, I should think<|im_end|>")
    prompt, (chosen, rejected) = decode(tokenizer, prepare(chat_pairs, tokenizer)[0][0])
    assert prompt == "<|im_start|>user\nWhat is 2 + 2? <|im_end|>\n<|im_start|>assistant\n"
    assert chosen == "4<|im_end|>"


def test_tools_and_template_arguments_reach_the_template(chat_pairs, tokenizer):
    for kwargs in (None, {"tools": None}):  # a null in a table is one that Arrow may have filled in
        row = {**chat_pairs[0], "tools": '[{"name": "add"}]', "chat_template_kwargs": kwargs}
        assert '"add"' in decode(tokenizer, prepare([row], tokenizer)[0][0])[0]


def test_extract_shared_prompt_agrees_with_trl_on_pairs():
    for chosen, rejected in [
        ("The sky is blue", "The sky is green"),
        ("same start, longer", "same start"),
        ("ab", "cd"),
        ("a b", "a c"),
    ]:
        theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
        prompt, completions = extract_shared_prompt([chosen, rejected])
        assert (prompt, completions) == (theirs["prompt"], [theirs["chosen"], theirs["rejected"]])


def test_extract_shared_prompt_of_more_than_two():
    assert extract_shared_prompt(["go left", "go right", "go lame"]) == ("go", [" left", " right", " lame"])


def test_the_prompt_ends_where_the_first_completion_leaves_it():
    """A tokenizer that merges across the boundary for one completion moves it for all."""

    def merging_tokenizer(text):  # "b" + "c" become one token
        return {"input_ids": [ord(c) for c in text.replace("bc", "X")]}

    prompt_ids, completion_ids, moved = tokenize_candidates(merging_tokenizer, "ab", ["d", "cd", "e"])
    assert moved and prompt_ids == [ord("a")]
    assert completion_ids == [[ord("b"), ord("d")], [ord("X"), ord("d")], [ord("b"), ord("e")]]


def test_ranked_rows(ranked, tokenizer):
    prepared, report = prepare(ranked, tokenizer)
    assert [len(row["completion_ids"]) for row in prepared] == [3, 2, 4, 2]
    assert [row["target_index"] for row in prepared] == [1, 1, 3, 0], "the best, of equals the first"
    assert report.num_without_order == 1 and "nothing to rank: 1 prompts" in str(report)


def test_reference_equal_to_a_candidate_is_stored_once(tokenizer):
    rows = [{**PAIRS[0], "reference": reference} for reference in ("4", "four", PAIRS[0]["rejected"], None)]
    options = RowOptions(reference=True, eos_token=tokenizer.eos_token)
    prepared, report = prepare(rows, tokenizer, options)
    assert [row["target_index"] for row in prepared] == [0, 2, 1, 0]
    assert [len(row["completion_ids"]) for row in prepared] == [2, 3, 2, 2]
    assert report.num_reference_missing == 1 and "no `reference`" in str(report)


def test_reference_is_left_alone_when_it_is_not_wanted(tokenizer):
    prepared, _ = prepare([{**PAIRS[0], "reference": "four"}], tokenizer)
    assert len(prepared[0]["completion_ids"]) == 2


def test_score_values_of_pairs(tokenizer):
    options = RowOptions(score_values=True, eos_token=tokenizer.eos_token)
    prepared, _ = prepare([{**PAIRS[0], "score_chosen": 7, "score_rejected": 2.5}], tokenizer, options)
    assert prepared[0]["scores"] == [7.0, 2.5]
    with pytest.raises(ValueError, match="must have scores, whose size this loss needs, got .*. Add `score_chosen`"):
        prepare(PAIRS, tokenizer, options)


def test_scores_are_what_a_batch_can_hold(tokenizer):
    """Equal in single precision is equal, from the report to the loss."""
    rows = [
        {"prompt": "p ", "completions": ["a", "b"], "scores": [1.0, 1.0 + 1e-12]},
        {"prompt": "p ", "completions": ["a", "b"], "scores": [0.1, 0.1 + 1e-6]},
    ]
    prepared, report = prepare(rows, tokenizer)
    assert report.num_without_order == 1
    assert [row["target_index"] for row in prepared] == [0, 1]
    for row in prepared:
        assert torch.tensor(row["scores"], dtype=torch.float32).tolist() == row["scores"]
    with pytest.raises(RowError, match="too large"):
        prepare_row({**rows[0], "scores": [0, 10**400]}, tokenizer, RowOptions())


def test_scores_of_pairs_where_they_are_given(tokenizer):
    options = RowOptions(score_columns=True, eos_token=tokenizer.eos_token)
    row = {**PAIRS[0], "score_chosen": 7, "score_rejected": 2.5}
    for given, scores, has_scores in (
        (row, [7.0, 2.5], True),
        ({**row, "score_rejected": 7}, [7.0, 7.0], True),
        ({**row, "score_rejected": None}, [1.0, 0.0], False),
        (PAIRS[0], [1.0, 0.0], False),
    ):
        prepared = prepare_row(given, tokenizer, options)
        assert (prepared["scores"], prepared["has_scores"]) == (scores, has_scores)
    with pytest.raises(RowError, match="'score_rejected' holds nan"):
        prepare_row({**row, "score_chosen": 1, "score_rejected": float("nan")}, tokenizer, options)
    with pytest.raises(RowError, match=r"'score_chosen' \(1.0\) is not above the rejected 2.5"):
        prepare_row({**row, "score_chosen": 1, "score_rejected": 2.5}, tokenizer, options)


GOOD = {"prompt": "p ", "chosen": "good", "rejected": "bad"}


GOOD_LIST = {"prompt": "p ", "completions": ["a", "b"], "scores": [1.0, 0.0]}


CHAT = {
    "prompt": [{"role": "user", "content": "hi"}],
    "chosen": [{"role": "assistant", "content": "hello"}],
    "rejected": [{"role": "assistant", "content": "go away"}],
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "rejected": "good"}, r"row 1: column 'rejected' is the same as 'chosen'. Remove pairs without"),
        ({**GOOD, "chosen": " "}, r"row 1: column 'chosen' is empty. Remove rows whose answer is empty"),
        ({**GOOD, "rejected": None}, r"row 1: column 'rejected' is missing \(None\). Fill it in"),
        ({**GOOD, "prompt": None}, r"row 1: column 'prompt' is missing"),
        (
            {**GOOD, "prompt": "p" * 70},
            r"row 1: column 'prompt' has 70 tokens and fills max_length=64. Raise `max_length",
        ),
        ({**GOOD, "chosen": "x" * 70 + "a", "rejected": "x" * 70 + "b"}, r"the same tokens as 'chosen' once cut"),
        (
            {**GOOD_LIST, "scores": [1.0]},
            r"row 1: column 'scores' has 1 entries for 2 completions. Give one score per",
        ),
        ({**GOOD_LIST, "scores": [1.0, float("nan")]}, r"column 'scores' holds nan, which is not a finite number"),
        ({**GOOD_LIST, "scores": [1.0, float("inf")]}, r"column 'scores' holds inf"),
        (
            {**GOOD_LIST, "scores": [1.0, 1e39]},
            r"column 'scores' holds 1e\+39, which is too large",
        ),
        ({**GOOD_LIST, "scores": [1.0, None]}, r"column 'scores' holds None"),
        ({**GOOD_LIST, "completions": ["a"], "scores": [1.0]}, r"has 1 entries where 2 are needed. Remove prompts"),
        ({**GOOD_LIST, "completions": ["a", ""]}, r"column 'completions\[1\]' is empty"),
        ({**CHAT, "chosen": []}, r"column 'chosen' is an empty list of messages"),
        ({**CHAT, "chosen": [{"role": "assistant", "content": ""}]}, r"column 'chosen' is empty"),
        (
            {**CHAT, "chosen": [{"role": "user", "content": "why?"}]},
            r"column 'chosen' ends with a message of the user",
        ),
    ],
)
def test_unusable_row_is_refused_by_row_column_and_remedy_or_dropped_and_counted(row, message, tokenizer, caplog):
    good = GOOD_LIST if "completions" in row else CHAT if isinstance(row["chosen"], list) else GOOD
    options = RowOptions(max_length=64, eos_token=tokenizer.eos_token)
    with pytest.raises(ValueError, match=message) as error:
        prepare([good, row, good], tokenizer, options)
    assert "train dataset has 1 of 3 rows" in str(error.value) and 'on_invalid_row="drop"' in str(error.value)

    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        prepared, report = prepare([good, row, good], tokenizer, options, on_invalid_row="drop")
    assert len(prepared) == 2 and sum(report.dropped.values()) == 1
    assert "dropped" in caplog.text and "1 rows" in caplog.text

    stream = IterableDataset.from_generator(lambda: iter([good, row, good]))
    with pytest.raises(ValueError, match=message):
        list(prepare(stream, tokenizer, options)[0])
    assert len(list(prepare(stream, tokenizer, options, on_invalid_row="drop")[0])) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "chosen": 5, "rejected": 6}, r"column 'chosen' is int \(5\), neither text nor a list of messages"),
        ({**GOOD, "prompt": 5}, r"column 'prompt' is int"),
        (
            {**GOOD, "chosen": ["a"], "rejected": ["b"]},
            r"column 'chosen' holds 'a', which is not a message with a role",
        ),
        ({**CHAT, "prompt": "hi"}, r"column 'prompt' is str while 'chosen' is list"),
        ({**GOOD_LIST, "scores": ["1", "0"]}, "`scores` of the train dataset must hold numbers, got text"),
        ({**GOOD_LIST, "scores": 1.0}, r"column 'scores' is float, not a list of numbers"),
        ({**GOOD_LIST, "completions": "ab"}, r"column 'completions' is str, not a list"),
    ],
)
def test_wrong_types_are_refused(row, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        prepare([row, row], tokenizer)


def test_implicit_prompt_with_a_reference(tokenizer):
    options = RowOptions(reference=True, eos_token=tokenizer.eos_token)
    pair = {"chosen": "2 + 2? 4", "rejected": "2 + 2? 5"}
    prepared, _ = prepare([{**pair, "reference": "2 + 2? It is 4."}], tokenizer, options)
    assert decode(tokenizer, prepared[0]) == ("2 + 2?", [f" {text}<|im_end|>" for text in ("4", "5", "It is 4.")])
    for reference in ("It is 4.", "2 apples"):
        with pytest.raises(ValueError, match=r"'reference' does not begin with '2 \+ 2\?'.* Add a `prompt` column"):
            prepare([{**pair, "reference": reference}], tokenizer, options)


@pytest.mark.parametrize("prompt", ["messages", "text", "none"])
@pytest.mark.parametrize(
    "extra", [[], [{"role": "assistant", "content": "yes?"}, {"role": "user", "content": "well"}]]
)
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "be kind", "name": None}]])
def test_conversations_that_repeat_the_prompt(system, extra, prompt, tokenizer):
    """Answers as whole conversations, with the prompt beside them or not: datasets in wide use are like this."""
    start = [*system, *CHAT["prompt"], *extra]
    whole = {key: [{**message, "name": None} for message in start] + CHAT[key] for key in ("chosen", "rejected")}
    given = {"messages": {"prompt": start}, "text": {"prompt": CHAT["prompt"][0]["content"]}, "none": {}}
    options = RowOptions(reference=True, eos_token=tokenizer.eos_token)
    answer = [{"role": "assistant", "content": "hey"}]
    separate = {**CHAT, "prompt": start, "reference": answer}
    expected = prepare_row(separate, tokenizer, options)
    for reference in (answer, [*start, *answer]):
        assert prepare_row({**whole, **given[prompt], "reference": reference}, tokenizer, options) == expected


@pytest.mark.parametrize("column", ["chosen", "rejected", "reference"])
def test_a_prompt_repeated_in_one_answer_only_or_a_foreign_one_is_refused(column, tokenizer):
    options = RowOptions(reference=True, eos_token=tokenizer.eos_token)
    foreign = [{"role": "user", "content": "something else"}]
    row = {**CHAT, "reference": CHAT["chosen"]}
    with pytest.raises(ValueError, match=f"column '{column}' begins with a message of the user"):
        prepare_row({**row, column: foreign + row[column]}, tokenizer, options)


def test_nothing_behind_an_implicit_prompt_is_empty(tokenizer):
    with pytest.raises(ValueError, match="column 'rejected' is empty"):
        prepare([{"chosen": "ask answer", "rejected": "ask "}], tokenizer)


def test_streams_say_what_they_cut_and_name_missing_values(tokenizer, caplog):
    options = RowOptions(max_length=8, eos_token=tokenizer.eos_token)
    rows = [{**GOOD, "chosen": "a long answer"}] * 12
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        list(prepare(IterableDataset.from_generator(lambda: iter(rows)), tokenizer, options)[0])
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"train data: so far {n} completions cut at max_length=8" for n in (1, 10)]

    ragged = IterableDataset.from_generator(lambda: iter([GOOD, {"prompt": "p", "chosen": "c"}]))
    with pytest.raises(ValueError, match=r"row 1: column 'rejected' is missing"):
        list(prepare(ragged, tokenizer)[0])


def test_no_rows_at_all(tokenizer):
    for empty in (Dataset.from_list([]), Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})):
        with pytest.raises(ValueError, match="The train dataset must have rows, got none"):
            prepare(empty, tokenizer)
    with pytest.raises(ValueError, match="The train dataset must have rows, got none"):
        prepare(IterableDataset.from_generator(lambda: iter([])), tokenizer)


def test_tensor_formats_do_not_change_the_ids(tokenizer, ranked):
    plain = prepare(ranked, tokenizer)[0]
    for form in ("numpy", "torch"):
        assert list(prepare(ranked.with_format(form), tokenizer)[0].with_format(None)) == list(plain)


def test_another_version_does_not_use_what_this_one_cached(tokenizer, tmp_path, monkeypatch):
    from trl_ext.data import prepare as preparing

    path = tmp_path / "rows.jsonl"
    Dataset.from_list(PAIRS).to_json(path)

    def cache_files():
        dataset = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
        return {file["filename"] for file in prepare(dataset, tokenizer)[0].cache_files}

    first = cache_files()
    assert first == cache_files()
    monkeypatch.setattr(preparing, "PREPARED_BY", "another version")
    assert not first & cache_files()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**CHAT, "tools": "[{"}, r"row 0: column 'tools' holds .*, which is not JSON \(Expecting"),
        ({**CHAT, "chat_template_kwargs": "x"}, r"row 0: column 'chat_template_kwargs' is str, not names with"),
        (
            {**CHAT, "chosen": [{"role": "assistant", "content": [{"type": "text", "text": None}]}]},
            r"'chosen' is empty",
        ),
    ],
)
def test_broken_template_arguments_and_parts_are_named(row, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        prepare([row], tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, r"must have .*columns \['chosen', 'prompt'\], without `rejected`. Rename"),
        ({"prompt": "p", "completion": "c", "label": True}, r"without `chosen` and `rejected`"),
        ({"prompt": "p", "completions": ["a", "b"]}, r"must have `scores` beside `completions`, .* Add the column"),
        ({**GOOD, **GOOD_LIST}, r"not both, got the columns .*Remove one"),
    ],
)
def test_missing_columns_are_refused(row, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        prepare([row], tokenizer)


def test_images_are_refused(tokenizer):
    with pytest.raises(NotImplementedError, match="must not have images"):
        prepare([{**GOOD, "image": "x.png"}], tokenizer)


def test_all_problems_are_listed_once_with_their_number(tokenizer):
    rows = [GOOD, {**GOOD, "chosen": ""}, {**GOOD, "rejected": ""}, {**GOOD, "rejected": "good"}]
    with pytest.raises(ValueError) as error:
        prepare(rows, tokenizer)
    assert (
        "3 of 4 rows" in str(error.value) and "row 1" in str(error.value) and "(1 more like it: 2)" in str(error.value)
    )
    assert "row 3" in str(error.value)


def test_nothing_left_is_an_error_even_when_dropping(tokenizer):
    with pytest.raises(ValueError, match="1 of 1 rows that cannot be used"):
        prepare([{**GOOD, "chosen": ""}], tokenizer, on_invalid_row="drop")


def test_template_that_fails_is_reported_with_its_row(tokenizer):
    row = {**CHAT, "prompt": [{"role": "user", "content": None}]}
    with pytest.raises(ValueError, match=r"row 0: column 'prompt' could not be tokenised"):
        prepare([row], tokenizer)


def test_truncation_is_counted_and_said(tokenizer, caplog):
    options = RowOptions(max_length=8, eos_token=tokenizer.eos_token)
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        prepared, report = prepare([GOOD, {**GOOD, "chosen": "a long answer"}], tokenizer, options)
    assert report.num_truncated == 1 and "cut at max_length=8: 1 completions (25.0%)" in caplog.text
    assert len(prepared[1]["prompt_ids"] + prepared[1]["completion_ids"][0]) == 8


def test_preparing_twice_changes_nothing(pairs, tokenizer):
    once, _ = prepare(pairs, tokenizer)
    twice, report = prepare(once, tokenizer)
    assert twice is once and report is None


@pytest.mark.parametrize("as_stream", [False, True])
def test_objects_with_two_fields_of_one_name_are_refused(as_stream, tokenizer):
    # Arrow ends a name at a null character, and reads no row of such a table
    call = {"name": "f", "arguments": {"x": 1, "x\x00y": 2}}
    rows = Dataset.from_list([{**PAIRS[0], "tools": [call]}])
    rows = rows.to_iterable_dataset() if as_stream else rows
    with pytest.raises(
        ValueError, match="column 'tools' of the train dataset holds objects with two fields named 'x'"
    ):
        prepare_dataset(rows, tokenizer, RowOptions(), name="train")


def test_other_columns_are_dropped_or_kept_as_asked(tokenizer):
    rows = [{**GOOD, "source": "web"}]
    assert "source" not in prepare(rows, tokenizer)[0].column_names
    assert prepare(rows, tokenizer, keep_columns=True)[0][0]["source"] == "web"


def test_changed_options_do_not_reuse_cached_rows(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    Dataset.from_list(PAIRS).to_json(path)
    for max_length, expected in ((None, 0), (20, 9)):
        dataset = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
        options = RowOptions(max_length=max_length, eos_token=tokenizer.eos_token)
        assert prepare(dataset, tokenizer, options)[1].num_truncated >= (expected > 0)


def test_real_preference_data(tokenizer):
    path = real_data("preference.jsonl")
    options = RowOptions(max_length=4096, eos_token=tokenizer.eos_token)
    _prepared, report = prepare(Dataset.from_json(str(path)), tokenizer, options, on_invalid_row="drop")
    assert report.num_rows == len(read_jsonl(path)) == 235
    assert report.num_prompts + sum(report.dropped.values()) == 235


def test_real_ranked_data(tokenizer):
    path = real_data("ranked.jsonl")
    _prepared, report = prepare(Dataset.from_json(str(path)), tokenizer, on_invalid_row="drop")
    assert report.num_rows == 611 and report.num_prompts + sum(report.dropped.values()) == 611


def test_prepare_row_needs_no_dataset(tokenizer):
    assert prepare_row(GOOD, tokenizer, RowOptions())["scores"] == [1.0, 0.0]


def test_an_end_of_the_template_that_is_no_named_special_token(tokenizer):
    """As in Phi-3: the template ends an answer with one token, the text with another."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in tokenizer.all_special_ids
    text = tokenizer("no, for ")["input_ids"]
    for end in ("", "<|end|>", "<|end|>\n", f"<|end|>\n{tokenizer.eos_token}", tokenizer.eos_token):
        assert without_end([*text, *tokenizer(end)["input_ids"]], tokenizer) == text
