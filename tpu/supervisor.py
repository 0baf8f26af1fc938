"""`python -m tpu worker`: runs a command on one host of several, and holds the hosts together.

Worker 0 listens, the others connect to it and stay connected. It counts them, starts all at the
same moment, hears how each one's command ended, and gives one verdict that all of them follow. The
command learns from FOT_COORDINATOR, FOT_PROCESSES and FOT_PROCESS_ID that it is one of several.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fot_jax.common.errors import UserError
from fot_jax.common.stopping import stopping
from fot_jax.training import cluster
from fot_jax.training.cluster import Place
from tpu import control

STOPPED = 128 + signal.SIGTERM  # the exit code of a command that saved and stopped
SILENT_SHARE = 1 / 30  # of --timeout: how long worker 0 waits for the last ones without a word


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a run ended, alike on all workers.

    Attributes:
      code: 0, or 143 where it was stopped and has saved; 1 after a failure.
      failed: the worker that failed first.
      why: what became of it.
    """

    code: int
    failed: int | None = None
    why: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the verb."""
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="for state.json")
    for flag, seconds, what in (
        ("--timeout", 300, "for all workers to get here, and to end after one has"),
        ("--silence", 30, "without a sign of life, after which a worker is lost"),
    ):
        parser.add_argument(
            flag, type=_seconds, default=seconds, metavar="SECONDS", help=f"{what}: {seconds}"
        )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --, with arguments")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r}: give a number of seconds above 0")


def run(args: argparse.Namespace) -> int:
    """Runs the command when all workers are here, and ends when all have ended or one has failed.

    Returns the exit code: 0 where all finished; 143 where they were stopped and saved; the
    command's own where this one failed first, 128 + signal if it was killed; 1 where another did.

    Raises:
      UserError: flags or surroundings make no sense, or workers are missing.
    """
    place = cluster.place()
    path = Path(args.run_dir) / "state.json"
    try:
        if not args.run_dir:
            raise FileNotFoundError
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run_dir {args.run_dir!r} is no directory, nor can it be one") from error
    state = {"state": "waiting", "code": None, "worker": place.index, "workers": len(place.hosts)}
    state |= {"pid": os.getpid(), "started": time.time(), "ended": None, "why": None}
    state["failed"] = None

    def note(**changes: Any) -> None:
        state.update(changes)
        _write(path, state)

    note()
    try:
        code, verdict = asyncio.run(_work(place, args, lambda: note(state="running")))
    except UserError as error:
        note(state="failed", code=2, why=str(error), ended=time.time())
        raise
    how = {0: "finished", STOPPED: "stopped"}.get(verdict.code, "failed")
    who = None if verdict.failed is None else control.name_of(place, verdict.failed)
    why = who and f"{who} {verdict.why}"
    note(state=how, code=code, why=why, failed=verdict.failed, ended=time.time())
    if why:
        so = "" if verdict.failed == place.index else "stopped because "
        print(f"tpu worker {place.index}: {so}{why}", file=sys.stderr, flush=True)
    return code


def _write(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(state))
    partial.replace(path)


# --- From the count to the verdict ---------------------------------------------------------------


async def _work(
    place: Place, args: argparse.Namespace, running: Callable[[], None]
) -> tuple[int, Verdict]:
    """One worker's life: its exit code, and the verdict."""
    events: control.Events = asyncio.Queue()
    links: control.Links = {}
    child: subprocess.Popen | None = None
    server: asyncio.Server | None = None
    stopped = False
    loop = asyncio.get_running_loop()

    async def meet() -> bool:
        """Whether all start."""
        nonlocal server
        if len(place.hosts) > 1 and place.index > 0:
            return await control.report(place, links, events, args.timeout, args.silence)
        if len(place.hosts) > 1:
            server = await control.count(place, links, events, args.timeout, args.silence)
        return True

    def stop() -> None:
        """Any of the signals asks the command to save and stop, as it does after SIGTERM."""
        nonlocal stopped
        stopped = True
        if child is None:
            meeting.cancel()
        else:
            child.send_signal(signal.SIGTERM)

    def look() -> None:
        """Tells, once, that the command has ended."""
        if child is not None and child.poll() is not None:
            if loop.remove_signal_handler(signal.SIGCHLD):
                _kill_group(child)
                events.put_nowait((place.index, {"ended": child.returncode}))

    meeting = asyncio.ensure_future(meet())
    for each in stopping():
        loop.add_signal_handler(each, stop)
    loop.add_signal_handler(signal.SIGCHLD, look)
    alive = asyncio.ensure_future(control.keep_alive(links, args.silence / 4))
    try:
        starts = False
        with contextlib.suppress(asyncio.CancelledError):
            starts = await meeting
        if stopped or not starts:
            control.send(links.values(), {"ended": STOPPED})  # the others may be starting
            return STOPPED, Verdict(STOPPED)
        child = _start(place, args.command)
        running()
        look()  # it may have ended before anyone looked
        if place.index == 0:
            verdict = await _judge(place, events, args.timeout)
            control.send(links.values(), {"verdict": dataclasses.asdict(verdict)})
        else:
            verdict = await _obey(place, links, events)
        return _exit_code(place, verdict, _kill(child)), verdict
    finally:
        alive.cancel()
        if child is not None:
            _kill(child)
        await control.hang_up(links)
        if server is not None:
            server.close()


def _exit_code(place: Place, verdict: Verdict, returncode: int) -> int:
    if verdict.failed is None:
        return verdict.code
    return (_code(returncode) or 1) if verdict.failed == place.index else 1


async def _judge(place: Place, events: control.Events, timeout: float) -> Verdict:
    """What worker 0 makes of all that happens."""
    codes: dict[int, int] = {}
    times: list[float] = []  # once one has ended: to say who is missing, and to give up
    while len(codes) < len(place.hosts):
        try:
            async with asyncio.timeout_at(times[0] if times else None):
                worker, message = await events.get()
        except TimeoutError:
            missing = sorted(set(range(len(place.hosts))) - set(codes))
            if len(times) == 1:
                why = f"did not end within {timeout:g} s after another one"
                return Verdict(1, missing[0], why)
            del times[0]
            names = ", ".join(control.name_of(place, each) for each in missing)
            so = f"another worker's command has ended; at most {timeout:g} s"
            print(f"tpu worker 0: waiting for {names}: {so}", file=sys.stderr, flush=True)
            continue
        if "lost" in message and worker not in codes:
            return Verdict(1, worker, message["lost"])
        if type(ended := message.get("ended")) is int:
            if _code(ended) not in (0, STOPPED):
                how = f"signal {-ended}" if ended < 0 else f"exit code {ended}"
                return Verdict(1, worker, f"ended with {how}")
            codes[worker] = _code(ended)
            if not times:
                now = asyncio.get_running_loop().time()
                times = [now + timeout * SILENT_SHARE, now + timeout]
    return Verdict(max(codes.values()))


async def _obey(place: Place, links: control.Links, events: control.Events) -> Verdict:
    """The verdict of worker 0, which is told how the command here ends."""
    while True:
        worker, message = await events.get()
        if worker == place.index:
            control.send(links.values(), message)
        elif "lost" in message:
            return Verdict(1, worker, message["lost"])
        elif "verdict" in message:
            try:
                return Verdict(**message["verdict"])
            except TypeError:
                return Verdict(1, worker, "sent what is no verdict")


# --- The command ---------------------------------------------------------------------------------


def _start(place: Place, command: list[str]) -> subprocess.Popen:
    """Starts the command in a process group of its own.

    It ignores SIGHUP: what hangs up on all processes of a session stops it by the signal from here.

    Raises:
      UserError: there is no such program.
    """
    names = ("FOT_COORDINATOR", "FOT_PROCESSES", "FOT_PROCESS_ID")
    environment = {name: x for name, x in os.environ.items() if name not in names}
    if len(place.hosts) > 1:
        coordinator = f"{place.hosts[0]}:{place.port + 1}"
        values = (coordinator, str(len(place.hosts)), str(place.index))
        environment |= dict(zip(names, values, strict=True))
    ends = dies_with_parent()

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        ends()

    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=prepare,
        )
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}: give a program after --") from error


def dies_with_parent() -> Callable[[], None]:
    """For a new process to call before it becomes a program: SIGKILL when its parent ends.

    Linux alone does this; elsewhere a process whose parent is killed lives on.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    parent, set_parent_death_signal = os.getpid(), 1

    def call() -> None:
        if prctl is not None:
            prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)

    return call


def _kill(child: subprocess.Popen) -> int:
    """Kills the command and all in its process group, unless it has ended; its return code."""
    if child.returncode is None:
        _kill_group(child)
    return child.wait()


def _kill_group(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _code(returncode: int) -> int:
    """The exit code that a shell gives to what subprocess calls -signal."""
    return 128 - returncode if returncode < 0 else returncode
