"""An index of a memory in segments: the keys of each in clusters, of which queries visit the best.

When a segment is closed, the keys of every head are clustered, by k-means on a sample of them, and
its slots are put in the order of their clusters: of no consequence for whoever looks them all up. A
query ranks the clusters of all segments, takes the best ones up to a number of keys, and scores
these keys exactly (segments.py). When segments are merged, k-means goes on with
the centres of all of them, so that clusters become narrower, not more populous, as memory grows.

Keys are clustered as memory keeps them, decoded: unrotated, and of length 1 where the model
normalises them. Clusters are ranked by about the best inner product that a query can expect with
one of their keys: that with the centre, and DEVIATIONS times the length of the query times how far
keys are from the centre. By the first part alone, clusters whose keys are all alike would come too
early, and wide ones, which have the best keys as often, too late. The distance to the centre would
not do: a trained model's queries lie far from all of its keys (in SmolLM2 they are a tenth as
long), where the distance to a key says little but how long the key is.

Where there are very many clusters a query does not rank all of them: those of each segment are in
groups, clusters of what they are ranked by, and a query goes to the best groups as it goes to the
best clusters. Groups are in RAM alone, made when a segment is closed or loaded.

Letters: K key/value heads, M slots of a segment, D head dim, C clusters of a segment.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fot_jax.model import memory as memories
from fot_jax.model.attention.partial_softmax import AnyArray
from fot_jax.model.memory import LayerMemory, Stored

SLOTS = 128  # of a cluster, on average at most: to score centres costs about 1 % of all keys
ROUNDS = 8  # of k-means
ROUNDS_OF_GROUPS = 3
SAMPLE = 32  # keys for each centre that they go over
BLOCK = 2**12  # keys that are assigned at a time
ROUNDS_OF_MERGED = 2  # of k-means, which begins with what was found before
COMPARED = 2**13  # centres that a key is compared with, at most; and groups, a centre
COMPARED_GROUPS = 2**9
NEAR = 8
FEW = 512  # centres are a multiple of this while segments are merged: few sizes to compile for
OF_GROUP = 32  # centres, on average
PRODUCTS = 2**20  # of keys and centres at a time: they stay in the cache of a CPU
DEVIATIONS = 1.5  # 1 to 2 were about as good for keys of SmolLM2 and of dictionary lookup
RUN = 64  # centres, among whose products the greatest is sought by itself


class Clusters(NamedTuple):
    """The clusters of a segment of one layer; heads with fewer have empty ones at the end."""

    centres: Float[AnyArray, "1 K C D"]  # float32
    # Of keys from their centre, of each element: the root of the mean square. float32
    deviations: Float[AnyArray, "1 K C"]
    starts: Int[AnyArray, "1 K C+1"]  # int32: cluster c has the slots starts[c] … starts[c + 1] - 1


class Level(NamedTuple):
    """Where vectors of all segments of one layer are: in clusters, one segment after another."""

    reaches: Stored  # [1, K, as many as there is room for, D + 1 or 2] float32; see reaches_of
    used: Bool[AnyArray, "1 K room"]  # those with a member
    segment: Int[np.ndarray, " clusters"]
    first: Int[np.ndarray, "K clusters"]  # vector of its segment
    size: Int[np.ndarray, "K clusters"]

    def up_to(self, segment: int) -> Level:
        """Of the segments before one, only."""
        count = np.searchsorted(self.segment, segment)
        used = self.used & (jnp.arange(self.used.shape[2]) < count)
        return Level(self.reaches, used, *(x[..., :count] for x in self[2:]))

    def with_segment(self, number: int, reaches, first, size) -> Level:
        """With that of a number; the array of reaches is made twice as long when it is full."""
        x, used, count, more = self.reaches.x, self.used, len(self.segment), reaches.shape[2]
        while count + more > x.shape[2]:
            x = jnp.pad(x, [(0, 0), (0, 0), (0, x.shape[2]), (0, 0)])
            used = jnp.pad(used, [(0, 0), (0, 0), (0, used.shape[2])])
        return Level(
            Stored(_put(x, reaches, count), None),
            _put(used, size[None] > 0, count),
            np.append(self.segment, np.full(more, number)),
            np.append(self.first, first, axis=1),
            np.append(self.size, size, axis=1),
        )


class Index(NamedTuple):
    """The clusters of all segments of one layer, and groups of these.

    Attributes:
      clusters: of keys, D + 1; those of a segment are in the order of their groups.
      groups: of the reaches of clusters, D + 2.
      reaches: [1, K, clusters, D + 1] of every segment: what is in the groups.
    """

    clusters: Level
    groups: Level
    reaches: tuple[Stored, ...] = ()

    def up_to(self, segment: int) -> Index:
        """Of the segments before one, only."""
        levels = self.clusters.up_to(segment), self.groups.up_to(segment)
        return Index(*levels, self.reaches[:segment])

    def with_segment(self, clusters: Clusters) -> Index:
        """With one more."""
        starts, reaches = np.asarray(clusters.starts)[0], reaches_of(clusters)[0]
        orders, groups = _grouped(reaches, np.diff(starts))
        reaches = np.take_along_axis(reaches, orders[..., None], 1)[None]
        first, size = (np.take_along_axis(x, orders, 1) for x in (starts[:, :-1], np.diff(starts)))
        number, of_group = len(self.reaches), groups.starts[0]
        return Index(
            self.clusters.with_segment(number, reaches, first, size),
            self.groups.with_segment(
                number, reaches_of(groups), of_group[:, :-1], np.diff(of_group)
            ),
            (*self.reaches, Stored(reaches, None)),
        )


def reaches_of(clusters: Clusters) -> Float[np.ndarray, "1 K C D+1"]:
    """What clusters are ranked by: inner products with `to_reaches` of a query, float32."""
    deviations = DEVIATIONS * np.asarray(clusters.deviations)[..., None]
    return np.concatenate([np.asarray(clusters.centres), deviations], -1)


def to_reaches(q: Float[np.ndarray, "1 K N D"]) -> Float[np.ndarray, "1 K N D+1"]:
    """A query, and its length, by which deviations are multiplied."""
    return np.concatenate([q, np.linalg.norm(q, axis=-1, keepdims=True)], -1)


def no_index(heads: int, dim: int) -> Index:
    """Of no segment yet."""
    nothing = np.zeros((heads, 0), int)
    used = jnp.zeros((1, heads, 512), bool)

    def of_nothing(dim):
        reaches = Stored(jnp.zeros((*used.shape, dim), jnp.float32), None)
        return Level(reaches, used, nothing[0], nothing, nothing)

    return Index(of_nothing(dim + 1), of_nothing(dim + 2))


def _grouped(
    reaches: Float[np.ndarray, "K C D+1"], size: Int[np.ndarray, "K C"]
) -> tuple[Int[np.ndarray, "K C"], Clusters]:
    """The order of clusters by their groups, empty clusters last, and the groups."""
    orders, by_head = [], []
    for x, members in zip(reaches, size, strict=True):
        used = np.flatnonzero(members)
        order, groups = used[:0], Clusters(x[:0], x[:0, 0], np.zeros(1, int))
        if len(some := x[used]):
            keys, begin = [Stored(some, None)], some[::OF_GROUP]
            order, groups = _merged_head(keys, begin, COMPARED_GROUPS, ROUNDS_OF_GROUPS)
        orders.append(np.append(used[order], np.flatnonzero(members == 0)))
        by_head.append(groups)
    return np.stack(orders), _of_heads(by_head)


@jax.jit
def _put(x, more, at):
    return lax.dynamic_update_slice_in_dim(x, jnp.asarray(more), at, axis=2)


@jax.jit
def clustered(layer: LayerMemory, visible: Int[AnyArray, ""]) -> tuple[LayerMemory, Clusters]:
    """The first `visible` slots of a layer [1, K, M, …] in the order of their clusters."""
    keys = jax.tree.map(lambda x: x[0], layer.k)
    order, clusters = lax.map(functools.partial(_of_head, visible=visible), keys)

    def ordered(x):
        return jax.vmap(lambda x, order: x[order])(x[0], order)[None]

    return jax.tree.map(ordered, layer), jax.tree.map(lambda x: x[None], clusters)


def _of_head(keys: Stored, visible) -> tuple[Int[Array, " M"], Clusters]:
    """The order of the slots of keys [M, D], and their clusters; those that hold nothing come last.

    The clusters of one head: centres [C, D], deviations [C], starts [C + 1].
    """
    slots = keys.x.shape[0]
    count = max(1, slots // SLOTS)
    sample = _decoded(keys, _spread(count * min(SAMPLE, SLOTS), visible))
    centres = _k_means(sample, _decoded(keys, _spread(count, visible)))
    block = min(BLOCK, slots & -slots)
    found = lax.map(
        lambda at: _nearest(_decoded(keys, at), centres), jnp.arange(slots).reshape(-1, block)
    )
    nearest, squares = (x.reshape(-1) for x in found)
    cluster = jnp.where(jnp.arange(slots) < visible, nearest, count)
    starts = jnp.searchsorted(jnp.sort(cluster), jnp.arange(count + 1)).astype(jnp.int32)
    total = jnp.zeros(count).at[cluster].add(squares, mode="drop")
    deviations = jnp.sqrt(total / (keys.dim * jnp.maximum(jnp.diff(starts), 1)))
    return jnp.argsort(cluster, stable=True), Clusters(centres, deviations, starts)


def _k_means(x, centres):
    """The centres of clusters of x [n, D], from some to begin with."""

    return lax.fori_loop(0, ROUNDS, lambda _, c: _means(x, _nearest(x, c)[0], c), centres)


def _means(x, nearest, centres):
    """Centres moved to the mean of those of x [n, D] that are nearest to them."""
    total = jnp.zeros_like(centres).at[nearest].add(x)
    members = jnp.zeros(len(centres)).at[nearest].add(1)[:, None]
    return jnp.where(members > 0, total / jnp.maximum(members, 1), centres)


def _nearest(x, centres):
    """The centre that each of x [n, D] is closest to, the first of equally close ones.

    And the square of the distance. To write all products to memory takes a CPU longer than to
    multiply, as does argmax than max.
    """
    (n, D), C = x.shape, len(centres)
    rows, run = _power_of_two(n, PRODUCTS // C), _power_of_two(C, RUN)
    half_square = jnp.square(centres).sum(1) / 2

    def of_rows(x):
        closeness = (x @ centres.T - half_square).reshape(rows, -1, run)
        best = closeness.max(-1).argmax(1)
        in_run = jnp.take_along_axis(closeness, best[:, None, None], 1)[:, 0].argmax(1)
        nearest = best * run + in_run
        return nearest, jnp.square(x - centres[nearest]).sum(1)

    found = lax.map(of_rows, x.reshape(-1, rows, D))
    return tuple(x.reshape(-1) for x in found)


def _power_of_two(n: int, most: int) -> int:
    """The largest that n is a multiple of, and not above `most` where that is above 1."""
    return min(n & -n, 1 << max(1, most).bit_length() - 1)


def _spread(count: int, visible):
    """So many of the visible slots, evenly spread, but not at even distances.

    First tokens of windows, of which there is one every few hundred slots, have keys unlike all
    others (they are attention sinks). At even distances a quarter of the centres began as such.
    """
    place = (jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(2654435769)) >> 8  # golden ratio
    slots = (place.astype(jnp.float32) * (visible / 2**24)).astype(jnp.int32)
    return jnp.minimum(slots, jnp.maximum(visible - 1, 0))


def _decoded(keys: Stored, at):
    return memories.decode(jax.tree.map(lambda x: x[at], keys), jnp.float32)


# --- Merging -------------------------------------------------------------------------------------


def merged(
    keys: Sequence[Stored], each: Sequence[Clusters], counts: Sequence[int]
) -> tuple[list[Int[np.ndarray, " n"]], Clusters]:
    """Clusters of several segments of a layer as one.

    Args:
      keys: of every segment, in its first slots, so many as `counts` says.
      each: their clusters.

    Returns:
      For each head the slots of all segments, one segment's after another's, in the new order; and
      the clusters.
    """
    orders, by_head = [], []
    for head in range(keys[0].x.shape[1]):
        of_head = [
            jax.tree.map(lambda x, head=head, n=n: np.asarray(x)[0, head, :n], stored)
            for stored, n in zip(keys, counts, strict=True)
        ]
        used = [np.diff(np.asarray(x.starts)[0, head]) > 0 for x in each]
        centres = [np.asarray(x.centres)[0, head, u] for x, u in zip(each, used, strict=True)]
        order, clusters = _merged_head(of_head, np.concatenate(centres), COMPARED, ROUNDS_OF_MERGED)
        orders.append(order)
        by_head.append(clusters)
    return orders, _of_heads(by_head)


def _of_heads(by_head: Sequence[Clusters]) -> Clusters:
    """The clusters of heads, [C, D], [C] and [C + 1] each, as those of a layer."""
    most = max(len(x.centres) for x in by_head)
    centres = [np.pad(x.centres, [(0, most - len(x.centres)), (0, 0)]) for x in by_head]
    deviations = [np.pad(x.deviations, (0, most - len(x.deviations))) for x in by_head]
    starts = [np.pad(x.starts, (0, most + 1 - len(x.starts)), mode="edge") for x in by_head]
    return Clusters(
        np.stack(centres)[None],
        np.stack(deviations)[None].astype(np.float32),
        np.stack(starts)[None].astype(np.int32),
    )


def _merged_head(
    keys: Sequence[Stored], centres: np.ndarray, compared: int, rounds: int
) -> tuple[np.ndarray, Clusters]:
    """Of one head: keys [n, D] of every segment, and the centres [C, D] to begin with."""
    count = sum(len(x.x) for x in keys)
    more = -len(centres) % FEW  # nothing is assigned to the second of two that are alike
    centres = np.pad(centres, [(0, more), (0, 0)], mode="edge")
    at = np.linspace(0, count, min(count, SAMPLE * len(centres)), endpoint=False).astype(int)
    sample = jax.tree.map(lambda *x: taken(x, at), *keys)
    for _ in range(rounds):
        centres = np.asarray(_moved(sample, _assigned([sample], centres, compared)[0], centres))
    nearest, squares = _assigned(keys, centres, compared)
    order = np.argsort(nearest, kind="stable")
    used, starts, members = np.unique(nearest[order], return_index=True, return_counts=True)
    total = np.bincount(nearest, squares)[used]
    deviations = np.sqrt(total / (keys[0].dim * members))
    return order, Clusters(centres[used], deviations, np.append(starts, count))


def _assigned(
    keys: Sequence[Stored], centres: np.ndarray, compared: int
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Which of centres [C, D] is closest to each of the keys [n, D] of several arrays.

    And the square of the distance.

    Of more than `compared` centres, the closest of those around a cell that the key is in, NEAR
    times as many as a cell has.
    """
    if len(centres) <= compared:
        return _nearest_in_blocks(keys, centres)
    count = 1 << len(centres).bit_length() // 2
    cells = np.asarray(_trained(centres, centres[:: len(centres) // count][:count]))
    cell, _ = _nearest_in_blocks(keys, cells)
    order = np.argsort(cell, kind="stable")
    bounds = np.searchsorted(cell[order], np.arange(count + 1))
    nearest, squares = np.empty(len(order), int), np.empty(len(order), np.float32)
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            many = min(len(centres), NEAR * len(centres) // count)
            some = np.asarray(_closest(centres, cells[i], many))
            in_cell = jax.tree.map(lambda *x, at=order[start:stop]: taken(x, at), *keys)
            found, squares[order[start:stop]] = _nearest_in_blocks([in_cell], centres[some])
            nearest[order[start:stop]] = some[found]
    return nearest, squares


def _nearest_in_blocks(keys: Sequence[Stored], centres: np.ndarray):
    """As `_assigned`, of all centres."""
    found = []
    for x in keys:
        for start in range(0, len(x.x), BLOCK):
            block = jax.tree.map(lambda x, at=start: x[at : at + BLOCK], x)
            n = len(block.x)
            block = jax.tree.map(lambda x, n=n: np.resize(x, (BLOCK, *x.shape[1:])), block)
            found.append([np.asarray(x)[:n] for x in _nearest_of_stored(block, centres)])
    return tuple(np.concatenate(x) for x in zip(*found, strict=True))


_trained = jax.jit(_k_means)


@jax.jit
def _moved(keys: Stored, nearest, centres):
    return _means(memories.decode(keys, jnp.float32), nearest, centres)


@jax.jit
def _nearest_of_stored(keys: Stored, centres):
    return _nearest(memories.decode(keys, jnp.float32), centres)


@functools.partial(jax.jit, static_argnames="count")
def _closest(centres, x, count: int):
    return lax.top_k(centres @ x - jnp.square(centres).sum(1) / 2, count)[1]


def taken(arrays: Sequence[np.ndarray], slots: np.ndarray) -> np.ndarray:
    """Of several arrays [n, …], taken as one, so many rows by their numbers."""
    ends = np.cumsum([len(x) for x in arrays])
    which = np.searchsorted(ends, slots, side="right")
    out = np.empty((len(slots), *arrays[0].shape[1:]), arrays[0].dtype)
    for i in np.flatnonzero(np.bincount(which, minlength=len(arrays))):
        at = np.flatnonzero(which == i)
        out[at] = arrays[i][slots[at] - (ends[i] - len(arrays[i]))]
    return out
