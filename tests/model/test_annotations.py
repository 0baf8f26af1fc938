"""Tests check annotations at every call (pyproject.toml): what does not fit is refused there."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from tiny import LLAMA

from fot_jax.model import cached_context, crossbatch, memory, parameters, rope, transformer
from fot_jax.model.attention import partial_softmax
from fot_jax.model.schemes import CachedContext

X = jnp.zeros([2, 4, 2, 8])
SEGMENTS = jnp.ones([2, 4], jnp.int32)
PLAN = crossbatch.Plan()

# None of these fails, or fails thus, without the check.
CALLS = [
    lambda: cached_context.attention(X, X, X, SEGMENTS, X, X, SEGMENTS[:1], CachedContext(4), PLAN),
    lambda: crossbatch.attention(X, X, X, SEGMENTS.astype(jnp.float32), PLAN),
    lambda: memory.put(X, X, SEGMENTS),  # X has 2 tokens
    lambda: parameters.init_norm(None, LLAMA, [1]),
    lambda: partial_softmax.no_parts(X.tolist()),
    lambda: rope.rotate(X[:, :, 0], rope.rope_table(LLAMA, 4)),
    lambda: rope.times(SEGMENTS, 0.5),
    lambda: transformer.memory_keys(LLAMA, X[0]),
]


@pytest.mark.parametrize("call", CALLS)
def test_what_does_not_fit_an_annotation_is_refused(call):
    with pytest.raises(TypeCheckError):
        call()
