"""How a LanguageModel reads text: cut into pieces, into the window and on into memory (paper §3.1).

The compiled programs are in model/inference.py; here it is decided on the host which piece comes
next, whose window is emptied before it, and how much memory that takes.

Letters: B rows, N tokens of a text, T tokens of a piece, E model dim.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from fot_jax.common.errors import UserError, check_range
from fot_jax.inference import forward as inference
from fot_jax.inference.forward import Cache
from fot_jax.model import memory as memories
from fot_jax.model.lookup import Dense, Lookup
from fot_jax.model.memory import Memory
from fot_jax.model.transformer import ModelConfig


class Model(Protocol):
    """What reading needs of a LanguageModel."""

    config: ModelConfig
    params: Any
    mesh: Mesh | None


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """What is kept of text that has left the local window, and how it is read.

    Attributes:
      size: most tokens kept, of each row, or of all together where they share; None: all.
      ring: what happens beyond them: True forgets the oldest, False refuses to read more.
      storage: float32, bfloat16, float16 or int8 (with a scale for each key and value); None:
        ModelConfig.memory_dtype or, where that is None too, the type that the model computes in.
      lookup: Dense() attends to all of memory, TopK(k) to the best k keys of each head and query,
        ApproximateTopK(k, recall) to most of these.
      shared: one memory for all rows of a batch (the paper's multi-doc setting).
    """

    size: int | None = None
    ring: bool = True
    storage: str | None = None
    lookup: Lookup = Dense()
    shared: bool = False

    def __post_init__(self):
        check_range("MemoryConfig", 0, 2**30, whole=True, size=self.size)
        if self.storage not in (None, *memories.STORAGE):
            raise UserError(
                f"MemoryConfig.storage = {self.storage!r}: choose one of "
                f"{', '.join(memories.STORAGE)}"
            )
        if self.size:
            self.lookup.check(self.size)


LAST_CONTEXT = 1024  # tokens of a text that stay in the window, as in LongLLaMA
EVERYTHING = MemoryConfig()
SHARED = MemoryConfig(shared=True)


def all_of_a_text(c: ModelConfig, storage: str | None, lookup: Lookup) -> MemoryConfig:
    """A memory of all that is read; of a model without memory layers, none."""
    return MemoryConfig(storage=storage, lookup=lookup) if c.memory_layers else EVERYTHING


def last_context(c: ModelConfig, more: int = 0) -> int:
    """How many tokens of a text stay in the window, when so many more are to have room beside them.

    Of a model without memory layers all that fit, as it has no others; else what its configuration
    says, or LongLLaMA's 1,024.
    """
    room = c.local_context - more
    return max(1, min(c.last_context_length or LAST_CONTEXT, room) if c.memory_layers else room)


@dataclasses.dataclass
class State:
    """What a model has read: the local window and the memory.

    Reading on changes it; `copy` it first to ask several things of one text.

    Attributes:
      model, mesh: of the LanguageModel that read it.
      cache, memory: on the devices.
      config: how memory was asked for.
      places: of each row's window, in use.
      held: tokens of each window that are none of padding.
      stored: tokens moved into each row of memory.
      limit: of memory, known here so that no window waits for the devices to say it.
      borrowed: whether another state has the same memory, which then must not be used up.
    """

    model: ModelConfig
    mesh: Mesh | None
    cache: Cache
    memory: Memory
    config: MemoryConfig
    places: Int[np.ndarray, " B"]
    held: Int[np.ndarray, " B"]
    stored: Int[np.ndarray, " rows"]
    limit: int = 0
    borrowed: bool = False

    @property
    def rows(self) -> int:
        return len(self.places)

    def copy(self) -> State:
        """Another one of the same content. The memory is copied once one of them adds to it."""
        self.borrowed = True
        cache = jax.tree.map(jnp.copy, self.cache)
        counts = (x.copy() for x in (self.places, self.held, self.stored))
        like = self.model, self.mesh, cache, self.memory, self.config
        return State(*like, *counts, self.limit, borrowed=True)

    def repeated(self, rows: int) -> State:
        """So many rows of what the only row of this one holds, to ask several things side by side.

        Raises:
          UserError: this one has several rows, or a memory for them to share.
        """
        if self.rows > 1 or self.config.shared:
            raise UserError("only a state of one row, with a memory of its own, can be repeated")

        def repeat(x):
            return jnp.repeat(x, rows, axis=0) if x.ndim else x

        cache, memory = jax.tree.map(repeat, (self.cache, self.memory))
        counts = (np.repeat(x, rows) for x in (self.places, self.held, self.stored))
        return State(self.model, self.mesh, cache, memory, self.config, *counts, self.limit)

    def own(self) -> None:
        """Makes the memory this state's alone."""
        if self.borrowed:
            self.memory, self.borrowed = jax.tree.map(jnp.copy, self.memory), False


def begin(lm: Model, state: State | None, config: MemoryConfig, rows: int) -> State:
    """The state to read on from: the given one, or one in which nothing was read.

    Raises:
      UserError: it is of another model or number of rows, or has a memory of its own; or a memory
        for a model without memory layers.
    """
    if state is not None:
        if state.rows != rows:
            raise UserError(f"{rows} documents for a state of {state.rows}: give as many")
        if (state.model, state.mesh) != (lm.config, lm.mesh):
            raise UserError("a state of another model, or on other devices: read the text again")
        if config != EVERYTHING:
            raise UserError(
                "a state has a memory of its own, which cannot be changed: give a state or how "
                "memory is wanted, not both"
            )
        return state
    if not lm.config.memory_layers and (config.size or config.lookup != Dense()):
        asked = f"of {config.size} tokens" if config.size else f"with {config.lookup}"
        raise UserError(
            f"a memory {asked} for a model without memory layers: it reads its local window alone; "
            "leave the memory out"
        )
    if lm.config.memory_before:
        config = _of_one_window(config, lm.config.local_context)
    dtype = lm.params["embedding"].dtype
    storage = config.storage or lm.config.memory_dtype or dtype.name
    memory = memories.empty(lm.config, 1 if config.shared else rows, 0, storage, lm.mesh)
    cache = inference.empty_cache(lm.config, rows, dtype, lm.mesh)
    counts = (np.zeros(n, int) for n in (rows, rows, memory.rows))
    return State(lm.config, lm.mesh, cache, memory, config, *counts)


def _of_one_window(config: MemoryConfig, context: int) -> MemoryConfig:
    """Of a model whose memory stands right before the window: there is a place for one."""
    if config.size is not None and config.size > context:
        raise UserError(
            f"a memory of {config.size} tokens for a model that sees the window before "
            f"(memory_before): give at most {context}, or leave the size out"
        )
    return dataclasses.replace(config, size=context if config.size is None else config.size)


class Piece(NamedTuple):
    """A piece of every row that was read."""

    start: Int[np.ndarray, " B"]  # its first token in the text
    length: Int[np.ndarray, " B"]
    hidden: Float[jax.Array, "B T E"]  # of its tokens; what comes after them is of no meaning

    def columns(self) -> slice:
        """Of the text, where all rows have the same length."""
        return slice(self.start[0], self.start[0] + self.length[0])


def pieces(
    lm: Model,
    state: State,
    tokens: Int[np.ndarray, "B N"],
    valid: Bool[np.ndarray, "B N"],
    *,
    last: int | None,
    progress: Callable[[int], Any] | None,
    lengths: Int[np.ndarray, " B"] | None = None,
    new_tokens: int = 0,
) -> Iterator[Piece]:
    """Reads text into a state, which changes, piece by piece.

    Args:
      valid: False for padding.
      last: last_context_length, None for its default.
      progress: called with the number of tokens read.
      lengths: tokens of each row, the rest is nothing; None: all.
      new_tokens: that will follow, for the size of the memory.

    Raises:
      UserError: last_context_length is out of range, or memory is too small and no ring.
    """
    context = lm.config.local_context
    if last is None:
        last = min(lm.config.last_context_length or LAST_CONTEXT, context)
    if not 1 <= last <= context:
        raise UserError(f"last_context_length = {last}: give 1 to {context}, the local context")
    rows = range(state.rows)
    lengths = np.full(state.rows, tokens.shape[1]) if lengths is None else lengths
    plans = [inference.cut(int(lengths[r]), int(state.places[r]), context, last) for r in rows]
    _reserve(lm, state, plans, valid, new_tokens)
    steps = max(len(plan) for plan in plans)
    # Rows with less to read wait, so that all end together.
    plans = [[(0, 0, False)] * (steps - len(plan)) + plan for plan in plans]
    running: collections.deque = collections.deque()
    for of_rows in zip(*plans, strict=True):
        start, stop, moves = (np.asarray(x) for x in zip(*of_rows, strict=True))
        _move(lm, state, moves)
        length = stop - start
        width = min(context, max(16, 1 << int(length.max() - 1).bit_length()))
        cut = [slice(start[row], stop[row]) for row in rows]
        piece = np.stack([widened(tokens[row, cut[row]], width) for row in rows])
        shown = np.stack([widened(valid[row, cut[row]], width) for row in rows])
        hidden, state.cache = inference.read(
            *(lm.config, state.config.lookup, lm.mesh, lm.params),
            *(state.cache, state.memory, piece, shown, length.astype(np.int32)),
        )
        state.places += length
        state.held += shown.sum(1)
        running.append(hidden)
        if len(running) > 2:  # not further ahead of the device than that
            running.popleft().block_until_ready()
        yield Piece(start, length, hidden)
        if progress is not None:
            progress(int(shown.sum()))


def remember(
    lm: Model,
    state: State,
    windows: Int[np.ndarray, "N T"],
    progress: Callable[[int], Any] | None,
) -> None:
    """Reads windows, each as if it were the only one, into the memory that a state's rows share.

    Raises:
      UserError: there is no room in memory, and it is no ring.
    """
    stored = int(state.stored[0] + state.held.sum()) + windows.size
    _check_room(state, stored)
    _grow(lm, state, stored, stored)
    _move(lm, state, state.places > 0)
    nothing = memories.empty(lm.config, 1, 0, state.memory.storage, lm.mesh)
    for start in range(0, len(windows), state.rows):
        piece = windows[start : start + state.rows]
        length = np.zeros(state.rows, int)
        length[: len(piece)] = windows.shape[1]
        piece = np.pad(piece, [(0, state.rows - len(piece)), (0, 0)])
        _, state.cache = inference.read(
            *(lm.config, state.config.lookup, lm.mesh, lm.params),
            *(state.cache, nothing, piece, np.ones_like(piece, bool), length.astype(np.int32)),
        )
        state.places += length
        state.held += length
        _move(lm, state, length > 0)
        if progress is not None:
            progress(int(length.sum()))


def make_room(lm: Model, state: State, rows: Bool[np.ndarray, " B"]) -> None:
    """A place for one more token of some rows: empties their windows where these are full."""
    _move(lm, state, rows & (state.places == lm.config.local_context))
    state.places += rows
    state.held += rows


def _move(lm: Model, state: State, rows: Bool[np.ndarray, " B"]) -> None:
    """Empties the windows of some rows."""
    if not rows.any():
        return
    moved = np.where(rows, state.held, 0)
    state.stored += moved.sum() if state.config.shared else moved
    _grow(lm, state, int(state.stored.max()), 2 * int(state.stored.max()))
    state.own()
    cache = state.cache
    valid, length, state.memory = inference.move(
        *(lm.config, lm.mesh, cache.layers, cache.valid, cache.length), *(state.memory, rows)
    )
    state.cache = Cache(cache.layers, valid, length)
    state.places[rows] = state.held[rows] = 0


def _grow(lm: Model, state: State, needed: int, wanted: int) -> None:
    """Room for `wanted` tokens in each row of memory, if it has not got the `needed` one."""
    if state.config.size is not None:
        needed, wanted = (min(tokens, state.config.size) for tokens in (needed, wanted))
    if lm.config.memory_layers and needed > state.limit:
        state.own()
        state.memory, state.limit = memories.grow(state.memory, wanted, lm.mesh), wanted


def _reserve(lm: Model, state: State, plans, valid, new_tokens: int) -> None:
    """Room in memory for all that will leave the window.

    Raises:
      UserError: there is none, and the memory is no ring.
    """
    if not lm.config.memory_layers:
        return
    moved, later = np.zeros(state.rows, int), np.zeros(state.rows, int)
    for row, plan in enumerate(plans):
        places, held = state.places[row], state.held[row]
        for start, stop, moves in plan:
            moved[row] += held if moves else 0
            places, held = (0, 0) if moves else (places, held)
            places, held = places + stop - start, held + valid[row, start:stop].sum()
        # Of new tokens each is read but the last. The window is emptied when it is full.
        overflow = places + new_tokens - 1 - lm.config.local_context
        if overflow > 0:
            windows = (overflow - 1) // lm.config.local_context
            later[row] = held - places + (1 + windows) * lm.config.local_context
    more = moved.sum() if state.config.shared else moved
    needed = int((state.stored + more + (later.sum() if state.config.shared else later)).max())
    _check_room(state, needed)
    # Writing may end early: room for a part of it, which grows as it is needed.
    wanted = min(needed, int((state.stored + more).max()) + max(4096, int(more.max())))
    _grow(lm, state, wanted, wanted)


def _check_room(state: State, needed: int) -> None:
    size = state.config.size
    if size is not None and needed > size and not state.config.ring:
        raise UserError(
            f"the memory of {size} tokens is full before the end of the text, which needs "
            f"{needed}: raise MemoryConfig.size, or set MemoryConfig.ring to forget the oldest"
        )


def widened(x: np.ndarray, width: int) -> np.ndarray:
    """x [..., n] with zeros up to the width."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
