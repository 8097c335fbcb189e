"""Sampling with vLLM. Most of it needs vLLM, in an environment of its own, and minutes."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.support import fake_vllm
from tests.support.large_weights import enlarge
from trl_ext.playground.model import save_byte_level_model
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import NEUTRAL, SamplingConfig
from trl_ext.sampling.vllm_engine import VllmEngine
from trl_ext.sampling.vllm_server import SERVE

VLLM_PYTHON = os.environ.get("TRL_EXT_VLLM_PYTHON")

GREEDY = {"temperature": 0.0, "max_new_tokens": 24}
# compiling takes longer than these tests
FAST_START = {"enforce_eager": True}


def config(python=VLLM_PYTHON, **settings):
    common = {"num_candidates": 1, "role_markers": None, "sampling_engine": "vllm", "vllm_python": str(python)}
    return SamplingConfig(**{**common, **GREEDY, **settings})


def needs_vllm(test):
    skip = pytest.mark.skipif(
        VLLM_PYTHON is None, reason="set TRL_EXT_VLLM_PYTHON to the interpreter of an environment with vLLM"
    )
    return pytest.mark.slow(skip(test))


class TestWithoutVllm:
    """What is found out before vLLM is there, or instead."""

    def test_missing_interpreter(self):
        with pytest.raises(FileNotFoundError, match="'/nowhere/bin/python' .no such file.*`sampling_engine`"):
            VllmEngine("model", config("/nowhere/bin/python"))

    def test_a_folder_is_answered_with_the_interpreter_in_it(self, tmp_path):
        python = tmp_path / "bin" / "python"
        python.parent.mkdir()
        python.touch()
        with pytest.raises(FileNotFoundError, match=f"a folder.*{python}"):
            VllmEngine("model", config(tmp_path))
        with pytest.raises(FileNotFoundError, match="a file that cannot be run"):
            VllmEngine("model", config(python))

    @pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is in this environment")
    def test_interpreter_without_vllm(self, monkeypatch):
        monkeypatch.setenv("PYTHONWARNINGS", "nonsense")  # something to be written
        with pytest.raises(RuntimeError, match="there is no vLLM in its environment") as caught:
            VllmEngine("model", config(sys.executable))
        message = str(caught.value)
        assert f"{sys.executable} -m pip install vllm" in message
        assert "`vllm_python`" in message and "`sampling_engine`" in message
        assert "The last lines it wrote:\n    Invalid -W option ignored: invalid action: 'nonsense'\n" in message

    @pytest.mark.parametrize(("program", "status"), [("false", 1), ("echo", 0)])
    def test_what_is_not_python(self, program, status):
        with pytest.raises(RuntimeError, match=f"ended with exit status {status}"):
            VllmEngine("model", config(program))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"temperature": 0.005}, "`temperature` must be 0 or at least 0.01 with vLLM, got 0.005"),
            ({"vllm_args": {"model": "x", "seed": 1, "logprobs_mode": "x"}}, "must not have model, logprobs_mode,"),
            ({"vllm_args": {"served_model_name": "x", "api_key": "y"}}, "must not have api_key, served_model_name,"),
            ({"vllm_args": {"seed": {1}}}, r"must hold numbers, strings, lists and dictionaries, got seed=\{1\}"),
        ],
    )
    def test_refused_settings(self, changed, message):
        with pytest.raises(ValueError, match=message):
            VllmEngine("model", config(sys.executable, **changed))

    def test_missing_model(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="The model folder '.*model' does not exist"):
            VllmEngine(str(tmp_path / "model"), config(sys.executable))

    def test_an_adapter_is_refused(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match="got the adapter.*merge_and_unload"):
            VllmEngine(str(tmp_path), config(sys.executable))


class TestConversation:
    """With a server that answers like vLLM's, in a process of its own."""

    @pytest.fixture
    def python(self, tmp_path):
        return fake_vllm.install(tmp_path, sys.executable)

    def test_what_is_asked_and_answered(self, python, tmp_path):
        drawing = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1}
        assert drawing.keys() == NEUTRAL.keys()
        given = {"max_model_len": 64, "enforce_eager": True, "hf_overrides": {"a": [1]}, "middleware": ["x", "y"]}
        settings = {"stop_strings": ["END"], "role_markers": ["User:"], "vllm_args": given}
        how = config(python, **drawing, **settings)
        with VllmEngine("model", how, dtype="float32", engine_args={"trust_remote_code": False}) as engine:
            assert (engine.version, engine.max_model_len) == ("0", 64)
            answers = engine.generate([[7], [8], [9]], [[2**63 - 1, 1], [], [3]])
        assert [[one.token_ids for one in row] for row in answers] == [[[7, 7], [1, 7]], [], [[3, 9]]]
        assert not answers[0][0].finished and answers[0][0].logps == [-0.5, -0.5]
        _, *asked = map(json.loads, (tmp_path / "asked.jsonl").read_text().splitlines())
        for one in asked:
            assert one.items() >= {**drawing, "max_tokens": 24, "stop": ["END", "User:"], "logprobs": 0}.items()
        assert sorted((one["prompt"], one["seed"]) for one in asked) == [([7], 1), ([7], 2**63 - 1), ([9], 3)]
        words = json.loads((tmp_path / "words.json").read_text())
        assert words[:2] == ["serve", "model"] and words[-1] == "--no-enable-chunked-prefill"
        assert "--enforce-eager" in words and "--no-trust-remote-code" in words
        for pair in (["--max-model-len", "64"], ["--hf-overrides", '{"a": [1]}'], ["--dtype", "float32"]):
            assert words[words.index(pair[0]) :][:2] == pair
        assert words[words.index("--middleware") :][:3] == ["--middleware", "x", "y"]
        socket = Path(words[words.index("--uds") + 1])
        assert not socket.parent.exists(), "nothing is left"

    def test_many_at_once(self, python):
        seeds = [[100 * prompt + k for k in range(14, 18)] for prompt in range(300)]
        with VllmEngine("model", config(python)) as engine:
            answers = engine.generate([[prompt] for prompt in range(300)], seeds)
            assert [[one.token_ids for one in row] for row in answers] == [
                [[k, prompt] for k in range(14, 18)] for prompt in range(300)
            ]
            group = engine._server.process.pid
        assert answers[0][0].finished and not processes_of_group(group)

    def test_killed_in_the_middle(self, python):
        engine = VllmEngine("model", config(python))
        group = engine._server.process.pid
        with pytest.raises(RuntimeError, match="failed on 400 requests to the model 'model'.*by SIGKILL") as caught:
            engine.generate([[1]] * 100, [[10, 11, 12, 13]] * 100)
        assert "VLLM_CPU_KVCACHE_SPACE" in str(caught.value) and "`sampling_engine`" in str(caught.value)
        assert "The last lines it wrote:\n    a line on standard output\n" in str(caught.value)
        assert not processes_of_group(group)
        with pytest.raises(RuntimeError, match="is closed"):
            engine.generate([[1]], [[1]])
        engine.close()

    def test_refused_request(self, python):
        engine = VllmEngine("model", config(python))
        with pytest.raises(RuntimeError, match="failed on 1 requests.*: seed must not be negative"):
            engine.generate([[1]], [[-1]])
        engine.close()

    def test_interrupted(self, python, monkeypatch):
        """Ctrl-C is the user's, not vLLM's."""
        with VllmEngine("model", config(python)) as engine:
            group = engine._server.process.pid
            monkeypatch.setattr(engine._server, "request", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                engine.generate([[1]], [[1]])
            assert not processes_of_group(group)

    def test_start_fails(self, python):
        with pytest.raises(RuntimeError, match="did not start with the model 'fails'.*exit status 1") as caught:
            VllmEngine("fails", config(python))
        assert "RuntimeError: out of memory" in str(caught.value) and "gpu_memory_utilization" in str(caught.value)

    def test_start_takes_too_long(self, python):
        with pytest.raises(RuntimeError, match="not ready after 1.5 seconds.*\n.*") as caught:
            VllmEngine("sleeps", config(python), startup_timeout=1.5)
        assert "`startup_timeout`" in str(caught.value)

    def test_it_ends_with_its_parent(self, python, tmp_path):
        words = [str(python), "-c", SERVE, "serve", "model", "--uds", str(tmp_path / "socket")]
        parent = subprocess.Popen(
            [sys.executable, "-c", "import subprocess, sys, time; p = subprocess.Popen(sys.argv[1:], "
             "start_new_session=True, stdout=2); print(p.pid, flush=True); time.sleep(60)", *words],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        group = int(parent.stdout.readline())
        while not (tmp_path / "socket").exists():
            time.sleep(0.05)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        assert all_end(group), processes_of_group(group)


PROMPTS = [list(f"{text} ".encode()) for text in ("What is 2 + 2?", "Bye!", "A somewhat longer prompt, " * 6, "One")]


@torch.no_grad()
def all_logps(model, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every token at every place, `(length, vocabulary)`."""
    return model(torch.tensor([token_ids])).logits[0].float().log_softmax(dim=-1)


def greedy(model, prompt: list[int], end_ids: list[int], max_new_tokens: int) -> tuple[list[int], list[float]]:
    """The most likely token again and again, one forward for each."""
    token_ids, logps = [], []
    while len(token_ids) < max_new_tokens and not (token_ids and token_ids[-1] in end_ids):
        logp, token = all_logps(model, prompt + token_ids)[-1].max(dim=-1)
        token_ids.append(token.item())
        logps.append(logp.item())
    return token_ids, logps


@pytest.fixture(scope="module")
def large_weights(tmp_path_factory):
    """
    A model whose distributions are far from uniform, in a folder. Its generation config has two end tokens, the second
    of which comes up in greedy text, and sampling parameters that would change every answer.
    """
    directory = tmp_path_factory.mktemp("vllm") / "model"
    save_byte_level_model(directory, hidden_size=128, num_layers=2, max_position_embeddings=512)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    enlarge(model)
    end_ids = [model.generation_config.eos_token_id, greedy(model, PROMPTS[0], [], 10)[0][-1]]
    model.save_pretrained(directory)
    GenerationConfig(
        eos_token_id=end_ids, do_sample=True, temperature=3.0, top_k=2, repetition_penalty=4.0, max_new_tokens=3
    ).save_pretrained(directory)
    return directory, model, end_ids


def processes_of_group(group: int) -> dict[int, str]:
    """The living processes of a process group, and their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _parent, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has just ended
            pass
    return found


def all_end(group: int, within: float = 15.0) -> bool:
    deadline = time.monotonic() + within
    while processes_of_group(group) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not processes_of_group(group)


@needs_vllm
class TestGreedy:
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, large_weights):
        with VllmEngine(str(large_weights[0]), config(vllm_args=FAST_START), dtype="float32") as engine:
            group = engine._server.process.pid
            assert processes_of_group(group)  # or the next line would always hold
            yield engine
        assert not processes_of_group(group)

    def test_equals_transformers(self, engine, large_weights):
        _directory, model, end_ids = large_weights
        answers = engine.generate(PROMPTS, [[1]] * len(PROMPTS))
        expected = [greedy(model, prompt, end_ids, GREEDY["max_new_tokens"]) for prompt in PROMPTS]
        assert [answer.token_ids for [answer] in answers] == [token_ids for token_ids, _logps in expected]
        for [answer], (_token_ids, logps) in zip(answers, expected, strict=True):
            assert answer.logps == pytest.approx(logps, abs=1e-4)  # measured: 1e-5
        assert len(set(answers[1][0].token_ids)) > 5  # text that says something

    def test_a_further_end_token_ends(self, engine, large_weights):
        _directory, _model, end_ids = large_weights
        [[answer], [other]] = engine.generate(PROMPTS[:2], [[1], [1]])
        assert answer.finished and answer.token_ids[-1] == end_ids[1] and len(answer.token_ids) == 10
        assert not other.finished and len(other.token_ids) == GREEDY["max_new_tokens"]

    def test_prompts_without_seeds(self, engine):
        assert engine.generate([], []) == []
        assert engine.generate([[1], [2]], [[], [3]])[0] == []


@needs_vllm
def test_candidates_of_both_engines_are_the_same(large_weights, tmp_path):
    """Greedy rows, with a stop string, a role marker, and prompts too long for the model or for vLLM alone."""
    directory, model, end_ids = large_weights
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [bytes(prompt).decode() for prompt in PROMPTS]
    whole = [greedy(model, tokenizer(text)["input_ids"], end_ids, 24)[0] for text in texts]
    decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in whole]
    letters = [next(c for c in text[3:] if c.isascii() and c.isprintable()) for text in decoded[1:3]]
    rows = [{"prompt": text, "number": n} for n, text in enumerate([*texts, "x" * 489, "y" * 233, "z" * 232])]
    settings = {
        "num_candidates": 1, "temperature": 0.0, "max_new_tokens": 24, "stop_strings": letters[0],
        "role_markers": letters[1],
    }  # fmt: skip
    ours, report = sample_candidates(
        directory, rows, SamplingConfig(**settings), tmp_path / "ours", keep_empty=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    of_vllm = config(**settings, vllm_args={**FAST_START, "max_model_len": 256})
    theirs, other = sample_candidates(
        directory, rows, of_vllm, tmp_path / "theirs", keep_empty=True, model_init_kwargs={"dtype": "float32"}
    )
    assert [row["number"] for row in ours] == [0, 1, 2, 3, 5, 6] and report.num_too_long == 1
    assert [row["number"] for row in theirs] == [0, 1, 2, 3, 6] and other.num_too_long == 2
    for one, same in zip([row for row in ours if row["number"] != 5], theirs, strict=True):
        assert one["logps"] == pytest.approx(same["logps"], abs=1e-3)  # sums over 24 tokens, 1e-5 each
        assert {**one, "logps": None} == {**same, "logps": None}
    cuts = [len(row["completions"][0]) < len(text) for row, text in zip(ours, decoded, strict=False)]
    assert cuts[1] and cuts[2] and report.cut_at_role_marker, "something was cut"
    again, _ = sample_candidates(
        directory, rows, of_vllm, tmp_path / "theirs", keep_empty=True, model_init_kwargs={"dtype": "float32"}
    )
    assert again == theirs


@needs_vllm
class TestSampling:
    """Answers with a temperature, a nucleus, the most likely tokens and stop strings."""

    SETTINGS = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.001, "max_new_tokens": 32}
    STOP_STRINGS = ("e", "t", "0", "+")
    SEEDS = [[2**63 - 1 - 100 * prompt - k for k in range(6)] for prompt in range(len(PROMPTS))]

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, large_weights):
        settings = {**cls.SETTINGS, "stop_strings": list(cls.STOP_STRINGS), "vllm_args": FAST_START}
        with VllmEngine(str(large_weights[0]), config(**settings), dtype="float32") as engine:
            yield engine

    @pytest.fixture(scope="class")
    @classmethod
    def answers(cls, engine):
        return engine.generate(PROMPTS, cls.SEEDS)

    def test_a_seed_makes_the_same_text_in_any_company(self, engine, answers):
        assert engine.generate(PROMPTS, self.SEEDS) == answers
        backwards = engine.generate(PROMPTS[::-1], [seeds[::-1] for seeds in self.SEEDS[::-1]])
        alone = engine.generate([PROMPTS[2]], [[self.SEEDS[2][3]]])
        assert [[one.token_ids for one in row[::-1]] for row in backwards[::-1]] == [
            [one.token_ids for one in row] for row in answers
        ]
        assert alone[0][0].token_ids == answers[2][3].token_ids

    def test_more_than_one_step_takes_in(self, engine):
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(3, 259, (80, 150), generator=generator).tolist()  # a step on a CPU has 4096 tokens
        answers = engine.generate(prompts, [[index] for index in range(80)])
        for index in (0, 27, 28, 79):
            [[alone]] = engine.generate([prompts[index]], [[index]])
            assert alone.token_ids == answers[index][0].token_ids

    def test_other_seeds_make_other_texts(self, engine, answers):
        for row in answers:  # short ones, stopped by a string, may be equal
            long = [tuple(one.token_ids) for one in row if len(one.token_ids) > 5]
            assert len(set(long)) == len(long) > 1
        [others] = engine.generate(PROMPTS[:1], [[1, 2, 3]])
        assert not {tuple(one.token_ids) for one in others} & {tuple(one.token_ids) for one in answers[0]}

    def test_logps_are_of_the_model_and_tokens_of_the_settings(self, answers, large_weights):
        _directory, model, _end_ids = large_weights
        checked = 0
        for prompt, row in zip(PROMPTS, answers, strict=True):
            for one in row:
                logps = all_logps(model, prompt + one.token_ids)[len(prompt) - 1 : -1]
                tokens = torch.tensor(one.token_ids).unsqueeze(1)
                expected = logps.gather(1, tokens).squeeze(1).tolist()
                assert one.logps == pytest.approx(expected, abs=1e-4)  # measured: 3e-5
                kept = (logps / 0.5).topk(20, dim=-1)
                assert (
                    2 * (logps.gather(1, tokens).squeeze(1) - logps.max(dim=-1).values) > math.log(0.02) - 1e-3
                ).all()
                assert (kept.indices == tokens).any(dim=-1).all()
                probabilities = kept.values.softmax(dim=-1)
                before = ((probabilities.cumsum(dim=-1) - probabilities) * (kept.indices == tokens)).sum(dim=-1)
                assert (before < 0.9 + 1e-3).all()
                checked += len(one.token_ids)
        assert checked > 200

    def test_stop_strings_and_end_tokens(self, answers, large_weights):
        directory, _model, end_ids = large_weights
        tokenizer = AutoTokenizer.from_pretrained(directory)

        def stops(token_ids):
            return any(string in tokenizer.decode(token_ids, skip_special_tokens=True) for string in self.STOP_STRINGS)

        ends = []
        for one in (one for row in answers for one in row):
            assert not stops(one.token_ids[:-1]) and len(one.logps) == len(one.token_ids)
            assert not set(one.token_ids[:-1]) & set(end_ids)
            ended, stopped = one.token_ids[-1] in end_ids, stops(one.token_ids)
            assert one.finished == ended
            assert ended or stopped or len(one.token_ids) == self.SETTINGS["max_new_tokens"]
            ends.append("ended" if ended else "stopped" if stopped else "length")
        assert set(ends) == {"ended", "stopped", "length"}


@needs_vllm
class TestFailures:
    def start(self, directory, startup_timeout=600.0, **settings):
        how = config(vllm_args=FAST_START, **settings)
        return VllmEngine(str(directory), how, dtype="float32", startup_timeout=startup_timeout)

    def test_model_it_does_not_run(self, tmp_path, tokenizer):
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=36, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=3, num_key_value_heads=3,  # heads 12 wide
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match=f"vLLM did not start with the model '{tmp_path}'") as caught:
            self.start(tmp_path)
        message = str(caught.value)
        assert "head" in message and "`sampling_engine` to 'transformers'" in message

    def test_start_takes_too_long(self, large_weights):
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="not ready after 1.5 seconds.*\n.*") as caught:
            self.start(large_weights[0], startup_timeout=1.5)
        assert "`startup_timeout`" in str(caught.value)
        assert time.monotonic() - start < 10

    @pytest.mark.parametrize("who", ["the server", "a process that it has started"])
    def test_killed_in_the_middle(self, large_weights, who):
        """As the system does where memory is short."""
        engine = self.start(large_weights[0], max_new_tokens=400)
        group = engine._server.process.pid
        [core] = [pid for pid, command in processes_of_group(group).items() if "EngineCore" in command]
        threading.Timer(2.0, os.kill, (group if who == "the server" else core, signal.SIGKILL)).start()
        with pytest.raises(RuntimeError, match="failed on 800 requests") as caught:
            engine.generate([[index + 3] for index in range(100)], [list(range(8))] * 100)
        print(caught.value)
        assert "`sampling_engine`" in str(caught.value)
        assert ("SIGKILL" in str(caught.value)) == (who == "the server")
        assert not processes_of_group(group)
        with pytest.raises(RuntimeError, match="is closed"):
            engine.generate([[3]], [[1]])

    def test_a_prompt_that_is_too_long(self, large_weights):
        engine = self.start(large_weights[0])
        with pytest.raises(RuntimeError, match="512"):
            engine.generate([[1] * 600], [[1]])

    def test_nothing_outlives_us(self, large_weights, tmp_path):
        """Killed in the middle of it, with a fork of ours that keeps the pipe to the worker open."""
        settings = {**GREEDY, "max_new_tokens": 400, "num_candidates": 1, "sampling_engine": "vllm"}
        settings |= {"vllm_python": VLLM_PYTHON, "vllm_args": FAST_START}
        script = tmp_path / "sample.py"
        script.write_text(
            "import json, os, sys, time\n"
            "from trl_ext.sampling import SamplingConfig, VllmEngine\n"
            "model, settings = sys.argv[1:]\n"
            "engine = VllmEngine(model, SamplingConfig(**json.loads(settings)), dtype='float32')\n"
            "fork = os.fork()\n"
            "if fork == 0:\n"
            "    time.sleep(60)\n"
            "    os._exit(0)\n"
            "print(engine._server.process.pid, fork, flush=True)\n"
            "engine.generate([[index + 3] for index in range(200)], [list(range(8))] * 200)\n"
        )
        us = subprocess.Popen([sys.executable, script, large_weights[0], json.dumps(settings)], stdout=subprocess.PIPE)
        group, fork = map(int, us.stdout.readline().split())
        try:
            time.sleep(2)
            assert processes_of_group(group) and us.poll() is None
            us.kill()
            us.wait()
            assert all_end(group), processes_of_group(group)
        finally:
            os.kill(fork, signal.SIGKILL)
            us.stdout.close()
