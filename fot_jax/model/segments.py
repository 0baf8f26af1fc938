"""Attention over a memory in segments, which may lie in files: see inference/segment_files.py.

There are few of them, of few sizes, as four of a size are merged (inference/segment_files.py). The
host calls one compiled program for each.

`Dense` and `TopK` go through all segments. `IndexedTopK` does not touch those that it need not:
what clusters are ranked by is on the device, which finds the best ones; the host gathers the keys
of these clusters, from RAM or from mapped files; the device finds the best keys, and the host
gathers their values. What travels, is computed and is read from files follows from
IndexedTopK.visited and k; only clusters are one for every 128 keys. Where these are many, the same
is done with groups of them first (clusters.py).

Several processes, each with segments of its own, attend together: each finds its best keys, all
learn which of them are the best of all, and the parts of the softmax are merged. For an index,
`visited` is divided among them.

Letters: B rows, K key/value heads, N queries of a key/value head, D head dim, k keys of a query, L
keys that are visited, V clusters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Float, Int

from fot_jax.model import clusters
from fot_jax.model import memory as memories
from fot_jax.model.attention import partial_softmax
from fot_jax.model.attention.partial_softmax import MASKED, AnyArray, Parts
from fot_jax.model.clusters import Index, Level
from fot_jax.model.lookup import (
    Dense,
    IndexedTopK,
    Lookup,
    TopK,
    attend_found,
    better,
    einsum,
    map_queries,
    none_found,
    scores_of,
)
from fot_jax.model.memory import LayerMemory, Stored, decode

GATHERED = 2**22  # bytes of keys that the host gathers at a time: they stay in the cache of a CPU
MANY = 2**16  # centres, of which a query does not score all


class Segment(NamedTuple):
    """A part of a layer's memory that is looked up by itself, and may lie in a file.

    With one row, all rows of the queries look into it.
    """

    layer: LayerMemory
    visible: AnyArray  # [rows] int32: how many slots hold something, from the first on


class Closed(NamedTuple):
    """The segments of a layer that nothing is added to, each of one row.

    Attributes:
      segments, index: of what this process holds; of others as many, of the same slots.
      process, processes: which it is, of those that memory is spread over.
    """

    segments: Sequence[Segment]
    index: Index
    process: int = 0
    processes: int = 1

    @property
    def ends(self) -> Int[np.ndarray, " segments"]:
        """Behind the last slot of each, counted through all."""
        return np.cumsum([segment.layer.k.x.shape[2] for segment in self.segments])


def attend(
    lookup: Lookup, q: Float[AnyArray, "B K N D"], closed: Closed, opened: Segment | None
) -> Parts:
    """Attention of scaled queries over all closed segments and the open one.

    Args:
      closed: one or more segments. Where several processes have them, all make the same call.
      opened: the same in all processes.

    Returns:
      Parts [B, K, N].
    """
    if isinstance(lookup, TopK):
        return _attend_best(lookup, q, closed, opened)
    parts = partial_softmax.no_parts(q)
    for segment in closed.segments:
        before, parts = parts, _add_segment(lookup, q, segment, parts)
        jax.block_until_ready(before)  # no more than two segments are on the devices
    parts = _of_all_processes(closed, parts)
    return parts if opened is None else _add_segment(lookup, q, opened, parts)


def _attend_best(lookup: TopK, q, closed: Closed, opened: Segment | None) -> Parts:
    """Finds the best keys of all, then goes to the values of those that this process holds."""
    by_index = isinstance(lookup, IndexedTopK)
    found = (search if by_index else _search_closed)(lookup, q, closed)
    scores, slots = _best_of_processes(closed, *found)
    start = closed.processes * closed.ends[-1]
    if opened is not None:
        layer, visible = opened
        scores, slots = _search_segment(lookup, q, layer.k, visible, start, (scores, slots))
    here = slots
    if closed.processes > 1:
        ours = (slots < start) & (slots % closed.processes == closed.process)
        here = jnp.where(ours, slots // closed.processes, -1)
    attend = _attend_values if by_index else _attend_closed
    parts = _of_all_processes(closed, attend(q, closed, scores, here))
    return parts if opened is None else _add_found(q.dtype, scores, slots, layer.v, start, parts)


def _search_closed(lookup: TopK, q, closed: Closed):
    """As `search`, through all keys."""
    best, start = none_found((*q.shape[:3], lookup.k)), 0
    for layer, visible in closed.segments:
        before, best = best, _search_segment(lookup, q, layer.k, visible, start, best)
        jax.block_until_ready(before)
        start += layer.k.slots
    return best


def _attend_closed(q, closed: Closed, scores, slots) -> Parts:
    """Attention to slots [B, K, N, k], those of closed segments, through all values."""
    parts, start = partial_softmax.no_parts(q), 0
    for layer, _ in closed.segments:
        before, parts = parts, _add_found(q.dtype, scores, slots, layer.v, start, parts)
        jax.block_until_ready(before)
        start += layer.v.slots
    return parts


@functools.partial(jax.jit, static_argnames="lookup")
def _add_segment(lookup: Dense, q, segment: Segment, parts: Parts) -> Parts:
    """Merges the attention of one more segment into `parts`."""
    layer, visible = segment

    def of_queries(args):
        return lookup.attend(*args, layer, visible, 1)

    return partial_softmax.merge(parts, _by_rows(of_queries, (q,), len(visible)))


@functools.partial(jax.jit, static_argnames="lookup")
def _search_segment(lookup: TopK, q, keys: Stored, visible, start, best):
    """The best of `best` and of a segment whose first slot is number `start` of all."""

    def of_queries(args):
        scores, slots = lookup.search(*args, keys, visible)
        return scores, slots + start

    return better(best, _by_rows(of_queries, (q,), len(visible)), lookup.k)


@functools.partial(jax.jit, static_argnames="dtype")
def _add_found(dtype, scores, slots, v: Stored, start, parts: Parts) -> Parts:
    """Merges the attention to those found slots that are a segment's into `parts`."""
    here = (slots >= start) & (slots < start + v.slots)

    def of_queries(args):
        return attend_found(*args, v, dtype)

    found = jnp.where(here, scores, MASKED), jnp.where(here, slots - start, 0)
    return partial_softmax.merge(parts, _by_rows(of_queries, found, v.x.shape[0]))


def _by_rows(of_queries, arrays, rows: int):
    """of_queries over arrays [B, K, N, ...] of as many rows as a memory has: B, or one for all."""
    B, K = arrays[0].shape[:2]
    if rows < B:
        arrays = [_in_one_row(x) for x in arrays]
    found = map_queries(of_queries, tuple(arrays), 64 * rows * K)
    return jax.tree.map(lambda x: _in_rows(x, B), found) if rows < B else found


def _in_one_row(x):
    """[B, K, N, ...] -> [1, K, B * N, ...]."""
    B, K, N = x.shape[:3]
    return x.swapaxes(0, 1).reshape(1, K, B * N, *x.shape[3:])


def _in_rows(x, B: int):
    """[1, K, B * N, ...] -> [B, K, N, ...]."""
    return x.reshape(x.shape[1], B, -1, *x.shape[3:]).swapaxes(0, 1)


# --- Over processes ------------------------------------------------------------------------------


def _of_all_processes(closed: Closed, parts: Parts) -> Parts:
    """The parts of all processes as one."""
    if closed.processes == 1:
        return parts
    every = process_allgather(parts)
    each = [jax.tree.map(lambda x, i=i: x[i], every) for i in range(closed.processes)]
    return functools.reduce(_merge, each)


_merge = jax.jit(partial_softmax.merge)


def _best_of_processes(closed: Closed, scores, slots):
    """The best k of what all processes found, whose slots take turns: s of process p is s P + p."""
    if closed.processes == 1:
        return scores, slots
    found = process_allgather((scores, slots * closed.processes + closed.process))
    each = list(zip(*found, strict=True))
    return functools.reduce(functools.partial(_better, k=scores.shape[-1]), each)


_better = jax.jit(better, static_argnames="k")


# --- By the index --------------------------------------------------------------------------------


def search(
    lookup: IndexedTopK, q: Float[AnyArray, "B K N D"], closed: Closed
) -> tuple[Float[np.ndarray, "B K N k"], Int[np.ndarray, "B K N k"]]:
    """The best keys of this process's closed segments, as far as the index leads to them.

    Returns:
      Scores, float32 and descending, and slots, int32, counted through all segments. Where fewer
      than k keys were visited, the rest of the scores are MASKED.
    """
    B = q.shape[0]
    visited = max(lookup.k, -(-lookup.visited // closed.processes))
    q, index = _in_one_row(np.asarray(q)), closed.index
    some = 8 + 4 * visited // clusters.SLOTS  # as many as are needed where they are small
    best = _best_clusters(index, clusters.to_reaches(q), some, visited)
    keys = [segment.layer.k for segment in closed.segments]
    found = _best_in_clusters(index.clusters, best, q, keys, lookup.k, visited)
    return tuple(_in_rows(x, B) for x in found)


def _best_clusters(index: Index, q, some: int, visited: int):
    """Scores and numbers of the best clusters; of many, of those in the groups that are visited."""
    count, groups = len(index.clusters.segment), len(index.groups.segment)
    if count <= MANY or not groups:  # there are none where all clusters are empty
        return _best_reaches(q, index.clusters.reaches, index.clusters.used, some)
    of_groups = clusters.to_reaches(q)
    best = _best_reaches(of_groups, index.groups.reaches, index.groups.used, some)
    some = min(some, visited)
    return _best_in_clusters(index.groups, best, q, index.reaches, some, visited)


def _best_in_clusters(level: Level, best, q, vectors: Sequence[Stored], k: int, visited: int):
    """The best k vectors among as many as are visited, of the best clusters; as `search`."""
    near, ids = (np.asarray(x)[0] for x in best)
    runs = _clusters_to_visit(level, near, ids, visited)
    K, N, _ = runs.size.shape
    many = max(1, GATHERED // (K * visited * vectors[0].x[0, 0, 0].nbytes))
    while N % many:
        many -= 1
    found = []
    for at in range(0, N, many):
        of_queries = slice(at, at + many)
        gathered = _gather(vectors, runs.of_queries(of_queries), visited)
        shape = 1, K, many, visited
        gathered = jax.tree.map(lambda x, shape=shape: x.reshape(*shape, *x.shape[1:]), gathered)
        there = runs.size[None, :, of_queries].sum(-1)
        found.append(_best_gathered(q[:, :, of_queries], gathered, there, k))
    scores, at = (np.concatenate(x, 2) for x in zip(*found, strict=True))
    return scores, _slots_of(at, runs, vectors)


@functools.partial(jax.jit, static_argnames="most")
def _best_reaches(q, reaches: Stored, used, most: int):
    """Scores and numbers of the `most` best reaches, or of all; of equal ones the first.

    Those of empty clusters are left out: they are where another one is that has all the keys.

    Choosing takes longer than the product, so it is done twice: among runs of them by the best
    of each, then among all of the best runs.
    """
    _, K, C, _ = reaches.x.shape
    run = 1 << int(math.log2(max(1, C / most))) // 2  # C is 512 times a power of two
    runs = C // run

    def of_queries(args):
        scores = jnp.where(used[:, :, None], scores_of(args[0], reaches.x), MASKED)
        scores = scores.reshape(*scores.shape[:3], runs, run)
        _, chosen = jax.lax.top_k(scores.max(-1), min(most, runs))
        chosen = jnp.sort(chosen, -1)[..., None]
        scores = jnp.take_along_axis(scores, chosen, -2)
        ids = chosen * run + jnp.arange(run)
        scores, ids = (x.reshape(*x.shape[:3], -1) for x in (scores, ids))
        scores, at = jax.lax.top_k(scores, min(most, C))
        return scores, jnp.take_along_axis(ids, at, -1)

    return map_queries(of_queries, (q,), K * C)


class _Runs(NamedTuple):
    """Runs of slots of segments: for every query those of clusters, the best first."""

    segment: Int[np.ndarray, "K N V"]
    first: Int[np.ndarray, "K N V"]  # slot in the segment
    size: Int[np.ndarray, "K N V"]  # slots; 0: none

    def of_queries(self, some: slice) -> _Runs:
        return _Runs(*(x[:, some] for x in self))


def _clusters_to_visit(level: Level, near, ids, most: int) -> _Runs:
    """Of the clusters ids [K, N, V], whose reaches have scores `near`, the first with most keys."""
    head = np.arange(len(ids))[:, None, None]
    ids = np.minimum(ids, len(level.segment) - 1)  # where there are fewer than V
    size = np.where(near > MASKED / 2, level.size[head, ids], 0)
    before = np.cumsum(size, -1) - size
    return _Runs(level.segment[ids], level.first[head, ids], np.clip(most - before, 0, size))


@functools.partial(jax.jit, static_argnames="k")
def _best_gathered(q, keys: Stored, there, k: int):
    """The k best scores [1, K, N, k] and where they are among keys [1, K, N, room, ...]; -1: none.

    `there` [1, K, N]: how many keys there are, from the first place on.
    """
    scores = einsum("bknd,bknld->bknl", q, decode(keys, q.dtype))
    seen = jnp.arange(scores.shape[-1]) < there[..., None]
    scores, at = jax.lax.top_k(jnp.where(seen, scores, MASKED), k)
    return scores, jnp.where(at < there[..., None], at, -1)


def _slots_of(at: Int[np.ndarray, "1 K N k"], runs: _Runs, stored: Sequence[Stored]) -> np.ndarray:
    """Which slots were gathered to places `at`, counted through all segments; int32, -1: none."""
    room = 1 + runs.size.sum(-1).max()
    ends = runs.size.cumsum(-1)
    query = np.arange(at[0, ..., 0].size).reshape(*at.shape[1:3], 1) * room
    run = np.searchsorted((query + ends).reshape(-1), query + np.maximum(at[0], 0), side="right")
    run = np.minimum(run, ends.size - 1)  # of a query for which there is nothing
    segment, first, end, size = (x.reshape(-1)[run] for x in (*runs[:2], ends, runs.size))
    slots = _starts_of(stored)[segment] + first + at[0] - (end - size)
    return np.where(at[0] < 0, -1, slots)[None].astype(np.int32)


def _starts_of(stored: Sequence[Stored]) -> Int[np.ndarray, " segments"]:
    """The number of the first slot of each segment, counted through all."""
    slots = np.array([each.x.shape[2] for each in stored])
    return np.cumsum(slots) - slots


def _attend_values(q, closed: Closed, scores, slots) -> Parts:
    """As `_attend_closed`, through no values but those of the slots."""
    return _attend_gathered(q.dtype, *_values(closed, scores, slots), q.shape[0])


def _values(closed: Closed, scores, slots):
    """Scores [1, K, n, k] of what was found in closed segments, else MASKED, and the values."""
    scores, slots = (np.asarray(_in_one_row(x))[0] for x in (scores, slots))
    here = (scores > MASKED / 2) & (slots >= 0) & (slots < closed.ends[-1])
    slots = np.where(here, slots, 0).reshape(len(slots), -1)

    def taken(*arrays):
        arrays = [np.asarray(x)[0] for x in arrays]
        out = memories.empty_on_host((*slots.shape, *arrays[0].shape[2:]), arrays[0].dtype)
        for of_head, its_slots, to in zip(zip(*arrays, strict=True), slots, out, strict=True):
            to[:] = clusters.taken(of_head, its_slots)
        return out[None]

    values = jax.tree.map(taken, *(segment.layer.v for segment in closed.segments))
    return np.where(here, scores, MASKED)[None], values


@functools.partial(jax.jit, static_argnames=("dtype", "rows"))
def _attend_gathered(dtype, scores, values: Stored, rows: int) -> Parts:
    """The softmax over scores [1, K, n, k] of values [1, K, n * k, ...], in parts [rows, K, N]."""
    slots = jnp.arange(scores.shape[2] * scores.shape[3]).reshape(1, 1, *scores.shape[2:])
    parts = attend_found(scores, jnp.broadcast_to(slots, scores.shape), values, dtype)
    return jax.tree.map(lambda x: _in_rows(x, rows), parts)


def _gather(stored: Sequence[Stored], runs: _Runs, room: int) -> Stored:
    """The vectors of runs.

    Args:
      stored: of every segment, one row.
      room: for vectors of each query, those of one run after another.

    Returns:
      Stored, but of arrays [K * N * room, ...]; places that no vector is for hold anything.
    """
    K, N, _ = runs.size.shape
    to = np.arange(K * N).reshape(K, N, 1) * room + runs.size.cumsum(-1) - runs.size
    head = np.broadcast_to(np.arange(K)[:, None, None], runs.size.shape)
    some = runs.size > 0
    # A loop over runs, which are long, takes less time than to number all of their vectors.
    copies = list(zip(*(x[some].tolist() for x in (head, *runs, to)), strict=True))

    def gather(arrays):
        arrays = [np.asarray(x)[0] for x in arrays]
        out = memories.empty_on_host((K * N * room, *arrays[0].shape[2:]), arrays[0].dtype)
        for head, segment, first, size, to in copies:
            out[to : to + size] = arrays[segment][head, first : first + size]
        return out

    return jax.tree.map(lambda *arrays: gather(arrays), *stored)
