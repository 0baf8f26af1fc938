"""Which signals ask a process to stop. Importing this loads no JAX."""

from __future__ import annotations

import signal


def stopping() -> list[signal.Signals]:
    """The signals that stop a command: SIGHUP only where it is not ignored, as nohup has it."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT] + [signal.SIGHUP] * hangs_up
