"""SIGTERM and SIGINT: a run finishes its step, saves and ends."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator

from fot_jax.common.agreement import Agreement, all_values


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
    """Records SIGTERM and SIGINT instead of ending the process; a second one ends it."""
    signals = StopSignals()

    def handler(signum, frame):
        if signals.exit_at_once:
            os._exit(128 + signum)
        signals.received, signals.exit_at_once = signal.Signals(signum), True

    before = {each: signal.signal(each, handler) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for each, handler_before in before.items():
            signal.signal(each, handler_before)
