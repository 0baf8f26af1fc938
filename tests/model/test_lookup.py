"""Choosing the best keys of a memory: against FAISS, brute force, and over shards."""

import dataclasses
import functools

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import fill, mesh_of, one_softmax, tokens_of
from tiny import LLAMA

from fot_jax.common.errors import UserError
from fot_jax.model import memory
from fot_jax.model.lookup import ApproximateTopK, Dense, TopK, attend

LOOKUPS = pytest.mark.parametrize("lookup", [TopK, ApproximateTopK])


def keys_of(x, storage="float32"):
    """x [B, K, n, D] in as many slots as a memory would allocate; the free ones are not zero."""
    slots = memory.slots_for(x.shape[2])
    x = np.pad(x, [(0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)], constant_values=100.0)
    return memory.encode(jnp.asarray(x, jnp.float32), storage)


@functools.partial(jax.jit, static_argnums=0)
def search(lookup, q, keys, visible):
    return lookup.search(q, keys, visible)


def brute_force(q, keys, k):
    """Of one head: the k best keys of each query, of equal ones the oldest."""
    scores = q.astype(np.float64) @ keys.T.astype(np.float64)
    slots = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, slots, 1), slots


# --- Search --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, k, dim", [(20_000, 32, 64), (20_000, 128, 16), (700, 100, 8), (5_000, 1, 8)]
)
def test_exact_search_equals_faiss(tokens, k, dim):
    """Also among equal scores, of which whole numbers make many: which of the last ones FAISS
    takes depends on its blocks; here they are the oldest."""
    rng = np.random.default_rng(tokens + k)
    for x, q in (
        (rng.normal(size=(tokens, dim)), rng.normal(size=(50, dim))),
        (rng.integers(-2, 3, (tokens, dim)), rng.integers(-2, 3, (50, dim))),
    ):
        x, q = x.astype(np.float32), q.astype(np.float32)
        index = faiss.IndexFlatIP(dim)
        index.add(x)
        want_scores, want_slots = index.search(q, k)
        visible = jnp.asarray([tokens])
        scores, slots = search(TopK(k), q[None, None], keys_of(x[None, None]), visible)
        scores, slots = np.asarray(scores[0, 0]), np.asarray(slots[0, 0])
        np.testing.assert_allclose(scores, want_scores, rtol=1e-5, atol=1e-5)
        for row in range(len(q)):
            sure = want_scores[row] > want_scores[row, -1] + 1e-4
            assert set(want_slots[row, sure]) <= set(slots[row])
            assert len(set(slots[row])) == k
        exact = brute_force(q, x, k)[1]
        whole = (x == np.rint(x)).all()
        assert (exact == slots).all() if whole else (exact == slots).mean() > 0.999


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.sampled_from([1, 3, 60, 130, 1100, 5000]),
    k=st.sampled_from([1, 4, 50]),
    storage=st.sampled_from(memory.STORAGE),
    of=st.sampled_from([TopK, ApproximateTopK]),
    seed=st.integers(0, 100),
)
def test_search_equals_brute_force(tokens, k, storage, of, seed):
    """With ties everywhere, heads and rows of their own, and fewer tokens than k. (On a CPU the
    approximate search is exact.)"""
    rng = np.random.default_rng(seed)
    x = rng.integers(-1, 2, (2, 2, tokens, 6)).astype(np.float32)
    x = np.asarray(memory.decode(memory.encode(jnp.asarray(x), storage), jnp.float32))
    q = rng.integers(-1, 2, (2, 2, 5, 6)).astype(np.float32)
    visible = np.asarray([tokens, max(1, tokens // 3)])
    scores, slots = search(of(k), q, keys_of(x, storage), visible)
    for row, head in np.ndindex(2, 2):
        n = min(k, visible[row])
        want = brute_force(q[row, head], x[row, head, : visible[row]], k)
        np.testing.assert_allclose(scores[row, head, :, :n], want[0], atol=1e-5)
        # Rounding may part equal scores; of equal ones the approximate search takes any.
        if storage not in ("int8", "int4") and of is TopK:
            np.testing.assert_array_equal(slots[row, head, :, :n], want[1])
        assert (scores[row, head, :, n:] < -1e29).all()


@pytest.mark.parametrize("k", [1, 32, 128, 300])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("tokens", [50, 500, 1000, 9000])
def test_search_of_every_shape(tokens, dim, k):
    """The numbers of the paper's models, on memories from a short prompt's up."""
    rng = np.random.default_rng(tokens)
    x = rng.integers(-2, 3, (1, 1, tokens, dim)).astype(np.float32)
    q = rng.integers(-2, 3, (1, 1, 4, dim)).astype(np.float32)
    scores, slots = search(TopK(k), q, keys_of(x), jnp.asarray([tokens]))
    want = brute_force(q[0, 0], x[0, 0], k)
    n = min(k, tokens)
    np.testing.assert_array_equal(scores[0, 0, :, :n], want[0])
    np.testing.assert_array_equal(slots[0, 0, :, :n], want[1])


# --- Attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lookup, shards, tokens, k",
    [
        (TopK, 1, 40, 9),
        (TopK, 1, 3000, 64),
        (TopK, 8, 3000, 7),
        (TopK, 8, 200, 128),
        (ApproximateTopK, 1, 3000, 7),
        (ApproximateTopK, 1, 200, 128),
        (ApproximateTopK, 8, 40, 9),
        (ApproximateTopK, 8, 3000, 64),
    ],
)
def test_attention_over_the_best_keys_equals_one_softmax(lookup, tokens, k, shards):
    """Also where a row has fewer keys than k: then all of them."""
    x_k, x_v, valid = tokens_of(tokens, seed=tokens)
    state = memory.empty(LLAMA, 2, tokens, mesh=mesh_of(shards))
    state = fill(state, x_k, x_v, valid, [512] * 8, shards)
    q = 2 * np.random.default_rng(1).normal(size=(2, LLAMA.num_kv_heads, 6, LLAMA.head_dim))
    q = q.astype(np.float32)
    got = attend(lookup(k), q, state.layers[0], state.visible, mesh_of(shards)).attended()
    for row, head, query in np.ndindex(q.shape[:3]):
        keys, values = (x[row, head, valid[row]] for x in (x_k, x_v))
        best = brute_force(q[row, head], keys, k)[1][query]
        want = one_softmax(q[row, head, query][None], keys[best], values[best])[0]
        np.testing.assert_allclose(got[row, head, query], want, atol=1e-5)


def test_shards_choose_the_oldest_of_equal_keys():
    """The k best over all shards, not of each."""
    tokens, k = 640, 5
    x_k, x_v, valid = tokens_of(tokens)
    x_k[:] = 1.0
    valid[:] = True
    state = fill(memory.empty(LLAMA, 2, tokens, mesh=mesh_of(8)), x_k, x_v, valid, [], 8)
    q = np.ones((2, LLAMA.num_kv_heads, 3, LLAMA.head_dim), np.float32)
    got = attend(TopK(k), q, state.layers[0], state.visible, mesh_of(8)).attended()
    want = x_v[:, :, None, :k].mean(3)
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), atol=1e-5)


def test_only_scores_and_outputs_travel_between_shards():
    """No collective of the compiled program moves anything of the memory's size."""
    for lookup in (Dense(), TopK(4)):
        state = memory.empty(LLAMA, 2, 2**15, mesh=mesh_of(8))
        q = np.ones((2, LLAMA.num_kv_heads, 3, LLAMA.head_dim), np.float32)
        program = jax.jit(functools.partial(attend, lookup, mesh=mesh_of(8)))
        text = program.lower(q, state.layers[0], state.visible).compile().as_text()
        collectives = [line for line in text.splitlines() if "all-" in line and " = " in line]
        assert collectives
        for line in collectives:
            assert str(2**12) not in line and str(2**15) not in line


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "int8"])
def test_best_keys_of_rounded_ones_are_nearly_the_best(storage):
    x_k, x_v, valid = tokens_of(2000)
    state = fill(memory.empty(LLAMA, 2, 2000, storage), x_k, x_v, valid, [512] * 8)
    q = np.random.default_rng(1).normal(size=(2, LLAMA.num_kv_heads, 30, LLAMA.head_dim))
    q = q.astype(np.float32)
    slots = np.asarray(search(TopK(32), q, state.layers[0].k, state.visible)[1])
    shares = []
    for row, head in np.ndindex(q.shape[:2]):
        best = brute_force(q[row, head], x_k[row, head, valid[row]], 32)[1]
        shares += [len(set(a) & set(b)) / 32 for a, b in zip(best, slots[row, head], strict=True)]
    assert 0.9 < np.mean(shares) < 1


# --- Bad input -----------------------------------------------------------------------------------


@LOOKUPS
def test_bad_input(lookup):
    with pytest.raises(UserError, match=f"{lookup.__name__}.k = 0: give 1 or more"):
        lookup(0)
    for k in (2.5, 2.0, float("inf")):
        with pytest.raises(UserError, match=f"{lookup.__name__}.k = {k}: give a whole number"):
            lookup(k)
    message = f"{lookup.__name__}.k = 65 is larger than the memory of 64 tokens: lower k"
    with pytest.raises(UserError, match=message):
        lookup(65).check(64)
    lookup(64).check(64)
    with pytest.raises(UserError, match="ApproximateTopK.recall = 0: give a number from 0.01 to 1"):
        dataclasses.replace(ApproximateTopK(3), recall=0)
