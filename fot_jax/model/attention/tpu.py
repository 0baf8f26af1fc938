"""Softmax attention in parts as TPU kernels: partial_softmax.py without scores in main memory.

The same parts and the same functions, for TPU v4 and later (v2 and v3 have no compiler for them).
A list says for each query row which key rows it meets; the kernel walks it with the scores of one
tile against another in fast memory alone. The lists are read ahead of the blocks they name, so the
next keys are on their way while a tile is being computed.

Scores stand transposed, keys down and queries across: what belongs to a query (largest score, sum)
is then a row, which the vector unit spreads down for free.

Letters: R rows, N key rows, K key/value heads, G query heads of each, D head dim, T queries and S
keys of a tile, P entries of a list.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fot_jax.model.attention.pair_lists import Lists
from fot_jax.model.attention.pair_lists import lay_out as lay_out  # of the engine, as they are
from fot_jax.model.attention.pair_lists import local_pairs as local_pairs
from fot_jax.model.attention.partial_softmax import ANY_DOCUMENT, MASKED, NOTHING, AnyArray


class Parts(NamedTuple):
    """Attention over the keys seen so far: a softmax whose division is put off to the end."""

    out: jax.Array  # [R * tiles, K, G, D, T] float32: sum of exp(score - top) * value
    top: jax.Array  # [R * tiles, K, G, 1, T] float32: the largest score
    total: jax.Array  # [R * tiles, K, G, 1, T] float32: sum of exp(score - top)

    @property
    def lse(self) -> jax.Array:
        """[R * tiles, K, G * T] float32: logsumexp of the scores."""
        lse = self.top + jnp.log(self.total)
        return lse.reshape(*lse.shape[:2], -1)

    def attended(self) -> jax.Array:
        """[R * tiles, K, G * T, D] float32: softmax(scores) times values."""
        out = (self.out / self.total).swapaxes(-1, -2)
        return out.reshape(*out.shape[:2], -1, out.shape[-1])


def no_parts(q: AnyArray, tile: int) -> Parts:
    """Nothing seen yet, for queries [R * tiles, K, G * T, D]."""
    tiles, K, GT, D = q.shape
    shape = (tiles, K, GT // tile, 1, tile)
    return Parts(
        jnp.zeros((*shape[:3], D, tile), jnp.float32),
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )


# --- Walking lists -------------------------------------------------------------------------------


class _Walk:
    """Sizes, and which blocks a kernel has at hand at each step of its grid.

    By queries, a grid is (heads, query tiles, tiles of the keys they meet); by keys it is
    (key/value heads, key tiles, heads and tiles of the queries they meet).
    """

    def __init__(self, q, k, q_segments, k_segments, lists: Lists, causal: bool):
        self.causal, self.lists = causal, lists
        self.all_q_tiles, self.K, GT, self.D = q.shape
        self.all_k_tiles = k.shape[0]
        self.q_tiles = self.all_q_tiles // q_segments.shape[0]
        self.k_tiles = self.all_k_tiles // k_segments.shape[0]
        self.T = q_segments.shape[1] // self.q_tiles
        self.S = k_segments.shape[1] // self.k_tiles
        self.G = GT // self.T
        self.segments = (
            q_segments.reshape(self.all_q_tiles, 1, self.T),
            k_segments.reshape(self.all_k_tiles, self.S, 1),
        )

    def by_head(self, x):
        """[R * tiles, K, G * T, D] -> [R * tiles, K, G, T, D]."""
        return x.reshape(self.all_q_tiles, self.K, self.G, self.T, self.D)

    def across(self, x):
        """[R * tiles, K, G * T] -> [R * tiles, K, G, 1, T]."""
        return x.reshape(self.all_q_tiles, self.K, self.G, 1, self.T)

    def by_queries(self):
        """Grid; blocks of queries, keys and segments; a function to blocks across queries."""
        P = self.lists.k_row.shape[1]

        def q_at(h, q_tile, step, *_):
            return q_tile, h // self.G, h % self.G, 0, 0

        def k_at(h, q_tile, step, rows, sees):
            entry = q_tile // self.q_tiles * P + step // self.k_tiles
            tile = step % self.k_tiles
            if self.causal:  # later keys are skipped, so they need not be fetched
                tile = jnp.minimum(tile, q_tile % self.q_tiles)
            tile = jnp.where(sees[entry] == NOTHING, self.k_tiles - 1, tile)
            return rows[entry] * self.k_tiles + tile, h // self.G, 0, 0

        grid = (self.K * self.G, self.all_q_tiles, P * self.k_tiles)
        return grid, *self._blocks(q_at, k_at)

    def by_keys(self):
        """The same for a grid by keys."""
        P = self.lists.q_row.shape[1]

        def k_at(h, k_tile, step, *_):
            return k_tile, h, 0, 0

        def q_at(h, k_tile, step, rows, sees):
            entry = k_tile // self.k_tiles * P + step // (self.q_tiles * self.G)
            tile, g = step // self.G % self.q_tiles, step % self.G
            if self.causal:
                tile = jnp.maximum(tile, k_tile % self.k_tiles)
            tile = jnp.where(sees[entry] == NOTHING, self.q_tiles - 1, tile)
            return rows[entry] * self.q_tiles + tile, h, g, 0, 0

        grid = (self.K, self.all_k_tiles, P * self.q_tiles * self.G)
        return grid, *self._blocks(q_at, k_at)

    def _blocks(self, q_at, k_at):
        def across(size: int):
            return pl.BlockSpec((None, None, None, size, self.T), q_at)

        queries = pl.BlockSpec((None, None, None, self.T, self.D), q_at)
        keys = pl.BlockSpec((None, None, self.S, self.D), k_at)
        segments = (
            pl.BlockSpec((None, 1, self.T), lambda *at: (q_at(*at)[0], 0, 0)),
            pl.BlockSpec((None, self.S, 1), lambda *at: (k_at(*at)[0], 0, 0)),
        )
        return queries, keys, segments, across

    def entry_by_queries(self, sees):
        """Of the step at hand by queries: what the pair sees, and how far queries are ahead."""
        q_tile, step = pl.program_id(1), pl.program_id(2)
        seen = sees[q_tile // self.q_tiles * self.lists.k_row.shape[1] + step // self.k_tiles]
        return seen, q_tile % self.q_tiles * self.T - step % self.k_tiles * self.S

    def entry_by_keys(self, sees):
        """The same by keys."""
        k_tile, step = pl.program_id(1), pl.program_id(2)
        entry = step // (self.q_tiles * self.G)
        seen = sees[k_tile // self.k_tiles * self.lists.q_row.shape[1] + entry]
        return seen, step // self.G % self.q_tiles * self.T - k_tile % self.k_tiles * self.S

    def runs(self, seen, ahead):
        """Whether the step at hand has any visible pair."""
        some = seen != NOTHING
        return some & (ahead > -self.S) if self.causal else some

    def scores(self, seen, ahead, q, k, q_segments, k_segments):
        """Scores and visibility of a tile, both [S, T]."""
        scores = _dot(k, q, 1, 1)
        same = q_segments == k_segments
        if self.causal:
            at_query = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) + ahead
            return scores, same & (at_query >= jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0))
        wanted = jnp.where(same, 1, jnp.where(seen == ANY_DOCUMENT, 1, 0))
        return scores, (wanted > 0) & (k_segments > 0)

    def call(self, kernel, grid, specs, results, aliases, products: int, name: str):
        """A kernel over a grid, its last dimension one step after another.

        Args:
          specs: of inputs and outputs, and shapes of what lasts from step to step.
          results: arrays shaped like the outputs.
          aliases: inputs, by number, that outputs take the place of.
          products: matrix products of a step.
        """
        in_specs, out_specs, scratch = specs
        steps = int(np.prod(grid))
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=grid,
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in results],
            input_output_aliases=aliases,
            cost_estimate=pl.CostEstimate(
                flops=steps * products * 2 * self.T * self.S * self.D // (2 if self.causal else 1),
                transcendentals=steps * self.T * self.S,
                bytes_accessed=steps * 4 * self.S * self.D,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            name=name,
        )


def _dot(a, b, axis_a: int, axis_b: int):
    """a and b contracted over an axis each, in float32."""
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _at_first_step(do):
    pl.when(pl.program_id(2) == 0)(do)


def _at_last_step(do):
    pl.when(pl.program_id(2) == pl.num_programs(2) - 1)(do)


# --- Forward -------------------------------------------------------------------------------------


def attend(q, k, v, q_segments, k_segments, pairs: Lists, parts: Parts, causal: bool) -> Parts:
    """As `partial_softmax.attend`: merges the attention of all `pairs` into `parts`."""
    walk = _Walk(q, k, q_segments, k_segments, pairs, causal)
    grid, queries, keys, segments, across = walk.by_queries()
    of_parts = [across(walk.D), across(1), across(1)]
    specs = (
        [queries, keys, keys, *segments, *of_parts],
        of_parts,
        [(walk.D, walk.T), (1, walk.T), (1, walk.T)],
    )
    call = walk.call(_attend, grid, specs, parts, {7: 0, 8: 1, 9: 2}, 2, "attend")
    listed = pairs.k_row.reshape(-1), pairs.k_sees.reshape(-1)
    return Parts(*call(*listed, walk.by_head(q), k, v, *walk.segments, *parts))


def _attend(walk, rows, sees, q, k, v, q_seg, k_seg, *refs):
    before, after, (out, top, total) = refs[:3], refs[3:6], refs[6:]

    @_at_first_step
    def _():
        for scratch, given in zip((out, top, total), before, strict=True):
            scratch[...] = given[...]

    entry = walk.entry_by_queries(sees)

    @pl.when(walk.runs(*entry))
    def _():
        scores, visible = walk.scores(*entry, q[...], k[...], q_seg[...], k_seg[...])
        scores = jnp.where(visible, scores, MASKED)
        highest = jnp.maximum(top[...], scores.max(0, keepdims=True))
        p = jnp.exp(scores - highest)
        kept = jnp.exp(top[...] - highest)
        out[...] = out[...] * kept + _dot(v[...], p.astype(v.dtype), 0, 0)
        total[...] = total[...] * kept + p.sum(0, keepdims=True)
        top[...] = highest

    @_at_last_step
    def _():
        for result, scratch in zip(after, (out, top, total), strict=True):
            result[...] = scratch[...]


# --- Backward ------------------------------------------------------------------------------------


def attend_backward(q, k, v, q_segments, k_segments, pairs, lse, d_out, delta, grads, causal):
    """As `partial_softmax.attend_backward`: adds the gradients of all `pairs` to `grads`."""
    dq, dk, dv = grads
    walk = _Walk(q, k, q_segments, k_segments, pairs, causal)
    inputs = (walk.by_head(q), k, v, *walk.segments)
    inputs += (walk.across(lse), walk.by_head(d_out), walk.across(delta))

    def specs(blocks, gradients, scratch):
        queries, keys, segments, across = blocks
        read = [queries, keys, keys, *segments, across(1), queries, across(1)]
        return [*read, *gradients], gradients, scratch

    grid, *blocks = walk.by_queries()
    of_queries = specs(blocks, [blocks[0]], [(walk.T, walk.D)])
    before = walk.by_head(dq)
    call = walk.call(_backward_queries, grid, of_queries, [before], {10: 0}, 3, "attend_dq")
    (after,) = call(pairs.k_row.reshape(-1), pairs.k_sees.reshape(-1), *inputs, before)

    grid, *blocks = walk.by_keys()
    of_keys = specs(blocks, [blocks[1]] * 2, [(walk.S, walk.D)] * 2)
    call = walk.call(_backward_keys, grid, of_keys, [dk, dv], {10: 0, 11: 1}, 4, "attend_dk_dv")
    dk, dv = call(pairs.q_row.reshape(-1), pairs.q_sees.reshape(-1), *inputs, dk, dv)
    return after.reshape(dq.shape), dk, dv


def _score_gradients(walk, entry, q, k, v, q_seg, k_seg, lse, d_out, delta):
    """Weights and gradients of the scores of a tile, both [S, T]."""
    scores, visible = walk.scores(*entry, q[...], k[...], q_seg[...], k_seg[...])
    p = jnp.where(visible, jnp.exp(scores - lse[...]), 0.0)
    return p, (p * (_dot(v[...], d_out[...], 1, 1) - delta[...])).astype(q.dtype)


def _backward_queries(walk, rows, sees, q, k, *refs):
    *inputs, before, after, dq = refs

    @_at_first_step
    def _():
        dq[...] = before[...]

    entry = walk.entry_by_queries(sees)

    @pl.when(walk.runs(*entry))
    def _():
        _, ds = _score_gradients(walk, entry, q, k, *inputs)
        dq[...] += _dot(ds, k[...], 0, 0)

    @_at_last_step
    def _():
        after[...] = dq[...]


def _backward_keys(walk, rows, sees, q, k, *refs):
    *inputs, before_k, before_v, after_k, after_v, dk, dv = refs
    d_out = inputs[-2]

    @_at_first_step
    def _():
        dk[...] = before_k[...]
        dv[...] = before_v[...]

    entry = walk.entry_by_keys(sees)

    @pl.when(walk.runs(*entry))
    def _():
        p, ds = _score_gradients(walk, entry, q, k, *inputs)
        dk[...] += _dot(ds, q[...], 1, 0)
        dv[...] += _dot(p.astype(q.dtype), d_out[...], 1, 0)

    @_at_last_step
    def _():
        after_k[...] = dk[...]
        after_v[...] = dv[...]
