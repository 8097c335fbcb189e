"""Runs of several stages: fresh processes, what is kept, what is refused, and how they end."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate import PartialState

from tests.support.data import REPOSITORY
from tests.support.sampling import PROMPTS, SETTINGS, by_number, torchrun
from tests.support.stage_functions import CALLS, end_early, look_around, run_a_sleeping_stage, sample
from trl_ext import SPINConfig
from trl_ext.runs.manifest import fingerprint, installed_versions, read_manifest, settings_of, start_afresh
from trl_ext.runs.process import PRELOADED
from trl_ext.runs.run import Run
from trl_ext.runs.settings import run_settings, unset_value
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig


def times_called(folder):
    return len((folder / "calls").read_text())


def test_what_the_server_preloads_can_be_imported():
    """It passes over modules that are not there, and each stage would import them anew."""
    assert all(find_spec(name) for name in PRELOADED)


def test_every_stage_has_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_REMOVED", "1")
    run = Run(tmp_path, {}, resume=False)
    first = run.stage("first", look_around)
    monkeypatch.delenv("TRL_EXT_REMOVED")
    monkeypatch.setenv("TRL_EXT_SEEN", "here")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("MASTER_PORT", "20000")
    second = run.stage("nested/second", look_around, text="x")
    third = run.stage("third", look_around, shards_models=True)
    assert len({os.getpid(), first["pid"], second["pid"], third["pid"]}) == 4
    assert [first["calls"], second["calls"], third["calls"], len(CALLS)] == [1, 1, 1, 0], "globals start anew"
    assert first["environment"] == {"TRL_EXT_REMOVED": "1"}
    ports = [figures["environment"]["MASTER_PORT"] for figures in (second, third)]
    assert len({"20000", *ports}) == 3, "a place of their own to meet at"
    assert second["environment"] == {"TRL_EXT_SEEN": "here", "MASTER_PORT": ports[0]}, "it does not shard, nor share"
    assert third["environment"] == {"TRL_EXT_SEEN": "here", "MASTER_PORT": ports[1], "ACCELERATE_USE_FSDP": "true"}
    assert first["arguments"] == {} and second["arguments"] == {"text": "x"}


def test_what_is_finished_is_never_run_again(tmp_path):
    (tmp_path / "data").write_text("1")
    settings = {"seed": 1, "rounds": 2, "path": tmp_path}
    figures = [
        Run(tmp_path / "run", {**settings, "rounds": rounds}, resume=rounds > 2, may_change=["rounds"]).stage(
            "one", look_around, inputs={"data": tmp_path / "data"}
        )
        for rounds in (2, 3, 4)
    ]
    assert figures[0] == figures[1] == figures[2] and times_called(tmp_path / "run" / "one") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["rounds"] == 4
    Run(tmp_path / "run", settings, resume=True, may_change=["rounds"]).stage("two", look_around)
    assert times_called(tmp_path / "run" / "two") == 1, "another one is"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "error",
            "Stage 'one' failed; its error is printed above. What is finished is kept. The same",
        ),
        ("exit", "Stage 'one' left before its end. What is finished is kept"),
        (
            "SIGKILL",
            "Stage 'one' was ended by SIGKILL, as a rule because memory ran out. What is .* resumes from",
        ),
        (
            "SIGSEGV",
            "Stage 'one' was ended by SIGSEGV. What is finished is kept. .*`--resume_from",
        ),
    ],
)
def test_what_is_unfinished_is_run_again_in_its_folder(how, message, tmp_path):
    run = Run(tmp_path, {}, resume=False)
    run.stage("zero", look_around)
    with pytest.raises(RuntimeError, match=message):
        run.stage("one", end_early, how=how)
    assert read_manifest(tmp_path / "one") is None
    run = Run(tmp_path, {}, resume=True)
    run.stage("zero", look_around)
    assert run.stage("one", end_early, how=how) == {"found": how}
    assert times_called(tmp_path / "zero") == 1


def test_other_settings_are_refused(tmp_path):
    settings = {"seed": 1, "lengths": (1, 2), "folder": tmp_path, "name": None}
    Run(tmp_path, settings, resume=False).keep("prompts", {"train.jsonl": ""})
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(FileExistsError, match="holds an earlier run. Add `--resume_from_checkpoint true`"):
        Run(tmp_path, settings, resume=False)
    changed = {**settings, "seed": 2, "name": "x", "more": 3}
    message = "begun with other settings: more was None and is 3, name was None and is 'x', seed was 1 and is 2"
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, changed, resume=True)
    with pytest.raises(ValueError, match="other settings: seed was 1 and is 2. Resume with the settings it was begun"):
        Run(tmp_path, changed, resume=True, may_change=["more", "name"])
    assert (tmp_path / "run.json").read_bytes() == before
    Run(tmp_path, changed, resume=True, may_change=["more", "name", "seed"])


@pytest.mark.parametrize("missing", ["min_p", "stop_strings", "role_markers", "bf16", "beta", "weight_decay"])
def test_a_run_from_before_an_option_was_added_is_resumed(missing, tmp_path, config_kwargs):
    def run(resume, absent=(), **changed):
        config = {name: changed.pop(name) for name in ("bf16", "beta", "weight_decay") if name in changed}
        parsed = SPINConfig(**{**config_kwargs, **config}), SamplingConfig(**changed)
        settings = {name: value for name, value in run_settings(parsed).items() if name not in absent}
        return Run(tmp_path / "run", settings, resume=resume, default_of=partial(unset_value, parsed))

    run(False, absent=[missing]).keep("prompts", {"train.jsonl": ""})
    texts = {"stop_strings": ["x"], "role_markers": ["x"]}
    other = {"min_p": 0.2, "bf16": True, "beta": 3.0, "weight_decay": 0.5, **texts}[missing]
    with pytest.raises(ValueError, match=f"other settings: {missing} was .* and is {re.escape(str(other))}"):
        run(True, **{missing: other})
    run(True)
    assert missing in settings_of(tmp_path / "run")
    run(True)
    with pytest.raises(ValueError, match=f"other settings: {missing} was"):
        run(True, **{missing: other})


def test_folders_of_something_else_are_refused(tmp_path):
    (tmp_path / "config.json").touch()
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="no run.json and holds config.json. Set `--output_dir` to an empty"):
            Run(tmp_path, {}, resume=resume)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "empty").mkdir()
    Run(tmp_path / "empty", {}, resume=True)


def test_processes_that_do_not_see_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="got 2 started and 1 seen: each .* set `--use_cpu true`"):
        Run(tmp_path, {}, resume=False)
    assert not list(tmp_path.iterdir())


def test_other_inputs_are_refused(tmp_path, sampler_dir):  # noqa: F811
    shutil.copytree(sampler_dir, tmp_path / "model")
    (tmp_path / "data").write_text("1")
    inputs = {"data": tmp_path / "data", "model": tmp_path / "model"}
    run = Run(tmp_path / "run", {}, resume=False)
    run.stage("one", look_around, inputs=inputs)
    (tmp_path / "model" / "README.md").write_text("not what is computed with")
    (tmp_path / "data").touch()
    run.stage("one", look_around, inputs=inputs)
    (tmp_path / "data").write_text("2")
    with pytest.raises(RuntimeError, match="Stage 'one' was made from another data than there is now in .*data. Rem"):
        run.stage("one", look_around, inputs=inputs)
    (tmp_path / "data").write_text("1")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RuntimeError, match="made from another model than .*, or set another `--output_dir`"):
        run.stage("one", look_around, inputs=inputs)
    assert times_called(tmp_path / "run" / "one") == 1


def test_the_manifest_says_what_a_stage_was_made_of(tmp_path):
    (tmp_path / "data").write_text("1")
    before = time.time()
    figures = Run(tmp_path / "run", {}, resume=False).stage(
        "one", look_around, inputs={"data": tmp_path / "data"}, config=SamplingConfig(), judge=look_around, number=3
    )
    manifest = read_manifest(tmp_path / "run" / "one")
    assert manifest["stage"] == "one" and manifest["figures"] == figures and manifest["num_processes"] == 1
    digest = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"  # of "1"
    assert manifest["inputs"] == {"data": f"sha256:{digest}"}
    assert fingerprint(tmp_path / "data") == f"sha256:{digest}" and fingerprint(Path("org/name")) == "org/name"
    arguments = manifest["arguments"]
    assert arguments["data"] == str(tmp_path / "data") and arguments["number"] == 3
    assert (
        arguments["config"]["temperature"] == 0.8 and arguments["judge"] == "tests.support.stage_functions:look_around"
    )
    seen = hashlib.sha256(b"x").hexdigest()
    assert manifest["outputs"] == {"calls": {"size": 1, "sha256": seen}}
    assert manifest["versions"] == installed_versions()
    assert manifest["versions"]["python"] == sys.version.split()[0] and manifest["versions"]["trl"].startswith("1.")
    assert 0 <= manifest["seconds"] <= time.time() - before + 0.1
    started = time.mktime(time.strptime(manifest["started"][:19], "%Y-%m-%dT%H:%M:%S"))
    assert before - 1 <= started <= time.time()


def test_starting_afresh_removes_the_stages_and_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    mine = [folder / name for name in ("notes.txt", "site/manifest.json", "round-1/notes.txt")]
    run = Run(folder, {}, resume=False)
    run.stage("round-1/one", look_around)
    with pytest.raises(RuntimeError):
        run.stage("two", end_early, how="error")
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted)
        start_afresh(folder)
    with pytest.raises(FileExistsError):
        Run(folder, {}, resume=False)
    assert read_manifest(folder / "round-1" / "one") is None, "what is half removed must not look finished"
    start_afresh(folder)
    left = [file for file in folder.rglob("*") if file.is_file()]
    assert sorted(left) == sorted([*mine, folder / "run.json"])
    assert not (folder / "two").exists() and not (folder / "round-1" / "one").exists()
    figures = Run(folder, {"other": 1}, resume=False).stage("round-1/one", look_around)
    assert figures["calls"] == 1 and times_called(folder / "round-1" / "one") == 1
    # what is not a run is left alone
    (folder / "run.json").unlink()
    start_afresh(folder)
    assert read_manifest(folder / "round-1" / "one") is not None


def test_a_run_inside_of_a_run_is_left_alone(tmp_path):
    Run(tmp_path, {}, resume=False).stage("one", look_around)
    Run(tmp_path / "two" / "inner", {}, resume=False).stage("one", look_around)
    start_afresh(tmp_path)
    assert not (tmp_path / "one").exists() and read_manifest(tmp_path / "two" / "inner" / "one") is not None


def test_a_run_that_failed_before_its_first_stage_is_begun_anew(tmp_path):
    Run(tmp_path, {"dataset_name": "misspelt"}, resume=False)
    run = Run(tmp_path, {"dataset_name": "right"}, resume=False)
    assert settings_of(tmp_path) == {"dataset_name": "right"}
    folder = run.keep("prompts", {"a": "1"})
    assert Run(tmp_path, {"dataset_name": "right"}, resume=True).keep("prompts", {"a": "2"}) == folder
    assert (folder / "a").read_text() == "1"
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        Run(tmp_path, {}, resume=False)


def test_secrets_are_not_written_down(tmp_path):
    arguments = ["--hub_token", "s1", "--hub_token=s2", "--max_new_tokens", "8"]
    Run(tmp_path, {}, resume=False).stage("one", look_around, arguments=arguments)
    written = (tmp_path / "one" / "manifest.json").read_text()
    figures = read_manifest(tmp_path / "one")["figures"]["arguments"]["arguments"]
    assert "s1" in figures and "s2" in figures, "the stage has them"
    assert json.loads(written)["arguments"]["arguments"] == [
        "--hub_token", "...", "--hub_token=...", "--max_new_tokens", "8"
    ]  # fmt: skip


def is_running(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stage_ends_with_the_process_that_asked_for_it(how, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    parent = context.Process(target=run_a_sleeping_stage, args=(str(tmp_path),))
    parent.start()
    file, deadline = tmp_path / "sleeping" / "pid", time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    stage = int(file.read_text())
    try:
        time.sleep(0.5)
        assert is_running(stage) and stage != parent.pid
        os.kill(parent.pid, how)
        deadline = time.monotonic() + 5
        while is_running(stage) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_running(stage)
    finally:
        parent.kill()
        parent.join()
        if is_running(stage):
            os.kill(stage, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.2, 2.0])
def test_sigterm_while_a_stage_starts(seconds, tmp_path):
    """Which takes some seconds; the signal may come to a thread, which does not keep it off."""
    script = (
        "import os, signal, sys, threading, time\n"
        "from tests.support.stage_functions import run_a_sleeping_stage\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        f"threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        f"run_a_sleeping_stage({str(tmp_path / 'run')!r})\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200, cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr
    assert "SIGTERM: ended in stage 'sleeping'" in done.stdout and time.monotonic() - began < 60


@pytest.mark.slow
def test_two_processes(tmp_path, sampler_dir, unlimited):  # noqa: F811
    """Three stages in which they speak to each other, then one that fails on one of them while the other waits."""
    job = {"folder": str(tmp_path / "run"), "model": sampler_dir, "prompts": PROMPTS, "settings": SETTINGS}
    (tmp_path / "job.json").write_text(json.dumps(job))
    start = time.monotonic()
    done = torchrun("tests/support/stage_functions.py", tmp_path / "job.json")
    assert done.returncode != 0 and time.monotonic() - start < 250, "it ends"
    assert "ValueError: only here" in done.stderr and "Stage 'failing' failed; its error is printed abo" in done.stderr
    first, second = (json.loads((tmp_path / f"figures-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and [figures["world"] for figures in first] == [2, 2, 2]
    pids = set()
    for number in range(2):
        heard = [json.loads((tmp_path / "run" / f"meeting-{number}" / f"{rank}.json").read_text()) for rank in (0, 1)]
        assert [one["total"] for one in heard] == [2 * number + 1] * 2
        assert [one["ranks"] for one in heard] == [[0, 1]] * 2
        pids |= {one["pid"] for one in heard}
    assert len(pids) == 4
    assert by_number(first[2]["rows"]) == by_number(unlimited), "sampled as by one process"
    # one process goes on with it
    assert read_manifest(tmp_path / "run" / "failing") is None
    run = Run(tmp_path / "run", {}, resume=True)
    assert run.stage("sampling", sample, inputs={"model": sampler_dir}) == first[2]
    (tmp_path / "run" / "sampling" / "shards" / "00003.jsonl").unlink()
    rows, _ = sample_candidates(sampler_dir, PROMPTS, SamplingConfig(**SETTINGS), tmp_path / "run" / "sampling")
    assert by_number(rows) == by_number(unlimited)
    assert PartialState().num_processes == 1
