"""Decode: a model writes text, token by token.

Letters: B rows, T tokens of a piece, E model dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from fot_jax.inference import forward
from fot_jax.inference.forward import Cache
from fot_jax.inference.prefill import Piece
from fot_jax.inference.sampling import Numbers, Sampler, sample
from fot_jax.inference.state import State
from fot_jax.model import transformer
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Lookup
from fot_jax.model.memory import Memory


def decode(
    params: Any,
    state: State,
    prompt: Iterable[Piece],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    stop: frozenset[int],
    until: Callable[[list[int]], bool] | None,
    when_read: Callable[[State], Any] | None,
) -> Iterator[list[int | None]]:
    """Continues what a state has read; the steps of `LanguageModel.stream`.

    Args:
      params: of the model, from `parameters_by_layer`.
      state: changed.
      prompt: from `prefill`, which reads it into the state as it is iterated over.
      stop, until, when_read: as of `LanguageModel.stream`.

    Yields:
      After each step the new token of every row, None for rows that have ended.
    """
    for piece in prompt:
        last = piece
    if when_read is not None:
        when_read(state)
    if not max_new_tokens:
        return

    def drawn(hidden, length, step):
        return token_after(
            state.model, sampler.among, state.mesh, params, hidden, length, sampler.numbers, step
        )

    token = drawn(last.hidden, last.length, np.int32(0))
    ended = np.zeros(state.rows, bool)
    written: list[list[int]] = [[] for _ in ended]
    for step in range(1, max_new_tokens + 1):
        fetched = np.asarray(token).tolist()
        ended |= [each in stop for each in fetched]
        now = [None if end else each for each, end in zip(fetched, ended, strict=True)]
        if until is not None:
            for row in np.flatnonzero(~ended):
                written[row].append(fetched[row])
                ended[row] = until(written[row])
        if not ended.all() and step < max_new_tokens:  # computed while this one is looked at
            state.make_room(~ended)
            if state.has_segments:
                hidden = state.run(params, token[:, None], ~ended[:, None], ~ended)
                token = drawn(hidden, np.ones_like(last.length), np.int32(step))
            else:
                token, state.cache = next_token(
                    state.model,
                    sampler.among,
                    state.config.lookup,
                    state.mesh,
                    params=params,
                    cache=state.cache,
                    memory=state.memory,
                    token=token,
                    goes_on=~ended,
                    numbers=sampler.numbers,
                    step=np.int32(step),
                )
        yield now
        if ended.all():
            return


@functools.partial(jax.jit, static_argnames=("c", "among", "mesh"))
def token_after(
    c: ModelConfig,
    among: str,
    mesh: Mesh | None,
    params: Any,
    hidden: Float[Array, "B T E"],
    length: Int[Array, " B"],
    numbers: Numbers,
    step: Int[Array, ""],
) -> Int[Array, " B"]:
    """The token after the first `length` ones of each row's piece."""
    hidden = jnp.take_along_axis(hidden, (length - 1)[:, None, None], 1)[:, 0]
    logits = transformer.logits(c, params, hidden)
    return forward.replicated(mesh, sample(among, logits, numbers, step))


@functools.partial(
    jax.jit, static_argnames=("c", "among", "lookup", "mesh"), donate_argnames="cache"
)
def next_token(
    c: ModelConfig,
    among: str,
    lookup: Lookup,
    mesh: Mesh | None,
    params: Any,
    cache: Cache,
    memory: Memory,
    token: Int[Array, " B"],
    goes_on: Bool[Array, " B"],
    numbers: Numbers,
    step: Int[Array, ""],
) -> tuple[Int[Array, " B"], Cache]:
    """Reads the token of each row that goes on, and draws the next one.

    Args:
      c, among, lookup, mesh: static.
      cache: used up; with room for a token.
    """
    hidden, cache = forward.run(
        c,
        lookup,
        mesh,
        params=params,
        cache=cache,
        memory=memory,
        tokens=token[:, None],
        valid=goes_on[:, None],
        advance=goes_on.astype(jnp.int32),
    )
    logits = transformer.logits(c, params, hidden[:, 0])
    return forward.replicated(mesh, sample(among, logits, numbers, step)), cache
