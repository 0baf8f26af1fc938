"""What Orbax and TensorStore raise, said once and in one line."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys

import jax
from etils import epath


@functools.cache
def raise_without_printing() -> None:
    """From now on, Orbax raises its errors without printing them from each of its threads, too.

    When writing many arrays fails, the first error is raised. The other threads go on failing for a
    while, as they find the event loop closed.
    """
    before = sys.unraisablehook

    def hook(unraisable):
        closed = str(unraisable.exc_value) == "Event loop is closed"
        if not closed and not inspect.iscoroutine(unraisable.object):
            before(unraisable)

    def of_a_thread(record) -> bool:
        orbax = record.exc_info and "orbax" in record.pathname
        return bool(orbax) or "exception was never retrieved" in record.getMessage()

    sys.unraisablehook = hook
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not of_a_thread(record))


def cause_of(error: Exception) -> Exception:
    """What failed here, where Orbax raises that processes have waited for each other in vain.

    When a save fails on one of several processes, all of them, that one too, raise the time-out of
    a barrier; what failed there is in its context.
    """

    def of_barrier(error: BaseException | None) -> bool:
        return isinstance(error, jax.errors.JaxRuntimeError | TimeoutError) and (
            "barrier" in str(error).lower()
        )

    if not of_barrier(error):
        return error
    cause: BaseException | None = error
    while of_barrier(cause):
        cause = cause.__context__
    if isinstance(cause, Exception):
        return cause
    return TimeoutError("another process has not written its part: see what it says")


def of_reading(error: Exception) -> BaseException:
    """What failed while an array was read: Orbax's own error has all that is known of the array."""
    if str(error).startswith("Encountered error while reading") and error.__cause__ is not None:
        return error.__cause__
    return error


def short_reason(error: BaseException) -> str:
    """What went wrong, without the specifications of arrays that TensorStore's errors list."""
    line = re.split(r" \[[\w ]+(?:\[\d+\])?='", " ".join(str(error).split()))[0]
    files = list(re.finditer(r'local file "([^"]+)"', line))
    if not files:
        return f"{type(error).__name__}: {line[:150]}"
    said = line[files[-1].end() :].strip(": ")[:150]
    missing = "is missing" if "NOT_FOUND" in line else "cannot be read"
    return f"{epath.Path(files[-1][1]).name}: {said or missing}"
