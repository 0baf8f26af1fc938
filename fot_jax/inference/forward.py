"""Compiled programs of a model that reads: windows of tokens, a local cache, a memory (paper §3.1).

A model reads a *piece* of text at a time. Every layer keeps the pieces of the local window in its
cache; memory layers see in the same softmax everything in their memory. When a piece no longer fits
into the window, the cache is emptied: memory layers move it to their memory, the others forget
it, and positions start again at 0.

Two programs read: `run` runs the layers over a piece and writes the caches only, `evict`
appends a cache to the memory. The former does not change the memory, so that it is never copied.
Of a memory that begins with segments in files, `run_over_segments` takes the place of `run`.

Letters: B rows, T tokens of a piece, W places of the window (the local context, rounded up), H
heads, K key/value heads, G = H / K, D head dim, E model dim, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from fot_jax.model import lookup as lookups
from fot_jax.model import memory as memories
from fot_jax.model import segments as segmented
from fot_jax.model import transformer
from fot_jax.model.attention import partial_softmax
from fot_jax.model.attention.partial_softmax import AnyArray
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Lookup
from fot_jax.model.memory import LayerMemory, Memory
from fot_jax.model.rope import positioned, rope_table, rotate
from fot_jax.model.segments import Closed, Segment


class LayerCache(NamedTuple):
    """The local window of one layer."""

    k: Float[Array, "B K W D"]  # as queries of the window see them
    v: Float[Array, "B K W D"]
    k_memory: Any = None  # the same as memory keeps them, where that is different (memory.py)


class Cache(NamedTuple):
    """The local window of all layers."""

    layers: tuple[LayerCache, ...]
    valid: Bool[Array, "B W"]  # False: free, or padding
    length: Int[Array, " B"]  # places in use, padding among them


def empty_cache(c: ModelConfig, rows: int, dtype=jnp.float32, mesh: Mesh | None = None) -> Cache:
    """A window with nothing in it."""
    places = c.local_context
    places = -(-places // 256) * 256 if places > 256 else 1 << (places - 1).bit_length()

    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def zeros():
        shape = (rows, c.num_kv_heads, places, c.head_dim)
        return jnp.zeros(shape, dtype, device=place)

    def layer(i):
        both = i in c.memory_layers and c.memory_positions  # then memory has other keys
        return LayerCache(zeros(), zeros(), zeros() if both else None)

    return Cache(
        tuple(layer(i) for i in range(c.num_layers)),
        jnp.zeros((rows, places), bool, device=place),
        jnp.zeros(rows, jnp.int32, device=place),
    )


# --- Run -----------------------------------------------------------------------------------------


@functools.partial(
    jax.jit, static_argnames=("c", "lookup", "mesh", "for_memory"), donate_argnames="cache"
)
def run(
    c: ModelConfig,
    lookup: Lookup,
    mesh: Mesh | None,
    params,
    cache: Cache,
    memory: Memory,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    advance: Int[Array, " B"],
    for_memory: bool = False,
) -> tuple[Float[Array, "B T E"], Cache]:
    """Runs all layers over the next piece of every row.

    Args:
      c, lookup, mesh: static.
      params: from `parameters_by_layer`.
      cache: used up; with room for `advance` more tokens.
      memory: of one row for each, or of one for all.
      valid: False for padding: nobody sees it.
      advance: how many places of the window a row's piece takes, from its first token on; what
        comes after is computed in vain. Rows of one batch may have pieces of different lengths.
      for_memory: static; whether the window is emptied next and nobody wants hidden states. Then
        only what moves to memory is computed: the layers below the last memory layer, and its keys
        and values.

    Returns:
      Hidden states, normalised, ready for `transformer.logits` (`for_memory`: those that enter the
      last memory layer, to wait for); the cache with the piece in it.
    """
    at = _places(c, cache, tokens, valid, advance, memory.visible)
    x = params["embedding"][tokens]
    layers = list(cache.layers)
    last = max(c.memory_layers, default=-1) if for_memory else c.num_layers
    for i, layer in enumerate(params["layers"][: last + 1]):
        q, layers[i] = _queries(c, i, layer, x, layers[i], at)
        if i == last:
            break
        if i in c.memory_layers and memory.slots:
            of_memory = memory.layers[c.memory_layers.index(i)]

            def look_up(q, of_memory=of_memory):
                return _attend_memory(lookup, q, of_memory, memory.visible, mesh)

            x = _outputs(c, layer, x, layers[i], at, look_up, q)
        else:
            x = _outputs(c, layer, x, layers[i], at, None, q)
    hidden = transformer.normalise(c, params["final_norm"], x)
    cache = Cache(tuple(layers), at.valid, cache.length + advance)
    return replicated(mesh, (hidden, cache))


def run_over_segments(
    c: ModelConfig,
    lookup: Lookup,
    params,
    cache: Cache,
    memory: Memory,
    closed: Sequence[Closed],
    in_closed: int,
    tokens: Int[AnyArray, "B T"],
    valid: Bool[AnyArray, "B T"],
    advance: Int[AnyArray, " B"],
    for_memory: bool = False,
) -> tuple[Float[Array, "B T E"], Cache]:
    """`run`, not compiled as a whole, of a memory that begins with segments.

    Layers up to the next memory layer are one program, so that the host can hand it one segment
    after another.

    Args:
      closed: segments of each memory layer.
      in_closed: tokens that are in them, those of all processes.
      memory: what comes after them.
    """
    piece = tokens, valid, advance, memory.visible + np.int32(in_closed)
    after = before = None
    for i, layer in enumerate(c.memory_layers):
        ends = for_memory and layer == c.memory_layers[-1]
        cache, (x, q) = _stretch(c, after, ends, params, cache, *piece, before)
        if ends:
            return x, cache
        opened = Segment(memory.layers[i], memory.visible) if memory.slots else None
        queries = q.reshape(*q.shape[:2], -1, q.shape[4])
        after, before = layer, (x, q, segmented.attend(lookup, queries, closed[i], opened))
    cache, hidden = _stretch(c, after, False, params, cache, *piece, before)
    return hidden, cache


@functools.partial(jax.jit, static_argnames=("c", "after", "ends"), donate_argnames="cache")
def _stretch(
    c: ModelConfig,
    after: int | None,
    ends: bool,
    params,
    cache: Cache,
    tokens,
    valid,
    advance,
    visible,
    before,
):
    """The layers from one memory layer to the next.

    Args:
      c, after, ends: static; the memory layer to go on from, None for the beginning; whether the
        piece is done at the next one.
      cache: used up.
      visible: tokens of memory, those in segments among them.
      before: x [B, T, E] at layer `after`, its queries [B, K, G, T, D] and what they found in
        memory, in parts [B, K, G * T].

    Returns:
      The cache, and x and queries at the next memory layer, or after the last one hidden states.
      In the cache of the last stretch the piece takes its places.
    """
    at = _places(c, cache, tokens, valid, advance, visible)
    layers = list(cache.layers)
    if after is None:
        x, start = params["embedding"][tokens], 0
    else:
        x, q, found = before
        found = jax.tree.map(lambda y: y.reshape(*q.shape[:4], *y.shape[3:]), found)
        x = _outputs(c, params["layers"][after], x, layers[after], at, lambda _, y: y, q, found)
        start = after + 1
    for i in range(start, c.num_layers):
        layer = params["layers"][i]
        q, layers[i] = _queries(c, i, layer, x, layers[i], at)
        if i in c.memory_layers:
            if ends:
                break
            return cache._replace(layers=tuple(layers)), (x, q)
        x = _outputs(c, layer, x, layers[i], at, None, q)
    cache = Cache(tuple(layers), at.valid, cache.length + advance)
    if ends:
        return cache, (x, q)
    return cache, transformer.normalise(c, params["final_norm"], x)


class _Places(NamedTuple):
    """Where a piece is in the window."""

    place: Int[Array, "B T"]
    seen: Bool[Array, "B T"]  # tokens that are none of padding
    valid: Bool[Array, "B W"]  # of the window, with the piece in it
    rope: Any  # of the places
    before: Any  # of the same places in the window before
    visible: Int[Array, " B"]  # tokens of memory


def _places(c: ModelConfig, cache: Cache, tokens, valid, advance, visible) -> _Places:
    place = cache.length[:, None] + jnp.arange(tokens.shape[1])
    seen = valid & (jnp.arange(tokens.shape[1]) < advance[:, None])
    places = cache.valid.shape[1]
    rope, before = (
        tuple(x[jnp.minimum(place, places - 1)] for x in rope_table(c, places, start))
        for start in (0, -c.local_context)
    )
    valid = memories.put(cache.valid[:, None], seen[:, None], place)[:, 0]
    visible = jnp.broadcast_to(visible, len(tokens))  # where rows share it, one number
    return _Places(place, seen, valid, rope, before, visible)


def _queries(c: ModelConfig, i: int, layer, x, of_layer: LayerCache, at: _Places):
    """Queries [B, K, G, T, D] of layer i, and its window with the piece's keys and values."""
    q, k, v = transformer.queries_keys_values(c, layer, x)
    if i in c.memory_layers:
        q = transformer.scaled_for_memory(c, q, at.visible)
    k_memory = rotate(k, at.before) if c.memory_before else k
    if i not in c.memory_layers or c.memory_positions:
        q, k = positioned(c, q, k, at.rope)
    new = LayerCache(k, v, None if of_layer.k_memory is None else k_memory)
    new = jax.tree.map(lambda x: x.swapaxes(1, 2), new)
    of_layer = jax.tree.map(functools.partial(memories.put, at=at.place), of_layer, new)
    B, T, H, D = q.shape
    return q.reshape(B, T, c.num_kv_heads, -1, D).transpose(0, 2, 3, 1, 4), of_layer


def _outputs(c: ModelConfig, layer, x, of_layer: LayerCache, at: _Places, look_up, q, found=()):
    """What comes out of a layer [B, T, E]: attention to the window and to memory, and the MLP.

    Args:
      look_up: of a tile of `q` and of `found`, whatever it is: attention to memory, in parts;
        None: there is none.
    """

    def attend(place, q, *found):
        local = _attend_window(q, of_layer, at.valid, place)
        if look_up is None:
            return local.attended()
        beyond = look_up(q, *found)
        if not c.memory_gate:
            return partial_softmax.merge(local, beyond).attended()
        return _gated(layer["attention"]["memory_gate"], local, beyond)

    arrays = (q, found) if found else (q,)
    attended = _by_tiles(attend, at.place, arrays)
    return transformer.add_outputs(c, layer, x, attended.reshape(*x.shape[:2], -1))


def replicated(mesh: Mesh | None, tree):
    """Results that every device of the mesh holds whole."""
    if mesh is None:
        return tree
    return lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def _by_tiles(attend, place: Int[Array, "B T"], arrays: tuple):
    """attend(place [B, t], *arrays [B, K, G * t, ...]) over tiles of t tokens: [B, T, H, D].

    Args:
      arrays: trees of arrays [B, K, G, T, ...], the first of them queries.
    """
    B, K, G, T, D = arrays[0].shape
    tile = T
    while tile % 2 == 0 and tile * B * K * G * 256 > partial_softmax.score_budget():
        tile //= 2
    tiles = T // tile

    def split(x):
        x = jnp.moveaxis(x.reshape(B, K, G, tiles, tile, *x.shape[4:]), 3, 0)
        return x.reshape(tiles, B, K, G * tile, *x.shape[5:])

    places = place.reshape(B, tiles, tile).swapaxes(0, 1)
    out = lax.map(lambda args: attend(*args), (places, *jax.tree.map(split, arrays)))
    out = out.reshape(tiles, B, K, G, tile, D).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(B, T, K * G, D).astype(arrays[0].dtype)


def _attend_window(q, layer: LayerCache, valid, place):
    """The valid tokens of the window at or before each query, in parts."""
    B, K, N, D = q.shape
    W, groups = valid.shape[1], N // place.shape[1]

    def step(start, size, parts):
        k, v, seen = (
            lax.dynamic_slice_in_dim(x, start, size, axis)
            for x, axis in ((layer.k, 2), (layer.v, 2), (valid, 1))
        )
        scores = jnp.einsum("bknd,bksd->bkns", q, k, preferred_element_type=jnp.float32)
        before = start + jnp.arange(size) <= place[:, :, None]
        visible = jnp.tile(before & seen[:, None], (1, groups, 1))[:, None]
        return partial_softmax.add_block(parts, scores, visible, v)

    return partial_softmax.over_blocks(
        step,
        partial_softmax.no_parts(q),
        places=W,
        used=jnp.minimum(place.max() + 1, W),
        block=min(W, 256),
        at_once=partial_softmax.fits_at_once(B * K * N, W),
    )


def _gated(gate: Float[Array, " H"], local, beyond):
    """sigmoid(gate) of memory, and the rest of the window; all of it where memory is empty."""
    K, N = local.top.shape[1:]
    share = jnp.repeat(jax.nn.sigmoid(gate).reshape(K, -1), N * K // len(gate), axis=1)  # [K, N]
    seen = (beyond.top > partial_softmax.MASKED / 2)[..., None]
    merged = share[..., None] * beyond.attended() + (1 - share[..., None]) * local.attended()
    return jnp.where(seen, merged, local.attended())


def _attend_memory(lookup: Lookup, q, layer: LayerMemory, visible, mesh):
    B, K, N, D = q.shape
    if len(visible) == B:
        return lookups.attend(lookup, q, layer, visible, mesh)
    q = q.swapaxes(0, 1).reshape(1, K, B * N, D)  # all rows look into one memory
    parts = lookups.attend(lookup, q, layer, visible, mesh)
    return jax.tree.map(lambda x: x.reshape(K, B, N, *x.shape[3:]).swapaxes(0, 1), parts)


# --- Evict ---------------------------------------------------------------------------------------


@functools.partial(
    jax.jit, static_argnames=("c", "mesh", "apart"), donate_argnames=("memory", "valid", "length")
)
def evict(
    c: ModelConfig,
    mesh: Mesh | None,
    layers,
    valid,
    length,
    memory: Memory,
    rows: Bool[Array, " B"],
    apart: bool = False,
) -> tuple[Bool[Array, "B W"], Int[Array, " B"], Memory]:
    """Empties the window of some rows: memory layers append it to their memory.

    Args:
      layers, valid, length: of the cache; the last two are used up.
      memory: used up.
      rows: which.
      apart: whether windows are no text together, of which memory_before would forget the older.

    Returns:
      The cache's valid and length, and the memory.
    """
    windows = []
    for i in c.memory_layers:
        k, v, k_memory = layers[i]
        windows.append((k if k_memory is None else k_memory, v))
    if c.memory_before:
        # Keys are at places of a whole window. Where this one is shorter, they move up to the next;
        # what memory has is then not of the window before.
        tables = rope_table(c, c.local_context + 1)
        up = tuple(x[c.local_context - length][:, None] for x in tables)
        windows = [(rotate(k, up), v) for k, v in windows]
        if not apart:
            gone = rows if memory.rows == len(rows) else rows.all()  # of a shared one others' stay
            memory = memory._replace(appended=jnp.where(gone, 0, memory.appended))
    memory = memories.append(memory, windows, valid & rows[:, None], mesh)
    return valid & ~rows[:, None], jnp.where(rows, 0, length), memory


# --- Results -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("c", "mesh"))
def logits(
    c: ModelConfig, mesh: Mesh | None, params: Any, hidden: Float[Array, "B T E"]
) -> Float[Array, "B T V"]:
    """Next-token logits, float32, of hidden states from `run`."""
    return replicated(mesh, transformer.logits(c, params, hidden))


@functools.partial(jax.jit, static_argnames=("c", "mesh"))
def score(
    c: ModelConfig,
    mesh: Mesh | None,
    params: Any,
    hidden: Float[Array, "B T E"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Nats of the targets, and whether they are the most likely tokens."""
    logits = transformer.logits(c, params, hidden)
    at_target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    scores = jax.nn.logsumexp(logits, -1) - at_target, at_target >= logits.max(-1)
    return replicated(mesh, scores)


@functools.partial(jax.jit, static_argnames="mesh")
def replicate(mesh: Mesh, tree: Any) -> Any:
    """Arrays that every device of the mesh holds whole."""
    return replicated(mesh, tree)
