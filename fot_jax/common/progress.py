"""Progress of a long job: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from tqdm import tqdm


@contextlib.contextmanager
def said_if_slow(text: str, seconds: float = 5.0) -> Iterator[None]:
    """Process 0 says on standard error what is going on, if the block takes longer than that."""

    def say():
        print(text, file=sys.stderr, flush=True)

    timer = threading.Timer(seconds, say)
    if jax.process_index() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def bar(
    total: int, unit: str = "token", seconds: float = 30.0, name: str | None = None
) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of tokens, or other units, just done.

    Process 0 shows progress on standard error: as a bar if that is a terminal, else as a line every
    `seconds`.

    Args:
      total: units in all.
      unit: singular, "token".
      seconds: between lines.
      name: of what is being done.
    """
    if jax.process_index():
        yield lambda tokens: None
        return
    if sys.stderr.isatty():
        options = {"unit": unit, "unit_scale": True, "dynamic_ncols": True}
        with tqdm(desc=name, total=total, **options) as shown:
            yield shown.update
        return
    done, said = 0, time.monotonic()
    before = f"{name}: " if name else ""

    def update(tokens: int) -> None:
        nonlocal done, said
        done += tokens
        if time.monotonic() - said > seconds:
            said = time.monotonic()
            print(f"{before}{done:,} of {total:,} {unit}s", file=sys.stderr, flush=True)

    yield update
