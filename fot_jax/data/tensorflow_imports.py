"""TensorFlow and SeqIO: imported when first used, quietly; that takes some seconds.

They are kept off the accelerators, which are JAX's.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import threading
import time
import types
import weakref
from collections.abc import Generator, Iterable, Iterator

_IMPORTING = threading.Lock()


def import_tensorflow() -> types.ModuleType:
    """The module tensorflow."""
    return _import_both()[0]


def import_seqio() -> types.ModuleType:
    """The module seqio."""
    return _import_both()[1]


def close_at_exit(rows: Generator) -> None:
    """Closes a generator of rows before the interpreter shuts down, if it is still in use.

    TensorFlow's threads read ahead, in Python: during the shutdown that would abort the process.
    """
    _open_generators().add(rows)


@functools.cache
def _open_generators() -> weakref.WeakSet[Generator]:
    generators: weakref.WeakSet[Generator] = weakref.WeakSet()
    atexit.register(_close, generators)
    return generators


def _import_both() -> tuple[types.ModuleType, types.ModuleType]:
    with _IMPORTING:  # two at once would lose stderr
        return _import_both_once()


@functools.cache
def _import_both_once() -> tuple[types.ModuleType, types.ModuleType]:
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # JAX sets that
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # else a broken row is reported in a hundred lines
    with _silent_stderr():  # TensorFlow logs its start before it reads that level
        import seqio
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            with contextlib.suppress(RuntimeError, ValueError):  # none there, or they are in use
                tf.config.set_visible_devices([], kind)
    return tf, seqio


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
