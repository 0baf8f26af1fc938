"""Softmax attention in parts.

Everything the Focused Transformer adds to a transformer is more keys in the same softmax. So
attention is built of *parts*: a part is one tile of queries against one tile of keys, and parts
merge exactly through their logsumexp. A list of pairs (query row, key row) says which parts there
are; local causal attention, every crossbatch context and every block of a memory are such lists.

`attend` walks the list forward, `attend_backward` walks it again and recomputes the scores from the
saved logsumexp, so neither ever holds the scores of more than one step. Softmax is in float32.

Letters: R rows, N key rows, H heads, K key/value heads, D head dim, T queries and S keys of a row,
P pairs of one step. Grouped queries (H = K * groups) fold into the query axis.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AnyArray = jax.Array | np.ndarray  # what public functions take outside of a compiled program

MASKED = -1e30  # finite, so that a part without any visible key merges as "nothing" and not as NaN

# What a pair lets its queries see of its keys. Keys of segment 0 are padding.
NOTHING = 0  # fills up a step that has fewer pairs than slots
SAME_DOCUMENT = 1  # keys of the query's own segment
ANY_DOCUMENT = 2  # every key that is not padding

MAX_TILE = 512
STRIP = 128  # queries of a tile on the diagonal that are computed at a time

LOOP_SCOPE = "at_most_{}_times"  # names the bound of a loop for tpu_compile/costs.py


class Pairs(NamedTuple):
    """Which query row attends to which key row, in steps of at most P pairs.

    No query row appears twice in one step, so that a step can write its rows independently.
    """

    q_row: jax.Array  # [steps, P] int32; slots that see nothing point beyond the last row
    k_row: jax.Array  # [steps, P] int32
    sees: jax.Array  # [steps, P] int32: NOTHING, SAME_DOCUMENT or ANY_DOCUMENT
    count: jax.Array  # [] int32: steps in use, the rest is filling


def schedule_pairs(pairs: Sequence[tuple[int, int, int]], rows: int, slots: int) -> Pairs:
    """Packs (query row, key row, sees) triples into as few steps of `slots` pairs as possible.

    Every step takes the query rows with most pairs left: the fewest steps that keep a query row
    from appearing twice in a step. Pairs of one query row keep their order.
    """
    waiting: dict[int, list[tuple[int, int, int]]] = {}
    for pair in pairs:
        waiting.setdefault(pair[0], []).append(pair)
    heap = [(-len(left), q_row) for q_row, left in waiting.items()]
    heapq.heapify(heap)
    steps = []
    while heap:
        taken = [heapq.heappop(heap) for _ in range(min(slots, len(heap)))]
        step = [waiting[q_row][left] for left, q_row in taken]  # left = -(pairs still to come)
        steps.append(sorted(step) + [(rows, 0, NOTHING)] * (slots - len(step)))
        for left, q_row in taken:
            if left + 1:
                heapq.heappush(heap, (left + 1, q_row))
    table = np.asarray(steps, np.int32).reshape(len(steps), slots, 3)
    return Pairs(table[..., 0], table[..., 1], table[..., 2], np.int32(len(steps)))


def tile_of(length: int) -> int:
    """The tile that `length` queries or keys are cut into: the largest divisor up to MAX_TILE.

    Where multiples of 128 divide, the largest of these: kernels for TPUs take no other tiles.
    """
    divisors = [tile for tile in range(1, min(length, MAX_TILE) + 1) if length % tile == 0]
    tile = max([tile for tile in divisors if tile % 128 == 0] or divisors)
    # A length with no useful divisor (a large prime) is one tile.
    return tile if tile >= 64 else length


def score_budget(platform: str | None = None) -> int:
    """Scores worth computing in one step: those that stay in a CPU's cache, or that fill a chip.

    Args:
      platform: cpu, gpu or tpu; None for the default one of this process.
    """
    return {"cpu": 2**20, "tpu": 2**23}.get(platform or jax.default_backend(), 2**25)


def slots_of(heads: int, queries: int, keys: int, platform: str) -> int:
    """Pairs worth computing in one step."""
    return max(1, score_budget(platform) // (heads * tile_of(queries) * tile_of(keys)))


def lay_out(
    pairs: Sequence[Sequence[tuple[int, int, int]]], rows: int, keys: int, slots: int
) -> Pairs:
    """Pairs of all devices as one Pairs with a leading device axis, filled up alike.

    Args:
      pairs: (query row, key row, sees) of each device.
      rows: query rows of a device.
      keys: key rows of a device; steps do not depend on it.
      slots: pairs worth computing in one step.
    """
    del keys
    queries = max(len({pair[0] for pair in of_device}) for of_device in pairs)
    slots = max(1, min(slots, queries))
    scheduled = [schedule_pairs(of_device, rows, slots) for of_device in pairs]
    steps = max(1, *(s.count for s in scheduled))

    def stacked(field: str):
        filled = (np.pad(getattr(s, field), ((0, steps - s.count), (0, 0))) for s in scheduled)
        return np.stack(list(filled))

    count = np.stack([s.count for s in scheduled])
    return Pairs(stacked("q_row"), stacked("k_row"), stacked("sees"), count)


def local_pairs(rows: int, slots: int) -> Pairs:
    """Each query row meets the key row of the same number, as far as it is the same document."""
    pairs = [(row, row, SAME_DOCUMENT) for row in range(rows)]
    return schedule_pairs(pairs, rows, min(slots, rows))


def to_tiles(x_RTHD: AnyArray, kv_heads: int) -> AnyArray:
    """[R, T, H, D] -> [R * tiles, K, H/K * tile, D]."""
    R, T, H, D = x_RTHD.shape
    tile, G = tile_of(T), H // kv_heads
    x = x_RTHD.reshape(R, T // tile, tile, kv_heads, G, D).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(R * (T // tile), kv_heads, G * tile, D)


def from_tiles(x: jax.Array, rows: int, length: int) -> jax.Array:
    """[R * tiles, K, H/K * tile, D] -> [R, T, H, D], the inverse of `to_tiles`."""
    _, K, GT, D = x.shape
    tile = tile_of(length)
    x = x.reshape(rows, length // tile, K, GT // tile, tile, D).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(rows, length, K * (GT // tile), D)


class Parts(NamedTuple):
    """Attention over the keys seen so far: a softmax whose division is put off to the end."""

    out: jax.Array  # [..., D] float32: sum of exp(score - top) * value
    top: jax.Array  # [...] float32: the largest score
    total: jax.Array  # [...] float32: sum of exp(score - top)

    @property
    def lse(self) -> jax.Array:
        """[...] float32: logsumexp of the scores."""
        return self.top + jnp.log(self.total)

    def attended(self) -> jax.Array:
        """[..., D] float32: softmax(scores) times values.

        Of queries that saw masked keys alone: finite; to which nothing was added: NaN.
        """
        return self.out / self.total[..., None]


def no_parts(q: AnyArray, tile: int = 0) -> Parts:
    """The neutral element of merging: nothing seen yet, for queries `q` [..., D].

    Args:
      tile: of engines that keep tiles apart; this one does not.
    """
    del tile
    top = jnp.full(q.shape[:-1], MASKED, jnp.float32)
    return Parts(jnp.zeros(q.shape, jnp.float32), top, jnp.zeros(q.shape[:-1], jnp.float32))


def add_block(parts: Parts, scores: jax.Array, visible: jax.Array, v: jax.Array) -> Parts:
    """One more block of keys in the same softmax, exactly (paper §3.1).

    Args:
      parts: leading axes [P, K, T].
      scores: [P, K, T, S] float32; visible: bool, broadcasts to it.
      v: [P, K, S, D] in the type that products are computed in.
    """
    scores = jnp.where(visible, scores, MASKED)
    top = jnp.maximum(scores.max(-1), parts.top)
    # Before a query has seen any key, masked ones weigh 1; the first key it sees makes that 0.
    p = jnp.exp(scores - top[..., None])
    kept = jnp.exp(parts.top - top)
    out = parts.out * kept[..., None] + _dot("pkts,pksd->pktd", p.astype(v.dtype), v)
    return Parts(out, top, parts.total * kept + p.sum(-1))


def merge(a: Parts, b: Parts) -> Parts:
    """One softmax over the keys of both parts, exactly (paper §3.1)."""
    top = jnp.maximum(a.top, b.top)
    wa, wb = jnp.exp(a.top - top), jnp.exp(b.top - top)
    out = a.out * wa[..., None] + b.out * wb[..., None]
    return Parts(out, top, a.total * wa + b.total * wb)


def over_blocks(step, parts: Parts, places: int, used: jax.Array, block: int, at_once: bool):
    """step(start, size, parts) over all blocks of `places` keys of which the first are used.

    Args:
      used: [] int32: keys in use; what a step sees of others counts for nothing.
      block: places of a step; divides `places`.
      at_once: whether one step may take all of them, which it does where half of them are used: of
        a block XLA's CPU backend makes a copy before it multiplies, of all of them none.
    """

    def block_by_block(parts):
        steps = (used + block - 1) // block
        return lax.fori_loop(0, steps, lambda i, parts: step(i * block, block, parts), parts)

    if not at_once:
        return block_by_block(parts)
    return lax.cond(2 * used >= places, lambda parts: step(0, places, parts), block_by_block, parts)


def fits_at_once(queries: int, places: int) -> bool:
    """Whether scores of so many queries and places are few enough for one step, on a CPU."""
    return jax.default_backend() == "cpu" and queries * places <= score_budget()


def attend(q, k, v, q_segments, k_segments, pairs: Pairs, parts: Parts, causal: bool) -> Parts:
    """Merges the attention of all `pairs` into `parts`.

    Args:
      q: [R * tiles, K, G * tile, D] scaled queries (`to_tiles`), any float type.
      k, v: [N * tiles, K, tile, D].
      q_segments, k_segments: [R, T], [N, S] int32 documents, 0 for padding.
      pairs: which rows meet.
      parts: what the queries have attended to so far.
      causal: True when a pair's two rows are the same window: only keys at or before a query
        are visible. False when the keys lie in other contexts, all of them before the query.
    """
    tile = q_segments.size // q.shape[0]
    q = _by_head(q, tile)
    by_head = Parts(*(_by_head(x, tile) for x in parts))
    for walk in _walks(q, k, q_segments, k_segments, pairs, causal):

        def one(parts, at, walk=walk):
            queries = [_take(x, at.q) for x in (q, *parts)]
            keys = [_take(x, at.k) for x in (k, v)]
            after = []
            for strip in walk.strips:
                q_s, *before = (strip.of_queries(x) for x in queries)
                k_s, v_s = (strip.of_keys(x) for x in keys)
                scores = _dot("pktd,pksd->pkts", q_s, k_s)
                after.append(add_block(Parts(*before), scores, walk.visible(at, strip), v_s))
            by_part = zip(parts, zip(*after, strict=True), strict=True)
            return Parts(*(_put(x, at.q, _whole(strips, x)) for x, strips in by_part))

        by_head = walk.over_all(one, by_head)
    return Parts(*(x.reshape(shape.shape) for x, shape in zip(by_head, parts, strict=True)))


def attend_backward(q, k, v, q_segments, k_segments, pairs, lse, d_out, delta, grads, causal):
    """Adds the gradients of all `pairs` to `grads` = (dq, dk, dv), tiled like q, k, v, float32.

    Args:
      lse: [R * tiles, K, G * tile] logsumexp over *all* parts of the forward pass.
      d_out: [R * tiles, K, G * tile, D] gradient of the merged output.
      delta: [R * tiles, K, G * tile] sum over D of d_out * out.
    """
    tile = q_segments.size // q.shape[0]
    shape = q.shape
    q, lse, d_out, delta, dq = (_by_head(x, tile) for x in (q, lse, d_out, delta, grads[0]))
    # [N * tiles, K, D, tile]: XLA's CPU backend takes twice the time where the scores come first in
    # these products, or where a loop has what turns a result round.
    grads = (dq, *(x.swapaxes(2, 3) for x in grads[1:]))
    for walk in _walks(q, k, q_segments, k_segments, pairs, causal):

        def one(grads, at, walk=walk):
            queries = [_take(x, at.q) for x in (q, lse, d_out, delta)]
            keys = [_take(x, at.k) for x in (k, v)]
            of_strips = []
            for strip in walk.strips:
                q_s, lse_s, d_out_s, delta_s = (strip.of_queries(x) for x in queries)
                k_s, v_s = (strip.of_keys(x) for x in keys)
                scores = _dot("pktd,pksd->pkts", q_s, k_s)
                p = jnp.exp(scores - lse_s[..., None])
                p = jnp.where(walk.visible(at, strip), p, 0.0)
                dp = _dot("pktd,pksd->pkts", d_out_s, v_s)
                ds = (p * (dp - delta_s[..., None])).astype(q.dtype)
                dq_s = _dot("pkts,pksd->pktd", ds, k_s)
                dk_s = _dot("pktd,pkts->pkds", q_s, ds)
                dv_s = _dot("pktd,pkts->pkds", d_out_s, p.astype(q.dtype))
                tile = k.shape[2]
                of_strips.append((dq_s, strip.to_tile(dk_s, tile), strip.to_tile(dv_s, tile)))
            dq, dk, dv = grads
            dq_b, dk_b, dv_b = zip(*of_strips, strict=True)
            dk, dv = _add(dk, at.k, _sum(dk_b)), _add(dv, at.k, _sum(dv_b))
            return _put(dq, at.q, _take(dq, at.q) + _whole(dq_b, dq)), dk, dv

        grads = walk.over_all(one, grads)
    dq, dk, dv = grads
    return dq.reshape(shape), dk.swapaxes(2, 3), dv.swapaxes(2, 3)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


class _At(NamedTuple):
    q: jax.Array  # [P] tiles of queries
    k: jax.Array  # [P] tiles of keys
    sees: jax.Array  # [P]


class _Strip(NamedTuple):
    """Queries of a tile, and the first keys of a tile, those that they may see."""

    queries: slice
    keys: int

    def of_queries(self, x):
        """[P, K, G, tile, ...] -> [P, K, G * queries, ...]."""
        x = x[:, :, :, self.queries]
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    def of_keys(self, x):
        return x[:, :, : self.keys]

    def to_tile(self, x, tile: int):
        """[P, K, D, keys] -> [P, K, D, tile], 0 for keys that are not seen."""
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, tile - self.keys)))


def _walks(q, k, q_segments, k_segments, pairs, causal: bool) -> list[_Walk]:
    """The tiles that the two rows of a pair meet in, whole ones and those on the diagonal apart."""
    q_tiles, k_tiles = q.shape[0] // q_segments.shape[0], k.shape[0] // k_segments.shape[0]
    tiles = np.argwhere(np.ones((q_tiles, k_tiles), bool))
    walk = functools.partial(_Walk, q, k, q_segments, k_segments, pairs)
    if not causal:
        return [walk(tiles)]
    below, on = tiles[tiles[:, 0] > tiles[:, 1]], tiles[tiles[:, 0] == tiles[:, 1]]
    walks = [walk(below, causal=True)] if len(below) else []
    return [*walks, walk(on, causal=True, diagonal=True)]


class _Walk:
    """The steps of a list of pairs: for each step of rows, every one of `tiles` of the pair.

    A tile on the diagonal is cut into strips of queries, each against the keys up to its own last
    one: of four strips, five eighths of the tile's scores are computed.
    """

    def __init__(self, q, k, q_segments, k_segments, pairs, tiles, causal=False, diagonal=False):
        self.causal, self.diagonal = causal, diagonal
        self.pairs = Pairs(*(jnp.asarray(x) for x in pairs))
        self.q_tiles = q.shape[0] // q_segments.shape[0]
        self.k_tiles = k.shape[0] // k_segments.shape[0]
        self.groups = q.shape[2]
        self.q_segments = q_segments.reshape(q.shape[0], -1)
        self.k_segments = k_segments.reshape(k.shape[0], -1)
        self.tiles = jnp.asarray(tiles)
        tile, keys = self.q_segments.shape[1], self.k_segments.shape[1]
        strip = STRIP if diagonal and tile % STRIP == 0 else tile
        self.strips = [
            _Strip(slice(start, start + strip), start + strip if diagonal else keys)
            for start in range(0, tile, strip)
        ]

    def over_all(self, one, carry):
        """one(carry, at) over all steps."""
        # The compiled program does not say how many there are: the scope does.
        most = self.pairs.q_row.shape[0] * len(self.tiles)
        with jax.named_scope(LOOP_SCOPE.format(most)):
            steps = self.pairs.count * len(self.tiles)
            return lax.fori_loop(0, steps, lambda i, carry: one(carry, self.at(i)), carry)

    def at(self, i) -> _At:
        step, tile = i // len(self.tiles), self.tiles[i % len(self.tiles)]
        return _At(
            self.pairs.q_row[step] * self.q_tiles + tile[0],
            self.pairs.k_row[step] * self.k_tiles + tile[1],
            self.pairs.sees[step],
        )

    def visible(self, at: _At, strip: _Strip) -> jax.Array:
        """[P, 1, G * queries, keys] bool."""
        q_seg = _take(self.q_segments, at.q)[:, strip.queries, None]
        k_seg = _take(self.k_segments, at.k)[:, None, : strip.keys]
        sees = at.sees[:, None, None]
        visible = (q_seg == k_seg) & (sees == SAME_DOCUMENT)
        if not self.causal:
            visible = (visible | (sees == ANY_DOCUMENT)) & (k_seg > 0)
        P, T, S = visible.shape
        if self.diagonal:
            visible &= np.arange(T)[:, None] + strip.queries.start >= np.arange(S)
        G = self.groups
        return jnp.broadcast_to(visible[:, None], (P, G, T, S)).reshape(P, 1, G * T, S)


def _by_head(x, tile: int):
    """[N, K, G * tile, ...] -> [N, K, G, tile, ...]; inside a loop XLA would copy it each time."""
    return x.reshape(*x.shape[:2], -1, tile, *x.shape[3:])


def _take(x, index):
    # One row is a slice: XLA's CPU and TPU backends move it without a gather.
    if index.shape[0] == 1:
        return lax.dynamic_slice_in_dim(x, index[0], 1, 0)
    return jnp.take(x, index, axis=0, mode="clip")


_sum = functools.partial(functools.reduce, jnp.add)


def _whole(of_strips, like):
    """[P, K, G * queries, ...] of each strip -> [P, K, G, tile, ...], as a tile of `like`."""
    by_head = (x.reshape(*x.shape[:2], like.shape[2], -1, *x.shape[3:]) for x in of_strips)
    return jnp.concatenate(list(by_head), axis=3)


# A tile is read once and written once in a step: where strips did so one by one, XLA's CPU backend
# copied all of x for each of them.
def _put(x, index, value):
    if index.shape[0] == 1:
        return lax.dynamic_update_slice_in_dim(x, value, index[0], 0)
    # Slots that see nothing point beyond the last row: what is read there is dropped.
    return x.at[index].set(value, mode="drop", unique_indices=True)


def _add(x, index, value):
    if index.shape[0] == 1:
        return _put(x, index, value + _take(x, index))
    return x.at[index].add(value)
