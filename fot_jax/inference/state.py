"""What a model has read: the local window and the memory of each row, and what is kept in them.

Letters: B rows, T tokens of a piece, E model dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, DTypeLike, Float, Int

from fot_jax.common.errors import UserError, because_of, check_range
from fot_jax.common.paths import in_bucket, path_of
from fot_jax.inference import forward, segment_files
from fot_jax.inference.forward import Cache
from fot_jax.inference.segment_files import Segments
from fot_jax.model import memory as memories
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Dense, IndexedTopK, Lookup
from fot_jax.model.memory import Memory


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """What is kept of text that has left the local window, and how it is read.

    Attributes:
      size: most tokens kept, of each row, or of all together where they share; None: all.
      ring: what happens beyond them: True forgets the oldest, False refuses to read more.
      storage: float32, bfloat16, float16, int8 (with a scale for each key and value) or int4 (with
        scales for every 32 elements of one); None: ModelConfig.memory_dtype or, where that is None
        too, the type that the model computes in.
      lookup: Dense() attends to all of memory, TopK(k) to the best k keys of each head and query,
        ApproximateTopK(k, recall) to most of these, and IndexedTopK(k, visited) to the best ones
        among as many as an index leads to.
      shared: one memory for all rows of a batch (the paper's multi-doc setting).
      directory: a new one of this machine, to keep memory in files as text is read (see
        segment_files.py), so that it may be larger than RAM; None: in RAM. Go on from it with
        LanguageModel.load_memory. Where a process was killed, `read` or `generate` of the same text
        with the same directory goes on from what is there, by whatever lookup it is given then: of
        one text, without a mask.

    In a directory, or with an index, memory is in segments: of one text, or of several that share
    it, and nothing is forgotten. It is on one device or, where several processes run together, on
    one of each: all have their share of it in files of their own.
    """

    size: int | None = None
    ring: bool = True
    storage: str | None = None
    lookup: Lookup = Dense()
    shared: bool = False
    directory: str | None = None

    def __post_init__(self):
        check_range("MemoryConfig", 0, 2**30, whole=True, size=self.size)
        if self.size is not None:  # of NumPy, say, which JSON does not know
            object.__setattr__(self, "size", int(self.size))
        if self.storage not in (None, *memories.STORAGE):
            raise UserError(
                f"MemoryConfig.storage = {self.storage!r}: choose one of "
                f"{', '.join(memories.STORAGE)}"
            )
        if self.size:
            self.lookup.check(self.size)
        if self.directory is not None:
            path_of(self.directory)
            if in_bucket(self.directory):
                raise UserError(
                    f"{self.directory}: files in a bucket cannot be memory-mapped: give a "
                    "directory of this machine"
                )
        if self.in_segments and self.size is not None and self.ring:
            raise UserError(
                f"{self.segments}, which forgets nothing: leave MemoryConfig.size out, or set "
                "MemoryConfig.ring to False"
            )

    @property
    def in_segments(self) -> bool:
        """Whether memory is kept in segments."""
        return self.directory is not None or isinstance(self.lookup, IndexedTopK)

    @property
    def segments(self) -> str:
        """What messages call such a memory."""
        where = "with an index" if self.directory is None else "in a directory"
        return f"{self.directory or self.lookup}: a memory {where}"


LAST_CONTEXT = 1024  # tokens of a text that stay in the window, as in LongLLaMA
EVERYTHING = MemoryConfig()
SHARED = MemoryConfig(shared=True)
# Fields of ModelConfig on which no key or value that was read depends: how the next text is read.
SETTINGS_OF_READING = ("last_context_length", "memory_dtype")


def all_of_a_text(c: ModelConfig, storage: str | None, lookup: Lookup) -> MemoryConfig:
    """A memory of all that is read; of a model without memory layers, none."""
    return MemoryConfig(storage=storage, lookup=lookup) if c.memory_layers else EVERYTHING


def check_texts(owner: str, rows: int, storage: str | None, lookup: Lookup) -> None:
    """Checks fields of an evaluation that reads texts, so many at a time, each into a memory.

    Raises:
      UserError: no such storage, or an index, for more than one text at a time.
    """
    with because_of(f"{owner}.storage"):
        MemoryConfig(storage=storage)
    if isinstance(lookup, IndexedTopK) and rows > 1:
        raise UserError(
            f"{owner}.rows = {rows} with {lookup}: documents that have a memory with an index each "
            f"are read one by one: set {owner}.rows = 1"
        )


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
      config: what is kept in memory, and how it is read.
      places: of each row's window, in use.
      held: tokens of each window that are none of padding.
      stored: tokens moved into each row of memory.
      limit: of memory, known here so that no window waits for the devices to say it.
      borrowed: whether another state has the same memory, which then must not be used up.
      segments: that come before `memory`, where it is kept in segments.
      closes: whether this state writes more of them.
      reader: the LanguageModel.
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
    segments: Segments | None = None
    closes: bool = False
    reader: Any = dataclasses.field(default=None, repr=False)

    @property
    def rows(self) -> int:
        return len(self.places)

    def copy(self) -> State:
        """Another one of the same content. The memory is copied once one of them adds to it.

        It closes no segments: what it reads stays in RAM.
        """
        self.borrowed = True
        cache = jax.tree.map(jnp.copy, self.cache)
        return dataclasses.replace(
            self,
            cache=cache,
            places=self.places.copy(),
            held=self.held.copy(),
            stored=self.stored.copy(),
            closes=False,
        )

    def repeated(self, rows: int) -> State:
        """A state of several rows, each with what the only row of this one holds.

        Raises:
          UserError: this one has several rows, or a memory for them to share.
        """
        if self.rows > 1 or self.config.shared:
            raise UserError("only a state of one row, with a memory of its own, can be repeated")

        def repeat(x):  # or copy: evicting uses up what a state has
            return jnp.repeat(x, rows, axis=0) if x.ndim else jnp.copy(x)

        cache, memory = jax.tree.map(repeat, (self.cache, self.memory))
        return dataclasses.replace(
            self,
            cache=cache,
            memory=memory,
            places=np.repeat(self.places, rows),
            held=np.repeat(self.held, rows),
            stored=np.repeat(self.stored, rows),
            borrowed=False,
            closes=False,
        )

    def run(
        self,
        params: Any,
        tokens: Int[np.ndarray | jax.Array, "B T"],
        valid: Bool[np.ndarray, "B T"],
        advance: Int[np.ndarray, " B"],
        for_memory: bool = False,
    ) -> Float[jax.Array, "B T E"]:
        """Hidden states of the next piece of every row, which is put into the window.

        Arguments as of `forward.run`.
        """
        piece = {"tokens": tokens, "valid": valid, "advance": advance.astype(np.int32)}
        piece |= {"params": params, "cache": self.cache, "memory": self.memory}
        piece["for_memory"] = for_memory
        if self.has_segments:
            piece |= {"closed": self.segments.of_layers(), "in_closed": self.segments.tokens}
            hidden, self.cache = forward.run_over_segments(self.model, self.config.lookup, **piece)
        else:
            hidden, self.cache = forward.run(self.model, self.config.lookup, self.mesh, **piece)
        return hidden

    @property
    def has_segments(self) -> bool:
        """Whether a part of the memory is in closed segments."""
        return self.segments is not None and self.segments.tokens > 0

    def make_room(self, rows: Bool[np.ndarray, " B"]) -> None:
        """Takes a place for one more token of some rows, whose windows are emptied where full."""
        self.evict(rows & (self.places == self.model.local_context))
        self.places += rows
        self.held += rows

    def evict(self, rows: Bool[np.ndarray, " B"], apart: bool = False) -> None:
        """Empties the windows of some rows; memory layers append them to their memory.

        Args:
          apart: whether they are no text together: as of forward.evict.
        """
        if not rows.any():
            return
        moved = np.where(rows, self.held, 0)
        total = self.stored + (moved.sum() if self.config.shared else moved)
        if self.closes and total[0] - self.segments.tokens > self.segments.slots:
            count = int(self.stored[0]) - self.segments.tokens
            self.segments = self.segments.with_closed(self.memory, count)
            self._own_memory()
            self.memory = segment_files.restart(self.memory)
        self.stored = total
        needed, closed = int(total.max()), self.segments.tokens if self.segments else 0
        self.reserve(needed, needed + needed - closed)
        self._own_memory()
        valid, length, self.memory = forward.evict(
            self.model,
            self.mesh,
            layers=self.cache.layers,
            valid=self.cache.valid,
            length=self.cache.length,
            memory=self.memory,
            rows=rows,
            apart=apart,
        )
        self.cache = Cache(self.cache.layers, valid, length)
        self.places[rows] = self.held[rows] = 0

    def reserve(self, needed: int, wanted: int) -> None:
        """Room for `wanted` tokens in each row of memory, if it has less than the `needed`."""
        if self.config.size is not None:
            needed, wanted = min(needed, self.config.size), min(wanted, self.config.size)
        if self.segments is not None:
            needed, wanted = needed - self.segments.tokens, wanted - self.segments.tokens
        if self.closes:
            needed, wanted = min(needed, self.segments.slots), min(wanted, self.segments.slots)
        if self.model.memory_layers and needed > self.limit:
            self._own_memory()
            self.memory, self.limit = memories.grow(self.memory, wanted, self.mesh), wanted

    def check_room(self, needed: int) -> None:
        """Raises UserError where so many tokens do not fit, and the memory is no ring."""
        size = self.config.size
        if size is not None and needed > size and not self.config.ring:
            raise UserError(
                f"the memory of {size} tokens is full before the end of the text, which needs "
                f"{needed}: raise MemoryConfig.size, or set MemoryConfig.ring to forget the oldest"
            )

    def _own_memory(self) -> None:
        """Makes the memory this state's alone: compiled programs use it up."""
        if self.borrowed:
            self.memory, self.borrowed = jax.tree.map(jnp.copy, self.memory), False


def begin(
    c: ModelConfig,
    dtype: DTypeLike,
    mesh: Mesh | None,
    *,
    rows: int,
    config: MemoryConfig,
    state: State | None,
) -> State:
    """The state to read on from: the given one, or one in which nothing was read.

    Args:
      c: of the model that reads.
      dtype: that it computes in.
      mesh: devices that hold it.
      rows: texts that are read side by side.
      config: of a new memory.
      state: what was read before.

    Raises:
      UserError: the state is of another number of rows, or has a memory of its own; or a memory
        for a model without memory layers.
    """
    if state is not None:
        if state.rows != rows:
            raise UserError(f"{rows} documents for a state of {state.rows}: give as many")
        if config != EVERYTHING:
            raise UserError(
                "a state has a memory of its own, which cannot be changed: give a state or how "
                "memory is wanted, not both"
            )
        return state
    asked = {
        f"in {config.directory}": config.directory,
        f"of {config.size} tokens": config.size,
        f"with {config.lookup}": config.lookup != Dense(),
        f"of {config.storage}": config.storage,
    }
    if not c.memory_layers and any(asked.values()):
        wanted = next(words for words, given in asked.items() if given)
        raise UserError(
            f"a memory {wanted} for a model without memory layers: it reads its local window "
            "alone; leave the memory out"
        )
    if config.in_segments:
        check_segments(c, mesh, rows, config)
    if c.memory_before:
        config = _of_one_window(config, c.local_context)
    storage = config.storage or c.memory_dtype or jnp.dtype(dtype).name
    memory = memories.empty(c, 1 if config.shared else rows, 0, storage, mesh)
    return State(
        model=c,
        mesh=mesh,
        cache=forward.empty_cache(c, rows, dtype, mesh),
        memory=memory,
        config=config,
        places=np.zeros(rows, int),
        held=np.zeros(rows, int),
        stored=np.zeros(memory.rows, int),
    )


def check_segments(c: ModelConfig, mesh: Mesh | None, rows: int, config: MemoryConfig) -> None:
    """Checks that a memory can be in segments.

    Raises:
      UserError: it cannot, of such a model or on such devices; or of several texts.
    """
    if c.memory_before:
        raise UserError(
            f"{config.segments}, and that of the model is one window (memory_before), which needs "
            "none: leave it out"
        )
    if mesh is not None:
        raise UserError(
            f"{config.segments}, which is read on one device of a process, and the model is on "
            f"{mesh.size}: load it on one, or leave the memory as it is by default"
        )
    if rows > 1 and not config.shared:
        raise UserError(
            f"{config.segments}, which is of one text, and {rows} are given: read them one by one, "
            "or let them share a memory"
        )


def _of_one_window(config: MemoryConfig, context: int) -> MemoryConfig:
    """For a model whose memory is at positions right before the window: at most one window."""
    if config.size is not None and config.size > context:
        raise UserError(
            f"a memory of {config.size} tokens for a model that sees the window before "
            f"(memory_before): give at most {context}, or leave the size out"
        )
    return dataclasses.replace(config, size=context if config.size is None else config.size)
