"""What one process of several is asked to do, all do after the same step.

A process asks through the key-value store of `jax.distributed`, and all look there in each step,
after they have begun it and have the results of the step before. That is in time: to have the
results of step n + 1 a process needs this one to have begun it, and so to have asked in step n;
then nobody leaves step n + 2 without having seen it. (JAX's own preemption service would take
SIGTERM for itself, and knows no other request.)
"""

from __future__ import annotations

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

AHEAD = 2  # steps between asking and doing, where there are several processes


class Agreement:
    """Requests of the processes of one run, each by a name of its own."""

    def __init__(self):
        several = jax.process_count() > 1
        self._store = ocp.multihost.get_jax_distributed_client() if several else None
        self._alone: dict[str, tuple[int, int]] = {}

    def ask(self, what: str, step: int, value: int = 0) -> None:
        """Asks for something in `step`; where several do, the first one's value is taken."""
        if self._store is None:
            self._alone.setdefault(what, (step, value))
            return
        try:
            self._store.key_value_set(_key(what), f"{step + AHEAD} {value}")
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def due(self, what: str, step: int) -> int | None:
        """The value of what was asked, where it is to be done after `step`."""
        if self._store is None:
            at, value = self._alone.get(what, (step + 1, 0))
        else:
            try:
                at, value = map(int, self._store.key_value_try_get(_key(what)).split())
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" not in str(error):
                    raise
                return None
        return value if step >= at else None


def _key(what: str) -> str:
    return f"fot_jax/asked/{what}"


def all_agree(fine: bool) -> bool:
    """Whether it is fine on all processes, which wait for each other here."""
    if jax.process_count() == 1:
        return fine
    return bool(multihost_utils.process_allgather(np.array(fine)).all())
