"""Softmax attention in parts as GPU kernels: partial_softmax.py without scores in main memory.

The same parts and the same functions, through Triton, for NVIDIA's Ampere and later. A program of
a kernel holds a block of queries and walks the list of the key rows they meet, or the other way
around for the gradients of keys and values.

Letters: R rows, N key rows, K key/value heads, G query heads of each, D head dim, T queries and S
keys of a tile, B and C queries and keys of a block, P entries of a list.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fot_jax.model.attention.pair_lists import Lists
from fot_jax.model.attention.pair_lists import lay_out as lay_out  # of the engine, as they are
from fot_jax.model.attention.pair_lists import local_pairs as local_pairs
from fot_jax.model.attention.partial_softmax import ANY_DOCUMENT, MASKED, NOTHING, Parts
from fot_jax.model.attention.partial_softmax import no_parts as no_parts

SMALLEST_BLOCK = 16  # that a GPU's matrix units multiply
# Of those tried on an H100 (64 or 128 of each, 4 or 8 warps, 2 or 3 stages) none was faster by more
# than 2 %, and the others need more shared memory.
BLOCK = 64
WARPS = 4
STAGES = 2


def block_of(tile: int) -> int:
    """What a tile is cut into: the largest power of two that divides it, up to BLOCK."""
    return min(tile & -tile, BLOCK)


# --- Walking lists -------------------------------------------------------------------------------


class _Walk:
    """Sizes, and where the blocks are that a program reads."""

    def __init__(self, q, k, q_segments, k_segments, causal: bool):
        self.causal = causal
        self.all_q_tiles, self.K, GT, self.D = q.shape
        self.all_k_tiles, _, self.S, _ = k.shape
        self.q_tiles = self.all_q_tiles // q_segments.shape[0]
        self.k_tiles = self.all_k_tiles // k_segments.shape[0]
        self.T = q_segments.shape[1] // self.q_tiles
        self.G = GT // self.T
        self.B, self.C = block_of(self.T), block_of(self.S)
        self.segments = (
            q_segments.reshape(self.all_q_tiles, self.T),
            k_segments.reshape(self.all_k_tiles, self.S),
        )

    def call(self, kernel, lists, inputs, results, by_keys: bool, name: str):
        """A kernel over blocks of queries, or of keys, of all heads.

        Args:
          lists: [R, P] rows that are met, and what is seen of them.
          inputs: (queries, keys): of those that a program has and of those that it walks along.
          results: arrays of what a program has, which outputs are added to and take the place of.
        """
        mine, others = inputs[::-1] if by_keys else inputs
        size, tile = (self.C, self.S) if by_keys else (self.B, self.T)
        heads = 1 if by_keys else self.G
        blocks = heads * tile // size  # of a tile

        def own(x):
            """Blocks of [tiles, K, heads * tile, ...], or of segments [tiles, tile]."""

            def at(i, h):
                of_tile, block = _divmod(i, blocks)
                if x.ndim == 2:
                    return of_tile, _divmod(block, tile // size)[1]
                return of_tile, h, block, *(0 for _ in x.shape[3:])

            return pl.BlockSpec(
                (None, size) if x.ndim == 2 else (None, None, size, *x.shape[3:]), at
            )

        def whole(x):
            return pl.BlockSpec(x.shape, lambda i, h: (0,) * x.ndim)

        rows, sees = lists
        count = (sees != NOTHING).sum(1)
        read = (rows, sees, count, *others, *mine)
        specs = [*map(whole, (rows, sees, count, *others)), *map(own, (*mine, *results))]
        first = len(read)
        tiles = self.all_k_tiles if by_keys else self.all_q_tiles
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid=(tiles * blocks, self.K),
            in_specs=specs,
            out_specs=[own(x) for x in results],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
            input_output_aliases={first + i: i for i in range(len(results))},
            compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
            name=name,
        )(*read, *results)

    def walk_keys(self, rows, sees, count, visit, carry):
        """visit(carry, seen, (tile, head, keys), how far queries are ahead) of every block met."""
        tile, block = _divmod(pl.program_id(0), self.G * self.T // self.B)
        row, of_row = _divmod(tile, self.q_tiles)
        first_query = of_row * self.T + _divmod(block, self.T // self.B)[1] * self.B
        head = pl.program_id(1)
        blocks = self.k_tiles * self.S // self.C
        if self.causal:  # later keys are not visible
            blocks = _divmod(first_query + self.B + self.C - 1, self.C)[0]

        def step(i, carry):
            entry, block = _divmod(i, blocks)
            of_row, of_tile = _divmod(block, self.S // self.C)
            tile = rows[row, entry] * self.k_tiles + of_row
            at = tile, head, pl.ds(of_tile * self.C, self.C)
            return visit(carry, sees[row, entry], at, first_query - block * self.C)

        return lax.fori_loop(0, count[row] * blocks, step, carry)

    def walk_queries(self, rows, sees, count, visit, carry):
        """visit(carry, seen, (tile, head, queries), (tile, tokens), ahead) of every block met."""
        tile, block = _divmod(pl.program_id(0), self.S // self.C)
        row, of_row = _divmod(tile, self.k_tiles)
        first_key = of_row * self.S + block * self.C
        head = pl.program_id(1)
        skipped = _divmod(first_key, self.B)[0] if self.causal else 0  # earlier queries see nothing
        blocks = self.q_tiles * self.T // self.B - skipped

        def step(i, carry):
            i, block = _divmod(i, blocks)
            entry, g = _divmod(i, self.G)
            of_row, of_tile = _divmod(block + skipped, self.T // self.B)
            tile, start = rows[row, entry] * self.q_tiles + of_row, of_tile * self.B
            at = tile, head, pl.ds(g * self.T + start, self.B)
            ahead = (block + skipped) * self.B - first_key
            return visit(carry, sees[row, entry], at, (tile, pl.ds(start, self.B)), ahead)

        return lax.fori_loop(0, count[row] * self.G * blocks, step, carry)

    def visible(self, seen, ahead, q_segments, k_segments):
        """Of segments [B, 1] and [1, C], or [1, B] and [C, 1]; queries are so far ahead of keys."""
        same = q_segments == k_segments
        if self.causal:
            at_query, at_key = (
                lax.broadcasted_iota(jnp.int32, x.shape, 0 if x.shape[1] == 1 else 1)
                for x in (q_segments, k_segments)
            )
            return same & (at_query + ahead >= at_key)
        return (same | (seen == ANY_DOCUMENT)) & (k_segments > 0)


def _divmod(i, n):
    """Of numbers that are not negative: a kernel need not look at signs."""
    n = jnp.asarray(n, jnp.int32)
    return lax.div(i, n), lax.rem(i, n)


def _dot(a, b, axis_a: int, axis_b: int):
    """a and b contracted over an axis each, in float32."""
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _widened(*arrays):
    """Arrays [..., D] with D a power of two that a GPU's matrix units multiply: zeros added."""
    D = arrays[0].shape[-1]
    wide = max(SMALLEST_BLOCK, 1 << (D - 1).bit_length())
    return [jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, wide - D)]) for x in arrays]


# --- Forward -------------------------------------------------------------------------------------


def attend(q, k, v, q_segments, k_segments, pairs: Lists, parts: Parts, causal: bool) -> Parts:
    """As `partial_softmax.attend`: merges the attention of all `pairs` into `parts`."""
    D = q.shape[-1]
    q, k, v, out = _widened(q, k, v, parts.out)
    walk = _Walk(q, k, q_segments, k_segments, causal)
    q_segments, k_segments = walk.segments
    inputs = (q, q_segments), (k, v, k_segments)
    results = out, parts.top, parts.total
    out, *rest = walk.call(_attend, pairs[:2], inputs, results, by_keys=False, name="attend")
    return Parts(out[..., :D], *rest)


def _attend(walk, rows, sees, count, k, v, k_seg, q, q_seg, *refs):
    before, after = refs[:3], refs[3:]
    q, q_seg = q[...], q_seg[...]

    def visit(carry, seen, at, ahead):
        out, top, total = carry
        tile, _, keys = at
        scores = _dot(q, k[at], 1, 1)
        visible = walk.visible(seen, ahead, q_seg[:, None], k_seg[tile, keys][None, :])
        scores = jnp.where(visible, scores, MASKED)
        highest = jnp.maximum(top, scores.max(1))
        p = jnp.exp(scores - highest[:, None])
        kept = jnp.exp(top - highest)
        out = out * kept[:, None] + _dot(p.astype(v.dtype), v[at], 1, 0)
        return out, highest, total * kept + p.sum(1)

    carry = walk.walk_keys(rows, sees, count, visit, tuple(x[...] for x in before))
    for ref, x in zip(after, carry, strict=True):
        ref[...] = x


# --- Backward ------------------------------------------------------------------------------------


def attend_backward(q, k, v, q_segments, k_segments, pairs, lse, d_out, delta, grads, causal):
    """As `partial_softmax.attend_backward`: adds the gradients of all `pairs` to `grads`."""
    D = q.shape[-1]
    q, k, v, d_out, dq, dk, dv = _widened(q, k, v, d_out, *grads)

    walk = _Walk(q, k, q_segments, k_segments, causal)
    q_segments, k_segments = walk.segments
    inputs = (q, d_out, lse, delta, q_segments), (k, v, k_segments)
    (dq,) = walk.call(_backward_queries, pairs[:2], inputs, [dq], by_keys=False, name="attend_dq")
    dk, dv = walk.call(
        _backward_keys, pairs[2:], inputs, [dk, dv], by_keys=True, name="attend_dk_dv"
    )
    return tuple(x[..., :D] for x in (dq, dk, dv))


def _backward_queries(walk, rows, sees, count, k, v, k_seg, *refs):
    *mine, before, after = refs
    q, d_out, lse, delta, q_seg = (x[...] for x in mine)

    def visit(dq, seen, at, ahead):
        tile, _, keys = at
        k_block = k[at]
        scores = _dot(q, k_block, 1, 1)
        visible = walk.visible(seen, ahead, q_seg[:, None], k_seg[tile, keys][None, :])
        p = jnp.where(visible, jnp.exp(scores - lse[:, None]), 0.0)
        ds = (p * (_dot(d_out, v[at], 1, 1) - delta[:, None])).astype(q.dtype)
        return dq + _dot(ds, k_block, 1, 0)

    after[...] = walk.walk_keys(rows, sees, count, visit, before[...])


def _backward_keys(walk, rows, sees, count, q, d_out, lse, delta, q_seg, *refs):
    *mine, before_k, before_v, after_k, after_v = refs
    k, v, k_seg = (x[...] for x in mine)

    def visit(grads, seen, at, segments, ahead):
        dk, dv = grads
        q_block, d_out_block = q[at], d_out[at]
        scores = _dot(k, q_block, 1, 1)  # [C, B]
        visible = walk.visible(seen, ahead, q_seg[segments][None, :], k_seg[:, None])
        p = jnp.where(visible, jnp.exp(scores - lse[at][None, :]), 0.0)
        ds = (p * (_dot(v, d_out_block, 1, 1) - delta[at][None, :])).astype(q.dtype)
        dv = dv + _dot(p.astype(d_out.dtype), d_out_block, 1, 0)
        return dk + _dot(ds, q_block, 1, 0), dv

    dk, dv = walk.walk_queries(rows, sees, count, visit, (before_k[...], before_v[...]))
    after_k[...], after_v[...] = dk, dv
