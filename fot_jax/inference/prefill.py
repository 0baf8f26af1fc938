"""Prefill: text is read into the local window, and on into memory (paper §3.1).

A model reads a *piece* of text at a time. Here it is decided on the host which piece comes next,
whose window is emptied before it, and how much memory that takes; forward.py has the compiled
programs.

Letters: B rows, N tokens of a text, T tokens of a piece, E model dim.
"""

from __future__ import annotations

import collections
import numbers
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from fot_jax.common.errors import UserError
from fot_jax.inference import forward, inputs
from fot_jax.inference.state import State, last_context
from fot_jax.model import memory as memories

AHEAD = 2  # pieces that the host may be ahead of the devices
ROOM = 4096  # tokens that are written before memory grows for more of them


class Piece(NamedTuple):
    """A piece of every row that was read."""

    start: Int[np.ndarray, " B"]  # its first token in the text
    length: Int[np.ndarray, " B"]
    # Of its tokens; what comes after them has no meaning. None: nobody wanted them.
    hidden: Float[jax.Array, "B T E"] | None

    def columns(self) -> slice:
        """Of the text, where all rows have the same length."""
        return slice(self.start[0], self.start[0] + self.length[0])


class Step(NamedTuple):
    """What one row does at one step of prefill: reads the tokens start … stop - 1."""

    start: int
    stop: int
    evicts: bool  # the window is emptied first


def plan(tokens: int, cached: int, context: int, last: int) -> list[Step]:
    """How a text is cut into pieces, as LongLLaMA does it.

    All but the last `last` tokens are cut from the left into pieces of `context`, then comes one
    piece with the rest. Text read from the start has each piece in a window of its own. With
    tokens in the window already, a piece joins them where it fits.

    Args:
      tokens: to read now.
      cached: places of the window in use.
      context: places of the window in all.
      last: at most so many tokens in the last piece.
    """
    before = tokens - min(tokens, last)
    bounds = [(i, min(i + context, before)) for i in range(0, before, context)]
    bounds.append((before, tokens))
    joins, steps = cached > 0, []
    for i, (start, stop) in enumerate(bounds):
        evicts = cached + stop - start > context if joins else i > 0
        cached = stop - start + (0 if evicts else cached)
        steps.append(Step(start, stop, evicts))
    return steps


def prefill(
    params: Any,
    state: State,
    tokens: Int[np.ndarray, "B N"],
    valid: Bool[np.ndarray, "B N"],
    *,
    last: int | None,
    progress: Callable[[int], Any] | None,
    lengths: Int[np.ndarray, " B"] | None = None,
    new_tokens: int = 0,
    every_hidden: bool = False,
) -> Iterator[Piece]:
    """Reads text into a state, which changes, piece by piece.

    Args:
      params: of the model, from `parameters_by_layer`.
      valid: False for padding.
      last: last_context_length, None for its default.
      progress: called with the number of tokens read.
      lengths: tokens of each row, the rest is nothing; None: all.
      new_tokens: that will follow, for the size of the memory.
      every_hidden: whether hidden states of all pieces are wanted, and not of the last one alone:
        the others are then read for memory, with the layers that it takes.

    Raises:
      UserError: last_context_length is out of range, or memory is too small and no ring.
    """
    context = state.model.local_context
    if last is None:
        # A full window without memory would lose all of its tokens to the next one.
        half = context // 2
        room = 0 if every_hidden else min(new_tokens or half, half)
        last = last_context(state.model, 0 if state.model.memory_layers else room)
    if not isinstance(last, numbers.Integral) or not 1 <= last <= context:
        raise UserError(
            f"last_context_length = {last}: give a whole number from 1 to {context}, the local "
            "context"
        )
    rows = range(state.rows)
    lengths = np.full(state.rows, tokens.shape[1]) if lengths is None else lengths
    plans = [plan(int(lengths[r]), int(state.places[r]), context, last) for r in rows]
    _reserve(state, plans, valid, new_tokens)
    steps = max(len(each) for each in plans)
    # Rows with less to read wait, so that all end together.
    plans = [[Step(0, 0, False)] * (steps - len(each)) + each for each in plans]
    running: collections.deque = collections.deque()
    of_steps = [
        [np.asarray(x) for x in zip(*step, strict=True)] for step in zip(*plans, strict=True)
    ]
    for i, (start, stop, evicts) in enumerate(of_steps):
        state.evict(evicts & (state.places > 0))
        length = stop - start
        # The last piece stays in the window, whatever comes next.
        leaves = of_steps[i + 1][2] if i + 1 < steps else np.zeros(state.rows, bool)
        for_memory = not every_hidden and bool((leaves | (length == 0)).all())
        width = min(context, max(16, 1 << int(length.max() - 1).bit_length()))
        of_rows = [slice(start[row], stop[row]) for row in rows]
        piece = np.stack([inputs.padded(tokens[row, of_rows[row]], width) for row in rows])
        shown = np.stack([inputs.padded(valid[row, of_rows[row]], width) for row in rows])
        hidden = state.run(params, piece, shown, length, for_memory)
        state.places += length
        state.held += shown.sum(1)
        if for_memory:
            state.evict(length > 0)  # now: the window has not all that a next piece would need
        running.append(hidden)
        if len(running) > AHEAD:
            running.popleft().block_until_ready()
        yield Piece(start, length, None if for_memory else hidden)
        if progress is not None:
            progress(int(shown.sum()))


def remember(
    params: Any,
    state: State,
    windows: Int[np.ndarray, "N T"],
    progress: Callable[[int], Any] | None,
) -> None:
    """Reads windows, each as if it were the only one, into the memory that a state's rows share.

    Raises:
      UserError: there is no room in memory, and it is no ring.
    """
    c, mesh = state.model, state.mesh
    stored = int(state.stored[0] + state.held.sum()) + windows.size
    state.check_room(stored)
    state.reserve(stored, stored)
    state.evict(state.places > 0)
    nothing = memories.empty(c, 1, 0, state.memory.storage, mesh)
    for start in range(0, len(windows), state.rows):
        piece = windows[start : start + state.rows]
        length = np.zeros(state.rows, int)
        length[: len(piece)] = windows.shape[1]
        piece = np.pad(piece, [(0, state.rows - len(piece)), (0, 0)])
        _, state.cache = forward.run(
            c,
            state.config.lookup,
            mesh,
            params=params,
            cache=state.cache,
            memory=nothing,
            tokens=piece,
            valid=np.ones_like(piece, bool),
            advance=length.astype(np.int32),
            for_memory=True,
        )
        state.places += length
        state.held += length
        state.evict(length > 0, apart=True)
        if progress is not None:
            progress(int(length.sum()))


def _reserve(
    state: State, plans: list[list[Step]], valid: Bool[np.ndarray, "B N"], new_tokens: int
) -> None:
    """Makes room in memory for all that will leave the window.

    Raises:
      UserError: there is none, and the memory is no ring.
    """
    context = state.model.local_context
    if not state.model.memory_layers:
        return
    moved, later = np.zeros(state.rows, int), np.zeros(state.rows, int)
    for row, steps in enumerate(plans):
        places, held = state.places[row], state.held[row]
        for start, stop, evicts in steps:
            moved[row] += held if evicts else 0
            places, held = (0, 0) if evicts else (places, held)
            places, held = places + stop - start, held + valid[row, start:stop].sum()
        # Each new token is read but the last. The window is emptied when it is full.
        overflow = places + new_tokens - 1 - context
        if overflow > 0:
            windows = (overflow - 1) // context
            later[row] = held - places + (1 + windows) * context
    if state.config.shared:
        moved, later = moved.sum(), later.sum()
    needed = int((state.stored + moved + later).max())
    state.check_room(needed)
    # Decoding may end early: room for a part of it, which grows as it is needed.
    wanted = min(needed, int((state.stored + moved).max()) + max(ROOM, int(moved.max())))
    state.reserve(wanted, wanted)
