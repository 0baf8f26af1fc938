"""Takes the place of tpu/worker.py on fake workers: no counting, but its states and its ends."""

import ctypes
import json
import os
import signal
import subprocess
import time
from pathlib import Path


def add_arguments(parser):
    parser.add_argument("--run_dir")
    parser.add_argument("command", nargs="+")


def run(args):
    worker = int(os.environ["FOT_WORKER"])
    directory, started = Path(args.run_dir), time.time()
    broken = Path(os.environ["FAKE_GCLOUD"], "broken")  # says which worker has failed

    def tell(state, code=None, why=None, ended=None):
        told = {"state": state, "code": code, "why": why, "worker": worker, "workers": 2}
        told |= {"pid": os.getpid(), "started": started, "ended": ended}
        (directory / "half").write_text(json.dumps(told))
        (directory / "half").rename(directory / "state.json")

    broken.unlink(missing_ok=True)
    tell("running")
    die_with_parent = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # noqa: E731
    child = subprocess.Popen(args.command, preexec_fn=die_with_parent)
    while child.poll() is None:
        if broken.exists():
            child.kill()
            tell("failed", 1, f"stopped because {broken.read_text()} failed", time.time())
            return 1
        time.sleep(0.05)
    if child.returncode:
        tell("failed", child.returncode, f"ended with exit code {child.returncode}", time.time())
        broken.write_text(f"worker {worker}")
        return child.returncode
    tell("finished", 0, None, time.time())
    return 0
