"""
Stands in for `srun`, `scontrol` and `scancel`, whichever it is called as: a job's nodes are the hosts of `hosts.py`.

`SLURM_STAND_IN` names a folder with `nodes.json`: for each node its name and the words that run a command there.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

folder = Path(os.environ["SLURM_STAND_IN"])
nodes = json.loads((folder / "nodes.json").read_text())
called_as, arguments = Path(sys.argv[0]).name, sys.argv[1:]


def srun():
    command = arguments[arguments.index("bash") :]
    tasks = [
        subprocess.Popen([*prefix, *command], env={**os.environ, "SLURM_NODEID": str(number)})
        for number, prefix in enumerate(nodes.values())
    ]
    (folder / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    while any(task.poll() is None for task in tasks):
        if any(task.returncode for task in tasks):  # --kill-on-bad-exit
            time.sleep(15)
            for task in tasks:
                task.kill()
        time.sleep(0.1)
    return max(task.wait() & 255 for task in tasks)


def scontrol():
    if arguments[:2] == ["show", "hostnames"]:
        print("\n".join(nodes))
    else:
        with (folder / "scontrol").open("a") as said:
            said.write(" ".join(arguments) + "\n")
    return 0


def scancel():
    assert arguments == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
    for task in (folder / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    return 0


sys.exit({"srun": srun, "scontrol": scontrol, "scancel": scancel}[called_as]())
