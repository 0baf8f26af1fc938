"""Inference memory against one softmax over everything, in NumPy float64."""

import numpy as np
import pytest

from fot_jax.model.memory import LayerMemory

B, T, H, K, D = 2, 5, 4, 2, 8


def one_softmax(q, k, v, visible):
    """q [T, D] over k, v [S, D], where visible [T, S]."""
    scores = np.where(visible, q @ k.T, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


# None; less than a block of slots; several blocks.
@pytest.mark.parametrize("slots", [0, 10, 1040])
def test_attention_equals_one_softmax_over_memory_and_window(slots):
    rng = np.random.default_rng(slots)
    q, k, v = (rng.normal(size=(B, T, heads, D)) for heads in (H, K, K))
    memory_k, memory_v = rng.normal(size=(2, B, K, slots, D))
    filled = rng.integers(0, 2, (B, slots))
    memory = LayerMemory(*(x.astype(np.float32) for x in (memory_k, memory_v)), filled)
    window = (x.astype(np.float32) for x in (q, k, v))
    got = memory.attend_with_window(*window, np.ones((B, T), np.int32))
    causal = np.tril(np.ones((T, T), bool))
    for row in range(B):
        visible = np.concatenate([causal, np.tile(filled[row] > 0, (T, 1))], axis=1)
        for head in range(H):
            of = head // (H // K)
            keys = np.concatenate([k[row, :, of], memory_k[row, of]])
            values = np.concatenate([v[row, :, of], memory_v[row, of]])
            want = one_softmax(q[row, :, head], keys, values, visible)
            np.testing.assert_allclose(got[row, :, head], want, atol=1e-5)
