"""
Sampling with vLLM, which runs in a Python environment of its own.

vLLM pins versions of torch, transformers and much else that need not be those of training. It is never imported here:
the interpreter of an environment that has it runs `vllm serve`, and requests go over HTTP to a socket in a folder that
no other user can enter.
"""

import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn

import torch

from .config import NEUTRAL, SamplingConfig
from .engine import Generated
from .vllm_server import RequestError, VllmServer, flags, server_environment

SET_BY_ARGUMENTS = ("model", "dtype", "generation_config", "logprobs_mode", "uds")
# of a server that others speak to; with these it would not answer us
OF_PUBLIC_SERVERS = ("api_key", "headless", "root_path", "served_model_name", "ssl_certfile", "ssl_keyfile")
# an engine takes as many GPUs as the product of these
NUMBERS_OF_GPUS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")

LEAST_TEMPERATURE = 0.01  # vLLM silently samples at this one where it is given a lower one

# requests on their way at a time; vLLM batches as many of them as fit
CONCURRENT = 256

OTHERWISE = (
    "Set `vllm_python` to the Python interpreter of an environment with vLLM that can run this model, or "
    "`sampling_engine` to 'transformers'."
)

# in what vLLM says: of a process that the system has killed, too
SHORT_OF_MEMORY = ("memory", "Memory", "exited unexpectedly")
MEMORY = (
    "If memory is short: set `max_model_len` in `vllm_args` to what the longest prompt and answer need, and "
    "`gpu_memory_utilization` to the share of the device that vLLM may take. On a CPU, the environment variable "
    "VLLM_CPU_KVCACHE_SPACE is the size of its cache in GiB. Otherwise: "
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

    Several processes on a machine have one engine each, on GPUs of its own, see [`server_environment`]. On a CPU they
    share its cores.

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
            Further options of `vllm serve`, such as `revision` and `trust_remote_code`. Those in `config` win.

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
        engine_args = {"enable_prefix_caching": True, **(engine_args or {}), **(config.vllm_args or {})}
        _check_settings(model, config.temperature, engine_args)
        self.model, self.max_new_tokens = str(model), config.max_new_tokens
        self.python = _find_interpreter(config.vllm_python)
        stop_strings = [*(config.stop_strings or ()), *(config.role_markers or ())]
        self._body = {
            "model": self.model,
            **{name: getattr(config, name) for name in NEUTRAL},
            "max_tokens": self.max_new_tokens,
            "stop": stop_strings,
            "logprobs": 0,
            "return_token_ids": True,
        }
        fixed = {
            "dtype": dtype,
            "generation_config": "vllm",  # its end tokens count all the same
            "logprobs_mode": "raw_logprobs",
            "disable_uvicorn_access_log": True,
            "uvicorn_log_level": "warning",
        }
        words = [self.model, *flags({**engine_args, **fixed})]
        gpus = math.prod(engine_args.get(name, 1) for name in NUMBERS_OF_GPUS)
        environment = server_environment(os.environ, self.python, gpus, torch.cuda.device_count())
        self._server: VllmServer | None = VllmServer(self.python, words, environment)
        try:
            self._server.wait_until_ready(startup_timeout)
            self.version = self._server.request("/version")["version"]
            self.max_model_len = self._server.request("/v1/models")["data"][0]["max_model_len"]
            # some of what vLLM cannot do, it only finds out when it has to
            self._server.request("/v1/completions", {**self._body, "prompt": [0], "max_tokens": 1})
        except BaseException as error:
            self._fail(f"vLLM did not start with the model {self.model!r}", error)

    def generate(self, prompt_ids: list[list[int]], seeds: list[list[int]]) -> list[list[Generated]]:
        """
        Candidates for each prompt.

        Args:
            prompt_ids (`list[list[int]]`): tokens of the prompts. The more at once the better; vLLM batches them.
            seeds (`list[list[int]]`): for each prompt one integer per candidate, from 0 to 2**63 - 1.

        Returns:
            `list[list[Generated]]`: for each prompt its candidates, in the order of the seeds.

        Raises:
            RuntimeError: vLLM failed, refused a request, or its process was ended; the engine is closed then.
        """
        if self._server is None:
            raise RuntimeError("This engine is closed. Make another `VllmEngine`.")
        pool = ThreadPoolExecutor(CONCURRENT)
        try:
            jobs = [
                [pool.submit(self._complete, self._server, ids, seed) for seed in row]
                for ids, row in zip(prompt_ids, seeds, strict=True)
            ]
            return [[job.result() for job in row] for row in jobs]
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            number = sum(map(len, seeds))
            self._fail(f"vLLM failed on {number} requests to the model {self.model!r}", error)
        finally:
            pool.shutdown()

    def _complete(self, server: VllmServer, prompt: list[int], seed: int) -> Generated:
        [choice] = server.request("/v1/completions", {**self._body, "prompt": prompt, "seed": seed})["choices"]
        # `stop_reason` is the stop string, the id of a further end token, or None for the tokenizer's end token
        finished = choice["finish_reason"] == "stop" and not isinstance(choice["stop_reason"], str)
        return Generated(choice["token_ids"], choice["logprobs"]["token_logprobs"], finished)

    def close(self) -> None:
        """End the process and give back what it holds. Once is enough, more does no harm."""
        if self._server is not None:
            self._server.end()
            self._server = None

    def __enter__(self) -> "VllmEngine":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _fail(self, what: str, error: BaseException) -> NoReturn:
        """End the server, and raise the error; as a `RuntimeError` if the server has made it."""
        server, self._server = self._server, None
        is_late = isinstance(error, TimeoutError)
        is_gone = isinstance(error, OSError | HTTPException) and not is_late
        status = server.end(at_once=True, seconds=5 * is_gone)  # it ends a moment after its connections
        if not (is_late or is_gone or isinstance(error, RequestError)):
            raise error
        why, advice, lines = str(error), OTHERWISE, server.last_lines()
        if is_gone and status is not None:
            if status >= 0:
                why = f"its process ended with exit status {status}"
            elif -status in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                why = f"its process was ended from outside, by {signal.Signals(-status).name}"
            else:
                why = f"its process crashed with {signal.Signals(-status).name}"
        if is_late:
            advice = (
                "Set `startup_timeout` higher, or `vllm_args` to {'enforce_eager': True}, which starts faster and "
                f"samples slower. Or: {OTHERWISE}"
            )
        elif any("No module named 'vllm'" in line for line in lines):
            why = "there is no vLLM in its environment"
            advice = f"Run `{self.python} -m pip install vllm`. Or: {OTHERWISE}"
        elif status == -signal.SIGKILL or any(sign in f"{why} {lines}" for sign in SHORT_OF_MEMORY):
            advice = MEMORY + OTHERWISE
        wrote = "".join(f"    {line}\n" for line in lines)
        wrote = f"The last lines it wrote:\n{wrote}" if wrote else ""
        raise RuntimeError(f"{what} (by {self.python}): {why}.\n{wrote}{advice}") from None


def _check_settings(model: str, temperature: float, engine_args: dict[str, Any]) -> None:
    doubled = [name for name in (*SET_BY_ARGUMENTS, *OF_PUBLIC_SERVERS) if name in engine_args]
    if doubled:
        raise ValueError(
            f"`vllm_args` must not have {', '.join(doubled)}, which the engine sets itself. Remove {doubled[0]!r}."
        )
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"`temperature` must be 0 or at least {LEAST_TEMPERATURE} with vLLM, got {temperature}. vLLM would sample "
            f"at {LEAST_TEMPERATURE}. Set it to 0 (greedy) or {LEAST_TEMPERATURE}."
        )
    folder = Path(model)
    if str(model).startswith((".", "/", "~")) and not os.path.isdir(folder):
        raise FileNotFoundError(f"The model folder {str(model)!r} does not exist. Correct the path.")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"`model` must be a whole model with vLLM, got the adapter {model!r}. Merge it into its base "
            "(`merge_and_unload` of PEFT) and save the result, or set `sampling_engine` to 'transformers'."
        )


def _find_interpreter(python: str) -> str:
    path = os.path.expanduser(str(python))
    found = shutil.which(path)
    if found is not None:
        return os.path.abspath(found)  # links stay: they are what tells an environment's interpreter from the system's
    inside = Path(path) / "bin" / "python"
    what = "a folder" if inside.is_file() else "a file that cannot be run" if os.path.exists(path) else "no such file"
    advice = f"Set it to {str(inside)!r}." if inside.is_file() else OTHERWISE
    raise FileNotFoundError(f"`vllm_python` must be a Python interpreter, got {str(python)!r} ({what}). {advice}")
