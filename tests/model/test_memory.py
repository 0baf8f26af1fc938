"""Inference memory: what is in it after any way of filling it, in any storage and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from tiny import LLAMA

from fot_jax.model import memory
from fot_jax.model.lookup import Dense, attend

B, K, D = 2, LLAMA.num_kv_heads, LLAMA.head_dim
SHARDS = pytest.mark.parametrize("shards", [1, 8])


def mesh_of(shards):
    return None if shards == 1 else Mesh(np.asarray(jax.devices()[:shards]), (memory.AXIS,))


@functools.cache
def appending(shards):
    return jax.jit(functools.partial(memory.append, mesh=mesh_of(shards)), donate_argnums=0)


def fill(state, k, v, valid, pieces, shards=1):
    """Appends tokens [B, K, N, D] in pieces of the given sizes, the last one the rest."""
    start = 0
    for size in [*pieces, k.shape[2]]:
        cut = slice(start, min(start + size, k.shape[2]))
        if cut.start < cut.stop:
            window = [(k[:, :, cut], v[:, :, cut])]
            state = appending(shards)(state, window, valid[:, cut])
        start = cut.stop
    return state


def contents(state, row, shards=1):
    """Keys and values of a row by slot, in use: two [K, n, D]."""
    n = int(state.visible[row])

    def of(stored):
        x = np.asarray(memory.decode(stored, jnp.float32))[row]
        x = x.reshape(K, shards, -1, D).swapaxes(1, 2).reshape(K, -1, D)  # dealt out in turn
        return x[:, :n]

    return of(state.layers[0].k), of(state.layers[0].v)


def tokens_of(length, seed=0, rows=B):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, rows, K, length, D)).astype(np.float32)
    return k, v, rng.random((rows, length)) < 0.8


# --- Append --------------------------------------------------------------------------------------


@SHARDS
@pytest.mark.parametrize("pieces", [1, 7, 100])
def test_appending_in_pieces_is_appending_at_once(shards, pieces):
    length = 300
    k, v, valid = tokens_of(length)
    empty = functools.partial(memory.empty, LLAMA, B, length, mesh=mesh_of(shards))
    whole = fill(empty(), k, v, valid, [], shards)
    cut = fill(empty(), k, v, valid, [-(-length // pieces)] * pieces, shards)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_array_equal(a, b)
    for row in range(B):
        for got, want in zip(contents(cut, row, shards), (k, v), strict=True):
            np.testing.assert_array_equal(got, want[row][:, valid[row]])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 80),
    st.lists(st.sampled_from([1, 5, 16, 48]), min_size=1, max_size=12),
    st.sampled_from([1, 8]),
)
def test_a_ring_keeps_the_last_tokens(limit, pieces, shards):
    """Whatever the sizes; also where a piece is longer than the ring."""
    k, v, valid = tokens_of(sum(pieces))
    state = memory.empty(LLAMA, B, limit, mesh=mesh_of(shards))
    state = fill(state, k, v, valid, pieces, shards)
    for row in range(B):
        order = np.flatnonzero(valid[row])
        slot = {place % limit: token for place, token in enumerate(order)}
        tokens = [slot[s] for s in range(len(slot))]
        assert sorted(tokens) == order[-limit:].tolist()
        for got, want in zip(contents(state, row, shards), (k, v), strict=True):
            np.testing.assert_array_equal(got, want[row][:, tokens])


def test_a_ring_never_stops_going_around():
    """The count of tokens stays small, whatever was read: here as after 2^31 of them."""
    limit, step = 70, 30
    k, v, _ = tokens_of(step)
    state = memory.empty(LLAMA, B, limit)
    for n in range(1, 200):
        k[:], v[:] = n, -n
        state = appending(1)(state, [(k, v)], np.ones((B, step), bool))
        keys, values = contents(state, 1)
        assert keys.shape[1] == min(limit, n * step)
        last = sorted(i // step + 1 for i in range(max(0, n * step - limit), n * step))
        assert sorted(keys[0, :, 0].tolist()) == last
        assert (keys == -values).all()
    assert int(state.appended.max()) < 2 * limit


@SHARDS
def test_rows_share_a_memory(shards):
    """The first tokens of all rows come first; padding takes no slot."""
    k, v, valid = tokens_of(40)
    state = memory.empty(LLAMA, 1, 80, mesh=mesh_of(shards))
    state = fill(state, k, v, valid, [], shards)
    order = [(token, row) for token in range(40) for row in range(B) if valid[row, token]]
    for got, want in zip(contents(state, 0, shards), (k, v), strict=True):
        expected = np.stack([want[row, :, token] for token, row in order], axis=1)
        np.testing.assert_array_equal(got, expected)


@SHARDS
def test_growing_keeps_what_is_there(shards):
    k, v, valid = tokens_of(2000)
    state = memory.empty(LLAMA, B, 100, mesh=mesh_of(shards))
    sizes = []
    start = 0
    for limit in (100, 900, 1700, 2000):
        state = memory.grow(state, limit, mesh_of(shards))
        sizes.append(state.slots)
        cut = slice(start, start := limit)
        state = fill(state, k[:, :, cut], v[:, :, cut], valid[:, cut], [64] * 40, shards)
    assert sizes == sorted(sizes) and sizes[-1] > sizes[0]
    for row in range(B):
        for got, want in zip(contents(state, row, shards), (k, v), strict=True):
            np.testing.assert_array_equal(got, want[row][:, valid[row]])


@given(st.integers(1, 2**31 - 2**27), st.sampled_from([1, 3, 8]))
def test_slots_are_a_little_more_than_asked_for(tokens, shards):
    mesh = None if shards == 1 else jax.sharding.AbstractMesh((shards,), (memory.AXIS,))
    slots = memory.slots_for(tokens, mesh)
    of_shard = slots // shards
    assert slots >= tokens and slots % shards == 0
    assert of_shard <= max(64, 1.125 * tokens / shards + 1024)
    assert of_shard % min(1024, of_shard) == 0 and of_shard & -of_shard >= min(1024, of_shard)
    assert memory.slots_for(slots, mesh) == slots


@pytest.mark.parametrize("storage", memory.STORAGE)
def test_appending_copies_nothing(storage):
    """The compiled program updates the donated memory in place."""
    state = memory.empty(LLAMA, 1, 2**15, storage)
    k, v, valid = tokens_of(64, rows=1)
    compiled = appending(1).lower(state, [(k, v)], valid).compile()
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(state.layers[0].k))
    assert compiled.memory_analysis().temp_size_in_bytes < layer / 8


# --- Attend --------------------------------------------------------------------------------------


def one_softmax(q, k, v):
    """q [N, D] over k, v [S, D] in float64."""
    scores = q.astype(np.float64) @ k.T.astype(np.float64)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v.astype(np.float64)


# Values are standard normal; storage rounds each to 2^-9, 2^-12, 1/254 of the vector's largest.
ERRORS = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.004, "int8": 0.06, "int4": 0.4}


@pytest.mark.parametrize(
    "storage, tokens, shards",
    [
        ("float32", 1, 8),  # on one shard alone
        ("float32", 70, 8),
        ("float32", 3000, 1),
        ("bfloat16", 70, 1),
        ("bfloat16", 3000, 8),
        ("float16", 70, 8),
        ("float16", 3000, 1),
        ("int8", 1, 1),
        ("int8", 70, 1),
        ("int8", 3000, 8),
        ("int4", 70, 8),
        ("int4", 3000, 1),
    ],
)
def test_dense_attention_equals_one_softmax(storage, tokens, shards):
    """Grouped queries; rows filled differently; one block of slots and several."""
    k, v, valid = tokens_of(tokens, seed=tokens)
    valid[:, 0] = True
    state = memory.empty(LLAMA, B, tokens, storage, mesh_of(shards))
    state = fill(state, k, v, valid, [97] * 40, shards)
    q = np.random.default_rng(1).normal(size=(B, K, 6, D)).astype(np.float32)
    parts = attend(Dense(), q, state.layers[0], state.visible, mesh_of(shards))
    got = np.asarray(parts.attended())
    worst = 0.0
    for row in range(B):
        for head in range(K):
            seen = valid[row]
            want = one_softmax(q[row, head], k[row, head, seen], v[row, head, seen])
            worst = max(worst, np.abs(got[row, head] - want).max())
    assert worst < ERRORS[storage]
    if storage != "float32" and tokens > 1:
        assert worst > ERRORS[storage] / 50  # it is stored as it says


@pytest.mark.parametrize("storage", memory.STORAGE)
def test_storage_rounds_each_element_a_little(storage):
    x = np.random.default_rng(0).normal(size=(3, 50, 64)).astype(np.float32)
    x[0, 0] = 0
    got = np.asarray(memory.decode(memory.encode(jnp.asarray(x), storage), jnp.float32))
    relative = {"bfloat16": 2**-8, "float16": 2**-11}.get(storage, 0)
    step = {"int8": np.abs(x).max(-1, keepdims=True) / 127}.get(storage, 0)
    if storage == "int4":
        groups = x.reshape(3, 50, 2, 32)
        step = np.repeat((groups.max(-1) - groups.min(-1)) / 15, 32, -1) + 0.002
    assert (np.abs(got - x) <= relative * np.abs(x) + step / 2 * 1.001 + 1e-7).all()


def test_sizes():
    state = memory.empty(LLAMA, B, 1000, "int8")
    assert (state.slots, state.rows, state.storage) == (1024, B, "int8")
    one = B * K * 1024 * (D + 4)  # bytes of keys, with a scale each
    assert 2 * one <= state.nbytes <= 2 * one + 64
    one = B * K * 1024 * (D // 2 + 4)
    assert 2 * one <= memory.empty(LLAMA, B, 1000, "int4").nbytes <= 2 * one + 64
    assert memory.empty(LLAMA, B, 0).slots == 0


@pytest.mark.parametrize("shape", [(3,), (2, 5, 7), (1_000, 1_000)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_arrays_of_the_host_that_programs_use_where_they_are(shape, dtype):
    """Those at multiples of 64 bytes."""
    x = memory.empty_on_host(shape, dtype)
    assert x.shape == shape and x.dtype == dtype and x.ctypes.data % 64 == 0
    x[...] = 1
    assert (np.asarray(jax.jit(lambda x: x + 1)(x)) == 2).all()
