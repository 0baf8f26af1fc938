"""Contexts that were cached when they were read, as the baselines of the paper have them (§6).

Not crossbatch: in training a row sees what its memory layers have kept of its earlier windows, as
it was computed then, with the parameters of then, and without gradients. Transformer-XL keeps one
window in every layer; the Memorizing Transformer keeps many in one layer, looks up the best keys of
each query, and may merge what it finds through a learned gate.

Letters: R rows, T tokens of a row, M tokens kept of each, H heads, K key/value heads, G = H / K, D
head dim, k keys of a query.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fot_jax.model import crossbatch
from fot_jax.model.attention.partial_softmax import MASKED, AnyArray
from fot_jax.model.lookup import Lookup
from fot_jax.model.schemes import CachedContext


class Cached(NamedTuple):
    """What is kept of earlier windows, by memory layer (stacked) and row; a ring."""

    k: Float[Array, "layers R M K D"]  # as queries of later windows see them
    v: Float[Array, "layers R M K D"]
    segments: Int[Array, "R M"]  # the document of each token in its lane; 0: nothing there
    place: Int[Array, ""]  # where the next window goes


def empty(config, scheme: CachedContext, rows: int, dtype) -> Cached:
    """Nothing yet, for a model of this ModelConfig."""
    shape = (
        len(config.memory_layers),
        rows,
        scheme.cached_tokens,
        config.num_kv_heads,
        config.head_dim,
    )
    return Cached(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((rows, scheme.cached_tokens), jnp.int32),
        jnp.zeros([], jnp.int32),
    )


def updated(cached: Cached, k, v, segments: Int[Array, "R T"]) -> Cached:
    """With the keys and values [layers, R, T, K, D] of a window, over the oldest one."""

    def put(x, new, axis):
        new = lax.stop_gradient(new).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(x, new, cached.place, axis)

    return Cached(
        *(put(x, new, 2) for x, new in ((cached.k, k), (cached.v, v))),
        put(cached.segments, segments, 1),
        (cached.place + segments.shape[1]) % cached.segments.shape[1],
    )


def split(cached: Cached | None, parts: int) -> Cached | None:
    """That of each microbatch: every array with a first axis of them."""
    if cached is None:
        return None

    def of_rows(x, axis):
        x = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    k, v, segments, place = cached
    k, v, segments = of_rows(k, 1), of_rows(v, 1), of_rows(segments, 0)
    return Cached(k, v, segments, jnp.broadcast_to(place, parts))


def joined(cached: Cached | None) -> Cached | None:
    """The reverse of `split`."""
    if cached is None:
        return None

    def of_rows(x, axis):
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    k, v, segments, place = cached
    return Cached(of_rows(k, 1), of_rows(v, 1), of_rows(segments, 0), place[0])


def attention(
    q: Float[AnyArray, "R T H D"],
    k: Float[AnyArray, "R T K D"],
    v: Float[AnyArray, "R T K D"],
    segments: Int[AnyArray, "R T"],
    k_cached: Float[AnyArray, "R M K D"],
    v_cached: Float[AnyArray, "R M K D"],
    cached_segments: Int[AnyArray, "R M"],
    scheme: CachedContext,
    plan: crossbatch.Plan,
    gate: Float[AnyArray, " H"] | None = None,
) -> Float[Array, "R T H D"]:
    """Local causal attention and that to the row's own cache.

    Without a gate, one softmax; with it, sigmoid(gate) of the attention to the cache and the rest
    of local attention (where the cache has nothing to see, local attention alone).

    Differentiable in q, k, v and gate; row by row, so that the scores of one alone are held.
    """
    k_cached, v_cached = (lax.stop_gradient(x) for x in (k_cached, v_cached))
    weight = None if gate is None else jax.nn.sigmoid(gate.astype(jnp.float32))

    def on_device(device, q, k, v, k_cached, v_cached, segments, cached_segments, *weight):
        def of_row(arrays):
            return _of_row(scheme, *arrays, *weight)

        rows = q, k, v, k_cached, v_cached, segments, cached_segments
        return lax.map(jax.checkpoint(of_row), rows)

    arrays = [q, k, v, k_cached, v_cached, segments, cached_segments]
    if weight is not None:
        arrays.append(weight)
    return crossbatch.over_devices(plan, on_device, *arrays)


def _of_row(scheme, q, k, v, k_cached, v_cached, segments, cached_segments, weight=None):
    T, H, D = q.shape
    K = k.shape[1]
    q = q.reshape(T, K, H // K, D).transpose(1, 2, 0, 3)  # [K, G, T, D]
    k, v, k_cached, v_cached = (x.swapaxes(0, 1) for x in (k, v, k_cached, v_cached))  # [K, T, D]

    same = segments[:, None] == segments
    local = _scores(q, k, jnp.tril(same))
    if scheme.multi_doc:
        seen = jnp.broadcast_to(cached_segments > 0, (T, len(cached_segments)))
    else:
        seen = (segments[:, None] == cached_segments) & (cached_segments > 0)
    beyond, v_beyond = _beyond(scheme.lookup, q, k_cached, v_cached, seen)
    if weight is None:
        scores = jnp.concatenate([local, beyond], -1)
        p_local, p_beyond = jnp.split(jax.nn.softmax(scores, -1), [T], -1)
    else:
        w = weight.reshape(K, H // K, 1, 1)
        w = jnp.where(seen.any(-1)[:, None], w, 0.0)
        p_local, p_beyond = (1 - w) * jax.nn.softmax(local, -1), w * jax.nn.softmax(beyond, -1)
    out = _weighted(p_local, v) + _weighted(p_beyond, v_beyond)
    return out.astype(q.dtype).transpose(2, 0, 1, 3).reshape(T, H, D)


def _beyond(lookup: Lookup, q, k, v, seen):
    """Scores of the cached keys that are looked up, and their values: of all, or of each query."""
    scores = _scores(q, k, seen)
    found = lookup.best(lax.stop_gradient(scores))
    if found is None:
        return scores, v
    scores, slots = found
    k, v = (jax.vmap(lambda x, at: x[at])(x, slots) for x in (k, v))
    again = jnp.einsum("kgtd,kgtsd->kgts", q, k, preferred_element_type=jnp.float32)
    return jnp.where(scores > MASKED / 2, again, MASKED), v


def _scores(q, k, seen):
    scores = jnp.einsum("kgtd,ksd->kgts", q, k, preferred_element_type=jnp.float32)
    return jnp.where(seen, scores, MASKED)


def _weighted(p, v):
    """Of values [K, S, D], or [K, G, T, k, D] of each query."""
    products = "kgts,ksd->kgtd" if v.ndim == 3 else "kgts,kgtsd->kgtd"
    return jnp.einsum(products, p.astype(v.dtype), v, preferred_element_type=jnp.float32)
