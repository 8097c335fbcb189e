"""Run folders that are foreign or were tampered with are refused."""

import json
import os
import shutil

import pytest

from tests.support.malicious import PROMPTS, resume
from tests.support.stage_functions import look_around
from trl_ext.runs.manifest import ManifestError, read_manifest
from trl_ext.runs.run import Run
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig
from trl_ext.scoring.functions import FunctionScorer
from trl_ext.scoring.score import score_rows


def begun(folder, stages=("one", "two")):
    run = Run(folder, {"seed": 1}, resume=False)
    run.keep("rows", {"train.jsonl": '{"a": 1}\n'})
    for name in stages:
        run.stage(name, look_around, inputs={"rows": folder / "rows" / "train.jsonl"})
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two runs with the same settings and stages."""
    folders = [tmp_path_factory.mktemp("run") / "run" for _ in range(2)]
    for folder in folders:
        begun(folder)
    return folders


@pytest.fixture
def run_folder(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_what_was_not_touched_is_taken(run_folder):
    figures = [read_manifest(run_folder / name)["figures"] for name in ("one", "two")]
    assert resume(run_folder) == figures
    assert (run_folder / "one" / "calls").read_text() == "x", "not run again"


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


TAMPERING = {
    "figures": (lambda run, other: edit(run / "one/manifest.json", lambda m: m["figures"].update(calls=7)),
                "one/manifest.json was changed after it was written: it does not match its own digest"),
    "a key": (lambda run, other: edit(run / "one/manifest.json", lambda m: m.pop("figures")), "was changed after"),
    "its type": (lambda run, other: (run / "one/manifest.json").write_text("[1]"), "has no digest of itself"),
    "no JSON": (lambda run, other: (run / "one/manifest.json").write_text('{"stage":'), "cannot be read as JSON"),
    "no text": (lambda run, other: (run / "one/manifest.json").write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "truncated": (lambda run, other: os.truncate(run / "one/manifest.json", 100), "cannot be read as JSON"),
    "an output": (lambda run, other: (run / "one/calls").write_text("y"), "one/calls holds something else"),
    "its size": (lambda run, other: (run / "one/calls").write_text("xx"), "one/calls has 2 bytes, and stage 'one'"),
    "gone": (lambda run, other: (run / "one/calls").unlink(), "one/calls is gone, which stage 'one'"),
    "kept rows": (lambda run, other: (run / "rows/train.jsonl").write_text('{"a": 2}\n'), "train.jsonl holds"),
    "foreign": (lambda run, other: shutil.copytree(other / "one", run / "one", dirs_exist_ok=True),
                "one/manifest.json belongs to another run: its id is"),
    "of another stage": (lambda run, other: shutil.copytree(run / "two", run / "one", dirs_exist_ok=True),
                         "belongs to another stage, 'two', and was copied to that of 'one'"),
    "foreign run.json": (lambda run, other: shutil.copy(other / "run.json", run / "run.json"), "to another run: its"),
    "settings": (lambda run, other: edit(run / "run.json", lambda m: m["settings"].update(seed=2)),
                 "run.json was changed after it was written"),
    "broken settings": (lambda run, other: (run / "run.json").write_text("{}"), "run.json is damaged or of anoth"),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERING)
def test_foreign_and_tampered_manifests_are_refused(what, run_folder, finished):
    tamper, message = TAMPERING[what]
    tamper(run_folder, finished[1])
    with pytest.raises(ValueError, match=message) as refused:
        resume(run_folder)
    assert "Restore it, or" in str(refused.value) and "set another `--output_dir`" in str(refused.value)
    called = run_folder / "one" / "calls"
    assert not called.exists() or len(called.read_text()) < 3, "nothing was run"


def test_a_manifest_whose_digest_was_forged_is_refused_by_its_form(run_folder):
    from trl_ext.runtime.files import sealed

    file = run_folder / "one" / "manifest.json"
    content = {k: v for k, v in json.loads(file.read_text()).items() if k != "digest"}
    for wrong in ({"outputs": [1]}, {"outputs": {"calls": 1}}, {"figures": None}, {"run": 5}, {"inputs": "x"}):
        file.write_text(sealed({**content, **wrong}))
        with pytest.raises(ManifestError, match="manifest.json (is damaged|does not say)"):
            resume(run_folder)


def test_checkpoints_of_a_finished_stage_may_go(tmp_path):
    run = Run(tmp_path, {}, resume=False)
    (tmp_path / "one" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "one" / "checkpoint-5" / "optimizer.pt").write_text("x")
    run.stage("one", look_around)
    shutil.rmtree(tmp_path / "one" / "checkpoint-5")
    Run(tmp_path, {}, resume=True).stage("one", look_around)


@pytest.fixture(scope="module")
def sampled(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    sample_shards(model_dir, folder)
    return folder


def sample_shards(model, folder, **settings):
    config = SamplingConfig(num_candidates=2, max_new_tokens=4, **settings)
    return sample_candidates(model, PROMPTS, config, folder, shard_size=1, keep_empty=True)[0]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("shards/00000.jsonl", lambda text: text.replace('"index": 0', '"index": 1'), "does not match its digest"),
        ("shards/00000.jsonl", lambda text: text[:40], "cannot be read"),
        ("shards/00000.jsonl", lambda text: "", "does not match its digest"),
        ("shards/00000.jsonl", lambda text: "[[[", "cannot be read"),
        ("sampling.json", lambda text: text.replace("4", "5", 1), "was changed after it was written"),
        ("sampling.json", lambda text: "{}", "no digest of itself"),
    ],
)
def test_tampered_shards_are_refused(file, change, message, sampled, model_dir, tmp_path):
    shutil.copytree(sampled, tmp_path / "sampled")
    before = sample_shards(model_dir, tmp_path / "sampled")
    (tmp_path / "sampled" / file).write_text(change((sampled / file).read_text()))
    with pytest.raises((ValueError, FileExistsError), match=message) as refused:
        sample_shards(model_dir, tmp_path / "sampled")
    assert str(tmp_path / "sampled") in str(refused.value) and "emove" in str(refused.value)
    shutil.rmtree(tmp_path / "sampled")
    assert sample_shards(model_dir, tmp_path / "sampled") == before


def test_shards_of_other_settings_or_prompts_are_refused(sampled, model_dir, tmp_path):
    sample_shards(model_dir, tmp_path / "other", sampling_seed=7)
    for number in (0, 1):
        shutil.copytree(sampled, tmp_path / f"sampled-{number}")
    shutil.copy(tmp_path / "other/shards/00000.jsonl", tmp_path / "sampled-0/shards/00000.jsonl")
    shutil.copy(sampled / "shards/00001.jsonl", tmp_path / "sampled-1/shards/00000.jsonl")
    for number, message in ((0, "sampled with other settings"), (1, "must hold the prompts of its shard")):
        with pytest.raises(ValueError, match=message):
            sample_shards(model_dir, tmp_path / f"sampled-{number}")


def test_tampered_scores_are_refused(tmp_path):
    rows = [{"prompt": "a", "completions": ["b", "cc"]}, {"prompt": "d", "completions": ["e"]}]

    def score():
        scorer = FunctionScorer(
            lambda completions, **kwargs: [float(len(text)) for text in completions], name="length"
        )
        return [row["scores"] for row in score_rows(rows, [scorer], folder=tmp_path, batch_size=1)]

    assert score() == score() == [[1.0, 2.0], [1.0]]
    first, second = sorted(tmp_path.rglob("0000?.json"))
    edit(first, lambda content: content["values"][0][0].reverse())
    with pytest.raises(
        ValueError, match="00000.json was changed after it was written.*remove it to score its rows ag"
    ):
        score()
    shutil.copy(second, first)
    with pytest.raises(ValueError, match="00000.json holds the scores of other rows"):
        score()
    first.unlink()
    assert score() == [[1.0, 2.0], [1.0]]
