"""What runs on a TPU VM host over ssh: makes its environment, starts a run, reports on it.

Hosts are "workers" to Google Cloud, and in what is printed. They run this file with the python3
they came with, which is older than what training needs: it uses nothing but the standard library
of Python 3.8. Each verb prints one line, ANSWER and a JSON object, short enough to be written at
once: ssh to all hosts mixes what they print, and this way not within a line.

In the home directory of a host:

    fot/code/DIGEST/      the code, and the archive that it came in
    fot/venv/DIGEST/      an environment; `whole` in it was written last
    fot/runs/NAME/        log, pid, what was asked for, the state.json of `python -m tpu worker`
    fot/cache/            compiled programs
    fot/on_worker.py      this file, under the name that it has had on pods set up before
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ANSWER = "fot_answer "
INSTALLED_AS = "on_worker.py"  # in FOT; pods that are set up already have it
FOT = Path.home() / "fot"
PYTHON = "3.11"  # the version that .ci/constraints.txt was tested with
LONGEST_ANSWER = 4000  # bytes: pipes take up to 4096 at once
ENDS = ("finished", "stopped", "failed")  # states in which nothing changes any more
STARTED = "--- started "  # begins what a run adds to the log


def main() -> None:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(required=True)
    setup_ = verbs.add_parser("setup")
    setup_.add_argument("code")
    setup_.set_defaults(run=lambda args: setup(args.code))
    start_ = verbs.add_parser("start")
    start_.add_argument("name")
    start_.add_argument("code")
    start_.add_argument("--env", action="append", default=[])
    start_.add_argument("--asked", default="", help="tells runs of one name from each other")
    start_.add_argument("arguments", nargs="+", help="of python -m fot_jax, after --")
    start_.set_defaults(
        run=lambda args: start(args.name, args.code, args.env, args.arguments, args.asked)
    )
    status_ = verbs.add_parser("status")
    status_.add_argument("name")
    status_.set_defaults(run=lambda args: status(args.name))
    logs_ = verbs.add_parser("logs")
    logs_.add_argument("name")
    logs_.add_argument("lines", type=int)
    logs_.add_argument("--follow", action="store_true")
    logs_.set_defaults(run=lambda args: logs(args.name, args.lines, args.follow))
    args = parser.parse_args()
    args.run(args)


def answer(**what) -> None:
    """Prints the answer of this worker."""
    what = {"worker": _index(), "host": socket.gethostname(), **what}
    while True:
        line = (ANSWER + json.dumps(what, ensure_ascii=False) + "\n").encode(errors="replace")
        if len(line) <= LONGEST_ANSWER:
            break
        longest = max(what, key=lambda key: len(str(what[key])))
        what[longest] = str(what[longest])[-len(str(what[longest])) * 3 // 4 :]
    os.write(1, line)


# --- setup ---------------------------------------------------------------------------------------


def setup(digest: str) -> None:
    """Makes the environment that the code asks for, unless it is there."""
    code = FOT / "code" / digest
    with _locked(FOT / "setup.lock"):
        try:
            _make_environment(code, _environment(code))
        except subprocess.CalledProcessError as error:
            last = " ".join(error.stdout.strip().splitlines()[-3:])
            answer(state="failed", why=f"{' '.join(map(str, error.cmd[:3]))}: {last}")
            return
        except OSError as error:
            answer(state="failed", why=str(error))
            return
        half = FOT / f"{INSTALLED_AS}.half-written"
        shutil.copyfile(__file__, half)
        half.rename(FOT / INSTALLED_AS)
    answer(state="ready")


def _environment(code: Path) -> Path:
    """Where the environment of this code is: named by all that it is made of."""
    made_of = hashlib.sha256(PYTHON.encode())
    for name in ("setup.cfg", ".ci/constraints.txt"):
        made_of.update((code / name).read_bytes())
    return FOT / "venv" / made_of.hexdigest()[:16]


def _make_environment(code: Path, environment: Path) -> None:
    """By uv, which finds the right Python or brings one.

    Images for v5e and later have Python 3.10 only; getting another from the system's packages needs
    a foreign archive and waits for locks that a freshly started machine holds for minutes.
    """
    if (environment / "whole").exists():
        return
    shutil.rmtree(environment, ignore_errors=True)
    uv = _uv()
    _output(uv, "venv", "--python", PYTHON, environment)
    # Of the package its dependencies only: the code of a run is what it is started in.
    install = [uv, "pip", "install", "--python", environment / "bin" / "python"]
    constraints = code / ".ci" / "constraints.txt"
    _output(*install, "-r", code / "setup.cfg", "--extra", "tpu", "-c", constraints)
    (environment / "whole").touch()


def _uv() -> str:
    here = FOT / "uv"
    found = shutil.which("uv") or shutil.which("uv", path=str(here / "bin"))
    if found is None:
        _output(sys.executable, "-m", "pip", "install", "--quiet", "--target", here, "uv")
    return found or str(here / "bin" / "uv")


def _output(*argv) -> str:
    argv = [str(word) for word in argv]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.run(argv, check=True, errors="replace", **both).stdout


# --- start ---------------------------------------------------------------------------------------


def start(name: str, digest: str, assignments: list[str], arguments: list[str], asked: str) -> None:
    """Starts a run that goes on when the connection ends, unless one of this name is going on."""
    code, run = FOT / "code" / digest, FOT / "runs" / name
    if not (code.exists() and (_environment(code) / "whole").exists()):
        answer(state="failed", why=f"code {digest} is not set up here: python -m tpu setup ...")
        return
    run.mkdir(parents=True, exist_ok=True)
    with _locked(run / "lock"):
        if _going_on(run):
            answer(state="going on")
            return
        with contextlib.suppress(FileNotFoundError):
            (run / "state.json").unlink()  # of the run before
        python = str(_environment(code) / "bin" / "python")
        ours = {"PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": str(FOT / "cache")}
        given = dict(each.split("=", 1) for each in assignments)
        with open(run / "log", "ab") as log:
            log.write(f"{STARTED}{time.strftime('%Y-%m-%d %H:%M:%S')} code {digest}\n".encode())
            log.flush()
            # As nohup: it goes on, whatever hangs up on those that the connection has started.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            supervisor = [python, "-m", "tpu", "worker", "--run_dir", str(run), "--"]
            child = subprocess.Popen(
                supervisor + [python, "-m", "fot_jax"] + arguments,
                cwd=code,
                env={**os.environ, **ours, **given},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        (run / "asked").write_text(asked)
        (run / "pid").write_text(str(child.pid))
    answer(state="started")


def _going_on(run: Path) -> bool:
    """Whether the process of a run is alive; another may have got its number since."""
    with contextlib.suppress(OSError):
        pid = (run / "pid").read_text()
        words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
        return b"--run_dir" in words and os.fsencode(str(run)) in words
    return False


# --- status and logs -----------------------------------------------------------------------------


def status(name: str) -> None:
    """Reports the state of the run: one of state.json, or one of

    none (never started), starting, lost (it is gone and has not said why).
    """
    run = FOT / "runs" / name
    if not (run / "pid").exists():
        answer(state="none")
        return
    going_on = _going_on(
        run
    )  # looked at first: when it is gone, it has written what it writes at its end
    try:
        told = json.loads((run / "state.json").read_text())
    except (OSError, ValueError):
        told = {}
    if not told and not going_on:
        told = {"state": "failed", "why": "ended before it could count the workers"}
        told["ended"] = os.path.getmtime(run / "log")
    state = told.get("state", "starting")
    if going_on and state in ENDS:
        state = "running"  # until its process is gone and another can be started
    if not going_on and state not in ENDS:
        state = "lost"
    log = _end_of_log(run)
    shown = {key: told.get(key) for key in ("code", "why", "failed", "started", "ended")}
    shown["last"] = next((line for line in reversed(log) if line.strip()), "")[:200]
    shown["worker"] = _index(run)
    with contextlib.suppress(OSError):  # there since fot_jax 0.2
        shown["asked"] = (run / "asked").read_text()
    if state in ("failed", "lost"):
        shown["traceback"] = "\n".join(_first_traceback(log))
    answer(**shown, state=state)


def logs(name: str, lines: int, follow: bool) -> None:
    """Prints the end of the log, this worker's index before every line.

    Args:
      follow: go on with what comes, until the connection ends.
    """
    run, parent = FOT / "runs" / name, os.getppid()
    prefix = f"[worker {_index(run)}] "
    if not (run / "log").exists():
        print(f"{prefix}has no log of {name}")
        return
    with open(run / "log", encoding="utf-8", errors="replace") as log:
        for line in collections.deque(log, lines):
            print(prefix + line.rstrip("\n"), flush=True)
        part = ""
        while follow and os.getppid() == parent:
            part += log.readline()
            if part.endswith("\n"):
                print(prefix + part, end="", flush=True)
                part = ""
            else:
                time.sleep(0.5)


def _end_of_log(run: Path) -> list[str]:
    """Lines of the last run, of its last megabyte."""
    with contextlib.suppress(OSError), open(run / "log", "rb") as log:
        log.seek(max(0, os.path.getsize(run / "log") - 2**20))
        lines = log.read().decode("utf-8", "replace").splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith(STARTED)]
        return lines[starts[-1] + 1 if starts else 0 :]
    return []


def _first_traceback(log: list[str]) -> list[str]:
    """The first traceback with a few lines after it; the last lines where there is none."""
    for number, line in enumerate(log):
        if "Traceback (most recent call last)" in line:
            ends = (at for at in range(number + 1, len(log)) if re.match(r"\S", log[at]))
            return log[number : next(ends, number + 40) + 3]
    return log[-15:]


def _index(run: Path | None = None) -> int | None:
    """Of this worker: among all, if the run has counted them; in its slice; None: not known."""
    if run is not None and (run / "state.json").exists():
        return json.loads((run / "state.json").read_text())["worker"]
    name = re.search(r"-w-(\d+)$", socket.gethostname())  # of a TPU's virtual machine
    index = os.environ.get("FOT_WORKER") or (name and name.group(1))
    return None if index is None else int(index)


@contextlib.contextmanager
def _locked(path: Path):
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
