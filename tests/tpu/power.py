"""Ends what runs on fake workers, and nothing else."""

import contextlib
import os
import signal
from pathlib import Path


def off(pods):
    """Kills the runs on the workers of a directory of pods, all at one time.

    A run that sees another's end would have the time to report it; none does once all are stopped.
    """
    for sent in (signal.SIGSTOP, signal.SIGKILL):
        for file in pods.glob("*/*/*/fot/runs/*/pid"):
            _send(sent, file)


def _send(sent, file):
    """Sends a signal to the process whose number is in a run's file.

    A number in a file may have become, or always been, that of another process: only one whose
    command line names the directory of the run is sent to.
    """
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        pid = int(file.read_text())
        words = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        if pid > 1 and os.fsencode(str(file.parent)) in words:
            os.kill(pid, sent)
