"""
The other end of [`~trl_ext.sampling.vllm_engine.VllmEngine`]: a script that runs vLLM, in the environment vLLM is
installed in.

It imports nothing of `trl_ext`, and torch only by way of vLLM. What it reads and writes are lines of JSON:

    in   {"llm": {...}, "sampling": {...}}                     settings: arguments of `LLM` and of `SamplingParams`
    out  {"ready": {"vllm": "0.32.0", "max_model_len": 4096}}
    in   {"prompts": [[5, 9], ...], "seeds": [[1, 2], ...]}    token ids, and one seed for each candidate of a prompt
    out  {"candidates": [[[token_ids, logps, finished], ...], ...]}

or, instead of an answer, `{"error": "what went wrong"}`, after which it ends. It also ends when its standard input is
closed and when the process that started it is gone, and takes the processes vLLM has started with it.
"""

import importlib.util
import json
import multiprocessing
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

# seconds vLLM gets to close down by itself
GRACE = 5


def listen(source: int, lines: queue.SimpleQueue, children: list[int], answer: Callable[[dict], None]) -> None:
    """
    Watch over the conversation, until it ends and for as long as this process takes to end too.

    Args:
        source (`int`): file descriptor the other end writes to.
        lines (`queue.SimpleQueue`): gets the lines that arrive, and `None` once no more can come.
        children (`list[int]`): ids of processes that vLLM has started, without which it would wait forever.
        answer: gets the error, should one of these end.
    """
    parent, chunks = os.getppid(), []
    # a process that the parent has forked keeps the pipe open when the parent is gone, so both are watched
    while os.getppid() == parent:
        if any(map(has_ended, children)):
            answer({"error": "a process that vLLM had started has ended, perhaps for want of memory"})
            os.killpg(os.getpgrp(), signal.SIGKILL)
        if not select.select([source], [], [], 1.0)[0]:
            continue
        chunk = os.read(source, 1 << 20)
        if not chunk:
            break
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            lines.put(b"".join([*chunks, end]))
            chunks = []
        chunks.append(rest)
    children.clear()
    lines.put(None)
    signal.alarm(GRACE + 1)  # ends this process even where threads have stopped running
    time.sleep(GRACE)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def has_ended(child: int) -> bool:
    try:  # without reaping it, which is for vLLM to do
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def start(settings: dict):
    """vLLM with the model, and what the other end wants to know of it."""
    import vllm
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # A prompt that does not fit into a step is computed in parts, and after each vLLM takes back the random number
        # it has drawn, which a CPU's generator refuses ("CPU Generator does not use offset", vLLM 0.32).
        settings["llm"].setdefault("enable_chunked_prefill", False)
    llm = vllm.LLM(**settings["llm"])
    # some of what vLLM cannot do, it only finds out when it has to
    generate(llm, {**settings["sampling"], "max_tokens": 1}, [[0]], [[0]])
    model_config = llm.llm_engine.vllm_config.model_config
    return llm, {"vllm": vllm.__version__, "max_model_len": model_config.max_model_len}


def generate(llm, sampling: dict, prompts: list[list[int]], seeds: list[list[int]]) -> list[list[tuple]]:
    """`(token_ids, logps, finished)` of every candidate of every prompt."""
    from vllm import SamplingParams

    # one request for each candidate; what the first of a prompt computes of it, the others find in the cache
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids, row in zip(prompts, seeds, strict=True) for _ in row],
        [SamplingParams(n=1, seed=seed, logprobs=0, **sampling) for row in seeds for seed in row],
        use_tqdm=False,
    )
    candidates = iter([candidate(output.outputs[0]) for output in outputs])
    return [[next(candidates) for _ in row] for row in seeds]


def candidate(output) -> tuple[list[int], list[float], bool]:
    token_ids = list(output.token_ids)
    logps = [at[token].logprob for token, at in zip(token_ids, output.logprobs, strict=True)]
    # `stop_reason` is the stop string, the id of a further end token, or None for the tokenizer's end token
    return token_ids, logps, output.finish_reason == "stop" and not isinstance(output.stop_reason, str)


def main() -> None:
    # vLLM and what it imports print to standard output, and processes it forks close standard input: both ends of the
    # conversation are moved to where nobody else looks for them
    source, target = os.dup(0), os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    # Python puts the folder of this script on its path, and with it `trl_ext`'s `data`, `metrics` and so on
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != folder]

    def answer(message: dict) -> None:
        print(json.dumps(message), file=target, flush=True)

    lines: queue.SimpleQueue = queue.SimpleQueue()
    children: list[int] = []
    threading.Thread(target=listen, args=(source, lines, children, answer), daemon=True).start()

    try:
        line = lines.get()
        if line is None:
            return
        if importlib.util.find_spec("vllm") is None:
            answer({"error": "there is no vLLM in its environment", "missing": True})
            return
        settings = json.loads(line)
        llm, about = start(settings)
        children += [child.pid for child in multiprocessing.active_children()]
        answer({"ready": about})
        while (line := lines.get()) is not None:
            answer({"candidates": generate(llm, settings["sampling"], **json.loads(line))})
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        answer({"error": f"{type(error).__name__}: {error}"})
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
