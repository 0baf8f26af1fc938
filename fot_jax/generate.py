"""LanguageModel: a checkpoint as a library object that reads long text and writes more of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fot_jax.errors import UserError
from fot_jax.model import crossbatch, memory
from fot_jax.model.memory import Memory
from fot_jax.model.transformer import Transformer


class Scores(NamedTuple):
    """Per token: how well the model predicted the target that follows it."""

    nats: jax.Array  # [B, N] float32: minus log probability of each target
    correct: jax.Array  # [B, N] bool: the target was the most likely token


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model with its parameters and vocabulary; immutable."""

    model: Transformer
    params: Any
    vocabulary: Any = None  # data/vocabulary.py

    @staticmethod
    def load(path: str) -> LanguageModel:
        """Loads a checkpoint: a workdir, or one step in its `checkpoints` directory.

        Raises:
          UserError: nothing there, or nothing whole.
        """
        from fot_jax.data.vocabulary import load_vocabulary
        from fot_jax.training import checkpoint

        config, params, workdir = checkpoint.load_model(path)
        vocabulary = load_vocabulary(workdir / "vocabulary")
        return LanguageModel(Transformer(config), params, vocabulary)

    def score(self, tokens: np.ndarray, targets: np.ndarray, *, capacity: int) -> Scores:
        """Reads documents window by window, with a memory of the last `capacity` tokens.

        Args:
          tokens: [B, N] int32 documents read side by side; N a multiple of the local context C.
          targets: [B, N] int32, the tokens that follow.
          capacity: memory slots beyond the local window, a multiple of C; 0 for none.
        """
        config = self.model.config
        window = config.local_context
        if tokens.shape[1] % window or capacity % window:
            raise UserError(
                f"{tokens.shape[1]} tokens with a memory of {capacity} do not divide into windows "
                f"of {window}: give multiples of it"
            )
        _check_tokens(tokens, config.vocab_size)
        return _score(self.model, capacity, self.params, jnp.asarray(tokens), jnp.asarray(targets))

    def generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        capacity: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[int]:
        """Continues one prompt: earlier windows in memory, the unfinished one as local context.

        Temperature 0 takes the most likely token. Returns the new tokens.
        """
        if not len(tokens):
            raise UserError("the prompt is empty: give at least one token")
        window = self.model.config.local_context
        if capacity % window:
            raise UserError(
                f"a memory of {capacity} does not divide into windows of {window}: give a multiple"
            )
        _check_tokens(np.asarray(tokens), self.model.config.vocab_size)
        read = functools.partial(_read_window, self.model, self.params)
        state = memory.empty(self.model.config, 1, capacity)
        local = list(tokens)
        while len(local) > window:
            _, state = read(jnp.asarray([local[:window]], jnp.int32), window, state)
            local = local[window:]
        key, new = jax.random.key(seed), []
        for _ in range(max_new_tokens):
            if len(local) == window + 1:
                _, state = read(jnp.asarray([local[:window]], jnp.int32), window, state)
                local = local[window:]
            padded = jnp.asarray([local + [0] * (window - len(local))], jnp.int32)
            logits, _ = read(padded, len(local), state)
            key, draw = jax.random.split(key)
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(jax.random.categorical(draw, logits / temperature))
            new.append(token)
            local.append(token)
        return new


def _check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise UserError(
            f"token {outside[0]} is outside the model's vocabulary of {vocab_size}: the text was "
            "tokenized for another model"
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(model: Transformer, capacity: int, params, tokens, targets) -> Scores:
    B, N = tokens.shape
    T = model.config.local_context

    def windows(x):
        return x.reshape(B, N // T, T).swapaxes(0, 1)

    def read(state: Memory, window):
        tokens, targets = window
        segments = jnp.ones_like(tokens)
        out = model.apply(
            {"params": params},
            *(tokens, segments, crossbatch.Plan()),
            memory=state if capacity else None,
        )
        logits = model.apply({"params": params}, out.hidden, method="logits")
        at_target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        nats = jax.nn.logsumexp(logits, -1) - at_target
        return state.append(out.window, segments), Scores(nats, at_target >= logits.max(-1))

    state = memory.empty(model.config, B, capacity, model.dtype)
    _, scores = lax.scan(read, state, (windows(tokens), windows(targets)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, N), scores)


@functools.partial(jax.jit, static_argnums=0)
def _read_window(model: Transformer, params, tokens, length, state: Memory):
    """Logits after the first `length` tokens of a window, and the memory with the window in it."""
    segments = (jnp.arange(tokens.shape[1]) < length).astype(jnp.int32)[None]
    out = model.apply({"params": params}, tokens, segments, crossbatch.Plan(), memory=state)
    last = lax.dynamic_index_in_dim(out.hidden[0], length - 1, 0, keepdims=False)
    logits = model.apply({"params": params}, last, method="logits")
    return logits, state.append(out.window, segments)
