"""Mesh, and the sharding of every array, from one table."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError
from fot_jax.model.layout import AXES, CACHED, PARAMETERS, ROW_AXES


def divide_cpu(count: int) -> None:
    """Makes `count` devices of a CPU, each with one thread, before JAX has devices.

    Changes nothing where there are devices already, or where the environment says how many.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    said = "JAX_NUM_CPU_DEVICES" in os.environ or "force_host_platform_device_count" in flags
    if count == 1 or said:
        return
    with contextlib.suppress(RuntimeError):  # there are devices
        jax.config.update("jax_num_cpu_devices", count)
        # Else the devices would share all threads, and wait for each other at every product.
        os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen=false {flags}"


@configurable
@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis.

    Rows are sharded over replica, data and fsdp; parameters over fsdp and tensor, so that what
    crosses replica and data in a step is gradients alone (and keys and values, where crossbatch
    groups span them).

    Attributes:
      data: -1 takes all devices that the other axes leave.
      replica: a multiple of the number of TPU slices, each of which holds whole replicas.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    replica: int = 1

    def __post_init__(self):
        for axis in AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or size < 1 and (axis, size) != ("data", -1):
                rest = " (-1: all that the other axes leave)" if axis == "data" else ""
                raise UserError(f"MeshShape.{axis} = {size!r}: give 1 or more devices{rest}")

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over the given devices (default: all).

        Those of a process are next to each other, those of a slice even more so.

        Raises:
          UserError: the axes do not multiply to the number of devices, or a replica would span
            slices.
        """
        devices = jax.devices() if devices is None else devices
        devices = sorted(devices, key=lambda device: (_slice_of(device), device.process_index))
        sizes = self.sizes(len(devices), slices=len(set(map(_slice_of, devices))))
        return Mesh(np.asarray(devices).reshape(sizes), AXES)

    def make_abstract(self) -> AbstractMesh:
        """A mesh without devices, to trace with: any number of them when `data` is given.

        Raises:
          UserError: `data` is -1 and the other axes do not divide the number of devices here.
        """
        if self.data == -1:
            return AbstractMesh(self.sizes(jax.device_count()), AXES)
        return AbstractMesh((self.replica, self.data, self.fsdp, self.tensor), AXES)

    def sizes(self, devices: int, slices: int = 1) -> tuple[int, int, int, int]:
        """Of the axes, over so many devices in so many TPU slices.

        Raises:
          UserError: they do not multiply to the devices, or a replica would span slices.
        """
        if self.replica % slices:
            raise UserError(
                f"MeshShape.replica = {self.replica} is not a multiple of the {slices} TPU slices: "
                "parameters would be gathered over the network between them"
            )
        rest = self.replica * self.fsdp * self.tensor
        data = devices // rest if self.data == -1 else self.data
        if data * rest != devices:
            raise UserError(
                f"mesh replica={self.replica} x data={self.data} x fsdp={self.fsdp} x "
                f"tensor={self.tensor} does not use {devices} devices exactly: change "
                "the MeshShape values"
            )
        return self.replica, data, self.fsdp, self.tensor


def _slice_of(device: jax.Device) -> int:
    """The TPU slice of a device; what is no TPU is in one."""
    of_tpu = device.platform == "tpu"
    return (getattr(device, "slice_index", None) or 0) if of_tpu else 0


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Sharding of every leaf of a tree of arrays or shapes: parameters, or all of a TrainState.

    An optimizer's state holds trees shaped like the parameters: a leaf is sharded like the
    parameter its path ends with, if it has that parameter's number of dimensions.

    Raises:
      UserError: a dimension does not divide over its mesh axis.
    """

    def of_leaf(path, leaf):
        names = tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
        for end, axes in (PARAMETERS | CACHED).items():
            if names[-len(end) :] == end and leaf.ndim == len(axes):
                for size, axis in zip(leaf.shape, axes, strict=True):
                    if isinstance(axis, str) and size % mesh.shape[axis]:
                        raise UserError(
                            f"{'/'.join(names)} {tuple(leaf.shape)}: {size} does not divide over "
                            f"mesh axis {axis} of {mesh.shape[axis]}: change the MeshShape"
                        )
                return NamedSharding(mesh, PartitionSpec(*axes))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def rows(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of a batch: rows over replica, data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def owned_rows(mesh: Mesh, count: int, process: int | None = None) -> range:
    """Which of the `count` rows of a batch a process holds (default: this one).

    Processes that share a tensor axis hold the same rows.

    Raises:
      UserError: rows do not divide over the mesh.
    """
    shards = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    if count % shards:
        raise UserError(
            f"{count} rows of a batch do not divide over {shards} devices (mesh axes "
            f"{' x '.join(ROW_AXES)}): change Data.lanes or the MeshShape"
        )
    process = jax.process_index() if process is None else process
    held = sorted(
        {
            index.indices(count)[:2]
            for device, (index,) in rows(mesh).devices_indices_map((count,)).items()
            if device.process_index == process
        }
    )
    if any(stop != start for (_, stop), (start, _) in itertools.pairwise(held)):
        raise ValueError(f"rows of process {process} lie apart: make the mesh with MeshShape.make")
    return range(held[0][0], held[-1][1])


def groups_of(rows: range, of_group: int) -> tuple[range, slice]:
    """The lane groups that a process reads for its rows, and which of their rows these are.

    A group whose rows lie on several processes is read by each of them.
    """
    groups = range(rows.start // of_group, -(-rows.stop // of_group))
    first = groups.start * of_group
    return groups, slice(rows.start - first, rows.stop - first)
