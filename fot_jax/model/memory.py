"""Inference memory: an explicit pytree of keys and values that memory layers read (paper §3.1).

Letters: B rows, M memory slots, T tokens of a window, H heads, K key/value heads, D head dim,
L memory layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from fot_jax.model import attention as parts_of
from fot_jax.model.attention import SAME_DOCUMENT, Parts


class LayerMemory(NamedTuple):
    """Keys and values of one memory layer: normalised where the model does so, never rotated."""

    k: Float[Array, "B K M D"]
    v: Float[Array, "B K M D"]
    filled: Int[Array, "B M"]  # 1 where a slot holds a token, 0 where it is free or padding

    def attend_with_window(self, q, k, v, segments):
        """One softmax over the local window, causally, and everything in memory.

        Args:
          q: [B, T, H, D] scaled queries; k, v: [B, T, K, D] of the window; segments: [B, T].

        Returns:
          [B, T, H, D] in q's dtype.
        """
        B, T, H, _ = q.shape
        K = k.shape[2]
        q_t, k_t, v_t = (parts_of.to_tiles(x, K) for x in (q, k, v))
        slots = parts_of.slots_of(H, T, T, jax.default_backend())
        window = parts_of.every_row(B, SAME_DOCUMENT, slots)
        parts = parts_of.attend(
            *(q_t, k_t, v_t, segments, segments, window), parts_of.no_parts(q_t), causal=True
        )
        parts = parts_of.merge(parts, self._attend(q_t))
        return parts_of.from_tiles(parts.attended().astype(q.dtype), B, T)

    def _attend(self, q_t) -> Parts:
        """Everything in memory, in blocks of slots: scores of one block at a time are held."""
        B, K, M, D = self.k.shape
        q = q_t.reshape(B, -1, *q_t.shape[1:])  # by row, then tile
        block = parts_of.tile_of(M)

        def step(i, parts):
            k, v = (
                lax.dynamic_slice_in_dim(x, i * block, block, 2).astype(q.dtype)
                for x in (self.k, self.v)
            )
            filled = lax.dynamic_slice_in_dim(self.filled, i * block, block, 1) > 0
            scores = jnp.einsum("bnktd,bksd->bnkts", q, k, preferred_element_type=jnp.float32)
            scores = jnp.where(filled[:, None, None, None], scores, parts_of.MASKED)
            return parts_of.absorb(parts, scores, True, v)

        parts = lax.fori_loop(0, M // block if M else 0, step, parts_of.no_parts(q))
        return Parts(*(x.reshape(q_t.shape[0], *x.shape[2:]) for x in parts))


class Memory(NamedTuple):
    """Memories of all memory layers. A ring: when full, the oldest slots are replaced."""

    k: Float[Array, "L B K M D"]
    v: Float[Array, "L B K M D"]
    filled: Int[Array, "B M"]
    next_slot: Int[Array, ""]

    def layer(self, place: int) -> LayerMemory:
        """The memory of the place-th memory layer."""
        return LayerMemory(self.k[place], self.v[place], self.filled)

    def append(self, window, segments: Int[Array, "B T"]) -> Memory:
        """Stores a window: per memory layer its (k, v), each [B, T, K, D]; padding stays hidden.

        Capacity must be a multiple of T.
        """
        if not self.k.size:  # no slots, or no memory layers
            return self
        k, v = (jnp.stack(x).swapaxes(2, 3).astype(self.k.dtype) for x in zip(*window, strict=True))
        T, at = segments.shape[1], self.next_slot
        return Memory(
            lax.dynamic_update_slice_in_dim(self.k, k, at, 3),
            lax.dynamic_update_slice_in_dim(self.v, v, at, 3),
            lax.dynamic_update_slice_in_dim(self.filled, (segments > 0).astype(jnp.int32), at, 1),
            (at + T) % self.k.shape[3],
        )


def empty(config, batch: int, capacity: int, dtype=jnp.float32) -> Memory:
    """An empty memory of `capacity` slots a row for a model of this ModelConfig."""
    layers = len(config.memory_layers)
    shape = (layers, batch, config.num_kv_heads, capacity, config.head_dim)
    return Memory(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((batch, capacity), jnp.int32),
        jnp.asarray(np.int32(0)),
    )
