"""Saves that failed are tried again, by all processes after the same step."""

from __future__ import annotations

import time
from collections.abc import Callable

from fot_jax.checkpoints.manager import MAX_FAILURES, Checkpointer
from fot_jax.common.agreement import Agreement

RETRY_SECONDS = 10  # from a save that failed to the next; then twice that, and so on


class SaveRetries:
    """When to save again after a save has failed in the background."""

    def __init__(self, checkpointer: Checkpointer, agreement: Agreement):
        self._checkpointer, self._agreement = checkpointer, agreement
        self._retries = 0
        self._retry_at: float | None = None  # by time.monotonic

    def due(self, step: int) -> bool:
        """Whether all processes save after this step because a save has failed on one of them."""
        if self._checkpointer.failed():
            wait = RETRY_SECONDS * 2 ** (self._checkpointer.failures - 1)
            self._retry_at = time.monotonic() + wait
        request = f"save again, {self._retries}"
        if self._retry_at is not None and time.monotonic() >= self._retry_at:
            self._agreement.request(request, step)
            self._retry_at = None
        if self._agreement.due(request, step) is None:
            return False
        self._retries += 1
        return True

    def until_saved(self, save: Callable[[], None]) -> None:
        """Waits for the last save of a run, and saves again where it has failed on one process.

        Raises:
          Exception: as of Checkpointer.save.
        """
        while not self._checkpointer.saved():
            failures = self._checkpointer.failures
            if failures < MAX_FAILURES:  # or `save` raises
                time.sleep(RETRY_SECONDS * 2 ** max(0, failures - 1))
            save()
