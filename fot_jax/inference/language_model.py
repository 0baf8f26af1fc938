"""LanguageModel: a checkpoint as a library object that reads long text and writes more of it.

    lm = fot_jax.LanguageModel.load("workdirs/quickstart")
    state = lm.read(lm.encode(book))                    # into memory, window by window
    lm.save_memory(state, "book.memory")                # and back: lm.load_memory("book.memory")
    question = lm.encode("def ", continues=True)        # goes on from the book
    print(lm.decode(lm.generate(question, 100, state=state.copy())))

How text is cut into windows, and what happens when the window is full, is that of LongLLaMA: see
`prefill.plan`.
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

from fot_jax.common.errors import LARGEST_COUNT, UserError, check_range
from fot_jax.data.vocabulary import Vocabulary, encode_prompt
from fot_jax.inference import forward, inputs, sampling
from fot_jax.inference.decode import decode
from fot_jax.inference.prefill import prefill, remember
from fot_jax.inference.state import (
    EVERYTHING,
    SETTINGS_OF_READING,
    SHARED,
    MemoryConfig,
    State,
    begin,
)
from fot_jax.model import lora
from fot_jax.model import memory as memories
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Lookup
from fot_jax.model.parameters import parameters_by_layer
from fot_jax.model.transformer import Transformer


class Scores(NamedTuple):
    """How well each token but the first was predicted by those before it."""

    nats: Float[np.ndarray, "B N-1"]  # minus log probability
    correct: Bool[np.ndarray, "B N-1"]  # it was the most likely token


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model with its parameters and vocabulary; immutable.

    Attributes:
      config: of the model.
      params: from `parameters_by_layer`; matrices in the type computed in. In bfloat16 there may
        be adapters among them.
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
          devices: of this machine, that memory is sharded over; where several processes run
            together (cluster.join), of each. All of them then make the same calls.

        Raises:
          UserError: nothing there, or nothing whole; fewer devices.
        """
        from fot_jax.checkpoints import loading

        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype = {dtype!r}: choose one of float32, bfloat16")
        check_range("LanguageModel", 1, devices=devices)
        present = len(jax.local_devices())
        if devices > present:
            raise UserError(
                f"devices = {devices}, but this machine has {present}: give at most these"
            )
        mesh = None
        if devices * jax.process_count() > 1:
            of_each: dict[int, list[jax.Device]] = {}
            for device in jax.devices():
                of_each.setdefault(device.process_index, []).append(device)
            chosen = [each[:devices] for _, each in sorted(of_each.items())]
            mesh = Mesh(np.asarray(chosen).reshape(-1), (memories.AXIS,))
        config, params = loading.load_model(path, jnp.dtype(dtype))
        if mesh is not None:
            whole = NamedSharding(mesh, PartitionSpec())
            params = jax.tree.map(lambda x: jax.device_put(np.asarray(x), whole), params)
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
        # In bfloat16 what a young adapter adds would be rounded away: it stays beside its kernel.
        if jnp.dtype(model.dtype) == jnp.float32:
            params = lora.merged(params)
        by_layer = parameters_by_layer(params, model.dtype)
        return LanguageModel(model.config, by_layer, vocabulary, mesh, files)

    def on_one_device(self) -> LanguageModel:
        """The same model, its parameters whole on the first device that this process has of it.

        For computations that are not laid out for several. All processes of a mesh call it.
        """
        if self.mesh is None:
            return self
        whole = self.params
        if not all(x.is_fully_replicated for x in jax.tree.leaves(whole)):
            whole = forward.replicate(self.mesh, whole)
        here = jax.tree.map(lambda x: x.addressable_data(0), whole)
        return dataclasses.replace(self, params=here, mesh=None)

    def for_memory(self, memory: MemoryConfig) -> LanguageModel:
        """The same model where it can read such a memory: one in segments is on one device."""
        return self._alone if memory.in_segments else self

    def _reader(self, in_segments: bool) -> LanguageModel:
        """The model that a memory is read by: one in segments by that on one device.

        Processes of one device each, which share such a memory, otherwise all do the same.
        """
        spread = self.mesh is not None and self.mesh.size == jax.process_count() > 1
        return self._alone if in_segments and spread else self

    @functools.cached_property
    def _alone(self) -> LanguageModel:
        """on_one_device, once: its fingerprint takes as long as reading all parameters."""
        return self.on_one_device()

    # --- Text --------------------------------------------------------------------------------

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Tokens of a text, with the marks that the vocabulary puts around it.

        Args:
          continues: the text goes on from what was read before (a state), and so has no marks.

        Raises:
          UserError: the checkpoint has no tokenizer; the text cannot be tokenized.
        """
        tokenizer = self._tokenizer()
        return tokenizer.encode(text) if continues else encode_prompt(tokenizer, text)

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

        Arguments as of `logits`; one document may be given (and masked) without the axis of rows.
        """
        if inputs.is_one_text(tokens):
            tokens, mask = [tokens], None if mask is None else [mask]
        tokens, valid = self._checked(tokens, mask)
        lm = self._reader(_in_segments(memory, state))
        state, tokens, valid = lm._begin_reading(tokens, valid, memory, state, progress)
        for _ in prefill(
            lm.params, state, tokens, valid, last=last_context_length, progress=progress
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
          rows: of a new state: so many windows are read side by side, and so many texts can then
            be read on from it.
          memory, state, progress: as of `logits`.

        Raises:
          UserError: longer windows, or a memory that is not shared; as of `logits`.
        """
        windows, _ = self._checked(windows, None)
        check_range("remember", 1, rows=rows)
        if windows.shape[1] > self.config.local_context:
            raise UserError(
                f"windows of {windows.shape[1]} tokens for a model with a local context of "
                f"{self.config.local_context}: cut them shorter"
            )
        lm = self._reader(_in_segments(memory, state))
        if state is None:
            state = lm._begin(rows, memory, None)
        else:
            state = lm._begin(state.rows, EVERYTHING if memory == SHARED else memory, state)
        if not state.config.shared:
            raise UserError("a memory for each row: set MemoryConfig.shared to have one for all")
        remember(lm.params, state, windows, progress)
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
            where that is less. Without memory layers all that fit, beside new tokens; of `read`
            half of the local context.
          memory: what is kept of what leaves the window. Not with `state`, which has its own.
          state: what was read before; changed. None: nothing.
          progress: called with the number of tokens of a piece when it has been read.

        Raises:
          UserError: no tokens, or tokens outside the vocabulary; a memory that the model, the
            state or the text does not fit.
        """
        tokens, valid = self._checked(tokens, mask)
        lm = self._reader(_in_segments(memory, state))
        state = lm._begin(len(tokens), memory, state)
        out = np.empty((*tokens.shape, self.config.vocab_size), np.float32)
        for piece in prefill(
            lm.params,
            state,
            tokens,
            valid,
            last=last_context_length,
            progress=progress,
            every_hidden=True,
        ):
            of_piece = np.asarray(forward.logits(lm.config, lm.mesh, lm.params, piece.hidden))
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
        tokens, valid = self._checked(tokens, mask)
        if tokens.shape[1] < 2:
            raise UserError("one token alone has no score: give at least two")
        targets = tokens[:, 1:]
        lm = self._reader(_in_segments(memory, state))
        state = lm._begin(len(tokens), memory, state)
        nats, correct = np.empty(targets.shape, np.float32), np.empty(targets.shape, bool)
        for piece in prefill(
            lm.params,
            state,
            tokens[:, :-1],
            valid[:, :-1],
            last=last_context_length,
            progress=progress,
            every_hidden=True,
        ):
            columns = piece.columns()
            of_piece = inputs.padded(targets[:, columns], piece.hidden.shape[1])
            scored = forward.score(lm.config, lm.mesh, lm.params, piece.hidden, of_piece)
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
        single = inputs.is_one_text(tokens)
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
          until: called after each token with all that its row has written; True ends the row, which
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
        padded, lengths = inputs.side_by_side(prompts, mask)
        check_range("generate", 0, LARGEST_COUNT, whole=True, max_new_tokens=max_new_tokens)
        sampler = sampling.sampler(
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, rows=len(prompts)
        )
        tokens, valid = self._checked(padded, mask)
        lm = self._reader(_in_segments(memory, state))
        state, tokens, valid = lm._begin_reading(tokens, valid, memory, state, progress)
        prompt = prefill(
            lm.params,
            state,
            tokens,
            valid,
            last=last_context_length,
            progress=progress,
            lengths=lengths - (padded.shape[1] - tokens.shape[1]),
            new_tokens=int(max_new_tokens),
        )
        if stop is None:
            stop = () if self.vocabulary is None else self.vocabulary.ends
        return decode(
            lm.params,
            state,
            prompt,
            sampler,
            max_new_tokens=int(max_new_tokens),
            stop=frozenset(map(int, stop)),
            until=until,
            when_read=when_read,
        )

    # --- Memory on disk ----------------------------------------------------------------------

    def save_memory(self, state: State, path: epath.PathLike) -> None:
        """Writes all that `state` holds into a directory.

        Args:
          path: new, or of an older memory, which is replaced when all is written. Of a memory in
            a directory that one, and there what its files do not hold yet.

        Raises:
          UserError: something else is there, or it cannot be written; or the memory is in another
            directory, or a copy of the state, or another model's.
        """
        from fot_jax.inference import memory_files

        lm = self._reader(state.segments is not None)
        lm._check_own(state)
        memory_files.save(path, state, lm._fingerprint, lm.mesh)

    def load_memory(self, path: epath.PathLike, lookup: Lookup = EVERYTHING.lookup) -> State:
        """What was read before, from `save_memory` or MemoryConfig.directory.

        Text that the state of a MemoryConfig.directory reads on is added to it; a copy of the state
        adds nothing. If it was not saved at the end, the log says how many tokens it has.

        Args:
          path: a directory with a memory, saved on any number of devices.
          lookup: how the memory is read from now on; its size and storage stay.

        Raises:
          UserError: nothing there, damaged, or the memory of another model.
        """
        from fot_jax.inference import memory_files

        lm = self._reader(memory_files.in_segments(path))
        state = memory_files.load(path, lm.config, lm._fingerprint, lookup, lm.mesh)
        return dataclasses.replace(state, reader=lm)

    @functools.cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """What keys and values depend on."""
        from fot_jax.checkpoints.array_checksums import array_checksums

        config = dataclasses.asdict(self.config)
        for name in SETTINGS_OF_READING:
            del config[name]
        leaves = jax.tree.leaves(self.params)
        dtype = self.params["embedding"].dtype.name
        return {"model": config, "dtype": dtype, "parameters": array_checksums(leaves)}

    def _check_own(self, state: State) -> None:
        """Raises UserError for a state of another model, or with other parameters."""
        settings = {name: getattr(self.config, name) for name in SETTINGS_OF_READING}
        config = dataclasses.replace(state.model, **settings)
        same = (config, state.mesh) == (self.config, self.mesh)
        if same and state.reader is not None and state.reader.params is not self.params:
            of_both = (each._fingerprint for each in (state.reader, self))
            parameters, others = (each["parameters"] for each in of_both)
            same = parameters == others
        if not same:
            raise UserError("a state of another model, or on other devices: read the text again")

    # --- What calls begin with ---------------------------------------------------------------

    def _checked(self, tokens, mask) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, N] int32, and where they are not padding."""
        return inputs.checked(tokens, mask, self.config.vocab_size, self.vocabulary)

    def _begin(
        self,
        rows: int,
        memory: MemoryConfig,
        state: State | None,
        text: Int[np.ndarray, "1 N"] | None = None,
    ) -> State:
        """The state to read on from; where a directory has a part of the text, what it has."""
        if state is not None:
            self._check_own(state)
        dtype = self.params["embedding"].dtype
        begun = begin(self.config, dtype, self.mesh, rows=rows, config=memory, state=state)
        if state is None and memory.in_segments:
            from fot_jax.inference import memory_files

            in_files = memory.directory is not None
            fingerprint = self._fingerprint if in_files else None
            begun = memory_files.begin_segments(begun, fingerprint, text)
        begun.model, begun.reader = self.config, self
        return begun

    def _begin_reading(self, tokens, valid, memory: MemoryConfig, state: State | None, progress):
        """The state to read on from, and the tokens and mask of what it has not read yet."""
        if state is not None:
            return self._begin(len(tokens), memory, state), tokens, valid
        alone = len(tokens) == 1 and valid.all()  # or places are not tokens of one text
        begun = self._begin(len(tokens), memory, None, tokens if alone else None)
        there = int(begun.stored[0])
        if there and progress is not None:
            progress(there)
        return begun, tokens[:, there:], valid[:, there:]


def _in_segments(memory: MemoryConfig, state: State | None) -> bool:
    """Whether what is read goes into segments."""
    return memory.in_segments if state is None else state.segments is not None
