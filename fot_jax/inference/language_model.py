"""LanguageModel: a checkpoint as a library object that reads long text and writes more of it.

    lm = fot_jax.LanguageModel.load("workdirs/quickstart")
    state = lm.read(lm.encode(book))                    # into memory, window by window
    lm.save_memory(state, "book.memory")                # and back: lm.load_memory("book.memory")
    new = lm.generate(lm.vocabulary.encode("def "), 100, state=state.copy())
    print(lm.decode(new))

How text is cut into windows, and what happens when the window is full, is that of LongLLaMA: see
`inference.cut`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from fot_jax.common.errors import LARGEST_SEED, UserError, check_range
from fot_jax.data.vocabulary import Vocabulary, encode_prompt
from fot_jax.inference import forward as inference
from fot_jax.inference import prefill as reading
from fot_jax.inference import sampling
from fot_jax.inference.prefill import EVERYTHING, SHARED, MemoryConfig, State
from fot_jax.model import memory as memories
from fot_jax.model import transformer
from fot_jax.model.lookup import Lookup
from fot_jax.model.parameters import parameters_by_layer
from fot_jax.model.transformer import ModelConfig, Transformer


class Scores(NamedTuple):
    """How well each token but the first was predicted by those before it."""

    nats: Float[np.ndarray, "B N-1"]  # minus log probability
    correct: Bool[np.ndarray, "B N-1"]  # it was the most likely token


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model with its parameters and vocabulary; immutable.

    Attributes:
      config: of the model.
      params: from `parameters_by_layer`; matrices in the type computed in.
      vocabulary: data/vocabulary.py.
      mesh: devices that hold it. Over its axis "memory", if there is one, memory is sharded.
        Parameters stay where they are; windows and what is computed are on every device.
      files: the directory with what came with a Hugging Face model beside its weights.
    """

    config: ModelConfig
    params: Any
    vocabulary: Vocabulary | None = None
    mesh: Mesh | None = None
    files: epath.Path | None = None

    # --- Loading -----------------------------------------------------------------------------

    @staticmethod
    def load(path: epath.PathLike, *, dtype: str = "float32", devices: int = 1) -> LanguageModel:
        """Loads a checkpoint: a workdir, a step in its `checkpoints`, or a Hugging Face directory.

        Args:
          dtype: float32 or bfloat16, of activations and matrices.
          devices: of this machine, that memory is sharded over.

        Raises:
          UserError: nothing there, or nothing whole; fewer devices.
        """
        from fot_jax.checkpoints import loading

        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype = {dtype!r}: choose one of float32, bfloat16")
        mesh = None
        check_range("LanguageModel", 1, devices=devices)
        if devices > 1:
            at_hand = jax.local_devices()
            if devices > len(at_hand):
                raise UserError(
                    f"devices = {devices}, but this machine has {len(at_hand)}: give at most these"
                )
            mesh = Mesh(np.asarray(at_hand[:devices]), (memories.AXIS,))
        config, params = loading.load_model(path, jnp.dtype(dtype))
        if mesh is not None:
            params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        vocabulary = loading.vocabulary_of(path)
        loading.check_rows(path, vocabulary, config.vocab_size)
        return LanguageModel(config, params, vocabulary, mesh, loading.files_of(path))

    @staticmethod
    def of(
        model: Transformer,
        params: Any,
        vocabulary: Vocabulary | None = None,
        files: epath.Path | None = None,
    ) -> LanguageModel:
        """From a model in training.

        Args:
          params: as `model.init` gives them, stacked by layer, on any mesh.
          vocabulary: what text is tokenized with.
          files: the directory with what came with the model that it was made of.
        """
        sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if isinstance(mesh, AbstractMesh) or mesh is not None and mesh.size == 1:
            mesh = None
        by_layer = parameters_by_layer(params, model.dtype)
        return LanguageModel(model.config, by_layer, vocabulary, mesh, files)

    def on_one_device(self) -> LanguageModel:
        """The same model, its parameters whole on the first device that this process has of it.

        For computations that are not laid out for several. All processes of a mesh call it.
        """
        if self.mesh is None:
            return self
        whole = _whole(self.mesh, self.params)
        here = jax.tree.map(lambda x: x.addressable_data(0), whole)
        return dataclasses.replace(self, params=here, mesh=None)

    # --- Text --------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that begins here, with the marks that the vocabulary puts around it.

        To read on from a state, `vocabulary.encode` gives the text alone.

        Raises:
          UserError: the checkpoint has no tokenizer; the text cannot be tokenized.
        """
        return encode_prompt(self._tokenizer(), text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, without marks.

        Raises:
          UserError: the checkpoint has no tokenizer.
        """
        return self._tokenizer().decode(tokens)

    def _tokenizer(self) -> Vocabulary:
        if self.vocabulary is None:
            raise UserError("the checkpoint has no tokenizer: give tokens in place of text")
        return self.vocabulary

    # --- Reading -----------------------------------------------------------------------------

    def read(
        self,
        tokens: Int[np.ndarray, "B N"] | Sequence[int],
        *,
        mask: np.ndarray | None = None,
        last_context_length: int | None = None,
        memory: MemoryConfig = EVERYTHING,
        state: State | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> State:
        """Reads text, and returns what is then in the window and in memory.

        Args: as of `logits`. One document may be given (and masked) without the axis of rows.
        """
        if len(tokens) == 0 or np.ndim(tokens[0]) == 0:
            tokens, mask = [tokens], None if mask is None else [mask]
        tokens, valid = self._text(tokens, mask)
        state = reading.begin(self, state, memory, len(tokens))
        for _ in reading.pieces(
            self, state, tokens, valid, last=last_context_length, progress=progress
        ):
            pass
        return state

    def remember(
        self,
        windows: Int[np.ndarray, "N T"],
        *,
        rows: int = 1,
        memory: MemoryConfig = SHARED,
        state: State | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> State:
        """Reads windows, each as if it were the only one, into a memory that all rows share.

        That is how training reads the previous contexts of PreviousContext. It takes as long
        whatever memory holds, as `read` does not, where each window looks into memory.

        Args:
          windows: of at most the local context.
          rows: of the state: so many windows are read side by side, and so many texts can then
            be read on from it.
          memory, state, progress: as of `logits`.

        Raises:
          UserError: longer windows, or a memory that is not shared; as of `logits`.
        """
        windows, _ = self._text(windows, None)
        check_range("remember", 1, rows=rows)
        if windows.shape[1] > self.config.local_context:
            raise UserError(
                f"windows of {windows.shape[1]} tokens for a model with a local context of "
                f"{self.config.local_context}: cut them shorter"
            )
        if state is None:
            state = reading.begin(self, None, memory, rows)
        if not state.config.shared:
            raise UserError("a memory for each row: set MemoryConfig.shared to have one for all")
        reading.remember(self, state, windows, progress)
        return state

    def logits(
        self,
        tokens: Int[np.ndarray, "B N"],
        *,
        mask: Bool[np.ndarray, "B N"] | None = None,
        last_context_length: int | None = None,
        memory: MemoryConfig = EVERYTHING,
        state: State | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Float[np.ndarray, "B N V"]:
        """Next-token logits after every token, float32.

        Args:
          tokens: documents of the same length, side by side.
          mask: 0 where a token is padding, to the left as a rule: nobody sees it, but it takes a
            place of its window.
          last_context_length: tokens that stay in the window at the end, at most the local
            context; by default ModelConfig.last_context_length, else 1024, or the local context
            where that is less.
          memory: what is kept of what leaves the window. Not with `state`, which has its own.
          state: what was read before; changed. None: nothing.
          progress: called with the number of tokens of a piece when it has been read.

        Raises:
          UserError: no tokens, or tokens outside the vocabulary; a memory that the model, the
            state or the text does not fit.
        """
        tokens, valid = self._text(tokens, mask)
        state = reading.begin(self, state, memory, len(tokens))
        out = np.empty((*tokens.shape, self.config.vocab_size), np.float32)
        for piece in reading.pieces(
            self, state, tokens, valid, last=last_context_length, progress=progress
        ):
            of_piece = np.asarray(_logits(self.config, self.mesh, self.params, piece.hidden))
            out[:, piece.columns()] = of_piece[:, : piece.length[0]]
        return out

    def score(
        self,
        tokens: Int[np.ndarray, "B N"],
        *,
        mask: Bool[np.ndarray, "B N"] | None = None,
        last_context_length: int | None = None,
        memory: MemoryConfig = EVERYTHING,
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
        state = reading.begin(self, state, memory, len(tokens))
        nats, correct = np.empty(targets.shape, np.float32), np.empty(targets.shape, bool)
        for piece in reading.pieces(
            *(self, state, tokens[:, :-1], valid[:, :-1]),
            last=last_context_length,
            progress=progress,
        ):
            columns = piece.columns()
            of_piece = reading.widened(targets[:, columns], piece.hidden.shape[1])
            scored = _score(self.config, self.mesh, self.params, piece.hidden, of_piece)
            nats[:, columns], correct[:, columns] = (
                np.asarray(x)[:, : piece.length[0]] for x in scored
            )
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
          The new tokens, up to but without the first stop token: a list of them for one prompt, a
          list of lists for several.
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
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop: Sequence[int] | None = None,
        until: Callable[[list[int]], bool] | None = None,
        mask: Bool[np.ndarray, "B N"] | None = None,
        last_context_length: int | None = None,
        memory: MemoryConfig = EVERYTHING,
        state: State | None = None,
        progress: Callable[[int], Any] | None = None,
        when_read: Callable[[State], Any] | None = None,
    ) -> Iterator[list[int | None]]:
        """Continues prompts, token by token.

        Args:
          prompts: of different lengths: each is read and continued as if alone (but for a memory
            that they share). With `mask`, an array padded to one length, as of `logits`.
          temperature: 0 takes the most likely token.
          top_k: draws among so many of the most likely tokens; None: all.
          top_p: draws among the fewest tokens whose probabilities sum to this.
          seed: of the draws, one for each row; of a number s, row r has s + r.
          stop: tokens that end a row; None: those at which the vocabulary says that a text ends.
          until: asked after each token with all that its row has written; True ends the row, which
            keeps the token.
          mask, last_context_length, memory, state, progress: as of `logits`.
          when_read: called with the state when the prompts have been read, to save it, say.

        Yields:
          After each step the new token of every row, None for rows that have ended.

        `state` then holds the prompts and what was written, without stop tokens, and without the
        last token where max_new_tokens or `until` ended it.

        Raises:
          UserError: as of `logits`; or a number out of range.
        """
        if not len(prompts) or mask is None and any(len(prompt) == 0 for prompt in prompts):
            raise UserError("the prompt is empty: give at least one token")
        rows = len(prompts)
        check_range("generate", 0, whole=True, max_new_tokens=max_new_tokens)
        check_range("generate", 0, temperature=temperature)
        check_range("generate", 1, whole=True, top_k=top_k)
        check_range("generate", 0, 1, top_p=top_p)
        seeds = list(seed) if isinstance(seed, Sequence | np.ndarray) else [seed] * rows
        if len(seeds) != rows:
            raise UserError(f"{len(seeds)} seeds for {rows} prompts: give one for each")
        for each in seeds:
            check_range("generate", 0, LARGEST_SEED, whole=True, seed=each)
        seeds = [int(each) for each in seeds]
        if not isinstance(seed, Sequence | np.ndarray):
            seeds = [each + row for row, each in enumerate(seeds)]
        lengths = np.asarray([len(prompt) for prompt in prompts])
        if mask is not None and len(set(lengths)) > 1:
            raise UserError("prompts of different lengths with a mask: pad them to one length")
        padded = [_whole_numbers(prompt, "a prompt", 1) for prompt in prompts]
        padded = np.stack([reading.widened(prompt, lengths.max()) for prompt in padded])
        tokens, valid = self._text(padded, mask)
        state = reading.begin(self, state, memory, rows)
        pieces = reading.pieces(
            *(self, state, tokens, valid),
            last=last_context_length,
            progress=progress,
            lengths=lengths,
            new_tokens=int(max_new_tokens),
        )
        draw = sampling.Draw.of(temperature, top_k, top_p, seeds)
        if stop is None:
            stop = () if self.vocabulary is None else self.vocabulary.ends
        most = int(max_new_tokens)
        return self._write(state, pieces, most, draw, frozenset(stop), until, when_read)

    def _write(self, state, pieces, max_new_tokens, draw, stop, until, when_read):
        """The steps of `stream`."""
        for piece in pieces:
            last = piece
        if when_read is not None:
            when_read(state)
        if not max_new_tokens:
            return
        token = sampling.first_token(
            *(self.config, draw.among, self.mesh, self.params),
            *(last.hidden, last.length, draw.numbers),
        )
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
                reading.make_room(self, state, ~ended)
                token, state.cache = sampling.next_token(
                    *(self.config, draw.among, state.config.lookup, self.mesh, self.params),
                    *(state.cache, state.memory, token, ~ended, draw.numbers, np.int32(step)),
                )
            yield now
            if ended.all():
                return

    # --- Memory on disk ----------------------------------------------------------------------

    def save_memory(self, state: State, path: epath.PathLike) -> None:
        """Writes all that `state` holds into a directory.

        Args:
          path: new, or of an older memory, which is replaced when all is written.

        Raises:
          UserError: something else is there, or it cannot be written.
        """
        from fot_jax.inference import memory_files

        memory_files.save(path, state, self._fingerprint, self.mesh)

    def load_memory(self, path: epath.PathLike, lookup: Lookup = EVERYTHING.lookup) -> State:
        """What was read before, from `save_memory`.

        Args:
          path: a directory with a memory, saved on any number of devices.
          lookup: how the memory is read from now on; what else it was asked for stays.

        Raises:
          UserError: nothing there, damaged, or the memory of another model.
        """
        from fot_jax.inference import memory_files

        return memory_files.load(path, self.config, self._fingerprint, lookup, self.mesh)

    @functools.cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """What keys and values depend on."""
        from fot_jax.checkpoints.array_checksums import array_checksums

        config = dataclasses.asdict(self.config)
        leaves = jax.tree.leaves(self.params)
        dtype = self.params["embedding"].dtype.name
        return {"model": config, "dtype": dtype, "parameters": array_checksums(leaves)}

    # --- Checks ------------------------------------------------------------------------------

    def _text(self, tokens, mask) -> tuple[np.ndarray, np.ndarray]:
        """Checked tokens [B, N] int32, and where they are none of padding."""
        tokens = _whole_numbers(tokens, "tokens", 2)
        if not tokens.size:
            raise UserError("the text is empty: give at least one token")
        if mask is None:
            valid = np.ones(tokens.shape, bool)
        else:
            valid = _whole_numbers(mask, "a mask", 2) > 0
        if valid.shape != tokens.shape:
            raise UserError(f"a mask of shape {valid.shape} for tokens of shape {tokens.shape}")
        rows = self.config.vocab_size
        outside = tokens[(tokens < 0) | (tokens >= rows)]
        if outside.size:
            of_another = "the text was tokenized for another model"
            if self.vocabulary is not None and outside[0] in range(rows, self.vocabulary.size):
                of_another = (
                    f"the tokenizer has {self.vocabulary.size}: leave what was added to it out of "
                    "the text"
                )
            raise UserError(
                f"token {outside[0]} is outside the model's vocabulary of {rows}: {of_another}"
            )
        return tokens.astype(np.int32), valid


def _whole_numbers(x: Any, what: str, dimensions: int) -> np.ndarray:
    """An array of so many dimensions, checked to be one of whole numbers (a mask may be bool)."""
    try:
        array = np.asarray(x)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{what} with rows of different lengths: pad them, with a mask") from error
    if (
        array.ndim != dimensions
        or array.size
        and array.dtype.kind not in "iu" + "b" * (what == "a mask")
    ):
        raise UserError(
            f"{what} of shape {array.shape} and type {array.dtype}: give whole numbers, "
            + ("a list of them" if dimensions == 1 else "[documents, length]")
        )
    return array


# --- Compiled ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _whole(mesh: Mesh, params):
    return inference.replicated(mesh, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(c: ModelConfig, mesh: Mesh | None, params, hidden):
    return inference.replicated(mesh, transformer.logits(c, params, hidden))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(c: ModelConfig, mesh: Mesh | None, params, hidden, targets):
    """Nats and correctness of targets [B, T]."""
    logits = transformer.logits(c, params, hidden)
    at_target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    scores = jax.nn.logsumexp(logits, -1) - at_target, at_target >= logits.max(-1)
    return inference.replicated(mesh, scores)
