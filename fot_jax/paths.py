"""Paths that users give: of this machine, or gs:// ones of Google Cloud Storage."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator

import fsspec
from etils import epath

from fot_jax.errors import UserError

for _scheme in ("gs", "gcs"):  # imported when first used
    fsspec.register_implementation(_scheme, "fot_jax.buckets.Buckets", clobber=True)


def path_of(text: epath.PathLike) -> epath.Path:
    """The path as it was given.

    Raises:
      UserError: it is of another kind, or empty.
    """
    scheme = re.match(r"(\w+)://", str(text))
    if not str(text) or "\0" in str(text) or scheme and scheme[1] != "gs":
        raise UserError(f"{text!r} is no path: give one of this machine, or gs://BUCKET/...")
    return epath.Path(text)


def in_bucket(path: epath.PathLike) -> bool:
    """Whether it is a gs:// path."""
    return str(path).startswith("gs://")


def create(path: epath.PathLike, content: bytes) -> None:
    """Writes a new file, if there is none yet: of several that try at once, one succeeds.

    Raises:
      FileExistsError: there is one. In a bucket it may be the caller's own: an answer may be lost
        and the request repeated. Compare the content.
      OSError: it cannot be written.
    """
    if in_bucket(path):
        fsspec.filesystem("gs").pipe_file(str(path), content, mode="create")
    else:
        with open(path, "xb") as file:
            file.write(content)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root. (Path.absolute takes gs:// for a directory here.)"""
    return epath.Path(path) if in_bucket(path) else epath.Path(path).absolute()


@contextlib.contextmanager
def new_directory(directory: epath.PathLike) -> Iterator[epath.Path]:
    """A directory to write into; when all is written it takes its name, in place of an older one.

    Raises:
      UserError: it cannot be written.
    """
    directory = epath.Path(directory)
    half = directory.parent / f"{directory.name}.half-written-{os.getpid()}-{uuid.uuid4().hex}"
    try:
        half.mkdir(parents=True)
        yield half
        older = half.with_name(half.name.replace(".half-written-", ".replaced-"))
        if directory.exists():
            directory.rename(older)
        half.rename(directory)
        older.rmtree(missing_ok=True)
    except BaseException as error:
        with contextlib.suppress(OSError):
            half.rmtree(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{directory}: cannot be written: {error.strerror}") from error
        raise


def remove_half_written(directory: epath.PathLike) -> None:
    """Removes what this process has half-written there, when it cannot go on.

    Its threads may still be writing, until they find that the files are gone.
    """
    path = epath.Path(os.path.realpath(directory))  # where a link leads
    gone, deadline = 0, time.monotonic() + 10
    while gone < 3 and time.monotonic() < deadline:
        halves = list(path.parent.glob(f"{glob.escape(path.name)}.half-written-{os.getpid()}-*"))
        for half in halves:
            shutil.rmtree(half, ignore_errors=True)
        gone = 0 if halves else gone + 1
        time.sleep(0.01)
