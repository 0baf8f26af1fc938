"""Signals to stop: a run finishes its step, saves and ends."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator

from fot_jax.common.agreement import Agreement, all_values
from fot_jax.common.stopping import stopping

SAME_SECONDS = 1.0  # in which signals are one: some go to all processes, and are passed on as well


@dataclasses.dataclass
class StopSignals:
    """Signals that this process has received.

    Attributes:
      received: the first one.
      exit_at_once: the next signal ends the process.
    """

    received: signal.Signals | None = None
    exit_at_once: bool = False

    def agreed(self, agreement: Agreement, step: int) -> signal.Signals | None:
        """The signal after which all processes stop after this step, whichever received it."""
        if self.received:
            agreement.request("stop", step, self.received)
        stopped = agreement.due("stop", step)
        return signal.Signals(stopped) if stopped else None

    def at_end(self) -> signal.Signals | None:
        """A signal that any process has received by now; all wait for each other here."""
        received = max(all_values(int(self.received or 0)))
        return signal.Signals(received) if received else None


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Records a signal to stop instead of ending the process; a second one, later, ends it."""
    signals, came = StopSignals(), -SAME_SECONDS

    def handler(signum, frame):
        nonlocal came
        if (now := time.monotonic()) - came < SAME_SECONDS:
            return
        if signals.exit_at_once:
            os._exit(128 + signum)
        signals.received, signals.exit_at_once, came = signal.Signals(signum), True, now

    before = {each: signal.signal(each, handler) for each in stopping()}
    try:
        yield signals
    finally:
        for each, handler_before in before.items():
            signal.signal(each, handler_before)
