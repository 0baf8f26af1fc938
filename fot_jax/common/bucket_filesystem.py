"""The file system of Google Cloud Storage: gcsfs, changed to behave as a disk does.

paths.py registers it with fsspec, which imports it when the first gs:// path is opened.
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

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises, with a traceback

_LOGIN = "log in (gcloud auth application-default login)"
_ROLES = "grant roles/storage.objectUser and roles/storage.legacyBucketReader on the bucket"


class BucketFileSystem(GCSFileSystem):
    """As gcsfs, except that:

    - listings are not cached, as other processes may change them;
    - every failed request is an OSError with errno and a file name, and a refused one is not taken
      for a file or directory that does not exist;
    - no bucket is created or removed.
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
        """Does nothing: a directory is a common prefix of names of objects."""

    async def _rmdir(self, path: str) -> None:
        """Does nothing, likewise."""

    async def _delete_files(self, files: list[str], batchsize: int) -> list[Any]:
        removed = await super()._delete_files(files, batchsize)
        # Answers to a batch of requests, of which some may be refused.
        return [
            PermissionError(errno.EACCES, f"not allowed ({x}): {_ROLES}", f"gs://{files[0]}")
            if isinstance(x, OSError) and re.search(r'"code": ?403|: 403$', str(x))
            else x
            for x in removed
        ]

    mkdir, rmdir = sync_wrapper(_mkdir), sync_wrapper(_rmdir)


def as_os_error(error: Exception, url: str) -> OSError:
    """The error a disk would give, for one that gcsfs or Google's libraries raise.

    Args:
      url: of the request.
    """
    target = re.search("/b/([^/?]+)(?:/o/([^/?]+))?", url)  # a bucket, and a name in it
    name = target and target[2]
    path = "gs://" + "/".join(map(unquote, filter(None, target.groups() if target else ())))
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
        said = re.sub(r"^(Forbidden: \S+|[A-Z]+ \S+:) ", "", said)  # the request
        return PermissionError(errno.EACCES, f"not allowed ({said}): {_ROLES}", path)
    if code in (416, "416"):
        return OSError(errno.EINVAL, "it ends before that", path)
    if isinstance(error, OSError) and error.errno:
        return error
    return OSError(errno.EIO, f"Google Cloud Storage failed ({said or type(error).__name__})", path)
