"""Sampling: which token comes next, from the logits of it.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from fot_jax.common.errors import LARGEST_SEED, UserError, check_range

MOST_LIKELY, LIKELY, ANY = "most likely", "likely", "any"


class Numbers(NamedTuple):
    """What tokens are drawn with."""

    keys: Key[Array, " B"]
    temperature: np.float32
    top_k: np.int32
    top_p: np.float32


class Sampler(NamedTuple):
    """How tokens are drawn."""

    among: str  # static: which tokens
    numbers: Numbers


def sampler(
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int | Sequence[int] | np.ndarray,
    rows: int,
) -> Sampler:
    """Draws among the top_k most likely tokens, and of these among the fewest that have a share of
    top_p of their probability; or, at temperature 0, takes the most likely token each time.

    Args:
      seed: one for each row; of a number s, row r has s + r.

    Raises:
      UserError: a number out of range, or not one seed for each row.
    """
    check_range("generate", 0, temperature=temperature)
    check_range("generate", 1, whole=True, top_k=top_k)
    check_range("generate", 0, 1, top_p=top_p)
    of_rows = isinstance(seed, Sequence | np.ndarray)
    seeds = list(seed) if of_rows else [seed] * rows
    if len(seeds) != rows:
        raise UserError(f"{len(seeds)} seeds for {rows} prompts: give one for each")
    for each in seeds:
        check_range("generate", 0, LARGEST_SEED, whole=True, seed=each)
    seeds = [int(each) + (0 if of_rows else row) for row, each in enumerate(seeds)]
    temperature = min(float(temperature), 1e30)  # in float32, all that follows is infinite
    few = top_k is not None or top_p < 1
    top_k = 2**31 - 1 if top_k is None else min(top_k, 2**31 - 1)
    # A key takes 32 bits of a seed.
    keys = [jax.random.fold_in(jax.random.key(s % 2**32), s // 2**32) for s in seeds]
    return Sampler(
        MOST_LIKELY if temperature < 1e-30 else LIKELY if few else ANY,
        Numbers(
            keys=jnp.stack(keys),
            temperature=np.float32(temperature),
            top_k=np.int32(top_k),
            top_p=np.float32(top_p),
        ),
    )


def sample(
    among: str, logits: Float[Array, "B V"], numbers: Numbers, step: Int[Array, ""]
) -> Int[Array, " B"]:
    """A token for each row; each step has draws of its own."""
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
