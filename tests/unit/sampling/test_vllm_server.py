"""The environment that a vLLM server gets: GPUs of its own, and nothing of the launcher."""

import pytest

from trl_ext.sampling.vllm_server import flags, server_environment

LAUNCHED = {
    "PATH": "/usr/bin", "HF_HOME": "/models", "PYTHONPATH": "/ours", "RANK": "5", "LOCAL_RANK": "1",
    "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500",
    "VLLM_API_KEY": "secret", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip


def test_the_launcher_is_not_heard_of():
    environment = server_environment(LAUNCHED, "/envs/vllm/bin/python", gpus=1, present=2)
    ours = {name: value for name, value in environment.items() if not name.startswith("VLLM_")}
    assert ours == {"PATH": "/envs/vllm/bin:/usr/bin", "HF_HOME": "/models", "CUDA_VISIBLE_DEVICES": "1"}


def test_what_is_set_wins_over_our_defaults():
    environment = server_environment({"VLLM_LOGGING_LEVEL": "DEBUG"}, "python", gpus=1, present=0)
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "2"


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, 1, "1"),
        (None, 2, "2,3"),
        ("4,6", 1, "6"),
        ("0,2,4,6", 2, "4,6"),
        ("", 1, ""),
        ("3", 1, "3"),  # by its launcher each process was given its own
    ],
)
def test_each_process_gets_its_own_gpus(visible, gpus, expected):
    environment = dict(LAUNCHED) if visible is None else {**LAUNCHED, "CUDA_VISIBLE_DEVICES": visible}
    present = 8 if visible is None else len(list(filter(None, visible.split(","))))
    assert server_environment(environment, "python", gpus, present)["CUDA_VISIBLE_DEVICES"] == expected


def test_a_single_process_keeps_what_it_sees():
    environment = {"CUDA_VISIBLE_DEVICES": "2,3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert server_environment(environment, "python", gpus=1, present=2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in server_environment({}, "python", gpus=2, present=8)


def test_without_gpus_none_is_named():
    environment = server_environment(LAUNCHED, "python", gpus=1, present=0)
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_too_few_gpus():
    environment = {**LAUNCHED, "LOCAL_WORLD_SIZE": "3", "CUDA_VISIBLE_DEVICES": "0,1"}
    with pytest.raises(ValueError, match="3 processes .* 1 GPUs each must have 3 GPUs, got 2. Start 2 processes"):
        server_environment(environment, "python", gpus=1, present=2)


@pytest.mark.parametrize("rank", range(8))
def test_too_few_gpus_of_the_machine(rank):
    """Each of the processes says so, also the one that there are GPUs for."""
    environment = {**LAUNCHED, "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": str(rank)}
    with pytest.raises(ValueError, match="8 processes .* 2 GPUs each must have 16 GPUs, got 8. Start 4 processes"):
        server_environment(environment, "python", gpus=2, present=8)
    environment["LOCAL_WORLD_SIZE"], environment["LOCAL_RANK"] = "4", str(rank % 4)
    first = 2 * (rank % 4)
    visible = server_environment(environment, "python", gpus=2, present=8)["CUDA_VISIBLE_DEVICES"]
    assert visible == f"{first},{first + 1}"


def test_an_engine_larger_than_the_machine():
    environment = {**LAUNCHED, "LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(ValueError, match="must have 8 GPUs, got 2. Lower `tensor_parallel_size` in `vllm_args`, or"):
        server_environment(environment, "python", gpus=4, present=2)


def test_lists_of_an_option_are_words_or_json():
    given = {"stop": ["a", "b"], "rules": [{"x": 1}], "eager": True, "length": 8, "absent": None}
    assert list(flags(given)) == ["--stop", "a", "b", "--rules", '{"x": 1}', "--eager", "--length", "8"]
