"""Drawing the next token, compiled: after a piece just read, and token by token.

Letters: B rows, T tokens of a piece, E model dim, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax.inference import forward as inference
from fot_jax.inference.forward import Cache
from fot_jax.model import transformer

MOST_LIKELY, LIKELY, ANY = "most likely", "likely", "any"


class Numbers(NamedTuple):
    """What tokens are drawn with."""

    keys: jax.Array  # [B]
    temperature: np.float32
    top_k: np.int32
    top_p: np.float32


class Draw(NamedTuple):
    """How tokens are drawn."""

    among: str  # static: which tokens
    numbers: Numbers

    @classmethod
    def of(cls, temperature: float, top_k: int | None, top_p: float, seeds: Sequence[int]) -> Draw:
        """Among the top_k most likely tokens, and of these the fewest that have a share of top_p of
        their probability; or, at temperature 0, always the most likely one. Every row has a seed of
        its own."""
        temperature = min(float(temperature), 1e30)  # in float32, all that follows is infinite
        few = top_k is not None or top_p < 1
        among = MOST_LIKELY if temperature < 1e-30 else LIKELY if few else ANY
        top_k = 2**31 - 1 if top_k is None else min(top_k, 2**31 - 1)
        # A key takes 32 bits of a seed.
        keys = [jax.random.fold_in(jax.random.key(s % 2**32), s // 2**32) for s in seeds]
        keys = jnp.stack(keys)
        numbers = np.float32(temperature), np.int32(top_k), np.float32(top_p)
        return cls(among, Numbers(keys, *numbers))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def first_token(c, among, mesh, params, hidden, length, numbers: Numbers) -> jax.Array:
    """The tokens [B] after the first `length` [B] of a piece, from its hidden states [B, T, E]."""
    hidden = jnp.take_along_axis(hidden, (length - 1)[:, None, None], 1)[:, 0]
    logits = transformer.logits(c, params, hidden)
    return inference.replicated(mesh, _choose(among, logits, numbers, jnp.int32(0)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames="cache")
def next_token(
    c, among, lookup, mesh, params, cache: Cache, memory, token, goes_on, numbers: Numbers, step
) -> tuple[jax.Array, Cache]:
    """Reads the token [B] of each row that goes_on [B], and draws the next one.

    `cache` is used up.
    """
    hidden, cache = inference.read(
        *(c, lookup, mesh, params, cache, memory),
        *(token[:, None], goes_on[:, None], goes_on.astype(jnp.int32)),
    )
    logits = transformer.logits(c, params, hidden[:, 0])
    return inference.replicated(mesh, _choose(among, logits, numbers, step)), cache


def _choose(among: str, logits, numbers: Numbers, step) -> jax.Array:
    """Tokens [B] from logits [B, V]; of every step, draws of its own."""
    if among == MOST_LIKELY:
        return logits.argmax(-1).astype(jnp.int32)
    logits = (logits - logits.max(-1, keepdims=True)) / numbers.temperature
    if among == LIKELY:
        descending = -jnp.sort(-logits, -1)
        kept = jnp.arange(logits.shape[-1]) < numbers.top_k
        p = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), -1)
        kept = (kept & (jnp.cumsum(p, -1) - p < numbers.top_p)).at[:, 0].set(True)
        least = jnp.where(kept, descending, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(numbers.keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
