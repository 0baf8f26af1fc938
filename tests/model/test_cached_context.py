"""Contexts cached in training: Transformer-XL and the Memorizing Transformer."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from tiny import LLAMA, PAPER, forward, plan_of, random_params, random_tokens

from fot_jax.common.errors import UserError
from fot_jax.data.documents import Document
from fot_jax.data.lanes import Lanes
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig
from fot_jax.model import cached_context, crossbatch
from fot_jax.model.cached_context import Cached
from fot_jax.model.lookup import ApproximateTopK, Dense, IndexedTopK, TopK
from fot_jax.model.schemes import CachedContext, PreviousContext
from fot_jax.model.transformer import Transformer
from fot_jax.training.partitioning import MeshShape

T = LLAMA.local_context
MODELS = pytest.mark.parametrize("config", [LLAMA, PAPER], ids=["llama", "paper"])
TRANSFORMER_XL = dataclasses.replace(LLAMA, memory_layers=(0, 1, 2), memory_before=True)


@functools.partial(jax.jit, static_argnames=("config", "scheme", "plan"))
def step(config, scheme, plan, params, cached, tokens, segments):
    model = Transformer(config)
    out = model.apply({"params": params}, tokens, segments, plan, keep=scheme, cached=cached)
    return model.apply({"params": params}, out.hidden, method="logits"), out.cached


def read(config, scheme, tokens, segments=None, plan=None):
    """Logits of windows [R, W * T], one window after the other; and the cache."""
    segments = np.ones_like(tokens) if segments is None else segments
    cached = cached_context.empty(config, scheme, len(tokens), jnp.float32)
    found = []
    for window in range(tokens.shape[1] // T):
        part = slice(window * T, (window + 1) * T)
        logits, cached = step(
            config,
            scheme,
            plan or crossbatch.Plan(),
            params=random_params(config),
            cached=cached,
            tokens=tokens[:, part],
            segments=segments[:, part],
        )
        found.append(np.asarray(logits))
    return np.concatenate(found, 1), cached


# --- Peers ---------------------------------------------------------------------------------------


@MODELS
def test_one_window_is_the_previous_context_of_crossbatch(config):
    """FoT with d = 1, but for gradients (paper §5)."""
    tokens = random_tokens(config, 3, 2 * T)
    got, _ = read(config, CachedContext(T), tokens)
    scheme = PreviousContext()
    rows = tokens.reshape(6, T)
    plan = plan_of(config, scheme, rows)
    want = forward(config, random_params(config), rows, np.ones_like(rows), plan)
    want = np.asarray(want).reshape(3, 2 * T, -1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_transformer_xl_is_one_window_of_twice_the_length():
    """For the first two windows of a text: then all there is before is in the cache."""
    tokens = random_tokens(LLAMA, 2, 2 * T)
    got, _ = read(TRANSFORMER_XL, CachedContext(T), tokens)
    plain = dataclasses.replace(LLAMA, memory_layers=(), local_context=2 * T)
    params = random_params(plain)
    want = forward(plain, params, tokens, np.ones_like(tokens), crossbatch.Plan())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config, lookup, gate",
    [
        (LLAMA, Dense(), False),
        (PAPER, Dense(), True),
        (PAPER, TopK(5), False),
        (LLAMA, TopK(5), True),
    ],
    ids=["llama", "paper, gate", "paper, top k", "llama, top k, gate"],
)
def test_a_language_model_reads_as_training_does(config, lookup, gate):
    """Its memory is this cache, window by window, until it is a ring."""
    config = dataclasses.replace(config, memory_gate=gate)
    tokens = random_tokens(config, 2, 5 * T)
    got, _ = read(config, CachedContext(3 * T, lookup), tokens)
    lm = LanguageModel.of(Transformer(config), random_params(config))
    memory = MemoryConfig(3 * T, lookup=lookup)
    want = lm.logits(tokens, last_context_length=T, memory=memory)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_transformer_xl_reads_as_it_was_trained():
    tokens = random_tokens(LLAMA, 2, 4 * T)
    got, _ = read(TRANSFORMER_XL, CachedContext(T), tokens)
    lm = LanguageModel.of(Transformer(TRANSFORMER_XL), random_params(TRANSFORMER_XL))
    for memory in (MemoryConfig(T), MemoryConfig()):  # one window, also when not asked for
        want = lm.logits(tokens, last_context_length=T, memory=memory)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=f"a memory of {T + 1} tokens .*: give at most {T}"):
        lm.read(tokens, memory=MemoryConfig(T + 1))


# --- Documents -----------------------------------------------------------------------------------


def test_a_document_does_not_see_the_one_before_it():
    tokens = random_tokens(LLAMA, 1, 3 * T)
    segments = np.repeat([1, 2], [T + 3, 2 * T - 3])[None]
    got, _ = read(LLAMA, CachedContext(2 * T), tokens, segments)
    other = tokens.copy()
    other[:, : T + 3] = (other[:, : T + 3] + 1) % LLAMA.vocab_size
    changed, _ = read(LLAMA, CachedContext(2 * T), other, segments)
    np.testing.assert_array_equal(got[:, T + 3 :], changed[:, T + 3 :])
    both, _ = read(LLAMA, CachedContext(2 * T, multi_doc=True), tokens, segments)
    np.testing.assert_array_equal(both[:, :T], got[:, :T])
    assert (np.abs(both - got).max(-1)[0, T + 3 :] > 1e-3).all()


@pytest.mark.parametrize("changed", [0, 1])
def test_batches_say_which_documents_the_cache_is_of(changed):
    """A lane with a document, then one of many windows, of which the first token sees all along."""

    class Source:
        def __init__(self, change):
            self.change = change

        def stream(self, *_):
            for number, length in enumerate((T + 5, 6 * T)):
                tokens = random_tokens(LLAMA, 1, length)[0]
                tokens[0] = (tokens[0] + self.change * (number == changed)) % LLAMA.vocab_size
                yield (0, number), Document(tokens, np.ones(length, np.float32))

    def logits(change):
        batches = itertools.islice(Lanes(Source(change), lanes=1, window=T), 6)
        tokens, segments = zip(*((x["inputs"], x["segment_ids"]) for x in batches), strict=True)
        found, _ = read(
            LLAMA, CachedContext(8 * T), *(np.concatenate(x, 1) for x in (tokens, segments))
        )
        return found[0, T + 4 :]  # of the second document

    differ = np.abs(logits(1) - logits(0)).max(-1) > 1e-5
    assert differ.all() if changed else not differ.any()


def test_padding_is_not_seen():
    tokens = random_tokens(LLAMA, 1, 2 * T)
    segments = np.repeat([0, 1], [3, 2 * T - 3])[None]
    for multi_doc in (False, True):
        scheme = CachedContext(T, multi_doc=multi_doc)
        got, _ = read(LLAMA, scheme, tokens, segments)
        changed, _ = read(LLAMA, scheme, np.where(segments, tokens, 7), segments)
        np.testing.assert_array_equal(got[:, T:], changed[:, T:])


def test_the_cache_is_a_ring():
    tokens = random_tokens(LLAMA, 2, 3 * T)
    segments = np.repeat([[4, 5, 6]], T, 1) + np.zeros((2, 1), int)
    _, cached = read(LLAMA, CachedContext(2 * T), tokens, segments)
    _, last = read(LLAMA, CachedContext(T), tokens[:, 2 * T :])
    np.testing.assert_allclose(cached.k[:, :, :T], last.k, atol=1e-6)  # of a first layer's x alone
    assert cached.segments[0].tolist() == [6] * T + [5] * T and cached.place == T


# --- Attention, in NumPy -------------------------------------------------------------------------


def random_attention(seed=0, R=2, H=4, K=2, D=8, M=24):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(R, T, n, D)).astype(np.float32) for n in (H, K, K))
    k_cached, v_cached = (rng.normal(size=(R, M, K, D)).astype(np.float32) for _ in range(2))
    segments = np.sort(rng.integers(3, 5, (R, T)), 1)
    cached_segments = np.sort(rng.integers(0, 4, (R, M)), 1)
    return q, k, v, segments, k_cached, v_cached, cached_segments


def by_hand(q, k, v, segments, k_cached, v_cached, cached_segments, scheme, gate=None):
    out = np.zeros(q.shape)
    groups = q.shape[2] // k.shape[2]
    best = getattr(scheme.lookup, "k", scheme.tokens)
    for row, t, h in np.ndindex(q.shape[:3]):
        of_query, kv = q[row, t, h].astype(np.float64), h // groups
        here = [s for s in range(t + 1) if segments[row, s] == segments[row, t]]
        wanted = lambda s: s > 0 if scheme.multi_doc else s == segments[row, t]  # noqa: B023, E731
        there = [s for s, segment in enumerate(cached_segments[row]) if wanted(segment)]
        there = sorted(there, key=lambda s: -(k_cached[row, s, kv] @ of_query))[:best]  # noqa: B023
        local = np.exp(k[row, here, kv] @ of_query)
        beyond = np.exp(k_cached[row, there, kv] @ of_query)
        a, b = local @ v[row, here, kv], beyond @ v_cached[row, there, kv]
        if gate is None:
            out[row, t, h] = (a + b) / (local.sum() + beyond.sum())
        elif there:
            g = 1 / (1 + np.exp(-gate[h]))
            out[row, t, h] = g * b / beyond.sum() + (1 - g) * a / local.sum()
        else:
            out[row, t, h] = a / local.sum()
    return out


@pytest.mark.parametrize("gate", [None, np.array([-2.0, 0.0, 1.0, 3.0], np.float32)])
@pytest.mark.parametrize("multi_doc", [False, True])
@pytest.mark.parametrize("lookup", [Dense(), TopK(3), ApproximateTopK(3)])
def test_attention(lookup, multi_doc, gate):
    scheme = CachedContext(24, lookup, multi_doc)
    arrays = random_attention()
    assert (arrays[3] == 4).any() and not (arrays[6] == 4).any()  # documents not in the cache
    got = cached_context.attention(*arrays, scheme, crossbatch.Plan(), gate)
    np.testing.assert_allclose(got, by_hand(*arrays, scheme, gate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [None, np.array([-2.0, 0.0, 1.0, 3.0], np.float32)])
@pytest.mark.parametrize("lookup", [Dense(), TopK(3)])
def test_gradients(lookup, gate):
    """Of queries, keys, values and gate; the cache gets none."""
    q, k, v, segments, k_cached, v_cached, cached_segments = random_attention()
    scheme = CachedContext(24, lookup)

    def attend(q, k, v, gate):
        rest = k_cached, v_cached, cached_segments, scheme, crossbatch.Plan(), gate
        return cached_context.attention(q, k, v, segments, *rest)

    with jax.enable_x64(True):
        wide = [None if x is None else jnp.asarray(x, jnp.float64) for x in (q, k, v, gate)]
        check_grads(attend, wide, order=1, modes=["rev"], atol=1e-3, rtol=1e-3)

    def of_cache(k_cached, v_cached):
        rest = cached_segments, scheme, crossbatch.Plan(), gate
        return cached_context.attention(q, k, v, segments, k_cached, v_cached, *rest).sum()

    for grads in jax.grad(of_cache, (0, 1))(k_cached, v_cached):
        assert not np.asarray(grads).any()


def test_on_a_mesh():
    config = dataclasses.replace(LLAMA, memory_gate=True)
    tokens, scheme = random_tokens(config, 4, 2 * T), CachedContext(T, TopK(5))
    want, _ = read(config, scheme, tokens)
    mesh = MeshShape(data=2, fsdp=2, tensor=2).make()
    plan = crossbatch.make_plan(scheme, 4, mesh=mesh, heads=4, window=T)
    got, _ = read(config, scheme, tokens, plan=plan)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_microbatches_have_their_parts_of_it():
    rng = np.random.default_rng(0)
    shape = (2, 6, 16, 2, 4)
    k, v, segments = (rng.normal(size=s).astype(np.float32) for s in (shape, shape, (6, 16)))
    cached = Cached(k, v, segments, 8)
    halves = cached_context.split(cached, 2)
    second = jax.tree.map(lambda x: x[1], halves)
    np.testing.assert_array_equal(second.k, cached.k[:, 3:])
    np.testing.assert_array_equal(second.segments, cached.segments[3:])
    assert second.place == 8
    for got, want in zip(cached_context.joined(halves), cached, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CachedContext(0), "CachedContext.tokens = 0"),
        (lambda: CachedContext(8, TopK(9)), "TopK.k = 9 is larger than the memory of 8 tokens"),
        (lambda: CachedContext(8, IndexedTopK(2)), "what is cached in training has no index"),
        (lambda: CachedContext(8).with_d(2), "CachedContext has no d"),
        (
            lambda: read(
                dataclasses.replace(LLAMA, memory_scaling=0.1),
                CachedContext(T),
                random_tokens(LLAMA, 1, T),
            ),
            "model.memory_scaling = 0.1 with a CachedContext: .* set it to 0",
        ),
        (
            lambda: dataclasses.replace(PAPER, memory_before=True),
            "model.memory_before gives keys of memory positions",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
