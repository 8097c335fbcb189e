"""Local files of rows: every ending that `datasets` knows, words in CSV, and messages that say where the fault is."""

import bz2
import gzip
import json
import lzma

import pytest
from datasets import Dataset, load_dataset
from trl import DatasetMixtureConfig, ScriptArguments

from tests.support.data import PAIRS
from trl_ext.data.load import load_datasets, load_prompts

JSON_LINES = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()


def load(path, streaming=False, **mixture):
    script_args = ScriptArguments(dataset_name=str(path) if path else None, dataset_streaming=streaming)
    return load_datasets(script_args, DatasetMixtureConfig(**mixture), with_eval=False, seed=0)[0]


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.bz2", "a.v2.jsonl.xz", "a.csv", "a.tsv",
     "a.csv.gz", "a.parquet", "a.arrow", "a [1]*?.jsonl", "folder/a.tsv", "."],
)  # fmt: skip
def test_every_ending_is_read(name, tmp_path, pairs, monkeypatch):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if ".csv" in name or ".tsv" in name:
        pairs.to_csv(tmp_path / "plain", sep="\t" if ".tsv" in name else ",", index=False)
        content = (tmp_path / "plain").read_bytes()
        (tmp_path / "plain").unlink()
    elif name.endswith("parquet"):
        pairs.to_parquet(path)
        content = path.read_bytes()
    elif name.endswith("arrow"):
        pairs.save_to_disk(tmp_path / "saved")
        content = (tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes()
    else:
        content = JSON_LINES
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], bytes)
    if name == ".":
        (path / "train.jsonl").write_bytes(content)
    else:
        path.write_bytes(compress(content))
    monkeypatch.chdir(tmp_path)
    for given in (path, name):
        assert list(load(given)) == PAIRS
    assert list(load(path, streaming=True)) == PAIRS


def test_words_in_csv_are_text(tmp_path):
    """None, NA, null, numbers and truth values, in a file, a folder and a mixture; only an empty cell is missing."""
    cells = ["None", "NA", "null", "nan", "N/A", "n/a", "NULL", "007", "1e3", "TRUE", "#N/A"]
    rows = [
        {"prompt": f"{number}? ", "chosen": cell, "rejected": "no", "kind": cell} for number, cell in enumerate(cells)
    ]
    Dataset.from_list([*rows, {**rows[0], "chosen": None}]).to_csv(tmp_path / "train.csv", index=False)
    Dataset.from_list(
        [{"prompt": "a", "chosen": one, "rejected": "x", "score_chosen": s} for one, s in (("4", 1), ("22", 2))]
    ).to_csv(tmp_path / "numbers.tsv", sep="\t", index=False)
    numbers = list(load(tmp_path / "numbers.tsv"))
    assert [row["chosen"] for row in numbers] == ["4", "22"] and [row["score_chosen"] for row in numbers] == [1, 2]
    (tmp_path / "numbers.tsv").unlink()
    mixture = [{"path": "csv", "data_files": str(tmp_path / "train.csv"), "split": "train"}]
    for data in (
        load(tmp_path / "train.csv"),
        load(tmp_path),
        load(tmp_path / "train.csv", True),
        load(None, datasets=mixture),
    ):
        found = list(data)
        assert [row["chosen"] for row in found] == [*cells, None] and [row["kind"] for row in found[:-1]] == cells
    plain = load_dataset("csv", data_files=str(tmp_path / "train.csv"), split="train")
    assert plain[0]["chosen"] is None  # read by `datasets` itself, and cached under another name


def test_empty_files_are_named(tmp_path):
    for name, content in (
        ("a.jsonl", b""), ("b.jsonl", b" \n\n"), ("c.json", b""), ("d.csv", b""), ("e.tsv", b"\n"), ("f.txt", b""),
        ("g.parquet", b""), ("h.arrow", b""), ("i.jsonl.gz", gzip.compress(b"")), ("j.json", b"[]"),
        ("k.csv", b"prompt,chosen\n"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        for streaming in (False, True):
            if streaming and name[0] in "jk":
                continue  # found when the stream is read
            with pytest.raises(ValueError) as refused:
                data = load(tmp_path / name, streaming)
                next(iter(data), None)
            assert str(refused.value).startswith(f"A data file must hold rows, got {tmp_path / name}, which ")
            assert str(refused.value).endswith("Add rows, or name another file.") and "\n" not in str(refused.value)
        (tmp_path / name).unlink()
    (tmp_path / "train.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"A data file must hold rows, got .*train.jsonl, which is empty"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "lines", "number", "shown"),
    [
        ("a.jsonl", ['{"prompt": "a"}', '{"prompt": "b"', '{"prompt": "c"}'], 2, r"""'\{"prompt": "b"' \(Expecting"""),
        ("a.jsonl", ['{"prompt": "a"}', "", "hello"], 3, r"'hello' \(Expecting value\)"),
        ("a.jsonl", ['{"prompt": "a"}', '["b"]'], 2, r"""'\["b"\]'"""),
        ("a.jsonl", ["{'prompt': 'a'}", "{'prompt': 'b'}"], 1, r"\(Expecting property name"),
        ("a.jsonl", ['{"prompt": "a"}', '{"prompt": "\udcff"}'], 2, r"\('utf-8' codec can't decode"),
        ("a.jsonl", ['{"prompt": "' + "x" * 300 + '"}', '{"prompt": "' + "x" * 300], 2, r"x\.\.\.' \(Unterminated"),
        ("a.jsonl.gz", ['{"prompt": "a"}', '{"prompt": "b",}'], 2, r"\(Expecting prop|\(Illegal"),
        ("a.json", ["[", '{"prompt": "a"},', '{"prompt": "b"', "]"], 4, r"'\]' \(Expecting ',' delimiter\)"),
        ("a.json", ['{"prompt": "a"}', '{"prompt": '], 2, r"Expecting value"),
        ("folder", ['{"prompt": "a"}', '{"prompt": '], 2, r"Expecting value"),
    ],
)  # fmt: skip
def test_a_broken_line_of_json_is_named(name, lines, number, shown, tmp_path):
    content = "\n".join(lines).encode("utf-8", errors="surrogateescape")
    path = tmp_path / ("train.jsonl" if name == "folder" else name)
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(
        ValueError, match=rf"^Line {number} of {path} must be a JSON object, got .*{shown}.*Fix the line"
    ) as refused:
        load(tmp_path if name == "folder" else path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300 + len(str(path))


def test_other_faults_of_files_are_named(tmp_path):
    (tmp_path / "rows.dat").write_bytes(JSON_LINES)
    for name in ("rows.dat", "rows"):  # they exist: neither a missing folder nor a name of the Hub
        (tmp_path / name).write_bytes(JSON_LINES)
        with pytest.raises(ValueError, match=rf"ending of a data file must be one of \.csv, .*got '{name}'. Rename"):
            load(tmp_path / name)
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="a.jsonl.gz cannot be read as a table of rows"):
        load(tmp_path / "a.jsonl.gz")
    for missing in ("b.jsonl.gz", "b.tsv", "b.arrow", "./b.txt"):
        with pytest.raises(FileNotFoundError, match="a local file, got .*, which is not there. Correct the path"):
            load(missing)
    (tmp_path / "lines.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"must have a column `prompt` to sample answers for, got \['text'\]"):
        load_prompts(ScriptArguments(str(tmp_path / "lines.txt")), DatasetMixtureConfig())
