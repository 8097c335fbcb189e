"""Two hosts on one machine: network namespaces with a cable between them, and names and mounts of their own."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.data import REPOSITORY
from tests.support.processes import ended_after

ADDRESSES = ("10.203.77.1", "10.203.77.2")  # of two namespaces that nothing else can reach
INTERFACE = "veth0"
NAMESPACES = ["--net", "--uts", "--mount", "--ipc"]
AS_USER = ["--user", "--map-root-user"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


class Host:
    """
    A process that keeps the namespaces of a host, and commands that run there.

    Network, host name, mounts and shared memory are its own. As on many a real machine, its name stands for a loopback
    address, which other hosts cannot reach.

    Args:
        name (`str`): the host's name.
        address (`str`): its address.
        folder (`Path`): for its files.
        beside (`Host`, *optional*): where namespaces need a user namespace, the host that has it.
    """

    def __init__(self, name: str, address: str, folder: Path, beside: "Host | None" = None):
        self.name, self.address, self.folder = name, address, folder
        self.files = folder / name
        self.files.mkdir(parents=True)
        self.is_root = os.geteuid() == 0
        unshare = ["unshare", *NAMESPACES]
        if not self.is_root and beside is None:
            unshare += AS_USER
        self._inside = [*NAMESPACES]
        prefix = []
        if not self.is_root:
            self._inside += ["--user", "--preserve-credentials"]
            if beside is not None:
                prefix = ["nsenter", f"--target={beside.pid}", "--user", "--preserve-credentials", "--"]
        # `cat` ends when this process does
        self.keeper = subprocess.Popen(
            [*prefix, *unshare, "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self.keeper.pid
        try:
            if self.keeper.stdout.readline() != "ready\n":
                raise OSError(self.keeper.stderr.read().strip())
            (self.files / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
            self.call("hostname", name)
            self.call("mount", "--bind", self.files / "hosts", "/etc/hosts")
            self.call("mount", "-t", "tmpfs", "none", "/dev/shm")
        except BaseException:
            self.close()
            raise

    def prefix(self, cwd: Path | None = None) -> list[str]:
        """The words that run a command on the host, by default in its own folder."""
        return ["nsenter", f"--target={self.pid}", *self._inside, f"--wdns={cwd or self.files}", "--"]

    def start(self, *command, **options) -> subprocess.Popen:
        return subprocess.Popen([*self.prefix(), *map(str, command)], **options)

    def call(self, *command) -> None:
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = process.communicate()
        if process.returncode:
            raise OSError(f"{' '.join(map(str, command))}: {output.strip()}")

    def unshare(self, path: Path) -> Path:
        """Give the host a folder of its own at a path. Returns where others find it."""
        own = self.files / f"own-{path.name}"
        own.mkdir()
        path.mkdir(exist_ok=True)
        self.call("mount", "--bind", own, path)
        return own

    def close(self) -> None:
        self.keeper.kill()
        self.keeper.communicate()


@contextlib.contextmanager
def two_hosts(folder: Path):
    """Two hosts that reach each other; the test is skipped, and says why, where the system does not permit them."""
    missing = [tool for tool in ("unshare", "nsenter", "ip", "mount") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"two hosts need {', '.join(missing)} (Linux, util-linux and iproute2)")
    probe = ["unshare", *NAMESPACES, *([] if os.geteuid() == 0 else AS_USER), "sh", "-c"]
    probe += [f"mount -t tmpfs none /dev/shm && ip link add {INTERFACE} type veth peer name other"]
    probed = subprocess.run(probe, capture_output=True, text=True)
    if probed.returncode:
        pytest.skip(f"this system does not permit network namespaces: {probed.stderr.strip()}")
    hosts = []
    try:
        for name, address in zip(("alpha", "beta"), ADDRESSES, strict=True):
            hosts.append(Host(name, address, folder, *hosts))
        cable = ["type", "veth", "peer", "name", INTERFACE, "netns", hosts[1].pid]
        hosts[0].call("ip", "link", "add", INTERFACE, *cable)
        for host in hosts:
            host.call("ip", "address", "add", f"{host.address}/30", "dev", INTERFACE)
            host.call("ip", "link", "set", INTERFACE, "up")
            host.call("ip", "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            host.close()


def environment(**others: str) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        **others,
    }


def launch_on(
    hosts, config: str, *command, num_processes: int = 2, port: int = 29500, timeout: float = 400, **variables
):
    """
    `accelerate launch` on each host, in a working directory of its own, with a shipped config.

    Returns:
        `list[subprocess.CompletedProcess]`: of each host, with what it has said, both streams together.
    """
    processes = []
    for rank, host in enumerate(hosts):
        where = ["--num_machines", len(hosts), "--num_processes", num_processes, "--machine_rank", rank]
        where += ["--main_process_ip", hosts[0].address, "--main_process_port", port]
        config_file = REPOSITORY / "accelerate_configs" / f"{config}.yaml"
        processes.append(
            host.start(
                *ACCELERATE, "--config_file", config_file, *where, *command,
                env=environment(**variables), stdout=(host.files / "output").open("w"), stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    return wait_for(processes, hosts, timeout)


def wait_for(processes, hosts, timeout: float) -> list[subprocess.CompletedProcess]:
    """Wait for a process of each host. When one has failed, the others get some seconds to notice."""
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(ended_after(process))
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.returncode for process in processes):
                deadline = min(deadline, time.monotonic() + 60)
            time.sleep(0.1)
    return [
        subprocess.CompletedProcess(process.args, process.returncode, (host.files / "output").read_text())
        for process, host in zip(processes, hosts, strict=True)
    ]
