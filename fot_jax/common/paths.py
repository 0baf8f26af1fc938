"""Paths that users give: of this machine, or gs:// ones of Google Cloud Storage."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator

import fsspec
from etils import epath

from fot_jax.common.errors import UserError

for _scheme in ("gs", "gcs"):  # imported when first used
    fsspec.register_implementation(_scheme, "fot_jax.common.buckets.Buckets", clobber=True)


def path_of(text: epath.PathLike) -> epath.Path:
    """The path as it was given.

    Raises:
      UserError: it is of another kind, or empty.
    """
    scheme = re.match(r"(\w+)://", str(text))
    if not str(text) or "\0" in str(text) or scheme and not re.match("gs://[^/]", str(text)):
        raise UserError(f"{text!r} is no path: give one of this machine, or gs://BUCKET/...")
    if scheme and (odd := re.search(r"[][*?\r\n]", str(text))):
        # Libraries take them for patterns, and would remove what they match.
        raise UserError(f"{text!r}: {odd[0]!r} in a gs:// path: give one without it")
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


def write(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file that has either all of it or what it had before.

    Raises:
      OSError: it cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    path = epath.Path(path)
    if in_bucket(path):  # where files are like that
        path.write_bytes(content)
    else:
        whole = path.parent / f"{path.name}.partial"
        whole.write_bytes(content)
        whole.replace(path)


@contextlib.contextmanager
def written_here(directory: epath.PathLike) -> Iterator[str]:
    """A directory on this machine for what cannot write into buckets, copied there at the end."""
    if not in_bucket(directory):
        yield str(directory)
        return
    with tempfile.TemporaryDirectory() as here:
        yield here
        fsspec.filesystem("gs").put(f"{here}/", f"{directory}/", recursive=True)


@contextlib.contextmanager
def google_errors(directory: epath.PathLike) -> Iterator[None]:
    """What Google's libraries raise in here, which others ask about a bucket, are OSErrors."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("google.auth.", "google.api_core.")):
            raise
        from fot_jax.common.buckets import of_a_disk

        bucket = str(directory).removeprefix("gs://").split("/")[0]
        raise of_a_disk(error, f"/b/{bucket}") from error


class Growing:
    """A file to write on in a bucket, where an object can only be replaced.

    What is new is sent as an object of its own, and the bucket asked to make one of the two.
    """

    def __init__(self, path: epath.PathLike, seconds: float = 10.0):
        """Args: seconds from one sending to the next, or more, unless it is closed."""
        self._files, self._path = fsspec.filesystem("gs"), str(path)
        self._seconds, self._next = seconds, time.monotonic() + seconds
        self._new: list[bytes] = []
        # Of what is there: a request that is repeated for want of an answer does nothing.
        self._generation = self._size = 0
        if epath.Path(path).exists():
            self._look()

    def _look(self) -> None:
        found = self._files.info(self._path)
        self._generation, self._size = int(found["generation"]), int(found["size"])

    def write(self, content: bytes) -> int:
        self._new.append(content)
        return len(content)

    def flush(self) -> None:
        """Sends what is new, if it is time.

        Raises:
          OSError: it was not sent, and is kept for the next time.
        """
        if time.monotonic() >= self._next:
            self.send()

    def send(self) -> None:
        """Sends what is new. Raises OSError as `flush`."""
        if not self._new:
            return
        self._next = time.monotonic() + 6 * self._seconds  # if it fails
        content = b"".join(self._new)
        if self._size:
            self._append(content)
        else:
            self._files.pipe_file(self._path, content)
        self._look()
        self._new.clear()
        self._next = time.monotonic() + self._seconds

    def _append(self, content: bytes) -> None:
        bucket, name = self._path.removeprefix("gs://").split("/", 1)
        more = f"{os.path.dirname(name)}/appending"  # no name that TensorBoard looks for
        self._files.pipe_file(f"gs://{bucket}/{more}", content)
        try:
            self._files.call(
                *("POST", "b/{}/o/{}/compose", bucket, name),
                ifGenerationMatch=str(self._generation),
                json={"sourceObjects": [{"name": name}, {"name": more}]},
            )
        except FileExistsError:  # another generation
            before = self._size
            self._look()
            if self._size != before + len(content):
                raise OSError(errno.EBUSY, "another process writes it", self._path) from None
        self._files.rm_file(f"gs://{bucket}/{more}")

    def close(self) -> None:
        self.send()


def read_range(path: epath.PathLike, start: int, stop: int) -> bytes:
    """Bytes of a file in a bucket, of which nothing else is sent; fewer where it ends before."""
    try:
        return fsspec.filesystem("gs").cat_file(str(path), start=start, end=stop)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return b""


def is_file(path: epath.PathLike) -> bool:
    """Whether it is a file and no directory, device or the like."""
    if in_bucket(path):
        return epath.Path(path).is_file()
    return os.path.isfile(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root. (Path.absolute takes gs:// for a directory here.)"""
    return epath.Path(path) if in_bucket(path) else epath.Path(path).absolute()


def kvstore(path: epath.PathLike) -> dict[str, str]:
    """A directory as TensorStore names it."""
    if in_bucket(path):
        bucket, _, name = str(path).removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}
    return {"driver": "file", "path": f"{absolute(path)}/"}


@contextlib.contextmanager
def new_directory(directory: epath.PathLike, mark: str) -> Iterator[epath.Path]:
    """A directory to write into; when all is written it takes its name, in place of an older one.

    In a bucket names are changed one by one. There a reader goes by the mark.

    Args:
      mark: a file without which the directory is not taken for what it is.

    Raises:
      UserError: it cannot be written.
    """
    directory = epath.Path(directory)
    half = directory.parent / f"{directory.name}.half-written-{os.getpid()}-{uuid.uuid4().hex}"
    try:
        half.mkdir(parents=True)
        yield half
        if in_bucket(directory):
            (directory / mark).unlink(missing_ok=True)
            directory.rmtree(missing_ok=True)
            _rename_in_bucket(half, directory, mark)
            return
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


def _rename_in_bucket(source: epath.Path, target: epath.Path, mark: str) -> None:
    """Gives all files of a directory other names, the mark's last. Nothing is sent here or back."""
    files = fsspec.filesystem("gs")
    before, after = (str(path).removeprefix("gs://") for path in (source, target))
    names = [name.removeprefix(f"{before}/") for name in files.find(before)]
    for some in ([name for name in names if name != mark], [mark]):
        files.mv([f"{before}/{name}" for name in some], [f"{after}/{name}" for name in some])


def remove_half_written(directory: epath.PathLike) -> None:
    """Removes what this process has half-written there, when it cannot go on.

    Its threads may still be writing, until they find that the files are gone.
    """
    path = epath.Path(directory if in_bucket(directory) else os.path.realpath(directory))
    gone, deadline = 0, time.monotonic() + 10
    while gone < 3 and time.monotonic() < deadline:
        halves = list(path.parent.glob(f"{glob.escape(path.name)}.half-written-{os.getpid()}-*"))
        for half in halves:
            with contextlib.suppress(OSError):
                half.rmtree(missing_ok=True)
        gone = 0 if halves else gone + 1
        time.sleep(0.01)
