"""
`run` and `Popen` as those of `subprocess`, for Python programs that import torch, TRL and this package.

Starting such a program takes ten seconds, nearly all of it imports. Here a server does them once, and each program is
a fork of it: a process of its own with its own environment, folder, streams, signals and exit code. The launchers'
workers and the servers of `multiprocessing` that a program starts are forked as well, as its descendants.

What is read while modules are imported is as it was in the server; a program with another `PYTHONHASHSEED` is started
the slow way, as is everything that is not `python script.py` or `python -m module`.
"""

import atexit
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from multiprocessing import connection, forkserver, resource_tracker

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# what a server has imported, and under which environment
IMPORTED = (
    "trl_ext.trainers.candidate_trainer trl_ext.runs.rounds trl trl.experimental.orpo peft scipy.stats matplotlib "
    "accelerate.commands.launch torch.distributed.run torch.distributed.tensor"
).split()
EXTRAS = ("deepspeed", "bitsandbytes")  # where they are installed
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": REPOSITORY}
STARTED = subprocess.Popen


class Popen(STARTED):
    """`subprocess.Popen`, forked from this process's server where that can be."""

    _status = None  # where the server writes the exit code

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        environment = dict(os.environ if env is None else env)
        program = None if executable or preexec_fn or pass_fds else program_of(args, environment)
        if program is None:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        # the rest: startupinfo, creationflags, shell, and the ends of three pipes
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[3:9]
        new_session = rest[14]
        streams = [
            0 if p2cread == -1 else p2cread,
            1 if c2pwrite == -1 else c2pwrite,
            2 if errwrite == -1 else errwrite,
        ]
        request = {"program": program, "cwd": str(cwd or os.getcwd()), "env": environment, "session": new_session}
        self._status, status = os.pipe()
        self.pid = server().fork(request, [*streams, status])
        os.close(status)
        self._child_created = True
        for ours, theirs in ((p2cwrite, p2cread), (c2pread, c2pwrite), (errread, errwrite)):
            if theirs != -1 and theirs != getattr(self, "_devnull", None) and ours != -1:
                os.close(theirs)
        if getattr(self, "_devnull", None) is not None:
            os.close(self._devnull)

    def _ended(self, seconds):
        """Take the exit code if it comes within so many seconds, `None` for any."""
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            code = os.read(self._status, 16)
            os.close(self._status)
            self.returncode = int(code) if code else -signal.SIGKILL  # its server was killed
        return self.returncode

    def _internal_poll(self, *args, **kwargs):
        return super()._internal_poll(*args, **kwargs) if self._status is None else self._ended(0)

    def _wait(self, timeout):
        if self._status is None:
            return super()._wait(timeout)
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def run(command, *, capture_output=False, check=False, timeout=None, **options):
    """As `subprocess.run`."""
    if capture_output:
        options.update(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def program_of(command, environment):
    """What Python runs in a command, `["-u", "script.py", ...]`; `None` if a fork would be something else."""
    command = list(map(str, command)) if isinstance(command, (list, tuple)) else []
    if command[:1] != [sys.executable] or environment.get("PYTHONHASHSEED", "0") != "0":
        return None
    program = command[1:]
    words = program[1:] if program[:1] == ["-u"] else program
    return program if words and (words[0] == "-m" or words[0].endswith(".py")) else None


class Server:
    """This process's end of the socket to its server."""

    def __init__(self, ours):
        self.socket, self.owner = ours, os.getpid()

    def fork(self, request, streams):
        message = json.dumps(request).encode()
        socket.send_fds(self.socket, [len(message).to_bytes(4, "big")], streams)
        self.socket.sendall(message)
        return int.from_bytes(receive(self.socket, 4), "big")


_server = None


def server():
    """The server of this process, started at the first call."""
    global _server
    if _server is None or _server.owner != os.getpid():
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.support.warm", str(theirs.fileno())]
        environment = {**os.environ, **ENVIRONMENT}
        STARTED(command, pass_fds=[theirs.fileno()], env=environment, cwd=REPOSITORY, stdin=subprocess.DEVNULL)
        theirs.close()
        _server = Server(ours)
    return _server


def receive(source, size):
    """So many bytes; fewer at the end."""
    found = b""
    while len(found) < size:
        more = source.recv(size - len(found))
        if not more:
            break
        found += more
    return found


def serve(requests):
    """Fork a process at each request until nobody can ask any more. Returns the request, in the process forked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})  # meant for the programs
    ended, wake = os.pipe()
    os.set_blocking(ended, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running = {}
    while True:
        ready, _, _ = select.select([requests, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            with contextlib.suppress(ChildProcessError):
                while (found := os.waitpid(-1, os.WNOHANG))[0]:
                    status = running.pop(found[0], None)
                    if status is not None:
                        with contextlib.suppress(BrokenPipeError):
                            os.write(status, str(os.waitstatus_to_exitcode(found[1])).encode())
                        os.close(status)
        if requests not in ready:
            continue
        size, fds, _, _ = socket.recv_fds(requests, 4, 4)
        if not size:
            os._exit(0)
        request = json.loads(receive(requests, int.from_bytes(size, "big")))
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for each in (ended, wake, fds[3], requests.detach(), *running.values()):
                os.close(each)
            return request, fds[:3]
        running[pid] = fds[3]
        for each in fds[:3]:
            os.close(each)
        requests.sendall(pid.to_bytes(4, "big"))


def fork_servers():
    """Fork, from this process, the server of `multiprocessing` and the one that `Popen` asks."""
    global _server
    address = connection.arbitrary_address("AF_UNIX")
    alive, ours = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        os.chmod(address, 0o600)
        listener.listen()
        pid = os.fork()
        if not pid:
            os.close(ours)
            with open("/proc/self/comm", "w") as name:
                name.write("forkserver")
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as trl_ext.runs.process starts it
            try:
                forkserver.main(os.dup(listener.fileno()), alive, [])
            finally:
                os._exit(0)
    os.close(alive)
    known = forkserver._forkserver
    known._forkserver_address, known._forkserver_alive_fd, known._forkserver_pid = address, ours, pid

    to_server, requests = socket.socketpair()
    if not os.fork():
        to_server.close()
        os.close(ours)
        return serve(requests)
    requests.close()
    _server = Server(to_server)
    return None


def become(request, streams):
    """Turn this process into the program that was asked for, up to its first line; returns what runs it."""
    while True:  # once more in a fork of this process's own server
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        if request["session"]:
            os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for stream in streams:
            os.close(stream)
        resource_tracker._resource_tracker._fd = None
        asked = fork_servers()
        if asked is None:
            break
        request, streams = asked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})
    subprocess.Popen = Popen
    sys.modules["torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"].Popen = Popen
    program = request["program"]
    if program[0] == "-u" or request["env"].get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    program = program[1:] if program[0] == "-u" else program
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if program[0] == "-m":
        sys.argv, sys.path[0] = program[1:], os.getcwd()
        return lambda: runpy._run_module_as_main(program[1])
    sys.argv, sys.path[0] = program, os.path.dirname(os.path.abspath(program[0]))
    main.__file__ = program[0]
    with open(program[0]) as opened:
        code = compile(opened.read(), program[0], "exec")
    return lambda: exec(code, main.__dict__)


def leave(program):
    """Run the program and end as Python does, but for taking its modules apart, which takes seconds."""
    code = 0
    try:
        program()
    except SystemExit as ending:
        code = ending.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    for name in EXTRAS:
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)  # as in `conftest.py`
    gc.freeze()  # memory stays shared with the forks
    leave(become(*serve(socket.socket(fileno=int(sys.argv[1])))))
