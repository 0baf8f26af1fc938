"""Which code attends on which devices: XLA's programs, or kernels of ours for TPUs and GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh, Mesh

from fot_jax.model.attention import gpu, partial_softmax, tpu

Pair = tuple[int, int, int]  # query row, key row, what the queries see of the keys


@runtime_checkable
class Engine(Protocol):
    """What crossbatch needs of a way to attend; each of these modules is one.

    Letters: R query rows, N key rows, K key/value heads, G query heads of each, D head dim.
    """

    def lay_out(self, pairs: Sequence[Sequence[Pair]], rows: int, keys: int, slots: int) -> Any:
        """Lists of the pairs of each device, with a leading device axis, all of one shape.

        Args:
          pairs: of each device.
          rows, keys: query rows and key rows of a device.
          slots: pairs worth computing in one step, where there are steps.
        """

    def local_pairs(self, rows: int, slots: int) -> Any:
        """A list, without a device axis, in which each row meets itself."""

    def no_parts(self, q: partial_softmax.AnyArray, tile: int) -> Any:
        """Nothing attended to yet, for queries [R * tiles, K, G * tile, D]."""

    def attend(self, q, k, v, q_segments, k_segments, pairs, parts, causal: bool) -> Any:
        """Merges the attention of a list of pairs into `parts`: as partial_softmax.attend."""

    def attend_backward(
        self, q, k, v, q_segments, k_segments, pairs, lse, d_out, delta, grads, causal: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Adds the gradients of a list of pairs: as partial_softmax.attend_backward."""


def engine_of(mesh: Mesh | AbstractMesh | None, window: int) -> Engine:
    """Kernels where the devices have them, for windows of tiles that fill their registers.

    Args:
      mesh: None: the first device.
      window: tokens of a row.
    """
    if isinstance(mesh, AbstractMesh):
        return partial_softmax
    device = (jax.devices() if mesh is None else mesh.devices.flat)[0]
    tile = partial_softmax.tile_of(window)
    if device.platform == "tpu" and device.device_kind not in ("TPU v2", "TPU v3"):
        return tpu if tile % 128 == 0 else partial_softmax
    major = str(getattr(device, "compute_capability", "")).split(".")[0]  # AMD's are words
    ampere_or_later = device.platform == "gpu" and major.isdigit() and int(major) >= 8
    if ampere_or_later and tile % gpu.SMALLEST_BLOCK == 0:
        return gpu
    return partial_softmax
