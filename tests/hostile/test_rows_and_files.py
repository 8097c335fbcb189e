"""Data of somebody else: no code, no template, no file that a row names."""

import pickle

import pytest
from datasets import Dataset, Image
from trl import DatasetMixtureConfig, ScriptArguments

from tests.support.data import PAIRS
from tests.support.malicious import Malicious
from trl_ext import SPINConfig
from trl_ext.data.load import load_datasets, load_prompts
from trl_ext.methods.spin.rows import sft_rows


def test_a_dataset_with_code_or_pickles_runs_none(tmp_path, marker):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    (folder / "train.pkl").write_bytes(pickle.dumps(Malicious(marker)))
    for args, mixture in (
        (ScriptArguments(str(folder)), DatasetMixtureConfig()),
        (
            ScriptArguments(),
            DatasetMixtureConfig(datasets=[{"path": "pandas", "data_files": str(folder / "train.pkl")}]),
        ),
    ):
        with pytest.raises(Exception) as refused:  # noqa: B017  (of datasets' own kinds)
            load_datasets(args, mixture, with_eval=False, seed=0)
        assert str(refused.value) and not marker.exists()


def test_what_a_row_says_is_never_a_template_or_a_file(tokenizer, tmp_path, marker):
    """Text of rows goes to the chat template as values."""
    from trl_ext.data.prepare import prepare_row
    from trl_ext.data.rows import RowOptions

    code = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in (1).__class__.__base__.__subclasses__() %}"
    row = {"prompt": [{"role": "user", "content": code}], "chosen": [{"role": "assistant", "content": code}],
           "rejected": [{"role": "assistant", "content": str(tmp_path)}]}  # fmt: skip
    prepared = prepare_row(row, tokenizer, RowOptions())
    assert code in tokenizer.decode(prepared["prompt_ids"])
    # nor may it bring a template of its own
    evil = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        prepare_row({**row, "chat_template_kwargs": {"chat_template": evil}}, tokenizer, RowOptions())
    assert not marker.exists()


def test_files_that_rows_name_are_not_opened(tmp_path, tokenizer):
    from trl_ext.data.prepare import prepare_dataset
    from trl_ext.data.rows import RowOptions

    (tmp_path / "seen.png").write_text("no image")
    rows = Dataset.from_list([{**row, "seen": str(tmp_path / "seen.png")} for row in PAIRS])
    rows = rows.cast_column("seen", Image())
    assert "seen" not in prepare_dataset(rows, tokenizer, RowOptions(), name="train", keep_columns=True)[0].features
    rows = rows.rename_column("chosen", "spare")
    with pytest.raises(NotImplementedError, match="`chosen` of the train dataset must hold text, .*got .*Image"):
        prepare_dataset(rows.rename_column("seen", "chosen"), tokenizer, RowOptions(), name="train")
    with pytest.raises(NotImplementedError, match="`completion` of the train dataset must hold text, .*got .*Image"):
        sft_rows(rows.rename_column("seen", "completion"), tokenizer, SPINConfig("out"), None, "train")
    rows.remove_columns("prompt").rename_column("seen", "prompt").save_to_disk(tmp_path / "rows")
    with pytest.raises(NotImplementedError, match="`prompt` of the prompt dataset must hold text, .*got .*Image"):
        load_prompts(ScriptArguments(str(tmp_path / "rows")), DatasetMixtureConfig())
