"""Paths that users give: of this machine, or gs:// ones of Google Cloud Storage."""

from __future__ import annotations

import re

from etils import epath

from fot_jax.errors import UserError


def path_of(text: epath.PathLike) -> epath.Path:
    """The path as it was given.

    Raises:
      UserError: it is of another kind, or empty.
    """
    scheme = re.match(r"(\w+)://", str(text))
    if not str(text) or "\0" in str(text) or scheme and scheme[1] != "gs":
        raise UserError(f"{text!r} is no path: give one of this machine, or gs://BUCKET/...")
    return epath.Path(text)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root. (Path.absolute takes gs:// for a directory here.)"""
    return epath.Path(path) if str(path).startswith("gs://") else epath.Path(path).absolute()
