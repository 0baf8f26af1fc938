"""Crossbatch: which contexts each row attends to, and the attention over them (paper §3.2).

Three things, top to bottom: *schemes* say, for every row of a batch, which other rows its memory
layers attend to; a *plan* turns a scheme into lists of pairs for the devices of a mesh;
`attention` computes local causal attention and all additional contexts as one softmax,
differentiably in all of them.

A row is one window of tokens, mostly of one document; where that ends inside it and the next one
begins, segment ids keep them apart. Nothing here holds the keys of more than one device's rows,
or the scores of more than one step of pairs: over a mesh keys and values travel around a ring.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from fot_jax.errors import UserError, check_range
from fot_jax.model import attention as parts_of
from fot_jax.model.attention import ANY_DOCUMENT, SAME_DOCUMENT, Pairs, Parts

ROW_AXES = ("replica", "data", "fsdp")  # mesh axes that rows are sharded over
HEAD_AXIS = "tensor"  # mesh axis that heads are sharded over


# --- Schemes -------------------------------------------------------------------------------------


class Context(NamedTuple):
    """One additional context of a row."""

    row: int  # its row in the group
    positive: bool  # of the same document, as far as the scheme knows
    sees: int = ANY_DOCUMENT  # SAME_DOCUMENT hides the keys of other documents in it


@dataclasses.dataclass(frozen=True)
class NoCrossbatch:
    """Plain transformer: a lane gives one window a step, and no row sees another one."""

    windows = 1  # rows that a lane gives each step: consecutive windows of its document
    advance = 1  # windows that a lane moves on per step

    def contexts(self, rows: int) -> list[list[Context]]:
        """For each of `rows` rows of a group, the contexts its memory layers attend to."""
        return [[] for _ in range(rows)]

    def output_place(self) -> slice:
        """The windows of a lane, by place, that the loss is taken on."""
        return slice(0, self.windows)

    def with_d(self, d: int) -> NoCrossbatch:
        raise UserError(f"the scheme NoCrossbatch has no d (asked for d={d}): drop train.d")


@dataclasses.dataclass(frozen=True)
class PreviousContext:
    """Scheme A: the previous context of this document and of d - 1 others (paper §3.2).

    A lane gives its last `w` windows and its current one. The current window of lane i attends to
    the w previous windows of lane i (positives; keys of another document in them are hidden) and
    to the last previous window of lanes i+1 … i+d-1, modulo the group (negatives). With two lanes,
    w = 1 and d = 2, rows 0 and 2 are the previous windows, 1 and 3 the current ones: row 1 attends
    to row 0 (positive) and row 2 (negative), row 3 to row 2 and row 0.

    Lanes move on by `advance` windows: 1, so that every window is the current one once; or w + 1
    where only every (w+1)-th window has a loss, as the questions of the dictionary lookup.
    """

    d: int = 1
    w: int = 1
    advance: int = 1

    def __post_init__(self):
        check_range("PreviousContext", 1, **dataclasses.asdict(self))
        if self.advance > self.w + 1:
            raise UserError(
                f"PreviousContext.advance = {self.advance} skips windows: give at most w + 1 = "
                f"{self.w + 1}"
            )

    @property
    def windows(self) -> int:
        return self.w + 1

    def contexts(self, rows: int) -> list[list[Context]]:
        lanes = rows // self.windows
        if self.d > lanes:
            raise UserError(
                f"PreviousContext.d = {self.d} is larger than the crossbatch group of {lanes} "
                "lanes: lower d, or raise Data.lanes (and Data.group_lanes)"
            )
        table = []
        for lane in range(lanes):
            own = [
                Context(lane * self.windows + place, True, SAME_DOCUMENT) for place in range(self.w)
            ]
            others = ((lane + j) % lanes for j in range(1, self.d))
            negatives = [Context(other * self.windows + self.w - 1, False) for other in others]
            table += [[] for _ in range(self.w)] + [own + negatives]
        return table

    def output_place(self) -> slice:
        return slice(self.w, self.windows)

    def with_d(self, d: int) -> PreviousContext:
        return dataclasses.replace(self, d=d)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Scheme B, stepping rule: `pack` consecutive windows of a lane in a step (paper §4).

    The row at place r of its pack attends to min(r * step + 1, n) contexts, its own among them,
    with n = range + 1 and step = ceil(n / (pack - 1)): the earlier windows of its document and,
    beyond those, the rows of the documents before it. Never around the group's start.
    """

    pack: int = 4
    range: int = 3

    def __post_init__(self):
        check_range("Packed", 1, pack=self.pack)
        check_range("Packed", 0, range=self.range)

    @property
    def windows(self) -> int:
        return self.pack

    @property
    def advance(self) -> int:
        return self.pack

    def contexts(self, rows: int) -> list[list[Context]]:
        n = self.range + 1
        step = -(-n // max(self.pack - 1, 1))
        table = []
        for row in range(rows):
            place = row % self.pack
            reach = min(min(place * step + 1, n) - 1, row)
            table.append([Context(row - j, j <= place) for j in range(1, reach + 1)])
        return table

    output_place = NoCrossbatch.output_place

    def with_d(self, d: int) -> Packed:
        return dataclasses.replace(self, range=d)


@dataclasses.dataclass(frozen=True)
class PackedTable:
    """Scheme B, fixed table: (positives, negatives) for every place in the pack (paper §4).

    LongLLaMA 3B: ((0, 0), (1, 1), (2, 1), (3, 0)); 7B: ((0, 0), (1, 2), (2, 5), (3, 4)). Positives
    are the nearest earlier windows of the pack, negatives the nearest rows before the pack.
    """

    table: tuple[tuple[int, int], ...] = ((0, 0), (1, 1), (2, 1), (3, 0))

    def __post_init__(self):
        object.__setattr__(self, "table", tuple(tuple(pair) for pair in self.table))
        for place, (positives, negatives) in enumerate(self.table):
            if not 0 <= positives <= place or negatives < 0:
                raise UserError(
                    f"PackedTable.table[{place}] = {(positives, negatives)}: place {place} of a "
                    f"pack has {place} earlier windows; positives must be 0 … {place}, "
                    "negatives 0 or more"
                )

    @property
    def windows(self) -> int:
        return len(self.table)

    @property
    def advance(self) -> int:
        return len(self.table)

    def contexts(self, rows: int) -> list[list[Context]]:
        table = []
        for row in range(rows):
            place = row % self.windows
            start = row - place
            positives, negatives = self.table[place]
            table.append(
                [Context(row - j, True) for j in range(1, positives + 1)]
                + [Context(start - j, False) for j in range(1, min(negatives, start) + 1)]
            )
        return table

    output_place = NoCrossbatch.output_place

    def with_d(self, d: int) -> PackedTable:
        raise UserError(f"PackedTable has no d (asked for d={d}): use Packed, or drop train.d")


def output_rows(scheme: Scheme, x: jax.Array) -> jax.Array:
    """Of an array of rows, those with a loss: [lanes * windows, ...] -> [lanes * n, ...]."""
    by_lane = x.reshape(-1, scheme.windows, *x.shape[1:])[:, scheme.output_place()]
    return by_lane.reshape(-1, *x.shape[1:])


Scheme = NoCrossbatch | PreviousContext | Packed | PackedTable


# --- Plan ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A scheme laid out for the devices of a mesh: static, made once per d by `make_plan`."""

    mesh: Mesh | AbstractMesh | None = None  # None: one device, no sharding
    ring: int = 1  # devices that one crossbatch group spans
    direction: int = 1  # +1: a device reads the rows of those before it first; -1: of those after
    hops: tuple[Pairs, ...] = ()  # by distance around the ring; leaves have a leading device axis
    positives: tuple[Pairs, ...] = ()  # the same, positives alone: for the positive attention mass

    @property
    def row_devices(self) -> int:
        """How many devices, or sets of them, share the rows."""
        return 1 if self.mesh is None else _row_devices(self.mesh)

    @property
    def platform(self) -> str:
        """Where this runs (or is compiled for): cpu, gpu or tpu."""
        on = self.mesh
        return on.devices.flat[0].platform if isinstance(on, Mesh) else jax.default_backend()


def make_plan(
    scheme: Scheme,
    rows: int,
    *,
    group_rows: int | None = None,
    mesh: Mesh | None = None,
    heads: int,
    window: int,
) -> Plan:
    """Lays out which pairs of rows each device computes at each hop.

    Args:
      scheme: which contexts each row attends to.
      rows: rows of one microbatch over all devices.
      group_rows: rows of a crossbatch group, within which contexts are drawn; None: all rows.
      mesh: devices; rows are sharded over the axes data and fsdp, heads over tensor.
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
            f"{' x '.join(ROW_AXES)}): change Data.lanes, Compute.accumulation or the mesh"
        )
    local_rows = rows // devices
    if rows % group_rows or group_rows % scheme.windows:
        raise UserError(
            f"{rows} rows of a microbatch are not whole crossbatch groups of {group_rows} rows "
            f"({scheme.windows} a lane): change Data.group_lanes or Compute.accumulation"
        )
    if local_rows % group_rows and group_rows % local_rows:
        raise UserError(
            f"a device has {local_rows} rows, a crossbatch group {group_rows}: "
            "one must be a multiple of the other; change Data.group_lanes or the mesh"
        )
    ring = max(1, group_rows // local_rows)
    contexts = scheme.contexts(group_rows)
    edges = [  # (query row, context) over all groups
        (start + row, context._replace(row=start + context.row))
        for start in range(0, rows, group_rows)
        for row, of_row in enumerate(contexts)
        for context in of_row
    ]
    slots = parts_of.slots_of(heads // head_shards, window, window, Plan(mesh).platform)

    def hops_of(direction: int, edges) -> tuple[Pairs, ...]:
        by_hop: list[list[list]] = [[[] for _ in range(devices)] for _ in range(ring)]
        for row, context in edges:
            device, source = row // local_rows, context.row // local_rows
            pair = (row % local_rows, context.row % local_rows, context.sees)
            by_hop[direction * (device - source) % ring][device].append(pair)
        while by_hop and not any(by_hop[-1]):
            by_hop.pop()
        return tuple(_stack(per_device, local_rows, slots) for per_device in by_hop)

    direction = min((1, -1), key=lambda sign: len(hops_of(sign, edges)))
    positives = [(row, context) for row, context in edges if context.positive]
    return Plan(mesh, ring, direction, hops_of(direction, edges), hops_of(direction, positives))


def _row_devices(mesh: Mesh) -> int:
    return int(np.prod([mesh.shape[axis] for axis in ROW_AXES]))


def _stack(per_device: Sequence[list], rows: int, slots: int) -> Pairs:
    """Pair lists of all devices as one Pairs with a leading device axis, filled up alike."""
    queries = max(len({pair[0] for pair in pairs}) for pairs in per_device)
    slots = max(1, min(slots, queries))
    scheduled = [parts_of.schedule_pairs(pairs, rows, slots) for pairs in per_device]
    steps = max(1, *(s.count for s in scheduled))
    fill = [(0, steps - s.count) for s in scheduled]
    return Pairs(
        *(
            np.stack([np.pad(s[i], (f, (0, 0))) for s, f in zip(scheduled, fill, strict=True)])
            for i in range(3)
        ),
        np.stack([s.count for s in scheduled]),
    )


# --- Attention -----------------------------------------------------------------------------------


def attention(q, k, v, segments, plan: Plan, k_context=None) -> jax.Array:
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
    hops = () if k_context is None else plan.hops
    k_context = k if k_context is None else k_context
    run = functools.partial(_attention, plan, len(hops))
    if plan.mesh is None:
        device = jnp.zeros([], jnp.int32)
        return run(q, k, k_context, v, segments, _of_device(hops, device))
    heads = PartitionSpec(ROW_AXES, None, HEAD_AXIS, None)
    rows = PartitionSpec(ROW_AXES, None)

    def on_device(q, k, k_context, v, segments):
        pairs = _of_device(hops, lax.axis_index(ROW_AXES))
        return run(q, k, k_context, v, segments, pairs)

    return jax.shard_map(
        on_device,
        mesh=plan.mesh,
        in_specs=(heads, heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )(q, k, k_context, v, segments)


def _of_device(hops: tuple[Pairs, ...], device) -> tuple[Pairs, ...]:
    return jax.tree.map(lambda x: jnp.asarray(x)[device], hops)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(plan, n_hops, q, k, k_context, v, segments, hops):
    return _forward(plan, n_hops, q, k, k_context, v, segments, hops)[0]


def _forward(plan, n_hops, q, k, k_context, v, segments, hops):
    R, T = q.shape[:2]
    K = k.shape[2]
    q_t, k_t, kc_t, v_t = (parts_of.to_tiles(x, K) for x in (q, k, k_context, v))
    local = _local_pairs(plan, q)
    parts = parts_of.no_parts(q_t)
    parts = parts_of.attend(q_t, k_t, v_t, segments, segments, local, parts, causal=True)

    travelling = (kc_t, v_t, segments)
    for hop, pairs in enumerate(hops):
        if hop:
            travelling = _send(plan, travelling)
        kc_t, v_t, k_segments = travelling
        parts = parts_of.attend(q_t, kc_t, v_t, segments, k_segments, pairs, parts, causal=False)
    out = parts_of.from_tiles(parts.attended().astype(q.dtype), R, T)
    saved = (q, k, k_context, v, segments, out, parts.lse, hops)
    return out, saved


def _backward(plan, n_hops, saved, d_out):
    q, k, k_context, v, segments, out, lse, hops = saved
    R, T = q.shape[:2]
    K = k.shape[2]
    q_t, k_t, kc_t, v_t = (parts_of.to_tiles(x, K) for x in (q, k, k_context, v))
    d_out_t, out_t = (parts_of.to_tiles(x, K) for x in (d_out, out))
    delta = (d_out_t.astype(jnp.float32) * out_t.astype(jnp.float32)).sum(-1)

    def zeros(x):
        return jnp.zeros(x.shape, jnp.float32)

    dq, dk, dv_local = parts_of.attend_backward(
        *(q_t, k_t, v_t, segments, segments, _local_pairs(plan, q), lse, d_out_t, delta),
        (zeros(q_t), zeros(k_t), zeros(v_t)),
        causal=True,
    )
    # Keys and values go around the ring once more, and their gradients travel with them.
    travelling, d_kc, d_v = (kc_t, v_t, segments), zeros(kc_t), zeros(v_t)
    for hop, pairs in enumerate(hops):
        if hop:
            travelling, d_kc, d_v = _send(plan, (travelling, d_kc, d_v))
        kc_t, v_t, k_segments = travelling
        dq, d_kc, d_v = parts_of.attend_backward(
            *(q_t, kc_t, v_t, segments, k_segments, pairs, lse, d_out_t, delta),
            (dq, d_kc, d_v),
            causal=False,
        )
    if n_hops > 1:
        d_kc, d_v = _send(plan, (d_kc, d_v), hops=1 - n_hops)
    grads = (dq, dk, d_kc, dv_local + d_v)
    grads = (parts_of.from_tiles(x, R, T).astype(q.dtype) for x in grads)
    return (*grads, None, None)


_attention.defvjp(_forward, _backward)


def _local_pairs(plan: Plan, q: jax.Array) -> Pairs:
    R, T, H, _ = q.shape
    return parts_of.every_row(R, SAME_DOCUMENT, parts_of.slots_of(H, T, T, plan.platform))


def _send(plan: Plan, block, hops: int = 1):
    """Moves every device's block `hops` devices on around its group's ring."""
    devices = _row_devices(plan.mesh)
    step = plan.direction * hops
    to = [(i, i - i % plan.ring + (i + step) % plan.ring) for i in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, ROW_AXES, to), block)


def positive_mass(q, k_context, v, segments, plan: Plan) -> jax.Array:
    """r_d: the share of the attention on additional contexts that goes to positives (paper §3.3).

    Same arguments as `attention`; not for differentiation. Returns a float32 scalar, the mean over
    queries, heads and rows that see any positive; NaN where no row does.
    """
    logsumexp = functools.partial(_context_logsumexp, plan, q, k_context, v, segments)
    positive, everything = logsumexp(plan.positives), logsumexp(plan.hops)
    sees = (positive > parts_of.MASKED / 2) & (segments > 0)[:, :, None]
    share = jnp.where(sees, jnp.exp(positive - everything), 0.0)
    return share.sum() / sees.sum()


def _context_logsumexp(plan, q, k_context, v, segments, hops) -> jax.Array:
    """Logsumexp of the scores of the given contexts alone: [R, T, H] float32."""

    def on_device(q, k_context, v, segments, device):
        R, T = q.shape[:2]
        K = k_context.shape[2]
        q_t, travelling = parts_of.to_tiles(q, K), (parts_of.to_tiles(k_context, K), segments)
        v_t = parts_of.to_tiles(v, K)
        parts: Parts = parts_of.no_parts(q_t)
        for hop, pairs in enumerate(_of_device(hops, device)):
            if hop:
                travelling = _send(plan, travelling)
            k_t, k_seg = travelling
            parts = parts_of.attend(q_t, k_t, v_t, segments, k_seg, pairs, parts, causal=False)
        return parts_of.from_tiles(parts.lse[..., None], R, T)[..., 0]

    if plan.mesh is None:
        return on_device(q, k_context, v, segments, jnp.zeros([], jnp.int32))
    heads, rows = PartitionSpec(ROW_AXES, None, HEAD_AXIS, None), PartitionSpec(ROW_AXES, None)
    return jax.shard_map(
        lambda *args: on_device(*args, lax.axis_index(ROW_AXES)),
        mesh=plan.mesh,
        in_specs=(heads, heads, heads, rows),
        out_specs=PartitionSpec(ROW_AXES, None, HEAD_AXIS),
        check_vma=False,
    )(q, k_context, v, segments)
