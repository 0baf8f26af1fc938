"""The queries that memory layers look into memory with."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Float, Int

from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import State
from fot_jax.model.lookup import Lookup


def queries_of(
    lm: LanguageModel, windows: Int[np.ndarray, "B T"], state: State, lookup: Lookup
) -> list[Float[np.ndarray, "B K G T D"]]:
    """Of each memory layer, for windows of at most the local context; scaled as for its scores.

    Args:
      lm: on one device.
      state: that is read on from; changed, but nothing is added to memory.
      lookup: that layers attend to memory with, as later ones see what earlier ones found.
    """
    c, recorded = lm.config, _recorded(lookup)
    recorded.calls.clear()
    state.config = dataclasses.replace(state.config, lookup=recorded)
    lm.read(windows, state=state, last_context_length=c.local_context)
    jax.effects_barrier()
    calls = recorded.calls.copy()
    recorded.calls.clear()

    def by_rows(q):  # [B, K, G * t, D]; of a memory that rows share [1, K, B * G * t, D]
        of_tile = c.num_heads // c.num_kv_heads, -1, c.head_dim
        if len(q) < len(windows):
            return q.reshape(c.num_kv_heads, len(windows), *of_tile).swapaxes(0, 1)
        return q.reshape(len(windows), c.num_kv_heads, *of_tile)

    # Windows are read tile by tile, each layer after the one before.
    calls, tiles = [by_rows(np.asarray(q)) for q in calls], len(calls) // len(c.memory_layers)
    of_layers = [calls[i : i + tiles] for i in range(0, len(calls), tiles)]
    return [np.concatenate(tiles, 3)[:, :, :, : windows.shape[1]] for tiles in of_layers]


@functools.cache  # one for all evaluations of a run, which would compile anew for another
def _recorded(lookup: Lookup) -> _Recorded:
    return _Recorded(lookup)


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """A lookup whose queries are recorded."""

    lookup: Lookup
    calls: list[Any] = dataclasses.field(default_factory=list, compare=False)

    def check(self, slots: int) -> None:
        self.lookup.check(slots)

    def attend(self, q, layer, visible, shards: int):
        io_callback(self.calls.append, None, q, ordered=True)
        return self.lookup.attend(q, layer, visible, shards)
