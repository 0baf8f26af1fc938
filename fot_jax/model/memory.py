"""Inference memory: an explicit pytree of keys and values that memory layers read (method.md §4).

Letters: B rows, M memory slots, T tokens of a window, H heads, K key/value heads, D head dim,
L memory layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fot_jax.model import attention as parts_of
from fot_jax.model.attention import ANY_DOCUMENT, SAME_DOCUMENT


class LayerMemory(NamedTuple):
    """Keys and values of one memory layer, as projected: keys are not rotated (method.md §4)."""

    k: Float[Array, "B M K D"]
    v: Float[Array, "B M K D"]
    filled: Int[Array, "B M"]  # 1 where a slot holds a token, 0 where it is free or padding

    def attend_with_window(self, q, k, v, segments):
        """One softmax over the local window, causally, and everything in memory.

        Args:
          q: [B, T, H, D] scaled queries; k, v: [B, T, K, D] of the window; segments: [B, T].

        Returns:
          [B, T, H, D] in q's dtype.
        """
        B, T, H, _ = q.shape
        K, M = k.shape[2], self.k.shape[1]
        platform = jax.default_backend()
        q_t, k_t, v_t = (parts_of.to_tiles(x, K) for x in (q, k, v))
        window = parts_of.every_row(B, SAME_DOCUMENT, parts_of.slots_of(H, T, T, platform))
        parts = parts_of.attend(
            *(q_t, k_t, v_t, segments, segments, window), parts_of.no_parts(q_t), causal=True
        )
        if M:
            mem_k, mem_v = (parts_of.to_tiles(x.astype(q.dtype), K) for x in (self.k, self.v))
            whole = parts_of.every_row(B, ANY_DOCUMENT, parts_of.slots_of(H, T, M, platform))
            parts = parts_of.attend(
                q_t, mem_k, mem_v, segments, self.filled, whole, parts, causal=False
            )
        return parts_of.from_tiles(parts.out.astype(q.dtype), B, T)


class Memory(NamedTuple):
    """Memories of all memory layers. A ring: when full, the oldest slots are replaced."""

    k: Float[Array, "L B M K D"]
    v: Float[Array, "L B M K D"]
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
        k, v = (jnp.stack(x).astype(self.k.dtype) for x in zip(*window, strict=True))
        T, at = segments.shape[1], self.next_slot
        return Memory(
            jax.lax.dynamic_update_slice_in_dim(self.k, k, at, 2),
            jax.lax.dynamic_update_slice_in_dim(self.v, v, at, 2),
            jax.lax.dynamic_update_slice_in_dim(
                self.filled, (segments > 0).astype(jnp.int32), at, 1
            ),
            (at + T) % self.k.shape[2],
        )


def empty(config, batch: int, capacity: int, dtype=jnp.float32) -> Memory:
    """An empty memory of `capacity` slots a row for a model of this ModelConfig."""
    layers = len(config.memory_layers)
    shape = (layers, batch, capacity, config.num_kv_heads, config.head_dim)
    return Memory(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((batch, capacity), jnp.int32),
        jnp.asarray(np.int32(0)),
    )
