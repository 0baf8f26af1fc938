"""Workers as real processes on this machine, each with a small Python program as its command."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tpu.local import free_port

ROOT = Path(__file__).parents[2]
LIMIT = 60  # seconds, for what should take one or two


def verb(name):
    """The command line of a verb."""
    return [sys.executable, "-m", "tpu", name]


class Pod:
    """Workers started one by one; what is left of them is killed at the end."""

    def __init__(self, directory, count):
        self.directory, self.count, self.port = directory, count, free_port()
        self.workers = {}

    def start(self, worker, program, *flags, **environment):
        command = [*verb("worker"), "--run_dir", str(self.directory / str(worker)), *flags]
        addresses = ",".join(f"127.0.0.1:{self.port}" for _ in range(self.count))
        own = {"FOT_WORKERS": addresses, "FOT_WORKER": str(worker), **environment}
        self.workers[worker] = subprocess.Popen(
            [*command, "--", sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, worker):
        """Waits for a worker; its exit code, standard output and last line of standard error."""
        out, err = self.workers[worker].communicate(timeout=LIMIT)
        return self.workers[worker].returncode, out, ([""] + err.splitlines())[-1]

    def state(self, worker):
        return json.loads((self.directory / str(worker) / "state.json").read_text())

    def close(self):
        for process in self.workers.values():
            process.kill()
            process.communicate(timeout=LIMIT)


def wait_until(true, what="it"):
    """Waits until a function gives something true, and gives that."""
    deadline = time.monotonic() + LIMIT
    while not (value := true()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)
    return value


def alive(pid):
    """Whether a process runs: a zombie does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
