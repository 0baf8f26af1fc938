"""Lists of the rows that meet, as the kernels for TPUs and GPUs walk them: by query, and by key.

Letters: R rows, N key rows, P entries of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax.model.attention.partial_softmax import NOTHING, SAME_DOCUMENT


class Lists(NamedTuple):
    """Which rows meet, by query row and again by key row. Filled up with NOTHING."""

    k_row: jax.Array  # [R, P] int32
    k_sees: jax.Array  # [R, P] int32: NOTHING, SAME_DOCUMENT or ANY_DOCUMENT
    q_row: jax.Array  # [N, P'] int32
    q_sees: jax.Array  # [N, P'] int32


def lay_out(
    pairs: Sequence[Sequence[tuple[int, int, int]]], rows: int, keys: int, slots: int = 0
) -> Lists:
    """Lists of (query row, key row, sees) triples, with a leading device axis, filled up alike.

    Args:
      pairs: of each device.
      rows, keys: query rows and key rows of a device.
      slots: of engines that compute in steps; kernels have none.
    """
    del slots

    def table(mine: int, other: int, count: int):
        found = [[[] for _ in range(count)] for _ in pairs]
        for device, of_device in enumerate(pairs):
            for pair in of_device:
                found[device][pair[mine]].append((pair[other], pair[2]))
        longest = max(1, max(len(each) for device in found for each in device))
        filled = np.zeros((len(pairs), count, longest, 2), np.int32)
        filled[..., 1] = NOTHING
        for device, lists in enumerate(found):
            for row, each in enumerate(lists):
                # What fills up names the same block again: nothing is fetched for it.
                filled[device, row, :, 0] = each[-1][0] if each else 0
                filled[device, row, : len(each)] = np.reshape(each, (-1, 2))
        return filled[..., 0], filled[..., 1]

    return Lists(*table(0, 1, rows), *table(1, 0, keys))


def local_pairs(rows: int, slots: int = 0) -> Lists:
    """Each query row meets the key row of the same number, as far as it is the same document."""
    del slots
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    sees = jnp.full((rows, 1), SAME_DOCUMENT, jnp.int32)
    return Lists(row, sees, row, sees)
