"""Inference memory: an explicit pytree of keys and values that memory layers read (paper §3.1).

Every row has slots, filled in the order its tokens were read. When all are filled, the memory is
grown, or, as a ring, overwrites its oldest entries. Keys are stored as other contexts see them:
normalised where the model does so, not rotated (with ModelConfig.memory_before, at the places of
the window before); so the order of slots is of no consequence.

Over a mesh with the axis "memory" slots are dealt out in turn: slot s lives on shard s % n.

Letters: B rows, T tokens, K key/value heads, M slots, D head dim, n shards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

AXIS = "memory"  # mesh axis that slots are sharded over
STORAGE = ("float32", "bfloat16", "float16", "int8", "int4")
GROUP = 32  # elements of a vector that share a scale in int4


class Stored(NamedTuple):
    """Vectors in a storage type."""

    # [B, K, M, D] float32, float16, int8, or the bits of bfloat16 as uint16: to update a few slots,
    # XLA's CPU backend would first convert the whole of a bfloat16 array to float32 and then back.
    # Of int4 [B, K, M, D / 2] uint8: the low bits are the first half of a vector.
    x: Array
    # int8: [B, K, M] float32, a vector is x * scale. int4: [B, K, M, 2 G] float16, for each of G
    # groups of elements what x is multiplied by, then for each what is added.
    scale: Array | None

    @property
    def slots(self) -> int:
        return self.x.shape[2]

    @property
    def dim(self) -> int:
        """Elements of a vector."""
        return self.x.shape[-1] * (2 if self.x.dtype == jnp.uint8 else 1)

    def slot(self, start, size: int, dtype) -> Float[Array, "B K S D"]:
        """The vectors of `size` slots from `start` on."""
        cut = functools.partial(
            lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=2
        )
        return decode(Stored(cut(self.x), None if self.scale is None else cut(self.scale)), dtype)


def encode(x: Float[Array, "*rows D"], storage: str) -> Stored:
    """Vectors as stored.

    int8 has a scale per vector: the largest element is 127 of it. int4 has 16 steps from the
    smallest to the largest element of each group: with a scale alone, and one for the whole vector,
    a few channels that are large in every key take the steps of all others.
    """
    if storage == "int8":
        x = x.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(x).max(-1), 1e-30) / 127
        return Stored(jnp.rint(x / scale[..., None]).astype(jnp.int8), scale)
    if storage == "int4":
        size = GROUP if x.shape[-1] % GROUP == 0 else x.shape[-1]
        groups = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // size, size)
        low = groups.min(-1).astype(jnp.float16)
        step = ((groups.max(-1) - low) / 15).astype(jnp.float16)
        # As they are read, and so that what float16 rounds to 0 divides by no 0.
        begin, by = (y.astype(jnp.float32)[..., None] for y in (low, jnp.maximum(step, 1e-7)))
        steps = jnp.clip(jnp.rint((groups - begin) / by), 0, 15)
        first, second = jnp.split(steps.reshape(x.shape).astype(jnp.uint8), 2, axis=-1)
        return Stored(first | second << 4, jnp.concatenate([step, low], -1))
    if storage == "bfloat16":
        return Stored(lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16), None)
    return Stored(x.astype(storage), None)


def decode(stored: Stored, dtype) -> Float[Array, "*rows D"]:
    """Vectors of a type to compute with."""
    x = stored.x
    if x.dtype == jnp.uint16:
        x = lax.bitcast_convert_type(x, jnp.bfloat16)
    elif x.dtype == jnp.int8:
        x = x.astype(jnp.float32) * stored.scale[..., None]
    elif x.dtype == jnp.uint8:
        x = jnp.concatenate([x & 15, x >> 4], -1)
        step, low = jnp.split(stored.scale.astype(jnp.float32)[..., None], 2, axis=-2)
        count = step.shape[-2]
        groups = x.reshape(*x.shape[:-1], count, x.shape[-1] // count).astype(jnp.float32)
        x = (groups * step + low).reshape(x.shape)
    return x.astype(dtype)


class LayerMemory(NamedTuple):
    """Keys and values of one memory layer."""

    k: Stored
    v: Stored


class Memory(NamedTuple):
    """Memories of all memory layers; one row for each document, or one that all rows share."""

    layers: tuple[LayerMemory, ...]
    appended: Int[Array, " B"]  # tokens stored; once a ring has gone around, limit + next slot
    limit: Int[Array, ""]  # slots in use; more tokens overwrite the oldest

    @property
    def visible(self) -> Int[Array, " B"]:
        """How many slots of each row hold something: the first ones."""
        return jnp.minimum(self.appended, self.limit)

    @property
    def rows(self) -> int:
        return self.appended.shape[0]

    @property
    def slots(self) -> int:
        """Allocated for each row, the limit or more; 0 without memory layers."""
        return self.layers[0].k.slots if self.layers else 0

    @property
    def storage(self) -> str:
        """One of STORAGE."""
        name = self.layers[0].k.x.dtype.name if self.layers else "float32"
        return {"uint16": "bfloat16", "uint8": "int4"}.get(name, name)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def slots_for(tokens: int, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Slots to allocate for so many tokens: up to an eighth more, so that few sizes are compiled.

    Up to 1024 a shard a power of two, then a multiple of 1024, so that blocks divide it.
    """
    shards = shards_of(mesh)
    tokens = max(64, -(-tokens // shards))
    power = 1 << (tokens - 1).bit_length()
    step = power if power <= 1024 else max(1024, power // 16)
    return -(-tokens // step) * step * shards


def shards_of(mesh: Mesh | AbstractMesh | None) -> int:
    """How many devices share the slots."""
    return mesh.shape[AXIS] if mesh is not None and AXIS in mesh.axis_names else 1


def empty(
    config, rows: int, limit: int, storage: str = "float32", mesh: Mesh | None = None
) -> Memory:
    """A memory of `limit` slots a row for a model of this ModelConfig, with nothing in it.

    Args:
      storage: one of STORAGE.
      mesh: where it lives: its slots over the axis "memory", if it has that, else replicated.
    """
    if not config.memory_layers:
        limit = 0
    slots = slots_for(limit, mesh) if limit else 0
    vector = jax.ShapeDtypeStruct((rows, config.num_kv_heads, slots, config.head_dim), jnp.float32)
    like = jax.eval_shape(functools.partial(encode, storage=storage), vector)
    place, along_slots = _shardings(mesh)

    def stored():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=along_slots), like)

    layers = tuple(LayerMemory(stored(), stored()) for _ in config.memory_layers)
    appended = jnp.zeros(rows, jnp.int32, device=place)
    return Memory(layers, appended, jnp.full((), limit, jnp.int32, device=place))


def specs(layers):
    """PartitionSpecs of a tree of arrays whose slots are sharded."""
    return jax.tree.map(lambda _: PartitionSpec(None, None, AXIS), layers)


def _shardings(mesh: Mesh | None) -> tuple[NamedSharding | None, NamedSharding | None]:
    """Of small arrays, and of arrays [B, K, M, ...]."""
    if mesh is None:
        return None, None
    along_slots = PartitionSpec(None, None, AXIS) if shards_of(mesh) > 1 else PartitionSpec()
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, along_slots)


# --- Append --------------------------------------------------------------------------------------


def append(
    memory: Memory,
    windows: Sequence[tuple[Float[Array, "B K T D"], Float[Array, "B K T D"]]],
    valid: Bool[Array, "B T"],
    mesh: Mesh | None = None,
) -> Memory:
    """Stores the valid tokens of a window in the next slots: keys and values per memory layer.

    A memory of one row takes the windows of all B rows, the first tokens of each first. A token for
    which there is no slot overwrites the oldest one. Jitted with `memory` donated, nothing but the
    new slots is written.
    """
    if not memory.slots:
        return memory
    shared = memory.rows < valid.shape[0]
    if shared:
        valid = valid.T.reshape(1, -1)
    count = valid.sum(1)
    place = memory.appended[:, None] + jnp.cumsum(valid, 1) - 1
    stays = valid & (place >= (memory.appended + count)[:, None] - memory.limit)
    slot = jnp.where(stays, place % jnp.maximum(memory.limit, 1), -1)

    def prepared(x):
        if shared:  # [B, K, T, D] -> [1, K, T * B, D]
            x = x.transpose(1, 2, 0, 3).reshape(1, x.shape[1], -1, x.shape[3])
        return encode(x, memory.storage)

    new = tuple(LayerMemory(prepared(k), prepared(v)) for k, v in windows)
    layers = write(memory.layers, new, slot, mesh)
    total, limit = memory.appended + count, memory.limit
    around = limit + (total - limit) % jnp.maximum(limit, 1)  # so that the count has no end
    return Memory(layers, jnp.where(total > limit, around, total), limit)


def write(layers, new, slot: Int[Array, "B T"], mesh: Mesh | None = None):
    """Any tree of arrays of slots [B, K, M, ...] with new ones [B, K, T, ...]; -1 is no slot."""
    shards = shards_of(mesh)

    def on_shard(layers, new, slot):
        mine = slot % shards == (lax.axis_index(AXIS) if shards > 1 else 0)
        # Out of bounds, and no index twice: these are dropped.
        beyond = jax.tree.leaves(layers)[0].shape[2] + jnp.arange(slot.shape[1])
        at = jnp.where((slot >= 0) & mine, slot // shards, beyond)
        return jax.tree.map(functools.partial(put, at=at), layers, new)

    if shards == 1:
        return on_shard(layers, new, slot)
    sharded, whole = specs(layers), PartitionSpec()
    return jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(sharded, whole, whole),
        out_specs=sharded,
        check_vma=False,
    )(layers, new, slot)


def put(
    x: Shaped[Array, "B K M ..."], new: Shaped[Array, "B K T ..."], at: Int[Array, "B T"]
) -> Shaped[Array, "B K M ..."]:
    """x with `new` at the indices `at`, none of them twice; those out of bounds are dropped."""

    def row(x, new, at):
        return x.at[:, at].set(new, mode="drop", unique_indices=True)

    return jax.vmap(row)(x, new, at)


def grow(memory: Memory, limit: int, mesh: Mesh | None = None) -> Memory:
    """The same memory with room for `limit` tokens a row; not for a ring that has gone around.

    Layer by layer: for a moment one layer is held twice. `memory` is used up.
    """
    more = slots_for(limit, mesh) - memory.slots
    limit = jnp.full_like(memory.limit, limit)
    if more <= 0:
        return memory._replace(limit=limit)

    def widened(layer):
        wide = _widened(layer, more // shards_of(mesh), mesh)
        jax.tree.map(lambda x: x.delete(), layer)
        return wide

    return Memory(tuple(widened(layer) for layer in memory.layers), memory.appended, limit)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _widened(layer: LayerMemory, more: int, mesh: Mesh | None) -> LayerMemory:
    """With so many more slots on every shard."""
    shards = shards_of(mesh)

    def pad(x):
        by_shard = x.reshape(*x.shape[:2], shards, -1, *x.shape[3:])
        widths = [(0, 0)] * 3 + [(0, more)] + [(0, 0)] * (x.ndim - 3)
        wide = jnp.pad(by_shard, widths).reshape(*x.shape[:2], -1, *x.shape[3:])
        return wide if mesh is None else lax.with_sharding_constraint(wide, _shardings(mesh)[1])

    return jax.tree.map(pad, layer)


def empty_on_host(shape: Sequence[int], dtype) -> np.ndarray:
    """An array to fill that programs of the CPU backend use where it is, at a multiple of 64 bytes.

    Others are copied whenever they are passed to one; most of np.empty's are.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)
