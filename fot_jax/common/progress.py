"""How far a long job is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
from tqdm import tqdm


@contextlib.contextmanager
def bar(total: int, unit: str = "token", seconds: float = 30.0) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of tokens (or what the unit is) just done.

    Speaks on standard error, on process 0; elsewhere than on a terminal a line every so many
    seconds.
    """
    if jax.process_index():
        yield lambda tokens: None
        return
    if sys.stderr.isatty():
        with tqdm(total=total, unit=unit, unit_scale=True, dynamic_ncols=True) as shown:
            yield shown.update
        return
    done, said = 0, time.monotonic()

    def update(tokens: int) -> None:
        nonlocal done, said
        done += tokens
        if time.monotonic() - said > seconds:
            said = time.monotonic()
            print(f"{done:,} of {total:,} {unit}s", file=sys.stderr, flush=True)

    yield update
