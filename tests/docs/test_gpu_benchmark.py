"""The benchmark for a CUDA GPU, rehearsed at toy size on a CPU."""

import csv

import gpu


def test_parts_append_their_rows_and_are_not_run_again(tmp_path, capsys):
    command = [
        "--rehearse",
        "--results",
        str(tmp_path / "rows.csv"),
        "--parts",
        "nan",
        "bf16",
        "compilations",
        "speed",
    ]
    gpu.main(command)
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows if row["what"] == "finished"] == command[-4:]
    assert all(row["value"] == "1.0" for row in rows if row["unit"] == "finite")
    assert all(float(row["value"]) < 0.05 for row in rows if row["unit"] == "of the norm")
    assert {row["way"] for row in rows if row["part"] == "speed"} >= {"sdpa padded", "sdpa shared"}
    assert all(row["device"] and row["commit"] for row in rows)
    capsys.readouterr()
    gpu.main(command)
    assert capsys.readouterr().out == "".join(f"{name}: finished before\n" for name in command[-4:])
