"""
Sampling with vLLM, which runs in a process and a Python environment of its own.

vLLM pins versions of torch, transformers and much else that need not be those of training. It is never imported here:
`sampling/vllm_worker.py` is run by the interpreter of an environment that has it, and the two talk over a pipe.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import NEUTRAL, SamplingConfig
from .engine import Generated

WORKER = Path(__file__).with_name("vllm_worker.py")

# what a launcher tells its processes, which vLLM would take to be meant for it; and ways into our own packages
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "PET_")
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV",
)  # fmt: skip

WORKER_DEFAULTS = {
    # the engine's core in the worker itself: one process less to lose, and the order of requests always the same
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",  # whether to report to vLLM's makers is not for a library to decide
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; on a CPU it would be most of the machine's memory
}

SET_BY_ARGUMENTS = ("model", "dtype", "max_model_len", "generation_config", "logprobs_mode")

LEAST_TEMPERATURE = 0.01  # vLLM silently samples at this one where it is given a lower one

OTHERWISE = (
    "Set `vllm_python` to the Python interpreter of an environment with vLLM that can run this model, or "
    "`sampling_engine` to 'transformers'."
)


class VllmEngine:
    """
    Sampling with vLLM.

    Every candidate is a request with a seed of its own, and each prompt is computed once for its candidates, but for
    its last tokens, those that do not fill a block of vLLM's cache (16 tokens on a GPU, 128 on a CPU). The text
    of a candidate follows from the model, the settings and its seed, whatever else is sampled beside it, up to
    arithmetic; it is not the text that [`~trl_ext.sampling.transformers_engine.TransformersEngine`] makes of the same
    seed, as vLLM draws its random numbers in its own way.

    An answer ends with an end token, those of the model's generation config and the tokenizer's; with the token that
    completes a stop string; or with `max_new_tokens`. Of the generation config nothing but the end tokens counts.

    Several processes on a machine have one engine each, on a GPU of its own: the one of `CUDA_VISIBLE_DEVICES` at
    `LOCAL_RANK`. On a CPU they share its cores.

    vLLM runs quietly: what it writes is shown when it fails. With the environment variable `VLLM_LOGGING_LEVEL` set to
    `INFO` or `DEBUG` it is passed on to standard error.

    Args:
        model (`str`):
            Folder or name of a whole model with its tokenizer. An adapter has to be merged into its base.
        config ([`SamplingConfig`]):
            How. `vllm_python` is the interpreter, a path or the name of a command. The temperature is 0 or at least
            0.01. An answer ends with the token that completes a stop string or a role marker. Nothing is cut: its
            tokens are all returned.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Of the weights, by name (`"bfloat16"`). vLLM's `"auto"` is the dtype they are saved in, but half precision
            for those saved in float32.
        startup_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds vLLM may take to load the model.
        engine_args (`dict`, *optional*):
            Further arguments of `vllm.LLM`, such as `revision` and `trust_remote_code`. Those in `config` win.

    Attributes:
        version (`str`): of vLLM.
        max_model_len (`int`): longest prompt and answer in tokens.

    Raises:
        FileNotFoundError: there is no such interpreter, or no such folder.
        ValueError: a setting vLLM does not have, an adapter, or fewer GPUs than processes.
        RuntimeError: vLLM did not start; the message has its reason and the last lines it wrote.

    Example:
    ```python
    from trl_ext.sampling import SamplingConfig, VllmEngine

    config = SamplingConfig(max_new_tokens=64, sampling_engine="vllm", vllm_python="/envs/vllm/bin/python")
    with VllmEngine("path/to/model", config) as engine:
        engine.generate([[12, 7, 81]], seeds=[[1, 2, 3, 4]])  # four candidates for one prompt
    ```
    """

    def __init__(
        self,
        model: str,
        config: SamplingConfig,
        *,
        dtype: str = "auto",
        startup_timeout: float = 600.0,
        engine_args: dict[str, Any] | None = None,
    ):
        engine_args = {**(engine_args or {}), **(config.vllm_args or {})}
        max_model_len = engine_args.pop("max_model_len", None)
        _check_settings(model, config.temperature, engine_args)
        self.model, self.max_new_tokens = str(model), config.max_new_tokens
        self.python = _find_interpreter(config.vllm_python)
        stop_strings = [*(config.stop_strings or ()), *(config.role_markers or ())]
        settings = {
            "llm": {
                "enable_prefix_caching": True,
                **engine_args,
                "model": self.model,
                "dtype": dtype,
                "max_model_len": max_model_len,
                "generation_config": "vllm",  # its end tokens count all the same
                "logprobs_mode": "raw_logprobs",
            },
            "sampling": {
                **{name: getattr(config, name) for name in NEUTRAL},
                "max_tokens": config.max_new_tokens,
                "stop": stop_strings,
                "detokenize": bool(stop_strings),  # the text is only needed to find them
            },
        }
        try:
            line = json.dumps(settings)
        except TypeError as error:
            raise ValueError(
                f"engine_args={engine_args!r} cannot be passed to another process: {error}. Use numbers, strings, "
                "lists and dictionaries."
            ) from None
        environment = worker_environment(os.environ, self.python, engine_args.get("tensor_parallel_size", 1))
        self._worker: _Worker | None = _Worker(self.python, environment)
        try:
            ready = self._ask(line, f"vLLM did not start with the model {self.model!r}", startup_timeout)["ready"]
        except BaseException:
            self._kill()
            raise
        self.version, self.max_model_len = ready["vllm"], ready["max_model_len"]

    def generate(self, prompt_ids: list[list[int]], seeds: list[list[int]]) -> list[list[Generated]]:
        """
        Candidates for each prompt.

        Args:
            prompt_ids (`list[list[int]]`): tokens of the prompts. The more at once the better; vLLM batches them.
            seeds (`list[list[int]]`): for each prompt one integer per candidate, from 0 to 2**63 - 1.

        Returns:
            `list[list[Generated]]`: for each prompt its candidates, in the order of the seeds.

        Raises:
            ValueError: a prompt that is empty or too long, or a seed out of range.
            RuntimeError: vLLM failed or its process was ended; the engine is closed then.
        """
        if self._worker is None:
            raise RuntimeError("This engine is closed. Make another `VllmEngine`.")
        self._check_requests(prompt_ids, seeds)
        if not any(seeds):
            return [[] for _ in prompt_ids]
        line = json.dumps({"prompts": prompt_ids, "seeds": seeds})
        try:
            answer = self._ask(line, f"vLLM failed on {sum(map(len, seeds))} requests to the model {self.model!r}")
        except BaseException:  # also when interrupted: an answer that is still to come would be taken for the next
            self._kill()
            raise
        return [[Generated(*candidate) for candidate in row] for row in answer["candidates"]]

    def close(self) -> None:
        """End the process and give back what it holds. Once is enough, more does no harm."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _kill(self) -> None:
        self._worker.kill()
        self.close()

    def __enter__(self) -> "VllmEngine":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _check_requests(self, prompt_ids: list[list[int]], seeds: list[list[int]]) -> None:
        if len(prompt_ids) != len(seeds):
            raise ValueError(
                f"{len(prompt_ids)} prompts came with seeds for {len(seeds)}. Pass a list for each prompt."
            )
        for index, (ids, row) in enumerate(zip(prompt_ids, seeds, strict=True)):
            if not ids:
                raise ValueError(f"Prompt {index} has no tokens, so there is nothing to go on from. Leave it out.")
            if len(ids) + self.max_new_tokens > self.max_model_len:
                raise ValueError(
                    f"Prompt {index} has {len(ids)} tokens. With max_new_tokens={self.max_new_tokens} it exceeds the "
                    f"{self.max_model_len} that vLLM was started for. Leave it out, or set `max_new_tokens` lower or "
                    "`max_model_len`, where it is not the model's own, higher."
                )
            for seed in row:
                if not 0 <= seed < 2**63:
                    raise ValueError(f"Prompt {index} has the seed {seed}. Use integers from 0 to 2**63 - 1.")

    def _ask(self, line: str, failed: str, timeout: float | None = None) -> dict[str, Any]:
        """
        Send a line and wait for the answer.

        Args:
            line (`str`): JSON.
            failed (`str`): what has not worked, should it not: the beginning of the message.
            timeout (`float`, *optional*): seconds to wait.

        Raises:
            RuntimeError: no answer, or that there was an error. The worker has ended.
        """
        failed = f"{failed} (by {self.python})"
        reply = self._worker.ask(line, timeout)
        if reply is not None and "error" not in reply:
            return reply
        running = self._worker.process.poll() is None
        self._worker.kill()
        self._worker.end()
        status = self._worker.process.returncode
        if reply is not None:
            why = reply["error"].strip().rstrip(".")
            install = f"Run `{self.python} -m pip install vllm`. Or: " if reply.get("missing") else ""
            instead = install + _advice(why) + OTHERWISE
        elif running:
            why = f"it was not ready after {timeout:g} seconds"
            instead = (
                "Set `startup_timeout` higher, or pass engine_args={'enforce_eager': True}, which starts faster and "
                f"samples slower. Or: {OTHERWISE}"
            )
        elif status < 0:
            why = f"its process was ended from outside, by {signal.Signals(-status).name}"
            instead = (_advice("memory") if status == -signal.SIGKILL else "") + OTHERWISE
        else:
            why, instead = f"its process ended with exit status {status}", OTHERWISE
        wrote = "".join(f"    {line}\n" for line in self._worker.last_lines())
        raise RuntimeError(f"{failed}: {why}.\n" + (f"The last lines it wrote:\n{wrote}" if wrote else "") + instead)


class _Worker:
    """The process that runs vLLM, and the pipes to it."""

    def __init__(self, python: str, environment: Mapping[str, str]):
        # a session of its own: its process group is the worker and all that vLLM starts, and nothing else
        self.process = subprocess.Popen(
            [python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._lines: deque[str] = deque(maxlen=15)
        passed_on = environment["VLLM_LOGGING_LEVEL"] in ("DEBUG", "INFO")
        self._reader = threading.Thread(
            target=_read_lines, args=(self.process.stderr, self._lines, passed_on), daemon=True
        )
        self._reader.start()
        self._buffer = bytearray()
        # also at the end of the interpreter, and when the engine is forgotten
        self._finalizer = weakref.finalize(self, _end_process, self.process, os.getpid())

    def ask(self, line: str, timeout: float | None) -> dict[str, Any] | None:
        """The answer; `None` if the process has ended without one, or has not given it in `timeout` seconds."""
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it may still have said why
            pass
        deadline = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                ended = self.process.poll() is not None  # looked at before the last read
                if selector.select(timeout=0 if ended else 1.0):
                    chunk = os.read(self.process.stdout.fileno(), 1 << 20)
                    if not chunk:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            self.process.wait(timeout=5)  # its exit status comes a moment after its last word
                        return None
                    self._buffer += chunk
                    if chunk.endswith(b"\n"):
                        text = self._buffer.decode(errors="replace")
                        self._buffer.clear()
                        try:
                            return json.loads(text)
                        except ValueError:
                            return {"error": f"{text.strip()[:200]!r} is no answer. Is it a Python interpreter?"}
                elif ended or (deadline is not None and time.monotonic() > deadline):
                    return None

    def kill(self) -> None:
        """End the process at once if it runs; `end` sees to what it leaves."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        self._finalizer()

    def last_lines(self) -> list[str]:
        """The end of what the process wrote to standard error."""
        self._reader.join(timeout=2)
        return list(self._lines)


def _read_lines(source, lines: deque[str], passed_on: bool) -> None:
    with source:
        for line in source:
            text = line.decode(errors="replace")
            if passed_on:
                sys.stderr.write(text)
            text = text.rstrip().rpartition("\r")[2]  # of a progress bar the last state
            if text.strip(" ~^"):  # of a traceback no markers
                lines.append(text[:400])


def _end_process(process: subprocess.Popen, owner: int) -> None:
    """Let the process close down, then end its whole group."""
    if os.getpid() != owner:  # a fork of ours that ends
        return
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def worker_environment(environment: Mapping[str, str], python: str, gpus: int = 1) -> dict[str, str]:
    """
    The environment variables of a worker.

    Args:
        environment (`Mapping[str, str]`): ours.
        python (`str`): path of the worker's interpreter.
        gpus (`int`, defaults to 1): GPUs an engine takes.

    Returns:
        `dict[str, str]`: ours without what the launcher of this process and its Python set for it, with the programs
        of the worker's environment found first, with quiet defaults for vLLM, and with `CUDA_VISIBLE_DEVICES` narrowed
        down where several processes share the machine.

    Raises:
        ValueError: fewer visible GPUs than the processes of this machine need.
    """
    result = {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    for name, value in WORKER_DEFAULTS.items():
        result.setdefault(name, value)
    # as if it were activated: vLLM compiles with programs that come as packages (ninja)
    result["PATH"] = os.pathsep.join(filter(None, [os.path.dirname(python), environment.get("PATH")]))
    rank = int(environment.get("LOCAL_RANK", 0))
    processes = int(environment.get("LOCAL_WORLD_SIZE", rank + 1))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    needed = processes * gpus
    devices = [str(index) for index in range(needed)] if visible is None else visible.split(",")
    # no more than one engine takes: all GPUs are hidden, or each process was given its own
    if processes == 1 or len(devices) <= gpus:
        return result
    if len(devices) < needed:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible!r} names {len(devices)} of the {needed} GPUs that {processes} processes "
            f"with an engine on {gpus} each would take. Start fewer processes, or set `sampling_engine` to "
            "'transformers'."
        )
    result["CUDA_VISIBLE_DEVICES"] = ",".join(devices[rank * gpus : (rank + 1) * gpus])
    return result


def _check_settings(model: str, temperature: float, engine_args: dict[str, Any]) -> None:
    doubled = [name for name in SET_BY_ARGUMENTS if name in engine_args]
    if doubled:
        raise ValueError(
            f"engine_args has {', '.join(doubled)}, which the engine sets itself: `model`, `dtype` and "
            "`max_model_len` are arguments of their own, the rest is fixed. Take it out."
        )
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature={temperature}: vLLM knows no temperature below {LEAST_TEMPERATURE} but 0, and would take "
            f"{LEAST_TEMPERATURE} instead. Set it to 0 (greedy), or to {LEAST_TEMPERATURE} or more."
        )
    folder = Path(model)
    if str(model).startswith((".", "/", "~")) and not os.path.isdir(folder):
        raise FileNotFoundError(f"model={str(model)!r} looks like a local folder, and there is none. Mend the path.")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{model!r} is an adapter, and vLLM is given whole models here. Merge it into its base "
            "(`merge_and_unload` of PEFT) and save the result, or set `sampling_engine` to 'transformers'."
        )


def _find_interpreter(python: str) -> str:
    path = os.path.expanduser(str(python))
    found = shutil.which(path)
    if found is not None:
        return os.path.abspath(found)  # links stay: they are what tells an environment's interpreter from the system's
    inside = Path(path) / "bin" / "python"
    if inside.is_file():
        why = f"is a folder. Set `vllm_python` to the interpreter in it, {str(inside)!r}."
    elif os.path.exists(path):
        why = f"cannot be executed. {OTHERWISE}"
    else:
        why = f"is not there. {OTHERWISE}"
    raise FileNotFoundError(f"vllm_python={str(python)!r} {why}")


def _advice(error: str) -> str:
    """What else may help, to be put before what always does."""
    if "memory" not in error.lower():
        return ""
    return (
        "If memory is short: set `max_model_len` to what the longest prompt and answer need, and give vLLM the share "
        "of the device it may take with engine_args={'gpu_memory_utilization': 0.5}, or, on a CPU, the GiB of its "
        "cache with the environment variable VLLM_CPU_KVCACHE_SPACE. Otherwise: "
    )
