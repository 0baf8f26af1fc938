"""Files in Google Cloud Storage: gcsfs, but like a disk where it is not.

paths.py tells fsspec of this, which imports it when the first gs:// path is opened.
"""

from __future__ import annotations

import errno
import logging
import re
from typing import Any
from urllib.parse import unquote

import google.auth.exceptions
from fsspec.asyn import sync_wrapper
from gcsfs.core import GCSFileSystem  # gcsfs.GCSFileSystem asks about each bucket by gRPC

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints what it raises, with a traceback

_LOGIN = "log in (gcloud auth application-default login)"
_ROLES = "grant roles/storage.objectUser and roles/storage.legacyBucketReader on the bucket"


class BucketFileSystem(GCSFileSystem):
    """As gcsfs, except that:

    - nothing is remembered of what other processes may change;
    - what is refused, or fails, is an OSError with a number and a file name, and does not pass for
      a file or directory that is not there;
    - no bucket is made or removed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "use_listings_cache": False})

    async def _request(self, method: str, path: str, *args: Any, **kwargs: Any):
        try:
            return await super()._request(method, path, *args, **kwargs)
        except Exception as error:
            raise as_os_error(error, self._format_path(path, args)) from error

    async def _isdir(self, path: str) -> bool:
        return await self._is("directory", path)

    async def _isfile(self, path: str) -> bool:
        return await self._is("file", path)

    async def _is(self, kind: str, path: str) -> bool:
        try:
            return (await self._info(path))["type"] == kind
        except FileNotFoundError:
            return False

    async def _mkdir(self, path: str, **kwargs: Any) -> None:
        """Does nothing: directories are what names of objects have in common."""

    async def _rmdir(self, path: str) -> None:
        """The same."""

    async def _delete_files(self, files: list[str], batchsize: int) -> list[Any]:
        removed = await super()._delete_files(files, batchsize)
        # What is refused of several that Google is asked for at once.
        return [
            PermissionError(errno.EACCES, f"not allowed ({x}): {_ROLES}", f"gs://{files[0]}")
            if isinstance(x, OSError) and re.search(r'"code": ?403|: 403$', str(x))
            else x
            for x in removed
        ]

    mkdir, rmdir = sync_wrapper(_mkdir), sync_wrapper(_rmdir)


def as_os_error(error: Exception, url: str) -> OSError:
    """What gcsfs raises, or Google's libraries do, as the error that a disk would give."""
    asked = re.search("/b/([^/?]+)(?:/o/([^/?]+))?", url)  # a bucket, and a name in it
    name = asked and asked[2]
    path = "gs://" + "/".join(map(unquote, filter(None, asked.groups() if asked else ())))
    said = " ".join(str(getattr(error, "message", None) or error).split())
    code = getattr(error, "code", None)
    if isinstance(error, FileNotFoundError) or code == 404:
        if not name:
            return OSError(errno.ENXIO, "there is no such bucket: correct the name", path)
        return FileNotFoundError(errno.ENOENT, "no such file", path)
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, "is there already", path)
    if isinstance(error, google.auth.exceptions.GoogleAuthError) or code in (401, "401"):
        return PermissionError(errno.EACCES, f"not allowed ({said}): {_LOGIN}", path)
    if code == 403 or type(error) is OSError and said.startswith("Forbidden: "):
        said = re.sub(r"^(Forbidden: \S+|[A-Z]+ \S+:) ", "", said)  # what was asked
        return PermissionError(errno.EACCES, f"not allowed ({said}): {_ROLES}", path)
    if code in (416, "416"):
        return OSError(errno.EINVAL, "it ends before that", path)
    if isinstance(error, OSError) and error.errno:
        return error
    return OSError(errno.EIO, f"Google Cloud Storage failed ({said or type(error).__name__})", path)
