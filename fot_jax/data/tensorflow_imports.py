"""TensorFlow and SeqIO: imported when first used, quietly; that takes some seconds."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import time
import types
import weakref
from collections.abc import Generator, Iterable, Iterator
from typing import Any


@functools.cache
def libraries() -> Any:
    """TensorFlow and SeqIO as .tf and .seqio: quiet, and kept off the accelerators.

    In .reading are the generators of rows that are in use. TensorFlow's threads read ahead, in
    Python; did they so while the interpreter goes away, they would abort the process.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # JAX sets that
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # or a broken row shows as a hundred lines
    with _silent_stderr():  # before TensorFlow knows of the level, it says what it looks for
        import seqio
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            with contextlib.suppress(RuntimeError, ValueError):  # none there, or they are in use
                tf.config.set_visible_devices([], kind)

    reading: weakref.WeakSet[Generator] = weakref.WeakSet()
    atexit.register(_close, reading)
    return types.SimpleNamespace(tf=tf, seqio=seqio, reading=reading)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what this process, all its threads, writes to file descriptor 2; exceptions pass."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _close(generators: Iterable[Generator]) -> None:
    """Closes generators, waiting up to a minute for a thread that is inside one."""
    for generator in list(generators):
        for _ in range(600):
            try:
                generator.close()
                break
            except ValueError:  # "already executing"
                time.sleep(0.1)
