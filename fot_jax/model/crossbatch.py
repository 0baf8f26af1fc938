"""Crossbatch: attention of the rows of a batch to each other, over many devices (paper §3.2).

Schemes (schemes.py) say, for every row of a batch, which other rows its memory layers attend to. A
*plan* turns a scheme into lists of pairs for the devices of a mesh; `attention` computes local
causal attention and all additional contexts as one softmax, differentiably in all of them.

A row is one window of tokens, mostly of one document; where that ends inside it and the next one
begins, segment ids keep them apart. Nothing here holds the keys of more than two devices' rows, or
the scores of more than one step of pairs: over a mesh keys and values travel around a ring.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from fot_jax.common.errors import UserError
from fot_jax.model import layout
from fot_jax.model.attention import partial_softmax
from fot_jax.model.attention.engine import Engine, Pair, engine_of
from fot_jax.model.attention.partial_softmax import AnyArray
from fot_jax.model.layout import HEAD_AXIS, ROW_AXES
from fot_jax.model.schemes import Scheme, checked_contexts

# --- Plan ----------------------------------------------------------------------------------------

Lists = Any  # of pairs, laid out for a device by an engine


class BrokenGroups(UserError):
    """A microbatch is not of whole crossbatch groups."""


class Contexts(NamedTuple):
    """The pairs of rows that each device computes, those around the ring in the order they come."""

    own: Lists | None = None  # with its own rows; leaves [devices, ...]
    ring: Lists | None = None  # with those of the devices before it; leaves [devices, hops, ...]
    sent: tuple[int, ...] = ()  # rows of a device that go around; `ring` numbers them from 0
    direction: int = 1  # +1: the device before comes first; -1: the one after


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A scheme laid out for the devices of a mesh: static, made once per d by `make_plan`.

    Attributes:
      mesh: None for one device.
      group_devices: devices that a crossbatch group spans, and its rows travel around.
      contexts: all of them; positives: those alone, for the positive attention mass.
      counts: how many contexts each row has; None: no row has any.
      engine: what attends.
    """

    mesh: Mesh | AbstractMesh | None = None
    group_devices: int = 1
    contexts: Contexts = Contexts()
    positives: Contexts = Contexts()
    counts: np.ndarray | None = None
    engine: Engine = partial_softmax

    @property
    def row_devices(self) -> int:
        """How many devices, or sets of them, share the rows."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in ROW_AXES)

    @property
    def platform(self) -> str:
        """Where this runs (or is compiled for): cpu, gpu or tpu."""
        return layout.platform(self.mesh)


def make_plan(
    scheme: Scheme,
    rows: int,
    *,
    group_rows: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    heads: int,
    window: int,
) -> Plan:
    """Lays out which pairs of rows each device computes, with which rows of others.

    Args:
      scheme: which contexts each row attends to.
      rows: rows of one microbatch over all devices.
      group_rows: rows of a crossbatch group, within which contexts are drawn; None: all rows.
      mesh: devices; rows are sharded over ROW_AXES, heads over HEAD_AXIS.
      heads, window: attention heads and tokens of a row, for the size of a step.

    Raises:
      UserError: rows, groups and devices do not divide.
    """
    group_rows = group_rows or rows
    devices = Plan(mesh).row_devices
    head_shards = 1 if mesh is None else mesh.shape[HEAD_AXIS]
    if rows % devices:
        raise UserError(
            f"{rows} rows of a microbatch do not divide over {devices} devices (mesh axes "
            f"{' x '.join(ROW_AXES)}): change Data.lanes, Compute.accumulation, the mesh, or on a "
            "CPU Compute.cpu_devices"
        )
    local_rows = rows // devices
    if rows % group_rows or group_rows % scheme.windows:
        raise BrokenGroups(
            f"{rows} rows of a microbatch are not whole crossbatch groups of {group_rows} rows "
            f"({scheme.windows} a lane): change Data.group_lanes or Compute.accumulation"
        )
    if local_rows % group_rows and group_rows % local_rows:
        raise UserError(
            f"a device has {local_rows} rows, a crossbatch group {group_rows}: "
            "one must be a multiple of the other; change Data.group_lanes or the mesh"
        )
    group_devices = max(1, group_rows // local_rows)
    engine = engine_of(mesh, window)
    slots = partial_softmax.slots_of(heads // head_shards, window, window, Plan(mesh).platform)

    def lay_out(per_device: list[list[Pair]], keys: int) -> Lists:
        return engine.lay_out(per_device, rows=local_rows, keys=keys, slots=slots)

    of_group = checked_contexts(scheme, group_rows)
    edges = [  # (query row, context) over all groups
        (start + row, context._replace(row=start + context.row))
        for start in range(0, rows, group_rows)
        for row, of_row in enumerate(of_group)
        for context in of_row
    ]
    positives = [(row, context) for row, context in edges if context.positive]
    in_contexts = functools.partial(
        _contexts,
        devices=devices,
        local_rows=local_rows,
        group_devices=group_devices,
        lay_out=lay_out,
    )
    return Plan(
        mesh=mesh,
        group_devices=group_devices,
        contexts=in_contexts(edges),
        positives=in_contexts(positives),
        counts=np.bincount([row for row, _ in edges], minlength=rows) if edges else None,
        engine=engine,
    )


def _contexts(edges, devices: int, local_rows: int, group_devices: int, lay_out) -> Contexts:
    """Sorts (query row, context) pairs by device and by distance around the ring."""

    def by_hop(direction: int) -> list[list[list[Pair]]]:
        hops = [[[] for _ in range(devices)] for _ in range(group_devices)]
        for row, context in edges:
            device, source = row // local_rows, context.row // local_rows
            pair = (row % local_rows, context.row % local_rows, context.sees)
            hops[direction * (device - source) % group_devices][device].append(pair)
        while hops and not any(hops[-1]):
            hops.pop()
        return hops

    direction = min((1, -1), key=lambda direction: len(by_hop(direction)))
    own, *ring = by_hop(direction) or [[]]
    sent = sorted({k_row for hop in ring for pairs in hop for _, k_row, _ in pairs})
    place = {row: i for i, row in enumerate(sent)}
    # All hops of all devices are laid out alike, as if each were a device.
    renumbered = [
        [(q_row, place[k_row], sees) for q_row, k_row, sees in ring[hop][device]]
        for device in range(devices)
        for hop in range(len(ring))
    ]

    def by_device(x):
        return x.reshape(devices, len(ring), *x.shape[1:])

    return Contexts(
        lay_out(own, local_rows) if any(own) else None,
        jax.tree.map(by_device, lay_out(renumbered, len(sent))) if ring else None,
        tuple(sent),
        direction,
    )


# --- Attention -----------------------------------------------------------------------------------


def attention(
    q: Float[AnyArray, "R T H D"],
    k: Float[AnyArray, "R T K D"],
    v: Float[AnyArray, "R T K D"],
    segments: Int[AnyArray, "R T"],
    plan: Plan,
    k_context: Float[AnyArray, "R T K D"] | None = None,
) -> Float[Array, "R T H D"]:
    """Local causal attention and, with `k_context`, all contexts of the plan: one softmax.

    Args:
      q: [R, T, H, D] queries, scaled; rotated where the layer has positions.
      k, v: [R, T, K, D] keys (rotated like q) and values of the local windows; H % K == 0.
      segments: [R, T] int32 documents, 0 for padding. Locally only the own document is visible.
      plan: from `make_plan` for R rows; without `k_context` any plan of the same mesh.
      k_context: [R, T, K, D] the same keys as other rows see them: not rotated (paper §3.1).
        None in layers without memory.

    Returns:
      [R, T, H, D] in q's dtype. Differentiable in q, k, v and k_context: contexts are the current
      parameters' keys, with gradients, wherever their rows live.
    """
    contexts = Contexts() if k_context is None else plan.contexts
    k_context = k if k_context is None else k_context

    def on_device(device, q, k, k_context, v, segments):
        pairs = _of_device(contexts, device)
        static = contexts._replace(own=None, ring=None)
        return _attention(plan, static, q, k, k_context, v, segments, pairs)

    return over_devices(plan, on_device, q, k, k_context, v, segments)


def over_devices(plan: Plan, function, *arrays) -> jax.Array:
    """Runs function(device, *arrays) on every device's rows and heads.

    Arrays are [rows, tokens, heads, dim], [rows, tokens] or [heads]; it gives a first one.
    """
    if plan.mesh is None:
        return function(jnp.zeros([], jnp.int32), *arrays)
    specs = {
        4: PartitionSpec(ROW_AXES, None, HEAD_AXIS, None),
        2: PartitionSpec(ROW_AXES, None),
        1: PartitionSpec(HEAD_AXIS),
    }
    return jax.shard_map(
        lambda *arrays: function(lax.axis_index(ROW_AXES), *arrays),
        mesh=plan.mesh,
        in_specs=tuple(specs[x.ndim] for x in arrays),
        out_specs=specs[4],
        check_vma=False,
    )(*arrays)


def _of_device(contexts: Contexts, device) -> tuple[Lists | None, Lists | None]:
    return jax.tree.map(lambda x: jnp.asarray(x)[device], (contexts.own, contexts.ring))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(plan, contexts, q, k, k_context, v, segments, pairs):
    return _forward(plan, contexts, q, k, k_context, v, segments, pairs)[0]


def _forward(plan, contexts, q, k, k_context, v, segments, pairs):
    R, T = q.shape[:2]
    q_t, k_t, kc_t, v_t = (partial_softmax.to_tiles(x, k.shape[2]) for x in (q, k, k_context, v))
    attend = plan.engine.attend
    local, parts = _local_pairs(plan, q), _no_parts(plan, q_t, T)
    parts = attend(q_t, k_t, v_t, segments, segments, local, parts, causal=True)

    def visit(parts, block, pairs):
        return attend(q_t, *block[:2], segments, block[2], pairs, parts, causal=False)

    parts = _around(plan, contexts, visit, parts, (kc_t, v_t, segments), pairs)
    out = partial_softmax.from_tiles(parts.attended().astype(q.dtype), R, T)
    # Named here, where remat policies see both: with either gone, all of it is computed again.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(parts.lse, "attention")
    return out, (q, k, k_context, v, segments, out, lse, pairs)


def _around(plan, contexts, visit, parts, block, pairs):
    """visit(parts, block, pairs) of a device's own block, then of those that come to it.

    The next block is on its way while one is visited; no more than these two are held.
    """
    own, ring = pairs
    if own is not None:
        parts = visit(parts, block, own)
    if ring is None:
        return parts

    def hop(carry, pairs):
        parts, block = carry
        return (visit(parts, block, pairs), _send(plan, contexts, block)), None

    first = _send(plan, contexts, _sent(contexts, block))
    return lax.scan(hop, (parts, first), ring, unroll=_unroll(ring))[0][0]


def _backward(plan, contexts, saved, d_out):
    q, k, k_context, v, segments, out, lse, pairs = saved
    R, T = q.shape[:2]
    q_t, k_t, kc_t, v_t = (partial_softmax.to_tiles(x, k.shape[2]) for x in (q, k, k_context, v))
    d_out_t, out_t = (partial_softmax.to_tiles(x, k.shape[2]) for x in (d_out, out))
    delta = (d_out_t.astype(jnp.float32) * out_t.astype(jnp.float32)).sum(-1)

    def gradients(block, pairs, before, causal=False):
        """Adds what the pairs give to (dq, dk, dv) of queries and block."""
        k, v, k_segments = block
        return plan.engine.attend_backward(
            q_t,
            k,
            v,
            q_segments=segments,
            k_segments=k_segments,
            pairs=pairs,
            lse=lse,
            d_out=d_out_t,
            delta=delta,
            grads=before,
            causal=causal,
        )

    dq, dk, dv = gradients(
        (k_t, v_t, segments), _local_pairs(plan, q), _zeros((q_t, k_t, v_t)), causal=True
    )
    block, d_kc = (kc_t, v_t, segments), _zeros(kc_t)
    own, ring = pairs
    if own is not None:
        dq, d_kc, dv = gradients(block, own, (dq, d_kc, dv))
    if ring is not None:
        dq, *of_sent = _backward_around(plan, contexts, gradients, dq, block, ring)
        d_kc, dv = (
            _rows(x, R)
            .at[np.asarray(contexts.sent)]
            .add(_rows(y, len(contexts.sent)))
            .reshape(x.shape)
            for x, y in zip((d_kc, dv), of_sent, strict=True)
        )
    grads = (partial_softmax.from_tiles(x, R, T).astype(q.dtype) for x in (dq, dk, d_kc, dv))
    return (*grads, None, None)


def _backward_around(plan, contexts, gradients, dq, block, ring):
    """Gradients from the pairs around the ring: (dq, then those of a device's sent keys, values).

    Blocks go around once more. The gradients of each follow a hop behind, so that they too are on
    their way while the next ones are computed, and go home at the end.
    """
    send = functools.partial(_send, plan, contexts)
    block = send(_sent(contexts, block))
    nothing = _zeros(block[:2])

    def hop(carry, pairs):
        dq, block, before = carry
        next_block, before = send(block), send(before)
        dq, *here = gradients(block, pairs, (dq, *nothing))
        return (dq, next_block, jax.tree.map(jnp.add, before, tuple(here))), None

    first, others = jax.tree.map(lambda x: x[0], ring), jax.tree.map(lambda x: x[1:], ring)
    dq, *here = gradients(block, first, (dq, *nothing))
    carry, hops = (dq, send(block), tuple(here)), jax.tree.leaves(ring)[0].shape[0]
    if hops > 1:
        carry, _ = lax.scan(hop, carry, others, unroll=_unroll(others))
    return carry[0], *send(carry[2], -hops)


_attention.defvjp(_forward, _backward)


def _no_parts(plan: Plan, q_t: AnyArray, window: int):
    return plan.engine.no_parts(q_t, partial_softmax.tile_of(window))


def _local_pairs(plan: Plan, q: AnyArray) -> Lists:
    R, T, H, _ = q.shape
    return plan.engine.local_pairs(R, partial_softmax.slots_of(H, T, T, plan.platform))


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _rows(x, rows: int):
    """[rows * tiles, ...] -> [rows, tiles, ...]."""
    return x.reshape(rows, -1, *x.shape[1:])


def _sent(contexts: Contexts, block):
    """Of a device's keys, values and segments, those of the rows that others need."""
    *tiled, segments = block
    rows, sent = segments.shape[0], np.asarray(contexts.sent)
    if len(sent) == rows:
        return block
    return (*(_rows(x, rows)[sent].reshape(-1, *x.shape[1:]) for x in tiled), segments[sent])


def _send(plan: Plan, contexts: Contexts, block, hops: int = 1):
    """Moves every device's block `hops` devices on around its group's ring."""
    n, step = plan.group_devices, contexts.direction * hops
    to = [(i, i - i % n + (i + step) % n) for i in range(plan.row_devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, ROW_AXES, to), block)


def _unroll(ring: Lists) -> bool:
    """Whether to write a ring's hops out: what the last one would send on then falls away."""
    return jax.tree.leaves(ring)[0].shape[0] <= 4


def positive_mass(
    q: Float[AnyArray, "R T H D"],
    k_context: Float[AnyArray, "R T K D"],
    v: Float[AnyArray, "R T K D"],
    segments: Int[AnyArray, "R T"],
    plan: Plan,
) -> Float[Array, ""]:
    """r_d: the share of the attention on additional contexts that goes to positives (paper §3.3).

    Same arguments as `attention`; not for differentiation. Returns a float32 scalar, the mean over
    queries, heads and rows that see any positive; NaN where no row does.
    """
    positive, everything = (
        _context_logsumexp(plan, contexts, q, k_context, segments)
        for contexts in (plan.positives, plan.contexts)
    )
    sees = (positive > partial_softmax.MASKED / 2) & (segments > 0)[:, :, None]
    share = jnp.where(sees, jnp.exp(positive - everything), 0.0)
    return share.sum() / sees.sum()


def _context_logsumexp(plan, contexts, q, k_context, segments) -> jax.Array:
    """Logsumexp of the scores of the given contexts alone: [R, T, H] float32."""

    def on_device(device, q, k_context, segments):
        R, T = q.shape[:2]
        q_t, k_t = (partial_softmax.to_tiles(x, k_context.shape[2]) for x in (q, k_context))

        def visit(parts, block, pairs):
            k, k_segments = block  # what is attended to does not matter: keys will do for values
            return plan.engine.attend(
                q_t, k, k, segments, k_segments, pairs=pairs, parts=parts, causal=False
            )

        pairs, parts = _of_device(contexts, device), _no_parts(plan, q_t, T)
        parts = _around(plan, contexts, visit, parts, (k_t, segments), pairs)
        return partial_softmax.from_tiles(parts.lse[..., None], R, T)

    return over_devices(plan, on_device, q, k_context, segments)[..., 0]
