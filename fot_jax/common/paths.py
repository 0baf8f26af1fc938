"""Paths that users give: of this machine, or gs:// ones of Google Cloud Storage."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

import fsspec
from etils import epath

from fot_jax.common.errors import UserError

_FILESYSTEM = "fot_jax.common.bucket_filesystem.BucketFileSystem"  # imported when first used
for _scheme in ("gs", "gcs"):
    fsspec.register_implementation(_scheme, _FILESYSTEM, clobber=True)


def path_of(text: epath.PathLike) -> epath.Path:
    """The path as it was given.

    Raises:
      UserError: it is of another kind, or empty, or begins with ~.
    """
    scheme = re.match(r"(\w+)://", str(text))
    if not str(text) or "\0" in str(text) or scheme and not re.match("gs://[^/]", str(text)):
        raise UserError(f"{text!r} is no path: give one of this machine, or gs://BUCKET/...")
    if scheme and (odd := re.search(r"[][*?\r\n]", str(text))):
        # Libraries take them for patterns, and would remove what they match.
        raise UserError(f"{text!r}: {odd[0]!r} in a gs:// path: give one without it")
    if str(text).startswith("~"):  # a shell does so, but not within quotes
        raise UserError(f"{text}: ~ is not taken for your home directory here: give the whole path")
    return epath.Path(text)


def check_for_orbax(path: epath.PathLike) -> None:
    """Checks that checkpoints can be written there: Orbax looks for files by patterns.

    Raises:
      UserError: a character of the whole path would be taken for one.
    """
    there = str(path) if in_bucket(path) else os.path.realpath(path)
    if odd := re.search(r"[][*?\\\udc80-\udcff]", there):
        raise UserError(f"{path}: {odd[0]!a} in the path {there!a}: give one without it")


def in_bucket(path: epath.PathLike) -> bool:
    """Whether it is a gs:// path."""
    return str(path).startswith("gs://")


@contextlib.contextmanager
def google_errors(directory: epath.PathLike) -> Iterator[None]:
    """Turns what Google's libraries raise in the block into OSErrors that name the bucket.

    For code that uses these libraries directly, as Orbax does, and not this project's filesystem.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("google.auth.", "google.api_core.")):
            raise
        from fot_jax.common.bucket_filesystem import as_os_error

        bucket = str(directory).removeprefix("gs://").split("/")[0]
        raise as_os_error(error, f"/b/{bucket}") from error


def is_file(path: epath.PathLike) -> bool:
    """Whether it is a file and no directory, device or the like."""
    if in_bucket(path):
        return epath.Path(path).is_file()
    return os.path.isfile(path)


def size_of(path: epath.PathLike) -> int:
    """Bytes of a file.

    Of this machine without `epath`, which looks up the names of its owner and group and fails where
    they have none, as in containers.
    """
    return epath.Path(path).stat().length if in_bucket(path) else os.path.getsize(path)


_NOT_NOW = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}


def why_unavailable(error: BaseException) -> str | None:
    """Why files that may be whole are not given; None if the error is another."""
    if isinstance(error, OSError):
        whole = error.errno in _NOT_NOW or (
            in_bucket(str(error.filename)) and not isinstance(error, FileNotFoundError)
        )
        named = "" if error.filename is None else f"{error.filename}: "
        return f"{named}cannot be read: {error.strerror}" if whole else None
    refused = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    line = " ".join(str(error).split())[:300]
    return f"cannot be read: {line}" if line.startswith(refused) else None


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root. (Path.absolute takes gs:// for a directory here.)"""
    return epath.Path(path) if in_bucket(path) else epath.Path(path).absolute()


def real_path(path: epath.PathLike) -> epath.Path:
    """The path that links lead to. (epath's resolve() follows none.)"""
    return epath.Path(path if in_bucket(path) else os.path.realpath(path))


def kvstore(path: epath.PathLike) -> dict[str, str]:
    """A directory as TensorStore names it."""
    if in_bucket(path):
        bucket, _, name = str(path).removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}
    return {"driver": "file", "path": f"{absolute(path)}/"}
