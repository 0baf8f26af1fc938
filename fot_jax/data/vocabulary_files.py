"""The directory of a saved vocabulary.

`vocabulary.json` says of what kind it is, with checksums; beside it are the tokenizer's own files,
from which it is made again. The kinds themselves are read by saved_vocabulary.py.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from etils import epath

from fot_jax.common import formats
from fot_jax.common.atomic import new_directory
from fot_jax.common.checksums import crc32_of_json
from fot_jax.common.errors import UserError

DESCRIPTION = "vocabulary.json"


def write_vocabulary(
    directory: epath.PathLike, description: dict[str, Any], files: dict[str, bytes] | None = None
) -> None:
    """Writes a vocabulary, whole or not at all; may replace an older one.

    Args:
      description: what vocabulary.json says: the kind, and what is not in the files.
      files: name and content of each file beside it.

    Raises:
      UserError: the directory cannot be written.
    """
    files = files or {}
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    with new_directory(directory, DESCRIPTION) as half:
        for name, content in files.items():
            (half / name).write_bytes(content)
        described = {**formats.VOCABULARY.number, **description, "sha256": checksums}
        sealed = {**described, "crc32": crc32_of_json(described, sort_keys=True)}
        (half / DESCRIPTION).write_text(json.dumps(sealed, indent=1))


def read_description(directory: epath.PathLike) -> dict[str, Any]:
    """What vocabulary.json says, when it and the files beside it are as they were written.

    Raises:
      UserError: nothing there, or damaged.
    """
    directory = epath.Path(directory)
    path = directory / DESCRIPTION
    if not path.exists():
        raise UserError(f"{directory}: no vocabulary here: there is no {DESCRIPTION}")
    description = read_json(path)
    if "crc32" in description:  # the first vocabularies of fot_jax 0.1 have none
        if description.pop("crc32") != crc32_of_json(description, sort_keys=True):
            raise UserError(f"{path}: damaged: it is not what was saved: restore it from a copy")
    formats.VOCABULARY.check(path, description)
    checksums = description.get("sha256")
    for name, checksum in checksums.items() if isinstance(checksums, dict) else ():
        if hashlib.sha256(read_bytes(directory / name)).hexdigest() != checksum:
            raise UserError(
                f"{directory / name}: damaged: its checksum is not that in {DESCRIPTION}: "
                "restore it from a copy"
            )
    return description


def read_bytes(path: epath.Path) -> bytes:
    """The content of a file.

    Raises:
      UserError: it is missing, or cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file: give the path of a tokenizer file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: as `read_bytes`; or it holds no JSON object.
    """
    content = read_bytes(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error}): restore it from a copy") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object: restore it from a copy")
    return value
