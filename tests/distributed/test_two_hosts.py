"""
Recipes over two hosts: the numbers of one process, and what machines that do not share their folders can do.

The hosts are network namespaces that meet by address, see `hosts.py`; each has a working directory of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.hosts import environment, launch_on, two_hosts
from tests.distributed.launching import RANKED, ROWS, assert_same_run
from tests.support.data import PAIRS, REPOSITORY
from tests.support.processes import ended_after, wait_until
from trl_ext.runtime.checkpoints import SEAL


@pytest.fixture
def hosts(tmp_path):
    with two_hosts(tmp_path / "hosts") as hosts:
        yield hosts


@pytest.fixture
def data(tmp_path):
    """Files by name, for a recipe to train on."""
    prompts = [{"prompt": row["prompt"]} for row in PAIRS]
    named = {"pairs": PAIRS, "ragged": ROWS["ragged"], "ranked": RANKED, "prompts": prompts}
    for name, rows in named.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: tmp_path / f"{name}.jsonl" for name in named}


def recipe(method, model, data, output_dir, batch_size=1, **settings):
    """The command line of a recipe, in words."""
    settings = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": output_dir,
        "per_device_train_batch_size": batch_size,
        "use_cpu": True,
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "dataset_test_split": "train",
        "eval_strategy": "epoch",
        **settings,
    }
    words = [REPOSITORY / "recipes" / f"{method}.py"]
    for name, value in settings.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return [str(word) for word in words]


def on_one_host(*command):
    """One process, whole batches, padded."""
    done = subprocess.run(
        [sys.executable, *command, "--per_device_train_batch_size", "2", "--prefix_sharing", "false"],
        env=environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def assert_ended(done):
    assert [one.returncode for one in done] == [0, 0], "\n\n".join(one.stdout[-4000:] for one in done)


def result(folder):
    """What a recipe has left behind, as `assert_same_run` takes it."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    evaluation = [log for log in history if "eval_loss" in log][-1]
    return {"train": history, "eval": evaluation}, load_file(folder / "model.safetensors"), None


def assert_same(one_folder, other_folder, rtol=1e-4, atol=1e-5):
    one, other = result(one_folder), result(other_folder)
    assert_same_run(one, other, rtol, atol)


def has_tokenised(done):
    """Whether the train rows were tokenised on each host, or taken from a cache."""
    return ["Tokenizing train dataset: 100%" in one.stdout for one in done]


def assert_refused(done, checkpoint):
    """On all hosts, as one of them has no whole checkpoint."""
    for one in done:
        assert one.returncode != 0
        assert f"Process 1 (beta) does not see {checkpoint}" in one.stdout
        assert "Every machine needs the whole checkpoint" in one.stdout


@pytest.mark.slow
def test_ddp_over_two_hosts_without_a_shared_folder(hosts, data, model_dir, tmp_path):
    """
    Lists of 1, 2, 4, 2 equal and 5 candidates; neither the output folder nor the datasets cache is shared. A
    checkpoint that the main host alone has is resumed once it is copied.
    """
    on_one_host(*recipe("rrhf", model_dir, data["ragged"], tmp_path / "one"))
    two, cache = tmp_path / "two", tmp_path / "cache"
    main, other = (host.unshare(two) for host in hosts)
    for host in hosts:
        host.unshare(cache)
    command = recipe("rrhf", model_dir, data["ragged"], two, save_strategy="steps", save_steps=5)
    done = launch_on(hosts, "multi_node_ddp", *command, HF_DATASETS_CACHE=str(cache))
    assert_ended(done)
    assert_same(tmp_path / "one", main)
    assert not list(two.iterdir()) and {path.name for path in other.iterdir()} <= {"checkpoint-5", "checkpoint-9"}
    assert has_tokenised(done) == [True, True]
    assert all("Prefix sharing rearranged" in one.stdout for one in done[:1])

    expected = load_file(main / "model.safetensors")
    for folder in (main, other):
        shutil.rmtree(folder / "checkpoint-9")
    (main / "model.safetensors").unlink()
    command += ["--resume_from_checkpoint", "true"]
    assert_refused(launch_on(hosts, "multi_node_ddp", *command, HF_DATASETS_CACHE=str(cache)), two / "checkpoint-5")
    shutil.copytree(main / "checkpoint-5", other / "checkpoint-5", dirs_exist_ok=True)
    done = launch_on(hosts, "multi_node_ddp", *command, HF_DATASETS_CACHE=str(cache))
    assert_ended(done)
    assert done[0].stdout.count("{'loss'") == 4, "5 of 9 steps were done before"
    assert not (other / "model.safetensors").exists()
    for name, weight in load_file(main / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_zero_3_over_two_hosts_and_resuming(hosts, data, model_dir, tmp_path):
    """In a shared folder. Where each host has its share of a checkpoint alone, it is refused."""
    pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    saving = {"save_strategy": "steps", "save_steps": 5}
    on_one_host(*recipe("slic", model_dir, data["ranked"], tmp_path / "one"))
    command = recipe("slic", model_dir, data["ranked"], tmp_path / "two", **saving)
    done = launch_on(hosts, "multi_node_zero3", *command)
    assert_ended(done)
    assert_same(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=1e-4)
    assert has_tokenised(done)[1] is False, "the main host has put it into the cache that they share"
    states = (tmp_path / "two" / "checkpoint-5").rglob("*_optim_states.pt")
    assert len(list(states)) == 2, "each process has written its share"
    for step in (5, 9):
        checkpoint = tmp_path / "two" / f"checkpoint-{step}"
        files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
        assert set(json.loads((checkpoint / SEAL).read_text())["files"]) == files - {SEAL}

    shutil.rmtree(tmp_path / "two" / "checkpoint-9")
    (tmp_path / "two" / "model.safetensors").unlink()
    done = launch_on(hosts, "multi_node_zero3", *command, "--resume_from_checkpoint", "true")
    assert_ended(done)
    assert done[0].stdout.count("{'loss'") == 4, "5 of 9 steps were done before"
    assert_same(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=1e-4)

    parts, whole = tmp_path / "parts", tmp_path / "two" / "checkpoint-5"
    main, other = (host.unshare(parts) for host in hosts)
    sealed = json.loads((whole / SEAL).read_text())
    of_other = {name for name in sealed["files"] if "rank_1_" in name or name == "rng_state_1.pth"}
    for folder, names in ((main, set(sealed["files"]) - of_other), (other, of_other)):
        for name in names:
            (folder / "checkpoint-5" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(whole / name, folder / "checkpoint-5" / name)
        own = {**sealed, "files": {name: sealed["files"][name] for name in names}}
        (folder / "checkpoint-5" / SEAL).write_text(json.dumps(own))
    assert len(of_other) > 2
    command = recipe("slic", model_dir, data["ranked"], parts, **saving)
    done = launch_on(hosts, "multi_node_zero3", *command, "--resume_from_checkpoint", "true")
    assert_refused(done, parts / "checkpoint-5")


@pytest.mark.slow
def test_spin_on_pairs_over_two_hosts(hosts, data, model_dir, tmp_path):
    """Its reference is computed on both hosts and kept by the main process alone."""
    on_one_host(*recipe("spin", model_dir, data["pairs"], tmp_path / "one"))
    main, _ = (host.unshare(tmp_path / "two") for host in hosts)
    assert_ended(launch_on(hosts, "multi_node_ddp", *recipe("spin", model_dir, data["pairs"], tmp_path / "two")))
    assert_same(tmp_path / "one", main)
    assert (main / "reference_train.npz").is_file()


@pytest.mark.slow
def test_rounds_over_two_hosts(hosts, data, model_dir, tmp_path):
    """Stages meet at a port of their own on the main host. Without a shared folder, all hosts refuse at once."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def score(prompts, completions, **columns):\n    return [len(set(c)) for c in completions]\n")
    settings = {"num_rounds": 1, "rewards": f"{rewards}:score", "num_watched_prompts": 2, "num_candidates": 3}
    settings |= {"max_new_tokens": 8, "num_train_epochs": 1, "eval_strategy": "no"}
    alone = tmp_path / "alone"
    for host in hosts:
        host.unshare(alone)
    for one in launch_on(hosts, "multi_node_ddp", *recipe("rrhf", model_dir, data["prompts"], alone, **settings)):
        assert one.returncode != 0
        assert f"Process 1 (beta) does not see what the main process has written into {alone}. All" in one.stdout

    shared = tmp_path / "shared"
    done = launch_on(hosts, "multi_node_ddp", *recipe("rrhf", model_dir, data["prompts"], shared, **settings))
    assert_ended(done)
    candidates = json.loads((shared / "round-1" / "candidates" / "manifest.json").read_text())
    assert candidates["num_processes"] == 2
    assert len(list((shared / "round-1" / "candidates" / "shards").iterdir())) == 2
    assert "6 rows -> 6 ranked rows" in done[0].stdout
    assert (shared / "round-1" / "model" / "model.safetensors").is_file() and (shared / "rounds.json").is_file()


BATCH_SCRIPT = REPOSITORY / "recipes" / "slurm" / "train.sbatch"


@pytest.fixture
def slurm(tmp_path):
    """What the batch script finds on a cluster: SLURM's commands and variables."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("srun", "scontrol", "scancel"):
        program = (REPOSITORY / "tests" / "distributed" / "slurm_stand_in.py").read_text()
        (bin_folder / name).write_text(f"#!{sys.executable}\n{program}")
        (bin_folder / name).chmod(0o755)
    (tmp_path / "nodes.json").write_text("{}")
    return environment(
        PATH=os.pathsep.join([str(bin_folder), os.path.dirname(sys.executable), os.environ["PATH"]]),
        SLURM_STAND_IN=str(tmp_path),
        SLURM_JOB_ID="4711",
        SLURM_JOB_NODELIST="alpha,beta",
        SLURM_JOB_NUM_NODES="2",
    )


@pytest.mark.parametrize(
    ("arguments", "strategy", "message"),
    [
        ([], "ddp", "No recipe is given"),
        (["recipes/nothing.py"], "ddp", "There is no recipes/nothing.py in"),
        (["recipes/slic.py"], "zero9", "There is no accelerate_configs/multi_node_zero9.yaml in"),
    ],
)
def test_batch_script_says_what_is_missing(arguments, strategy, message, slurm):
    done = subprocess.run(
        ["bash", BATCH_SCRIPT, *arguments],
        env={**slurm, "STRATEGY": strategy}, cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
def test_batch_script_told_to_stop_and_requeued(hosts, slurm, data, model_dir, tmp_path):
    """SLURM is stood in for; the script, the launchers, the recipe and the signals are real."""
    settings = {"num_train_epochs": 6, "learning_rate": 1e-3, "eval_strategy": "no"}
    on_one_host(*recipe("slic", model_dir, data["pairs"], tmp_path / "one", **settings))
    two = tmp_path / "two"
    _, *arguments = recipe("slic", model_dir, data["pairs"], two, **settings, save_strategy="steps", save_steps=2)
    (tmp_path / "nodes.json").write_text(json.dumps({host.name: host.prefix(REPOSITORY) for host in hosts}))
    slurm |= {"PROCESSES_PER_NODE": "1", "MAIN_ADDRESS": hosts[0].address, "GRACE": "60"}

    def submit(**variables):
        return subprocess.Popen(
            ["bash", BATCH_SCRIPT, "recipes/slic.py", *arguments],
            env={**slurm, **variables}, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    with ended_after(submit()) as job:
        wait_until((two / "checkpoint-4" / "checkpoint.json").exists, job)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=400)
    assert "Job 4711 is told to stop; the recipe has 60 s." in said and job.returncode != 0, said[-4000:]
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n" and not (two / "model.safetensors").exists()

    with ended_after(submit(SLURM_RESTART_COUNT="1")) as job:
        said, _ = job.communicate(timeout=400)
    assert job.returncode == 0, said[-4000:]
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n", "it is through"
    assert said.count("{'loss'") <= 2 * 20, "4 of 24 steps and more were done before; both hosts print theirs"
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for name, weight in load_file(two / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_rows_are_tokenised_once_for_each_cache(hosts, data, model_dir, tmp_path):
    """Two processes on each host, each of which has a cache; `test_zero_3_over_two_hosts_and_resuming` shares one."""
    cache = tmp_path / "cache"
    for host in hosts:
        host.unshare(cache)
    script = [REPOSITORY / "tests" / "distributed" / "prepare.py", model_dir, data["pairs"]]
    done = launch_on(hosts, "multi_node_ddp", *script, num_processes=4, HF_DATASETS_CACHE=str(cache))
    assert_ended(done)
    assert [one.stdout.count("Caching processed dataset at") for one in done] == [1, 1]
    assert [one.stdout.count("has its rows") for one in done] == [2, 2]
