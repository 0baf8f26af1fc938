"""Attention over a memory: all of it, or for each query its k best keys (paper §3.1).

`Dense`, `TopK` and `ApproximateTopK` are three ways to choose the keys; what is chosen goes through
one softmax with the local window. None holds more than a block of scores at a time, so what they
need does not grow with the memory. Over a mesh every shard looks up its own slots; only scores and
outputs travel. How they look into a memory in segments, and what `IndexedTopK` does there: see
segments.py.

Letters: B rows of memory, K key/value heads, N queries of a key/value head, M slots, S slots of a
block, D head dim, k keys of a query.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range
from fot_jax.model import memory as memories
from fot_jax.model.attention import partial_softmax
from fot_jax.model.attention.partial_softmax import MASKED, AnyArray, Parts
from fot_jax.model.memory import AXIS, LayerMemory, Stored

# Of products that choose keys: TPUs and GPUs would round float32, and each pass in its own way.
PRECISION = lax.Precision.HIGHEST


@configurable
@dataclasses.dataclass(frozen=True)
class Dense:
    """Attends to everything in memory, block by block: exact, and what LongLLaMA does."""

    def check(self, slots: int) -> None:
        """Any memory will do."""

    def attend(self, q, layer: LayerMemory, visible, shards: int) -> Parts:
        """On each of `shards` devices over its own slots; arguments as of `attend` below."""
        slots, queries = layer.k.slots, math.prod(q.shape[:3])

        def step(start, size, parts):
            k, v = (x.slot(start, size, q.dtype) for x in layer)
            return partial_softmax.add_block(parts, _dot(q, k), _seen(visible, start, size), v)

        parts = partial_softmax.over_blocks(
            step,
            partial_softmax.no_parts(q),
            places=slots,
            used=visible.max(),
            block=_block(slots, queries),
            # Vectors that are decoded are copied in any case.
            at_once=layer.k.x.dtype == q.dtype and partial_softmax.fits_at_once(queries, slots),
        )
        return _merge_shards(parts) if shards > 1 else parts

    def best(self, scores: jax.Array) -> None:
        """All of them."""


@configurable
@dataclasses.dataclass(frozen=True)
class TopK:
    """Attends to the k keys with the largest inner product, exactly; of equal ones, to the first.

    The paper uses k = 128, and 32 for the dictionary lookup.
    """

    k: int = 128

    def __post_init__(self):
        check_range(type(self).__name__, 1, whole=True, k=self.k)

    def check(self, slots: int) -> None:
        """Raises a UserError where memory has fewer slots."""
        if self.k > slots:
            raise UserError(
                f"{type(self).__name__}.k = {self.k} is larger than the memory of {slots} tokens: "
                "lower k, or attend to all of it with Dense"
            )

    def attend(self, q, layer: LayerMemory, visible, shards: int) -> Parts:
        """As Dense.attend."""
        scores, slots = self.search(q, layer.k, visible)
        if shards > 1:
            scores = _best_of_shards(scores, slots, shards)
        parts = attend_found(scores, slots, layer.v, q.dtype)
        return _merge_shards(parts) if shards > 1 else parts

    def search(self, q, keys: Stored, visible):
        """The best keys of every query.

        Args:
          q: [B, K, N, D]; keys: of M slots; visible: [B] how many of them, from the first on.

        Returns:
          (scores [B, K, N, k] float32, descending, slots [B, K, N, k] int32). Where fewer than k
          are visible, the rest of the scores are MASKED.
        """
        return exact_search(q, keys, visible, self.k)

    def best(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The k largest of scores [..., S], all of them if S < k, descending; and int32 where."""
        return lax.top_k(scores, min(self.k, scores.shape[-1]))


@configurable
@dataclasses.dataclass(frozen=True)
class ApproximateTopK(TopK):
    """The same, but only about `recall` of the k best keys are found, the quicker for it.

    Quicker on TPUs alone: elsewhere `jax.lax.approx_max_k` is exact.
    """

    recall: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        check_range("ApproximateTopK", 0.01, 1, recall=self.recall)

    def search(self, q, keys: Stored, visible):
        """As TopK.search."""
        B, K, N, _ = q.shape
        block = keys.slots
        while (
            block * B * K * N > partial_softmax.score_budget()
            and block % 2 == 0
            and block // 2 >= 8 * self.k
        ):
            block //= 2

        def step(i, best):
            scores = scores_of(q, keys.slot(i * block, block, q.dtype))
            scores = jnp.where(_seen(visible, i * block, block), scores, MASKED)
            found, at = self.best(scores)
            return better(best, (found, at.astype(jnp.int32) + i * block), self.k)

        steps = (visible.max() + block - 1) // block
        return lax.fori_loop(0, steps, step, none_found((B, K, N, self.k)))

    def best(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As TopK.best."""
        return lax.approx_max_k(scores, min(self.k, scores.shape[-1]), recall_target=self.recall)


@configurable
@dataclasses.dataclass(frozen=True)
class IndexedTopK(TopK):
    """The best k of those keys that an index leads to: as TopK, but memory is not gone through.

    Memory is then in segments of 65,536 tokens, each with an index of its keys (clusters.py). What
    is not in a closed segment yet is searched exactly.

    Attributes:
      visited: keys of closed segments that are scored for each query and head; in a very large
        memory as many centres of their clusters, too. Processes that share a memory divide it.
    """

    visited: int = 4_096

    def __post_init__(self):
        super().__post_init__()
        check_range("IndexedTopK", self.k, 2**24, whole=True, visited=self.visited)


Lookup = Dense | TopK | ApproximateTopK | IndexedTopK


def attend(
    lookup: Lookup,
    q: Float[AnyArray, "B K N D"],
    layer: LayerMemory,
    visible: Int[Array, " B"],
    mesh: Mesh | None = None,
) -> Parts:
    """Attention of scaled queries over a layer's memory, in parts [B, K, N]."""
    shards = memories.shards_of(mesh)
    if shards == 1:
        return lookup.attend(q, layer, visible, 1)

    def on_shard(q, layer, visible):
        mine = (visible + shards - 1 - lax.axis_index(AXIS)) // shards
        return lookup.attend(q, layer, mine, shards)

    whole = PartitionSpec()
    return jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(whole, memories.specs(layer), whole),
        out_specs=whole,
        check_vma=False,
    )(q, layer, visible)


# --- Exact search --------------------------------------------------------------------------------


def exact_search(q, keys: Stored, visible, k: int):
    """TopK.search: two passes, of which the first does nearly all the work.

    The keys are cut into groups of consecutive slots. The first pass computes every score and keeps
    the largest of each group. The k groups with the largest ones contain the k best keys: a key of
    any other group has k better ones before it, one in each of these. The second pass computes the
    scores of those groups again.
    """
    B, K, N, D = q.shape
    group = _group(keys.slots, k, D)
    if keys.slots <= 2 * k * group:
        return _search_all(q, keys, visible, k)
    groups = _best_groups(q, keys, visible, k, group)

    def of_queries(q_and_groups):
        q, groups = q_and_groups  # [B, K, n, D], [B, K, n, k]
        chosen = jnp.sort(groups, -1)  # so that of equal scores the oldest comes first
        slots = chosen[..., None] * group + jnp.arange(group)
        x = _take_groups(keys, chosen, group, q.dtype)  # [B, K, n, k, group, D]
        scores = einsum("bknd,bknigd->bknig", q, x)
        scores = jnp.where(slots < visible[:, None, None, None, None], scores, MASKED)
        scores, slots = (x.reshape(*x.shape[:3], k * group) for x in (scores, slots))
        best, at = lax.top_k(scores, k)
        return best, jnp.take_along_axis(slots, at, -1)

    return map_queries(of_queries, (q, groups), B * K * k * group * D)


def _group(slots: int, k: int, dim: int) -> int:
    """Slots of a group: to choose among slots / group takes about as long as to score k * group."""
    best = math.sqrt(6 * slots / (k * dim))
    return min(256, 1 << int(math.log2(max(8, best))))


def _best_groups(q, keys: Stored, visible, k: int, group: int) -> Int[Array, "B K N k"]:
    """The k groups with the best keys, of equal ones the first; slots // group where none is."""
    B, K, N, _ = q.shape
    block = max(group, _block(keys.slots, B * K * N))
    blocks = keys.slots // block  # of which `many` at a time: choosing among few is slow
    many = 1
    while (
        blocks % (2 * many) == 0
        and 2 * many * block * B * K * N <= 2 * group * partial_softmax.score_budget()
    ):
        many *= 2

    def largest(i):
        scores = scores_of(q, keys.slot(i * block, block, q.dtype))
        scores = jnp.where(_seen(visible, i * block, block), scores, MASKED)
        return scores.reshape(B, K, N, block // group, group).max(-1)

    def step(i, best):
        def fill(j, found):
            return lax.dynamic_update_slice_in_dim(
                found, largest(i * many + j), j * (block // group), 3
            )

        found = jnp.full((B, K, N, many * block // group), MASKED, jnp.float32)
        found = lax.fori_loop(0, many, fill, found)
        at = i * found.shape[3] + jnp.arange(found.shape[3], dtype=jnp.int32)
        return better(best, (found, jnp.broadcast_to(at, found.shape)), k)

    steps = (visible.max() + many * block - 1) // (many * block)
    nothing = none_found((B, K, N, k), slot=keys.slots // group)
    return lax.fori_loop(0, steps, step, nothing)[1]


def _search_all(q, keys: Stored, visible, k: int):
    """The search of a memory so small that all scores of some queries are held at once."""
    x = keys.slot(0, keys.slots, q.dtype)
    seen = _seen(visible, 0, keys.slots)

    def of_queries(args):
        scores = jnp.where(seen, scores_of(args[0], x), MASKED)
        scores = jnp.pad(
            scores, [(0, 0)] * 3 + [(0, max(0, k - keys.slots))], constant_values=MASKED
        )
        return lax.top_k(scores, k)

    return map_queries(of_queries, (q,), q.shape[0] * q.shape[1] * keys.slots)


def attend_found(scores, slots, v: Stored, dtype) -> Parts:
    """Softmax over the found keys, in parts."""

    def of_queries(args):
        scores, slots = args
        x = _take_groups(v, slots, 1, dtype)[..., 0, :]  # [B, K, n, k, D]
        top = scores.max(-1)
        p = jnp.exp(scores - top[..., None])
        out = jnp.einsum("bkni,bknid->bknd", p.astype(dtype), x, preferred_element_type=jnp.float32)
        return Parts(out, top, p.sum(-1))

    B, K, _, k = scores.shape
    return map_queries(of_queries, (scores, slots), B * K * k * v.x.shape[3])


# --- Over shards ---------------------------------------------------------------------------------


def _merge_shards(parts: Parts) -> Parts:
    top = lax.pmax(parts.top, AXIS)
    weight = jnp.exp(parts.top - top)
    return Parts(
        lax.psum(parts.out * weight[..., None], AXIS), top, lax.psum(parts.total * weight, AXIS)
    )


def _best_of_shards(scores, slots, shards: int):
    """The scores found on this shard, MASKED where k better keys were found elsewhere."""
    k = scores.shape[-1]
    age = slots * shards + lax.axis_index(AXIS)  # slots in the order they were filled
    everywhere = lax.all_gather((-scores, age), AXIS, axis=3, tiled=True)
    last_score, last_age = (
        x[..., k - 1 : k] for x in lax.sort(everywhere, dimension=3, num_keys=2)
    )
    ours = (-scores < last_score) | ((-scores == last_score) & (age <= last_age))
    return jnp.where(ours, scores, MASKED)


# --- Blocks --------------------------------------------------------------------------------------


def _block(slots: int, queries: int) -> int:
    """Slots of a block: a power of two that divides them all, so many that scores fit."""
    longest = 1024 if jax.default_backend() == "cpu" else 2**16  # longer ones gained nothing
    block = min(longest, slots & -slots)
    while block > 256 and block * queries > partial_softmax.score_budget():
        block //= 2
    return block


def _dot(q, k):
    return jnp.einsum("bknd,bksd->bkns", q, k, preferred_element_type=jnp.float32)


def scores_of(q, k):
    """The same where they decide which keys are the best."""
    return einsum("bknd,bksd->bkns", q, k)


def einsum(spec: str, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision=PRECISION)


def _seen(visible, start, size: int):
    """Which of `size` slots hold something: [B, 1, 1, S]."""
    return (start + jnp.arange(size) < visible[:, None])[:, None, None]


def none_found(shape, slot: int = 0):
    return jnp.full(shape, MASKED, jnp.float32), jnp.full(shape, slot, jnp.int32)


def better(best, found, k: int):
    """The k best of two lists of (scores, slots); of equal scores the first ones."""
    scores, slots = (jnp.concatenate(pair, -1) for pair in zip(best, found, strict=True))
    scores, at = lax.top_k(scores, k)
    return scores, jnp.take_along_axis(slots, at, -1)


def _take_groups(stored: Stored, groups: Int[Array, "B K n i"], size: int, dtype):
    """The vectors of some groups of consecutive slots: [B, K, n, i, size, D]; clipped."""

    def take(x):  # [B, K, M, ...]
        x = x.reshape(*x.shape[:2], -1, size, *x.shape[3:])
        return jax.vmap(jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip")))(x, groups)

    return memories.decode(jax.tree.map(take, stored), dtype)


def map_queries(function, arrays, cost: int):
    """function over arrays [B, K, N, ...], so many queries at a time that N * cost stays small."""
    N = arrays[0].shape[2]
    size = max(1, partial_softmax.score_budget() // (4 * cost))
    while N % size:
        size -= 1

    def split(x):
        return jnp.moveaxis(x.reshape(*x.shape[:2], N // size, size, *x.shape[3:]), 2, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], N, *x.shape[4:])

    return jax.tree.map(join, lax.map(function, tuple(split(x) for x in arrays)))
