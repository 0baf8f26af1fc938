"""Sizes in bytes, formatted for messages and parsed from XLA's."""

from __future__ import annotations

_LETTERS = ("", "K", "M", "G", "T", "P", "E")


def in_bytes(size: float) -> str:
    """A size in the largest binary unit that it fills: "512 bytes", "1.50 MiB", "3.34 GiB"."""
    unit = 0
    while unit + 1 < len(_LETTERS) and round(size / 1024**unit, 2) >= 1024:
        unit += 1
    return f"{size / 1024**unit:.2f} {_LETTERS[unit]}iB" if unit else f"{size:.0f} bytes"


def bytes_of(text: str) -> int:
    """Parses a size as XLA's compilers write it: "15.48G", "1.02T", "8.5K", "512B", "512".

    Raises:
      ValueError: it is no size.
    """
    number = text.strip().removesuffix("B").removesuffix("i")
    unit = _LETTERS.index(number[-1:]) if number[-1:] in _LETTERS[1:] else 0
    return round(float(number[:-1] if unit else number) * 1024**unit)
