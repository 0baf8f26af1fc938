"""Operations that objects in a bucket lack: appending, reading a range, use by local programs."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Iterator

import fsspec
from etils import epath

from fot_jax.common.paths import in_bucket


@contextlib.contextmanager
def staged_directory(directory: epath.PathLike) -> Iterator[str]:
    """A local directory for programs that cannot write to a bucket, copied to it at the end."""
    if not in_bucket(directory):
        yield str(directory)
        return
    with tempfile.TemporaryDirectory() as here:
        yield here
        fsspec.filesystem("gs").put(f"{here}/", f"{directory}/", recursive=True)


class AppendableFile:
    """A file in a bucket to append to, where an object can only be replaced.

    New content is sent as an object of its own, and the bucket is asked to join the two.
    """

    def __init__(self, path: epath.PathLike, seconds: float = 10.0):
        """Args: seconds: at least so many pass between two sends, but for `send` and `close`."""
        self._files, self._path = fsspec.filesystem("gs"), str(path)
        self._seconds, self._next = seconds, time.monotonic() + seconds
        self._new: list[bytes] = []
        # Of the object there: a request repeated because its answer was lost then does nothing.
        self._generation = self._size = 0
        # Appended, if an answer has been lost: so many of _new, to so many bytes in all.
        self._unsure: tuple[int, int] | None = None
        if epath.Path(path).exists():
            self._stat()

    def _stat(self) -> None:
        found = self._files.info(self._path)
        self._generation, self._size = int(found["generation"]), int(found["size"])

    def write(self, content: bytes) -> int:
        self._new.append(content)
        return len(content)

    def flush(self) -> None:
        """Sends new content if it is time to.

        Raises:
          OSError: it was not sent; it is kept for the next time.
        """
        if time.monotonic() >= self._next:
            self.send()

    def send(self) -> None:
        """Sends new content now. Raises OSError as `flush` does."""
        if not self._new:
            return
        self._next = time.monotonic() + 6 * self._seconds  # if it fails
        if self._unsure is not None:
            self._look()
        if self._size and self._new:
            self._append(b"".join(self._new))
        elif self._new:
            self._files.pipe_file(self._path, b"".join(self._new))
            self._stat()
            self._new.clear()
        self._next = time.monotonic() + self._seconds

    def _look(self) -> None:
        """Takes in what has become of appending, whose answer may have been lost."""
        before, (count, size) = self._size, self._unsure
        self._stat()
        self._unsure = None
        if self._size == size:
            del self._new[:count]
        elif self._size != before:
            raise OSError(errno.EBUSY, "another process writes it", self._path)

    def _append(self, content: bytes) -> None:
        bucket, name = self._path.removeprefix("gs://").split("/", 1)
        appended = f"{os.path.dirname(name)}/appending"  # no name that TensorBoard looks for
        self._files.pipe_file(f"gs://{bucket}/{appended}", content)
        self._unsure = len(self._new), self._size + len(content)
        with contextlib.suppress(FileExistsError):  # another generation: ours, if it was repeated
            self._files.call(
                "POST",
                "b/{}/o/{}/compose",
                bucket,
                name,
                ifGenerationMatch=str(self._generation),
                json={"sourceObjects": [{"name": name}, {"name": appended}]},
            )
        self._look()
        with contextlib.suppress(OSError):  # the next one replaces it
            self._files.rm_file(f"gs://{bucket}/{appended}")

    def close(self) -> None:
        self.send()


def read_range(path: epath.PathLike, start: int, stop: int) -> bytes:
    """Bytes start … stop - 1 of a file in a bucket; fewer where the file is shorter."""
    try:
        return fsspec.filesystem("gs").cat_file(str(path), start=start, end=stop)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return b""
