"""One run at a time in a workdir: a second one would remove its saves and write among its metrics.

While a run goes on, its workdir has a file RUNNING that says whose it is. On a disk the run also
holds a lock on it (flock), which the system drops when the process ends, however it does. In a
bucket there are no locks: there the owner gives a sign of life every BEAT_SECONDS, and a run on
another machine takes over once it has seen none for LEASE_SECONDS; on the same machine it sees at
once that the process is no more.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from fot_jax.common.atomic import create_file
from fot_jax.common.errors import UserError
from fot_jax.common.paths import in_bucket, path_of

RUNNING = "running.json"
BEAT_SECONDS, LEASE_SECONDS = 15.0, 60.0


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
    """Keeps a workdir for this run. All processes of the run call it; the first holds it.

    Raises:
      UserError: another run is going on there, or nothing can be written.
    """
    path = str(path_of(workdir))
    taking = (_take_in_bucket if in_bucket(path) else _take_on_disk)(path)
    with contextlib.ExitStack() as stack:
        while True:
            said = ""
            if jax.process_index() == 0:
                try:
                    if (taken := _taken(taking)) is None:
                        said = _WAITING
                    else:
                        stack.enter_context(taken)
                except UserError as error:
                    said = str(error)
                except OSError as error:
                    why = error.strerror or str(error)
                    said = f"{workdir}: cannot be written ({why}): choose another workdir"
            # While the first one waits, the others hear of it, or they would take it for gone.
            said = _said_by_the_first(said)
            if said != _WAITING:
                break
        if said:
            raise UserError(said)
        yield


_WAITING = "waiting"
# Goes on while it waits for another run to show whether it lives; ends with what has the workdir.
_Taking = Generator[None, None, contextlib.AbstractContextManager[None]]


def _taken(taking: _Taking) -> contextlib.AbstractContextManager[None] | None:
    try:
        return next(taking)
    except StopIteration as end:
        return end.value


def _said_by_the_first(line: str) -> str:
    """The line of process 0, on all."""
    if jax.process_count() == 1:
        return line
    content = np.zeros(2048, np.uint8)
    said = np.frombuffer(line.encode()[: content.size], np.uint8)
    content[: said.size] = said
    content = multihost_utils.broadcast_one_to_all(content)
    return bytes(content).rstrip(b"\0").decode(errors="replace")


# --- Who ----------------------------------------------------------------------------------------


def _me() -> dict[str, Any]:
    """This process, so that it is known again, and seen to have ended, on the same machine."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": _machine(),
        "began": _began(os.getpid()),
        "token": uuid.uuid4().hex,
    }


def _machine() -> str | None:
    """Of those that share their process numbers: a boot of a system, and a container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _began(pid: int) -> str | None:
    """When a process of this machine began, in ticks; None: there is none, or it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, IndexError, ValueError):
        return None


def _lives_here(owner: dict[str, Any]) -> bool | None:
    """Whether a process goes on; None: it is not of this machine."""
    if owner.get("machine") is None or owner["machine"] != _machine():
        return None
    return _began(owner.get("pid")) == owner.get("began") is not None


def _owner(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {}


def _refused(workdir: str, owner: dict[str, Any]) -> UserError:
    by = "another process"
    if "pid" in owner:
        by = f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')}"
    return UserError(
        f"{workdir}: a run is going on there ({by}): wait for its end, stop it, or choose another "
        "workdir"
    )


# --- Disks ---------------------------------------------------------------------------------------


def _take_on_disk(workdir: str) -> _Taking:
    yield from ()  # there is nothing to wait for
    return _on_disk(workdir)


@contextlib.contextmanager
def _on_disk(workdir: str) -> Iterator[None]:
    made = _make(workdir)
    path = os.path.join(workdir, RUNNING)
    try:
        file = _locked(workdir, path)
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_me()).encode(), 0)
            yield
        finally:
            if _is_of(path, file):  # the workdir may have been moved, and another run begun
                os.unlink(path)
            os.close(file)
    finally:
        for directory in made:  # where nothing was written
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def _is_of(path: str, file: int) -> bool:
    """Whether a name is that of an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except OSError:
        return False


def _make(directory: str) -> list[str]:
    """Makes a directory; returns those that were not there, the deepest first."""
    made = []
    while not os.path.isdir(directory) and os.path.dirname(directory) != directory:
        made.append(directory)
        directory = os.path.dirname(os.path.abspath(directory))
    if made:
        os.makedirs(made[0], exist_ok=True)
    return made


def _locked(workdir: str, path: str) -> int:
    """A descriptor of the file, which is locked and has its name still."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # less what the umask takes
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one that held it may have removed it in between, and another made a new one.
            if _is_of(path, file):
                return file
        except BlockingIOError:
            owner = _owner(os.pread(file, 4096, 0))
            os.close(file)
            raise _refused(workdir, owner) from None
        except OSError as error:  # a file system without locks
            logging.warning("%s: cannot be locked (%s): start no second run", path, error.strerror)
            return file
        os.close(file)


# --- Buckets -------------------------------------------------------------------------------------


def _take_in_bucket(workdir: str) -> _Taking:
    path, me = f"{workdir.rstrip('/')}/{RUNNING}", _me()
    while True:
        made = False
        with contextlib.suppress(FileExistsError):
            create_file(path, json.dumps(me).encode())
            made = True
        try:
            found = _read(path)
        except OSError:
            if made:
                with contextlib.suppress(OSError):
                    fsspec.filesystem("gs").rm_file(path)
            raise
        if found is None:  # removed in between
            continue
        owner, generation, _ = found
        if owner.get("token") == me["token"]:
            return _in_bucket(workdir, path, generation)
        lives = _lives_here(owner)
        if lives is None:
            lives = yield from _gives_signs(workdir, path, found)
        if lives:
            raise _refused(workdir, owner)
        logging.warning("%s: its run (%s) is no more: going on", workdir, owner.get("host"))
        _remove(path, generation)


@contextlib.contextmanager
def _in_bucket(workdir: str, path: str, generation: str) -> Iterator[None]:
    ended = threading.Event()
    try:
        _beat(path, generation, 0)  # without the right to, others would take this run for dead
        beats = threading.Thread(
            target=_keep_beating, args=(workdir, path, generation, ended), daemon=True
        )
        beats.start()
        yield
        ended.set()
        beats.join()
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            _remove(path, generation)


def _read(path: str) -> tuple[dict[str, Any], str, str] | None:
    """Whose it is, its generation, and its last sign of life."""
    files = fsspec.filesystem("gs")
    try:
        info = files.info(path)
        content = files.cat_file(path)
    except FileNotFoundError:
        return None
    return _owner(content), str(info["generation"]), (info.get("metadata") or {}).get("beat", "")


def _gives_signs(
    workdir: str, path: str, found: tuple[dict[str, Any], str, str]
) -> Generator[None, None, bool]:
    """Whether the owner, of another machine, is seen to live within the lease."""
    host = found[0].get("host", "another machine")
    logging.warning(
        "%s: a run on %s has it; if it gives no sign of life for %.0f s, this one goes on",
        workdir,
        host,
        LEASE_SECONDS,
    )
    deadline = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1.0)
        yield
        if (now := _read(path)) != found:
            return now is not None and now[1] == found[1]
    return False


def _keep_beating(workdir: str, path: str, generation: str, ended: threading.Event) -> None:
    """Gives signs of life until the run has ended, or ends it where another one has taken over."""
    count = 0
    while not ended.wait(BEAT_SECONDS):
        count += 1
        with contextlib.suppress(
            OSError
        ):  # the network: there is time until LEASE_SECONDS are over
            found = _read(path)
            if found is None or found[1] != generation:
                print(
                    f"fot: error: {workdir}: another run has taken over, as this one gave no sign "
                    f"of life for {LEASE_SECONDS:.0f} s: stopped, and nothing more is saved",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)
            _beat(path, generation, count)


def _beat(path: str, generation: str, count: int) -> None:
    bucket, name = path.removeprefix("gs://").split("/", 1)
    fsspec.filesystem("gs").call(
        "PATCH",
        "b/{}/o/{}",
        bucket,
        name,
        ifGenerationMatch=generation,
        json={"metadata": {"beat": str(count)}},
    )


def _remove(path: str, generation: str) -> None:
    """Removes that very object, if it is still there."""
    bucket, name = path.removeprefix("gs://").split("/", 1)
    found = _read(path)
    if found is not None and found[1] == generation:
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # changed in between
            fsspec.filesystem("gs").call(
                "DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=generation
            )
