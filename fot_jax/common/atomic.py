"""Files and directories that are written whole or not at all, on a disk or in a bucket."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
from etils import epath

from fot_jax.common.errors import UserError
from fot_jax.common.paths import in_bucket

# --- Files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Gives the path to write a file to, which takes the place of `path` when it is whole.

    If nothing is written, `path` stays as it was. Where it is a link, what it leads to is replaced;
    a file keeps its mode.
    """
    path = epath.Path(path)
    if in_bucket(path):  # where an object appears when all of it has been sent
        yield path
        return
    path = _led_to(path)
    partial = path.parent / f"{path.name}.partial"
    with contextlib.suppress(OSError):  # of a process that was killed
        os.unlink(partial)
    try:
        yield partial
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # of a full disk
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    if partial.exists():
        try:
            if path.exists():
                shutil.copymode(path, partial)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink()
            raise OSError(error.errno, error.strerror, str(path)) from error


def _led_to(path: epath.Path) -> epath.Path:
    """What a link leads to; any other path as it is, and a link to where nothing can be."""
    there = os.path.realpath(path)
    leads = os.path.islink(path) and os.path.isdir(os.path.dirname(there))
    return epath.Path(there) if leads else path


def write_file(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file, which has either its old content or all of the new.

    Raises:
      OSError: it cannot be written.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: epath.PathLike, content: Any) -> None:
    """Writes lists, dictionaries and what they hold as JSON: null for numbers that are not finite.

    Raises:
      OSError: as of write_file.
    """

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: plain(value) for name, value in x.items()}
        if isinstance(x, list | tuple):
            return [plain(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    write_file(path, json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


def create_file(path: epath.PathLike, content: bytes) -> None:
    """Writes a file that does not exist yet; of several callers at once, one succeeds.

    Raises:
      FileExistsError: it exists. In a bucket it may be the caller's own: an answer may be lost and
        the request repeated. Compare the content.
      OSError: it cannot be written.
    """
    if in_bucket(path):
        fsspec.filesystem("gs").pipe_file(str(path), content, mode="create")
    else:
        with open(path, "xb") as file:
            file.write(content)


# --- Directories ---------------------------------------------------------------------------------

_half_written: set[epath.Path] = set()  # by this process, now


@contextlib.contextmanager
def new_directory(directory: epath.PathLike, mark: str) -> Iterator[epath.Path]:
    """Gives a temporary directory to write into, which takes the place of `directory` at the end.

    If the block raises, what was written is removed and an older directory stays as it was. Where
    it is a link, what that leads to is replaced. In a bucket files are renamed one by one, `mark`
    last; once an older directory is removed, what was written stays whatever happens.

    Args:
      mark: the file by which readers recognise the directory.

    Raises:
      UserError: it cannot be written.
    """
    directory = epath.Path(directory)
    if not in_bucket(directory):
        directory = _led_to(directory)
    half = directory.parent / f"{directory.name}.half-written-{os.getpid()}-{uuid.uuid4().hex}"
    _half_written.add(half)
    only_copy = begun = False  # of what is written; whether it takes the other's place
    try:
        half.mkdir(parents=True)
        yield half
        if in_bucket(directory):
            only_copy = True
            _half_written.discard(half)
            (directory / mark).unlink(missing_ok=True)
            begun = True
            directory.rmtree(missing_ok=True)
            _rename_in_bucket(half, directory, mark)
            return
        older = half.with_name(half.name.replace(".half-written-", ".replaced-"))
        if directory.exists():
            directory.rename(older)
        try:
            half.rename(directory)
        except OSError:
            if older.exists():
                older.rename(directory)
            raise
        older.rmtree(missing_ok=True)
    except BaseException as error:
        if not only_copy:
            with contextlib.suppress(OSError):
                half.rmtree(missing_ok=True)
        if isinstance(error, OSError):
            why = error.strerror or error  # NumPy's has no number
            rest = f": what is not there yet is in {half}: move it there" if begun else ""
            if only_copy and not begun:
                rest = f": an older one is as it was; the new one is whole in {half}"
            raise UserError(f"{directory}: cannot be written: {why}{rest}") from error
        raise
    finally:
        _half_written.discard(half)


def _rename_in_bucket(source: epath.Path, target: epath.Path, mark: str) -> None:
    """Renames all files of a directory within the bucket, the mark last."""
    files = fsspec.filesystem("gs")
    before, after = (str(path).removeprefix("gs://") for path in (source, target))
    names = [name.removeprefix(f"{before}/") for name in files.find(before)]
    for batch in ([name for name in names if name != mark], [mark]):
        files.mv([f"{before}/{name}" for name in batch], [f"{after}/{name}" for name in batch])


@contextlib.contextmanager
def scratch_directory(parent: epath.PathLike) -> Iterator[epath.Path]:
    """Gives a new directory of this machine, which is removed at the end with all that is in it.

    Raises:
      OSError: it cannot be made.
    """
    path = epath.Path(tempfile.mkdtemp(dir=parent, prefix="scratch-"))
    _half_written.add(path)
    try:
        yield path
    finally:
        # Over NFS files that are still mapped stay until they are not: no reason to fail.
        shutil.rmtree(path, ignore_errors=True)
        _half_written.discard(path)


def remove_half_written() -> None:
    """Removes what this process is writing in directories as above, as it is about to exit.

    Other threads may still write there until they find their files gone, so it looks repeatedly.
    """
    gone, deadline = 0, time.monotonic() + 10
    while gone < 3 and time.monotonic() < deadline:
        halves = [half for half in tuple(_half_written) if half.exists()]
        for half in halves:
            with contextlib.suppress(OSError):
                half.rmtree(missing_ok=True)
        gone = 0 if halves else gone + 1
        time.sleep(0.01)
