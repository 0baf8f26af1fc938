"""Commands for the hosts of a pod, sent over ssh to all of them at once, and their answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import time

from fot_jax.common.errors import UserError
from tpu import gcloud, process
from tpu.gcloud import Argv, Pod
from tpu.host_agent import ANSWER, INSTALLED_AS
from tpu.ship import Code

_SCRIPT = f"~/fot/{INSTALLED_AS}"


def setup_commands(pod: Pod, code: Code) -> list[Argv]:
    """Ships the code and makes the environment. Again, they change nothing."""
    digest = code.digest  # hexadecimal
    half = f"{digest}.part"
    unpack = (
        f"cd ~/fot/code && {{ test -d {digest} || {{ rm -rf {half} && mkdir {half} && "
        f"tar -xzf {digest}.tar.gz -C {half} && mv -T {half} {digest}; }}; }}"
    )
    return [
        gcloud.ssh(pod, "mkdir -p ~/fot/code"),
        gcloud.scp(pod, str(code.path), f"fot/code/{digest}.tar.gz"),
        gcloud.ssh(pod, f"{unpack} && python3 {digest}/tpu/host_agent.py setup {digest}"),
    ]


def start_command(pod: Pod, code: Code, environment: list[str], arguments: list[str]) -> Argv:
    """Starts `fot ARGUMENTS` on every worker, detached."""
    given = [f"--env={assignment}" for assignment in environment]
    given.append(f"--asked={asked(code, environment, arguments)}")
    words = ["start", pod.name, code.digest, *given, "--", *arguments]
    return gcloud.ssh(pod, f"python3 {_SCRIPT} {shlex.join(words)}")


def asked(code: Code, environment: list[str], arguments: list[str]) -> str:
    """Tells runs of one name from each other that are not to do the same, whatever runs them."""
    what = [code.settings, environment, arguments]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def status_command(pod: Pod) -> Argv:
    """Asks every worker for its run."""
    none = shlex.quote(ANSWER + json.dumps({"worker": None, "host": "", "state": "none"}))
    return gcloud.ssh(
        pod, f"if test -e {_SCRIPT}; then python3 {_SCRIPT} status {pod.name}; else echo {none}; fi"
    )


def logs_command(pod: Pod, worker: str, lines: int, follow: bool) -> Argv:
    """Prints the ends of logs; workers take turns unless they are followed."""
    command = f"python3 {_SCRIPT} logs {pod.name} {lines}{' --follow' if follow else ''}"
    return gcloud.ssh(pod, command, worker, in_turn=not follow)


def set_up(pod: Pod, code: Code, expected: int) -> None:
    """Runs the commands of `setup_commands`.

    Raises:
      UserError: gcloud fails, or a worker says that it could not be done, or nothing.
    """
    make_directory, copy, make_environment = setup_commands(pod, code)
    code.save()
    process.call_with_retries(make_directory, process.SHORT)
    process.call_with_retries(copy, process.SHORT, everywhere=True)
    _all(ask(make_environment, expected), expected)


def start(command: Argv, expected: int) -> list[dict]:
    """Runs `start_command`; returns the answers.

    Raises:
      UserError: as `set_up`.
    """
    return _all(ask(command, expected, process.SHORT), expected)


def ask(command: Argv, expected: int, limit: float = process.LIMIT) -> list[dict]:
    """The answers of workers, in order; fewer than expected where some do not speak.

    (Where gcloud cannot prepare a node for ssh, it warns and goes on without.)

    Raises:
      UserError: gcloud fails, and nobody has answered.
    """
    for tries_left in reversed(range(process.TRIES)):
        try:
            answers = _answers(process.call(command, limit))
        except process.CallFailed as error:
            answers = _answers(error.out)
            if error.code != process.DROPPED or not (tries_left or answers):
                raise
        if len(answers) >= expected:
            break
        time.sleep(process.PAUSE if tries_left else 0)
    return sorted(answers, key=lambda each: (each["worker"] is None, each["worker"]))


def _answers(printed: str) -> list[dict]:
    lines = [line for line in printed.splitlines() if line.startswith(ANSWER)]
    answers = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a connection cut in the middle: it did not answer
            answer = json.loads(line[len(ANSWER) :])
            if isinstance(answer, dict) and {"worker", "host", "state"} <= answer.keys():
                answers.append(answer)
    return answers


def _all(answers: list[dict], expected: int) -> list[dict]:
    """The answers, if all are there and none of them is a failure."""
    for each in answers:
        if each["state"] == "failed":
            raise UserError(f"worker {each['worker']} ({each['host']}): {each['why']}")
    if len(answers) < expected:
        spoke = ", ".join(str(each["worker"]) for each in answers) or "none"
        raise UserError(
            f"{len(answers)} of {expected} workers answered ({spoke}): see python -m tpu status, "
            "and try again"
        )
    return answers
