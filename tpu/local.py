"""`python -m tpu local`: a pod made of processes on this machine, for rehearsal and tests.

Each process is a worker as on the hosts of a pod, with CPU devices, and runs `fot train`, or after
`--` another verb with a memory that is sharded over all. Whatever happens to this one, none of them
lives on: the kernel kills workers, and what they run, when the process that started them ends.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fot_jax.common.errors import UserError
from fot_jax.common.stopping import stopping
from tpu.supervisor import STOPPED, dies_with_parent

GRACE_SECONDS = 15  # for workers to end on their own after one has failed
LINES_KEPT = 500  # of each worker's output, to show again those of a failure
LINES_SHOWN = 20  # of a failure without a traceback
VERBS = ("generate", "evaluate")  # of fot, beside train
TRACEBACK = "Traceback (most recent call last):"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the verb."""
    parser.add_argument(
        "experiment",
        nargs="+",
        help="gin files to train; later ones override earlier ones. Or, after --, generate or "
        "evaluate with all their flags",
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="workers")
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="of each worker")
    parser.add_argument("--workdir", metavar="DIR", help="of training")
    parser.add_argument(
        "--gin", action="append", default=[], metavar='"NAME = VALUE"', help="repeatable"
    )
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="after failures, at most: 0"
    )


def run(args: argparse.Namespace) -> int:
    """Runs several processes, their output line by line with the worker's number.

    Returns the exit code: 0 when done; 143 after a signal to stop, with the last step saved; 1
    after one failure more than there are restarts.

    Raises:
      UserError: a number that makes no sense.
    """
    for name, least in (("processes", 1), ("devices", 1), ("restarts", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: give {least} or more")
    if args.experiment[0] in VERBS:
        if args.workdir is not None or args.gin:
            raise UserError(
                f"--workdir and --gin are of training: give those of {args.experiment[0]} after --"
            )
    elif args.workdir is None:
        raise UserError("--workdir is missing: give the directory of the run")
    workers: list[_Worker] = []
    with _stop_signals(workers) as stopped:
        for attempt in range(args.restarts + 1):
            with tempfile.TemporaryDirectory(prefix="tpu_local_") as directory:
                _start(workers, args, Path(directory))
                if stopped():  # while they were started
                    _stop(workers)
                _wait(workers)
                failure = _first_failure(workers, stopped())
            if failure is None:
                return STOPPED if stopped() else max(_codes(workers))
            _show(*failure)
            if stopped():
                break
            if attempt < args.restarts:
                _say(f"tpu local: starting again, {attempt + 1} of {args.restarts} times")
    return 1


# --- Workers -------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Worker:
    """One of the processes.

    Attributes:
      process: the supervisor.
      run_dir: where it leaves its state.
      reader: passes on its output.
      lines: the last ones of it.
    """

    process: subprocess.Popen
    run_dir: Path
    reader: threading.Thread | None = None
    lines: collections.deque[str] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=LINES_KEPT)
    )


def _start(workers: list[_Worker], args: argparse.Namespace, directory: Path) -> None:
    """Puts newly started workers in the place of those in the list."""
    workers.clear()
    port = free_port()
    for index in range(args.processes):
        run_dir = directory / str(index)
        process = subprocess.Popen(
            _command(args, run_dir),
            env=_environment(args, index, port),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # ^C is for this process alone, to pass on
            preexec_fn=dies_with_parent(),
        )
        workers.append(_Worker(process, run_dir))
    printing = threading.Lock()
    for index, worker in enumerate(workers):  # no thread runs while processes are forked
        worker.reader = threading.Thread(
            target=_pass_on, args=(index, worker, printing), daemon=True
        )
        worker.reader.start()


def _command(args: argparse.Namespace, run_dir: Path) -> list[str]:
    words = args.experiment
    if words[0] not in VERBS:
        bindings = [word for binding in args.gin for word in ("--gin", binding)]
        words = ["train", *words, "--workdir", args.workdir, *bindings]
    worker = [sys.executable, "-m", "tpu", "worker", "--run_dir", str(run_dir), "--"]
    return [*worker, sys.executable, "-m", "fot_jax", *words]


def _environment(args: argparse.Namespace, index: int, port: int) -> dict[str, str]:
    devices = f"--xla_force_host_platform_device_count={args.devices}"
    return {
        **os.environ,
        "FOT_WORKERS": ",".join([f"127.0.0.1:{port}"] * args.processes),
        "FOT_WORKER": str(index),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip(),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """One with the next one free too, from a range that kernels take none of for connections."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", port))
            b.bind(("127.0.0.1", port + 1))
            return port


def _pass_on(index: int, worker: _Worker, printing: threading.Lock) -> None:
    """Prints whole lines of a worker as they come."""
    for line in worker.process.stdout:
        text = line.decode(errors="replace").rstrip("\n")
        worker.lines.append(text)
        # Where nobody reads any more, training goes on.
        with printing, contextlib.suppress(OSError):
            print(f"[worker {index}] {text}", flush=True)


def _wait(workers: list[_Worker]) -> None:
    """Returns when all have ended; after a failure those that do not are killed."""
    deadline = None
    while any(worker.process.poll() is None for worker in workers):
        if deadline is None and any(code not in (0, STOPPED) for code in _codes(workers)):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for worker in workers:
                worker.process.kill()
        time.sleep(0.05)
    for worker in workers:
        worker.reader.join(timeout=5)


def _codes(workers: list[_Worker]) -> list[int]:
    """Exit codes of those that have ended; 128 + signal where one was killed."""
    codes = [worker.process.returncode for worker in workers]
    return [128 - code if code < 0 else code for code in codes if code is not None]


# --- Signals -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stop_signals(workers: list[_Worker]) -> Iterator[Callable[[], bool]]:
    """Passes signals to stop on to workers; gives a function that says whether one came."""
    came: list[int] = []

    def handler(signum, frame):
        came.append(signum)
        _stop(workers)

    before = {each: signal.signal(each, handler) for each in stopping()}
    try:
        yield lambda: bool(came)
    finally:
        for each, of_each in before.items():
            signal.signal(each, of_each)


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.send_signal(signal.SIGTERM)


# --- Failures ------------------------------------------------------------------------------------


def _first_failure(workers: list[_Worker], stopped: bool) -> tuple[str, Iterable[str]] | None:
    """What became of the worker that failed first, and its last lines; None where none did."""
    for worker in workers:
        state = _state(worker)
        if state.get("failed") is not None:
            return state["why"], workers[state["failed"]].lines
    if stopped:  # some before others had met them
        return None
    for index, (worker, code) in enumerate(zip(workers, _codes(workers), strict=True)):
        if code not in (0, STOPPED):
            return f"worker {index} ended with exit code {code}", worker.lines
    return None


def _state(worker: _Worker) -> dict:
    with contextlib.suppress(FileNotFoundError):
        return json.loads((worker.run_dir / "state.json").read_text())
    return {}


def _show(why: str, lines: Iterable[str]) -> None:
    """Says which worker failed first, with its traceback."""
    lines = list(lines)
    starts = [i for i, line in enumerate(lines) if line == TRACEBACK]
    shown = lines[starts[-1] :] if starts else lines[-LINES_SHOWN:]
    _say("\n".join([f"tpu local: failed first: {why}", *(f"  {line}" for line in shown)]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
