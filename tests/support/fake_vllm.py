"""
A stand-in for the package vLLM: a server that takes the command line of `vllm serve` and answers like it, without a
model. Its tokens follow from the seed. What it was asked goes into files beside the socket's log.
"""

from pathlib import Path

PYTHON = """\
#!/bin/sh
PYTHONPATH={folder} exec {python} "$@"
"""

PLATFORMS = """\
class current_platform:
    is_cpu = staticmethod(lambda: True)
"""

MAIN = """\
import json, os, signal, socketserver, sys, time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

FOLDER = Path(__file__).parents[3]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.answer({"version": "0", "data": [{"max_model_len": 64}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with (FOLDER / "asked.jsonl").open("a") as file:
            file.write(json.dumps(asked) + "\\n")
        if asked.get("seed") == 13:  # unlucky
            os.kill(os.getpid(), signal.SIGKILL)
        if asked.get("seed", 0) < 0:
            self.answer({"error": {"message": "seed must not be negative"}}, status=400)
            return
        tokens = [asked.get("seed", 0) % 100, *asked["prompt"][:1]]
        self.answer({"choices": [{
            "token_ids": tokens, "logprobs": {"token_logprobs": [-0.5] * len(tokens)},
            "finish_reason": "stop", "stop_reason": "END" if asked["stop"] else None,
        }]})


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads, request_queue_size = True, 1024


def main():
    (FOLDER / "words.json").write_text(json.dumps(sys.argv[1:]))
    print("a line on standard output")
    if sys.argv[2] == "fails":
        raise RuntimeError("out of memory")
    if sys.argv[2] == "sleeps":
        time.sleep(60)
    Server(sys.argv[sys.argv.index("--uds") + 1], Handler).serve_forever()
"""


def install(folder: Path, python: str) -> Path:
    """Make an interpreter in `folder` that finds this package."""
    for name, text in (("entrypoints/cli/main.py", MAIN), ("platforms.py", PLATFORMS)):
        file = folder / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    interpreter = folder / "python"
    interpreter.write_text(PYTHON.format(folder=folder, python=python))
    interpreter.chmod(0o755)
    return interpreter
