"""Agreement between processes: what one of them requests, all do after the same step.

A request is written to the key-value store of `jax.distributed` in some step n and carried out by
all processes after step n + 2. Each process looks there in every step, once it has started the step
and has the results of the one before. No process can miss a request: to have the results of step
n + 1, which step n + 2 waits for, it needs the requesting process to have started step n + 1, and
so to have written the request before. (JAX's own preemption service would handle SIGTERM itself,
and has no other requests.)
"""

from __future__ import annotations

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

AHEAD = 2  # steps from a request to what it asks for, where there are several processes


class Agreement:
    """Requests of the processes of one run, each under a name that is used once."""

    def __init__(self):
        several = jax.process_count() > 1
        self._store = ocp.multihost.get_jax_distributed_client() if several else None
        self._alone: dict[str, tuple[int, int]] = {}

    def request(self, name: str, step: int, value: int = 0) -> None:
        """Makes a request in `step`; of several processes that do, the first one's value holds."""
        if self._store is None:
            self._alone.setdefault(name, (step, value))
            return
        try:
            self._store.key_value_set(_key(name), f"{step + AHEAD} {value}")
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def due(self, name: str, step: int) -> int | None:
        """The value of a request that is to be carried out after `step`; None: there is none."""
        if self._store is None:
            at, value = self._alone.get(name, (step + 1, 0))
        else:
            try:
                at, value = map(int, self._store.key_value_try_get(_key(name)).split())
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" not in str(error):
                    raise
                return None
        return value if step >= at else None


def _key(name: str) -> str:
    return f"fot_jax/requests/{name}"


def all_arrive(name: str, seconds: int = 60) -> bool:
    """Whether all processes come here, under a name that is used once, within some time.

    For those that may come alone while others compute together: nothing is computed here.
    """
    if jax.process_count() == 1:
        return True
    client = ocp.multihost.get_jax_distributed_client()
    try:
        client.wait_at_barrier(_key(name), 1000 * seconds)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def all_values(value: int) -> list[int]:
    """The value of every process, in their order; they wait for each other here."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.array(value, np.int32)).tolist()


def all_agree(condition: bool) -> bool:
    """Whether a condition holds on all processes, which wait for each other here."""
    return all(all_values(condition))
