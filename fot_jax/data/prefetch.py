"""Batches are prepared by a background thread while the devices compute."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fot_jax.data.lanes import Lanes, Snapshot


class Prefetch:
    """Batches made and placed on the devices by a background thread, a few steps ahead.

    Iterates over (batch, snapshot of the lanes after it). An error in the thread is raised by the
    `next` that would have given its batch.
    """

    def __init__(
        self,
        lanes: Lanes,
        place: Callable[[dict[str, np.ndarray]], Any],
        depth: int = 2,
        count: int | None = None,
    ):
        """Starts the thread.

        Args:
          depth: how many batches may wait.
          count: how many there are to be, so that no document is read for others; None: no end.
        """
        self.waited = 0.0  # seconds that `next` has waited in all
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(lanes, place, count), name="prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, lanes, place, count) -> None:
        for made in itertools.count():
            if self._stop.is_set():
                return
            try:
                ends = made == count
                item = StopIteration() if ends else (place(next(lanes)), lanes.snapshot())
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> tuple[Any, dict[int, Snapshot]]:
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            self._queue.put(item)  # it is the answer from now on
            raise item
        return item

    def close(self) -> None:
        """Stops the thread; the lanes may then be used again."""
        self._stop.set()
        self._thread.join()
