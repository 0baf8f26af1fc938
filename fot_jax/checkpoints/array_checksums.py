"""Checksums of arrays, alike for arrays on one device, sharded over many, or read in slices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def array_checksums(arrays: Iterable[jax.Array]) -> list[int]:
    """A checksum of 32 bits for each array, of its elements' bits and places, on any sharding."""
    arrays = list(arrays)
    result = [0] * len(arrays)
    places: dict[Any, list[int]] = {}  # one program for all arrays on the same devices
    for i, array in enumerate(arrays):
        sharding = array.sharding
        if [device.platform for device in sharding.device_set] == ["cpu"]:
            # XLA's CPU backend would hold all words of the sum in memory.
            result[i] = slice_checksum(np.asarray(array), 0)
            continue
        whole = None
        if isinstance(sharding, NamedSharding):
            whole = NamedSharding(sharding.mesh, PartitionSpec())
        places.setdefault((frozenset(sharding.device_set), whole), []).append(i)
    for (_, whole), indices in places.items():
        sums = jax.jit(_checksum_program, out_shardings=whole)([arrays[i] for i in indices])
        for i, checksum in zip(indices, np.asarray(sums), strict=True):
            result[i] = int(checksum)
    return result


def _checksum_program(arrays: list[jax.Array]) -> jax.Array:
    def of(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
        bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
        place = jnp.uint32(0)
        for axis, size in enumerate(bits.shape):
            along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * jnp.uint32(size % 2**32) + along
        # An odd factor for each place: any change of a single element changes the sum.
        return (bits * (place * jnp.uint32(2) + jnp.uint32(1))).sum(dtype=jnp.uint32)

    return jnp.stack([of(x) for x in arrays])


def slice_checksum(x: np.ndarray, first: int) -> int:
    """The share of a slice in the checksum of its array: shares add up modulo 2**32.

    Args:
      x: elements that follow one another in the array, in C order.
      first: number of elements before them.
    """
    bits = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * min(x.dtype.itemsize, 4)}")
    total = 0
    for start in range(0, bits.size, 2**20):
        some = bits[start : start + 2**20].astype(np.uint32)
        at = np.uint32((first + start) % 2**32)
        places = np.arange(some.size, dtype=np.uint32) + at
        total += int((some * (places * np.uint32(2) + np.uint32(1))).sum(dtype=np.uint32))
    return total % 2**32
