"""Runs command lines of gcloud as processes, and says in one line what went wrong."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time

from fot_jax.common.errors import UserError
from tpu.gcloud import Argv

DROPPED = 255  # exit code of ssh, and so of gcloud, when a connection fails
TRIES = 4
PAUSE = 2.0  # seconds before the next try; gcloud has itself tried for 50 seconds by then
LIMIT = 3600.0  # seconds; deleting a large pod, or making an environment, is the longest
SHORT = 300.0  # for what workers, or Google's servers, answer at once; ssh may hang


class CallFailed(UserError):
    """A command of gcloud failed.

    Attributes:
      code: its exit code.
      out, text: what it wrote to stdout and stderr.
    """

    def __init__(self, line: str, code: int, out: str, text: str):
        super().__init__(line)
        self.code = code
        self.out = out
        self.text = text


def call(argv: Argv, limit: float = LIMIT, everywhere: bool = False) -> str:
    """Runs a command to its end and returns what it printed.

    Args:
      everywhere: it has failed where gcloud, with a warning and 0, leaves out nodes.

    Raises:
      CallFailed: it ended with another code than 0, or not within `limit` seconds.
      UserError: there is no such program.
    """
    with _started(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        code = None
        try:
            out, text = process.communicate(timeout=limit)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, text = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code is None:
        raise CallFailed(f"{_verb(argv)}: not done after {limit:.0f} seconds", DROPPED, out, text)
    if everywhere and not code and "Could not prepare all" in text:
        code = DROPPED
    if code:
        line = f"{_verb(argv)}: {_last_error(text) or f'exit code {code}'}"
        raise CallFailed(line, code, out, text)
    return out


def call_with_retries(argv: Argv, limit: float = LIMIT, everywhere: bool = False) -> str:
    """The same, for commands that may be repeated: tries again after a dropped connection.

    Raises:
      CallFailed, UserError: as `call`, once nothing has helped.
    """
    for _ in range(TRIES - 1):
        try:
            return call(argv, limit, everywhere)
        except CallFailed as error:
            if error.code != DROPPED:
                raise
            time.sleep(PAUSE)
    return call(argv, limit, everywhere)


def show(argv: Argv) -> int:
    """Runs a command whose output is for the user to read as it comes; returns its exit code.

    Raises:
      UserError: there is no such program.
    """
    with _started(argv) as process:
        try:
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise


def print_commands(commands: list[Argv]) -> None:
    """Prints what would run, a command a line."""
    for argv in commands:
        print(shlex.join(argv))


def _started(argv: Argv, **options) -> subprocess.Popen:
    """In a session of its own, to be ended together with the ssh processes that it starts."""
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
            **options,
        )
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {argv[0]} on this machine: install the Google Cloud CLI "
            "(cloud.google.com/sdk/docs/install), then run: gcloud auth login"
        ) from error


def _verb(argv: Argv) -> str:
    """Of a command line: "gcloud queued-resources ssh"."""
    words = [word for word in argv if re.fullmatch(r"[a-z-]+", word) and word[0] != "-"]
    return " ".join(word for word in words[:5] if word not in ("compute", "tpus"))


# What gcloud says of its own doings on several workers, before and after what they say.
_CHATTER = re.compile(
    "#####|SSH: Attempting|Using (ssh|scp) batch size|Preparing (SSH|SCP) command|"
    "Finished preparing|Completed execution"
)


def _last_error(text: str) -> str:
    """gcloud's own error with what follows it, or the last lines of whatever else it wrote."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not _CHATTER.match(line)]
    errors = [number for number, line in enumerate(lines) if line.startswith("ERROR:")]
    last = lines[errors[-1] :][:4] if errors else lines[-2:]
    return re.sub(r"^ERROR: (\(gcloud[^)]*\) )?", "", " ".join(last))
