"""LanguageModel: a checkpoint as a library object that reads long text and writes more of it.

    lm = fot_jax.LanguageModel.load("workdirs/quickstart")
    state = lm.read(lm.vocabulary.encode(book))         # into memory, window by window
    lm.save_memory(state, "book.memory")                # and back: lm.load_memory("book.memory")
    lm.generate(lm.vocabulary.encode("def "), 100, state=state.copy())

How text is cut into windows, and what happens when the window is full, is that of LongLLaMA: see
`inference.cut`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from fot_jax.errors import LARGEST_SEED, UserError, check_range
from fot_jax.model import inference, transformer
from fot_jax.model import memory as memories
from fot_jax.model.inference import Cache
from fot_jax.model.lookup import Dense, Lookup
from fot_jax.model.memory import Memory
from fot_jax.model.transformer import ModelConfig, Transformer


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """What is kept of text that has left the local window, and how it is read.

    Attributes:
      size: most tokens kept, of each row; None: all that is ever read.
      ring: what happens beyond them: True forgets the oldest, False refuses to read more.
      storage: float32, bfloat16, float16 or int8 (with a scale for each key and value).
      lookup: Dense() attends to all of memory, TopK(k) to the best k keys of each head and query,
        ApproximateTopK(k, recall) to most of these.
      shared: one memory for all rows of a batch (the paper's multi-doc setting).
    """

    size: int | None = None
    ring: bool = True
    storage: str = "float32"
    lookup: Lookup = Dense()
    shared: bool = False

    def __post_init__(self):
        check_range("MemoryConfig", 0, 2**31 - 1, size=self.size)
        if self.storage not in memories.STORAGE:
            raise UserError(
                f"MemoryConfig.storage = {self.storage!r}: choose one of "
                f"{', '.join(memories.STORAGE)}"
            )
        if self.size:
            self.lookup.check(self.size)


class Scores(NamedTuple):
    """How well each token but the first was predicted by those before it."""

    nats: Float[np.ndarray, "B N-1"]  # minus log probability
    correct: Bool[np.ndarray, "B N-1"]  # it was the most likely token


@dataclasses.dataclass
class State:
    """What a model has read: the local window and the memory.

    Reading on changes it; `copy` it first to ask several things of one text.
    """

    cache: Cache
    memory: Memory
    config: MemoryConfig
    places: Int[np.ndarray, " B"]  # of the window, in use
    stored: int  # most tokens in memory of any row; padding counts

    @property
    def rows(self) -> int:
        return len(self.places)

    def copy(self) -> State:
        """Another one of the same content; for a moment, twice the memory."""
        arrays = jax.tree.map(jnp.copy, (self.cache, self.memory))
        return State(*arrays, self.config, self.places.copy(), self.stored)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model with its parameters and vocabulary; immutable.

    Attributes:
      config: of the model.
      params: from `inference.parameters_by_layer`; matrices in the type computed in.
      vocabulary: data/vocabulary.py.
      mesh: devices that hold it. Over its axis "memory", if there is one, memory is sharded;
        everything else is replicated.
    """

    config: ModelConfig
    params: Any
    vocabulary: Any = None
    mesh: Mesh | None = None

    # --- Loading -----------------------------------------------------------------------------

    @staticmethod
    def load(path: epath.PathLike, *, dtype: str = "float32", devices: int = 1) -> LanguageModel:
        """Loads a checkpoint: a workdir, or one step in its `checkpoints` directory.

        Args:
          dtype: float32 or bfloat16, of activations and matrices.
          devices: of this machine, that memory is sharded over.

        Raises:
          UserError: nothing there, or nothing whole; fewer devices.
        """
        from fot_jax.data.vocabulary import load_vocabulary
        from fot_jax.training import checkpoint

        mesh = None
        if devices > 1:
            at_hand = jax.local_devices()
            if devices > len(at_hand):
                raise UserError(
                    f"devices = {devices}, but this machine has {len(at_hand)}: give at most these"
                )
            mesh = Mesh(np.asarray(at_hand[:devices]), (memories.AXIS,))
        config, params, workdir = checkpoint.load_model(path)
        params = inference.parameters_by_layer(params, jnp.dtype(dtype), use_up=True)
        if mesh is not None:
            params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        return LanguageModel(config, params, load_vocabulary(workdir / "vocabulary"), mesh)

    @staticmethod
    def of(model: Transformer, params: Any, vocabulary: Any = None) -> LanguageModel:
        """From parameters in training, wherever they are sharded."""
        sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if isinstance(mesh, AbstractMesh) or mesh is not None and mesh.size == 1:
            mesh = None
        by_layer = inference.parameters_by_layer(params, model.dtype)
        return LanguageModel(model.config, by_layer, vocabulary, mesh)

    # --- Reading -----------------------------------------------------------------------------

    def read(
        self,
        tokens: Int[np.ndarray, "B N"] | Sequence[int],
        *,
        mask: np.ndarray | None = None,
        last_context_length: int | None = None,
        memory: MemoryConfig = MemoryConfig(),
        state: State | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> State:
        """Reads text, and returns what is then in the window and in memory.

        Args: as of `logits`. One document may be given without the axis of rows.
        """
        tokens, valid = self._text(np.atleast_2d(np.asarray(tokens)), mask)
        state = self._begin(state, memory, len(tokens))
        for _ in self._pieces(state, tokens, valid, None, last_context_length, 0, progress):
            pass
        return state

    def logits(
        self,
        tokens: Int[np.ndarray, "B N"],
        *,
        mask: Bool[np.ndarray, "B N"] | None = None,
        last_context_length: int | None = None,
        memory: MemoryConfig = MemoryConfig(),
        state: State | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Float[np.ndarray, "B N V"]:
        """Next-token logits after every token, float32.

        Args:
          tokens: documents of the same length, side by side.
          mask: 0 where a token is padding, to the left as a rule: nobody sees it, but it takes a
            place of its window.
          last_context_length: tokens that stay in the window at the end, at most the local
            context; by default 1024, or the local context where that is less.
          memory: what is kept of what leaves the window; not with `state`, which has its own.
          state: what was read before; changed. None: nothing.
          progress: called with the number of tokens of a piece when it has been read.

        Raises:
          UserError: no tokens, or tokens outside the vocabulary; a memory that the model, the
            state or the text does not fit.
        """
        tokens, valid = self._text(tokens, mask)
        state = self._begin(state, memory, len(tokens))
        out = np.empty((*tokens.shape, self.config.vocab_size), np.float32)
        for start, length, hidden in self._pieces(
            state, tokens, valid, None, last_context_length, 0, progress
        ):
            columns = slice(start[0], start[0] + length[0])
            out[:, columns] = _logits(self.config, self.params, hidden)[:, : length[0]]
        return out

    def score(
        self,
        tokens: Int[np.ndarray, "B N"],
        *,
        mask: Bool[np.ndarray, "B N"] | None = None,
        last_context_length: int | None = None,
        memory: MemoryConfig = MemoryConfig(),
        state: State | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Scores:
        """How well each token but the first of every row is predicted by those before it.

        Arguments as of `logits`; the last token is not read.
        """
        tokens, valid = self._text(tokens, mask)
        if tokens.shape[1] < 2:
            raise UserError("one token alone has no score: give at least two")
        targets = tokens[:, 1:]
        state = self._begin(state, memory, len(tokens))
        nats, correct = np.empty(targets.shape, np.float32), np.empty(targets.shape, bool)
        for start, length, hidden in self._pieces(
            state, tokens[:, :-1], valid[:, :-1], None, last_context_length, 0, progress
        ):
            columns = slice(start[0], start[0] + length[0])
            of_piece = _widened(targets[:, columns], hidden.shape[1])
            scored = _score(self.config, self.mesh, self.params, hidden, of_piece)
            nats[:, columns], correct[:, columns] = (np.asarray(x)[:, : length[0]] for x in scored)
        return Scores(nats, correct)

    # --- Writing -----------------------------------------------------------------------------

    def generate(
        self,
        tokens: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
        max_new_tokens: int,
        **options: Any,
    ) -> list[int] | list[list[int]]:
        """Continues one prompt, or each of several. Options as of `stream`.

        Returns:
          The new tokens, up to but without the first stop token: a list of them for a prompt, a list
          of lists for several.
        """
        single = len(tokens) == 0 or np.ndim(tokens[0]) == 0
        prompts = [tokens] if single else tokens
        new: list[list[int]] = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, **options):
            for row, token in zip(new, step, strict=True):
                if token is not None:
                    row.append(token)
        return new[0] if single else new

    def stream(
        self,
        prompts: Sequence[Sequence[int]] | Int[np.ndarray, "B N"],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop: Sequence[int] = (),
        mask: Bool[np.ndarray, "B N"] | None = None,
        last_context_length: int | None = None,
        memory: MemoryConfig = MemoryConfig(),
        state: State | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Iterator[list[int | None]]:
        """Continues prompts, token by token.

        Args:
          prompts: of different lengths: each is read and continued as if alone. With `mask`, an
            array padded to one length, as of `logits`.
          temperature: 0 takes the most likely token.
          top_p: draws among the fewest tokens whose probabilities sum to this.
          seed: of the draws, one for each row; of a number s, row r has s + r.
          stop: tokens that end a row.
          mask, last_context_length, memory, state, progress: as of `logits`.

        Yields:
          After each step the new token of every row, None for rows that have ended.

        Raises:
          UserError: as of `logits`; or a number out of range.
        """
        ragged = mask is None
        if ragged and any(len(prompt) == 0 for prompt in prompts) or not len(prompts):
            raise UserError("the prompt is empty: give at least one token")
        rows = len(prompts)
        check_range("generate", 0, max_new_tokens=max_new_tokens, temperature=temperature)
        check_range("generate", 0, 1, top_p=top_p)
        seeds = [seed + row for row in range(rows)] if np.ndim(seed) == 0 else list(seed)
        if len(seeds) != rows:
            raise UserError(f"{len(seeds)} seeds for {rows} prompts: give one for each")
        for each in seeds:
            check_range("generate", 0, LARGEST_SEED, seed=each)
        lengths = np.asarray([len(prompt) for prompt in prompts])
        padded = np.zeros((rows, lengths.max()), np.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        tokens, valid = self._text(padded, mask)
        state = self._begin(state, memory, rows)
        for _, length, hidden in self._pieces(
            state, tokens, valid, lengths, last_context_length, max_new_tokens, progress
        ):
            last = length
        if max_new_tokens:
            yield from self._write(
                state, hidden, last, max_new_tokens, temperature, top_p, seeds, frozenset(stop)
            )

    def _write(self, state, hidden, length, new_tokens, temperature, top_p, seeds, stop):
        """The steps of `stream`, after the prompts are read."""
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        how = _Draw("most likely" if temperature == 0 else "top p" if top_p < 1 else "any")
        numbers = np.float32(temperature or 1), np.float32(top_p)
        draw = functools.partial(_first_token, self.config, how, self.mesh, self.params)
        token = draw(hidden, length, keys, *numbers)
        ended = np.zeros(len(seeds), bool)
        for step in range(1, new_tokens + 1):
            following = None
            if step < new_tokens:  # computed while this token is fetched
                self._make_room(state, np.ones(state.rows, int))
                following, state.cache = _next_token(
                    *(self.config, how, state.config.lookup, self.mesh, self.params),
                    *(state.cache, state.memory, token, keys, np.int32(step), *numbers),
                )
                state.places += 1
            fetched = np.asarray(token).tolist()
            ended |= [each in stop for each in fetched]
            yield [None if end else each for each, end in zip(fetched, ended, strict=True)]
            if ended.all():
                return
            token = following

    # --- Memory on disk ----------------------------------------------------------------------

    def save_memory(self, state: State, path: epath.PathLike) -> None:
        """Writes all that `state` holds into a new directory, in place of an older memory."""
        from fot_jax import memory_files

        memory_files.save(path, state, self._fingerprint, self.mesh)

    def load_memory(self, path: epath.PathLike, lookup: Lookup = Dense()) -> State:
        """What was read before, from `save_memory`.

        Raises:
          UserError: nothing there, damaged, or the memory of another model.
        """
        from fot_jax import memory_files

        return memory_files.load(path, self.config, self._fingerprint, lookup, self.mesh)

    @functools.cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """What keys and values depend on."""
        from fot_jax.training.checkpoint_items import checksums

        config = dataclasses.asdict(self.config)
        return {"model": config, "parameters": checksums(jax.tree.leaves(self.params))}

    # --- Piece by piece ----------------------------------------------------------------------

    def _text(self, tokens, mask) -> tuple[np.ndarray, np.ndarray]:
        """Checked tokens [B, N] int32, and where they are none of padding."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) and tokens.size:
            raise UserError(
                f"tokens of shape {tokens.shape} and type {tokens.dtype}: give whole numbers, "
                "[documents, length]"
            )
        if not tokens.size:
            raise UserError("the text is empty: give at least one token")
        valid = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask).astype(bool)
        if valid.shape != tokens.shape:
            raise UserError(f"a mask of shape {valid.shape} for tokens of shape {tokens.shape}")
        outside = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
        if outside.size:
            raise UserError(
                f"token {outside[0]} is outside the model's vocabulary of "
                f"{self.config.vocab_size}: the text was tokenized for another model"
            )
        return tokens.astype(np.int32), valid

    def _begin(self, state: State | None, config: MemoryConfig, rows: int) -> State:
        if state is not None:
            if state.rows != rows:
                raise UserError(f"{rows} documents for a state of {state.rows}: give as many")
            return state
        if config.size and not self.config.memory_layers:
            raise UserError(
                f"a memory of {config.size} tokens for a model without memory layers: it reads its "
                "local window alone; leave the memory out"
            )
        memory = memories.empty(
            self.config, 1 if config.shared else rows, 0, config.storage, self.mesh
        )
        dtype = self.params["embedding"].dtype
        cache = inference.empty_cache(self.config, rows, dtype, self.mesh)
        return State(cache, memory, config, np.zeros(rows, int), 0)

    def _pieces(self, state, tokens, valid, lengths, last, new_tokens, progress):
        """Reads text: yields (start [B], length [B], hidden [B, T, E]) of each piece.

        Args:
          lengths: [B] tokens of each row, the rest is nothing; None: all.
          last: last_context_length.
          new_tokens: that will follow, for the size of the memory.
        """
        context = self.config.local_context
        last = min(1024, context) if last is None else last
        if not 1 <= last <= context:
            raise UserError(
                f"last_context_length = {last}: give 1 to {context}, the local context"
            )
        rows = range(state.rows)
        lengths = np.full(state.rows, tokens.shape[1]) if lengths is None else lengths
        plans = [inference.cut(int(lengths[r]), int(state.places[r]), context, last) for r in rows]
        self._reserve(state, plans, new_tokens)
        steps = max(len(plan) for plan in plans)
        # Rows with less to read wait, so that all end together.
        plans = [[(0, 0, False)] * (steps - len(plan)) + plan for plan in plans]
        running: collections.deque = collections.deque()
        for pieces in zip(*plans, strict=True):
            start, stop, moves = (np.asarray(x) for x in zip(*pieces, strict=True))
            self._move(state, moves)
            length = stop - start
            width = min(context, max(16, 1 << int(length.max() - 1).bit_length()))
            cut = [slice(start[row], stop[row]) for row in rows]
            piece = np.stack([_widened(tokens[row, cut[row]], width) for row in rows])
            shown = np.stack([_widened(valid[row, cut[row]], width) for row in rows])
            hidden, state.cache = inference.read(
                *(self.config, state.config.lookup, self.mesh, self.params),
                *(state.cache, state.memory, piece, shown, length.astype(np.int32)),
            )
            state.places += length
            running.append(hidden)
            if len(running) > 2:  # not further ahead of the device than that
                running.popleft().block_until_ready()
            yield start, length, hidden
            if progress is not None:
                progress(int(length.sum()))

    def _make_room(self, state: State, tokens: np.ndarray) -> None:
        """Empties the windows that so many more tokens do not fit into."""
        self._move(state, state.places + tokens > self.config.local_context)

    def _move(self, state: State, rows: np.ndarray) -> None:
        """Empties the windows of some rows."""
        if rows.any():
            cache = state.cache
            valid, length, state.memory = inference.move(
                *(self.config, self.mesh, cache.layers, cache.valid, cache.length),
                *(state.memory, rows),
            )
            state.cache = Cache(cache.layers, valid, length)
            state.places[rows] = 0

    def _reserve(self, state: State, plans, new_tokens: int) -> None:
        """Room in memory for all that will leave the window.

        Raises:
          UserError: there is none, and the memory is no ring.
        """
        if not self.config.memory_layers:
            return
        moved = [0] * state.rows
        for row, plan in enumerate(plans):
            window = int(state.places[row])
            for start, stop, moves in itertools.chain(plan, [(0, 1, None)] * (new_tokens - 1)):
                if moves is None:  # one of the new tokens
                    moves = window == self.config.local_context
                if moves:
                    moved[row] += window
                    window = 0
                window += stop - start
        needed = state.stored + (sum(moved) if state.config.shared else max(moved))
        size = state.config.size
        if size is not None and needed > size:
            if not state.config.ring:
                raise UserError(
                    f"the memory of {size} tokens is full before the end of the text, which needs "
                    f"{needed}: raise MemoryConfig.size, or set MemoryConfig.ring to forget the "
                    "oldest"
                )
            needed = size
        state.stored = needed
        if needed > int(state.memory.limit):
            state.memory = memories.grow(state.memory, needed, self.mesh)


# --- Compiled ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _logits(c: ModelConfig, params, hidden):
    return transformer.logits(c, params, hidden)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(c: ModelConfig, mesh: Mesh | None, params, hidden, targets):
    """Nats and correctness of targets [B, T]."""
    logits = transformer.logits(c, params, hidden)
    at_target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    scores = jax.nn.logsumexp(logits, -1) - at_target, at_target >= logits.max(-1)
    return inference.replicated(mesh, scores)


class _Draw(NamedTuple):
    among: str  # "most likely", "top p" or "any"


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _first_token(c, how, mesh, params, hidden, length, keys, temperature, top_p):
    """The token after the first `length` [B] of a piece."""
    at = jnp.maximum(length - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, at, 1)[:, 0]
    logits = transformer.logits(c, params, hidden)
    token = _choose(how, logits, keys, jnp.int32(0), temperature, top_p)
    return inference.replicated(mesh, token)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames="cache")
def _next_token(
    c, how, lookup, mesh, params, cache, memory, token, keys, step, temperature, top_p
) -> tuple[jax.Array, Cache]:
    """Reads the token [B] of each row and draws the next one."""
    ones = jnp.ones_like(token)
    hidden, cache = inference.read(
        c, lookup, mesh, params, cache, memory, token[:, None], ones[:, None] > 0, ones
    )
    logits = transformer.logits(c, params, hidden[:, 0])
    token = _choose(how, logits, keys, step, temperature, top_p)
    return inference.replicated(mesh, token), cache


def _choose(how: _Draw, logits, keys, step, temperature, top_p):
    if how.among == "most likely":
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / temperature
    if how.among == "top p":
        descending = -jnp.sort(-logits, -1)
        p = jax.nn.softmax(descending, -1)
        kept = (jnp.cumsum(p, -1) - p < top_p).at[:, 0].set(True)
        least = jnp.where(kept, descending, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _widened(x: np.ndarray, width: int) -> np.ndarray:
    """x [..., n] with zeros up to the width."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
