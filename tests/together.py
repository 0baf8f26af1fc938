"""Several processes on this machine that are one run, as `python -m tpu worker` starts them."""

import os
import subprocess
import sys

from runs import with_devices

from tpu.local import free_port


def start(words, processes, devices=1):
    """Starts `python *words` so many times, with FOT_* set and so many devices for each.

    They do not outlive what `ended` waits for; a test that waits for less kills the others.
    """
    run = {
        "FOT_COORDINATOR": f"127.0.0.1:{free_port()}",
        "FOT_PROCESSES": str(processes),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**with_devices(devices), **run, "FOT_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]


def ended(processes):
    """Waits for all: their exit codes, and what each wrote to stdout and to stderr."""
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said
