"""Sealing: JSON is saved with a checksum over itself, so that damage to the file is noticed."""

from __future__ import annotations

import json
import zlib
from typing import Any


def crc32_of_json(content: Any, sort_keys: bool = False) -> int:
    """CRC-32 of a value that JSON can hold, in the form json.dumps gives it."""
    return zlib.crc32(json.dumps(content, sort_keys=sort_keys).encode())


def seal(content: Any) -> dict[str, Any]:
    """A value that JSON can hold, as JSON holds it (tuples are lists), with its checksum."""
    content = json.loads(json.dumps(content))
    return {"crc32": crc32_of_json(content), "content": content}


def unseal(sealed: Any) -> Any:
    """What was sealed.

    Raises:
      ValueError: it is not what `seal` gave.
    """
    if not isinstance(sealed, dict) or sealed.keys() != {"crc32", "content"}:
        raise ValueError("no checksum")
    if sealed["crc32"] != crc32_of_json(sealed["content"]):
        raise ValueError("not what was saved: the checksum differs")
    return sealed["content"]
