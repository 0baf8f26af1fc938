"""Where a result comes from: what stands beside its numbers in every file of results."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import jax

from fot_jax import __version__


def provenance() -> dict[str, str]:
    """The command of this process, the code it runs, and the machine."""
    device = jax.devices()[0]
    machine = f"{jax.device_count()} x {device.device_kind} ({platform.machine()})"
    return {**command_and_code(), "device": machine}


def command_and_code() -> dict[str, str]:
    """Of a process that leaves the devices to others: who asks for one may keep it to himself."""
    return {
        "command": shlex.join([*_program(Path(sys.argv[0])), *sys.argv[1:]]),
        "commit": _commit(),
        "jax": jax.__version__,
    }


def _program(path: Path) -> list[str]:
    """As it is typed: a program, a module, or a directory that Python runs."""
    if path.name == "__main__.py":
        return ["python", "-m", path.parent.name]
    if path.is_dir():
        return ["python", os.path.relpath(path)]
    return [path.name]


def _commit() -> str:
    """Of the code, "-dirty" where it or experiment files have been changed since; its version
    where it is in no repository (that of the project it is installed beside is not its own).
    """

    def git(*words: str) -> str:
        here = Path(__file__).parents[1]  # the package
        done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if git("ls-files", "--", "evals/provenance.py"):
            changed = git("status", "--porcelain", "-uno", "--", ".", ":(top)*.gin")
            return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except OSError:  # there is no git
        pass
    return f"version {__version__}"
