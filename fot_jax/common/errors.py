"""The one exception that bad input raises, and the check of numbers that raises it."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator

LARGEST_SEED = 2**63 - 1
LARGEST_COUNT = 2**31 - 1  # of steps, which compiled programs count in int32
LARGEST_FLOAT = float.fromhex("0x1.fffffep+127")  # of float32, which programs compute in


class UserError(ValueError):
    """Bad input or a full disk: what is wrong, where, and what to do about it, in one line.

    The command line prints the message and exits with code 2.
    """


class NotHere(UserError):
    """Something is missing on this machine that may be there on the one that is to run."""


@contextlib.contextmanager
def because_of(cause: str) -> Iterator[None]:
    """Puts a cause ("Owner.field has 3") before the message of a UserError raised in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{cause}: {error}") from error


def check_range(
    owner: str,
    least: float,
    most: float | None = None,
    whole: bool = False,
    **values: float | None,
):
    """Checks numbers of an experiment: finite, and from `least` to `most` inclusive.

    Args:
      owner: what they are parameters of, as experiment files name it.
      least, most: bounds; most = None for no upper bound but that of float32.
      whole: fractions are refused, too.
      values: by parameter; a value of None passes.

    Raises:
      UserError: names the first value out of range.
    """
    for name, value in values.items():
        if whole and not isinstance(value, numbers.Integral | None):
            raise UserError(f"{owner}.{name} = {value}: give a whole number")
        if value is None or least <= value <= (LARGEST_FLOAT if most is None else most):
            continue
        wanted = f"a number from {least} to {most}"
        if most is None:
            wanted = f"{least} or more" + f", at most {LARGEST_FLOAT:.2g}" * (value > least)
        raise UserError(f"{owner}.{name} = {value}: give {wanted}")
