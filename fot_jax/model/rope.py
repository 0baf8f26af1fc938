"""Rotary positions, and how published models scale them to read further (arXiv 2104.09864).

Letters: R rows, T tokens of a row, H heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fot_jax.model.attention.partial_softmax import AnyArray
from fot_jax.model.config import ModelConfig, RopeScaling


def rope_frequencies(c: ModelConfig) -> np.ndarray:
    """Angle per position of each pair of dimensions: [D / 2] float64."""
    frequencies = c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    return frequencies if c.rope_scaling is None else _scaled(c, c.rope_scaling, frequencies)


def _scaled(c: ModelConfig, s: RopeScaling, frequencies: np.ndarray) -> np.ndarray:
    if s.kind == "dynamic":  # and the window no longer than original_max_position
        return frequencies
    if s.kind == "linear":
        return frequencies / s.factor
    if s.kind == "llama3":
        turns = s.original_max_position * frequencies / (2 * np.pi)  # over the original context
        keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    else:

        def pair(turns: float) -> float:
            """Which pair of dimensions turns so often over the original context."""
            wavelength = s.original_max_position / (turns * 2 * np.pi)
            return c.head_dim / 2 * np.log(wavelength) / np.log(c.rope_theta)

        low, high = pair(s.beta_fast), pair(s.beta_slow)
        if s.truncate:
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0), min(high, c.head_dim - 1)
        between = high - low or 0.001
        keep = 1 - (np.arange(c.head_dim // 2) - low) / between
    keep = np.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / s.factor)


def rope_table(c: ModelConfig, length: int, start: int = 0) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of positions start … start + length - 1: two [T, 1, D / 2] float32."""
    angles = np.arange(start, start + length)[:, None, None] * rope_frequencies(c)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def positioned(c: ModelConfig, q: Float[Array, "R T H D"], k: Float[Array, "R T K D"], rope):
    """Queries and keys with rotary positions. Memory keys, as if at position 0, are as projected:

    what YaRN multiplies both with is therefore in the queries.
    """
    q, k = rotate(q, rope), rotate(k, rope)
    return (q if c.rope_scaling is None else times(q, c.rope_scaling.score_factor)), k


def times(x: Float[AnyArray, " ..."], factor) -> Float[Array, " ..."]:
    """An array times a factor of float32, computed in it, in the array's type.

    In the type itself the factor would be rounded, and all of the array be wrong alike.
    """
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def rotate(x: Float[Array, "R T H D"], rope) -> Float[Array, "R T H D"]:
    """Rotary positions in the half-split layout of Hugging Face weights; computed in float32."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
