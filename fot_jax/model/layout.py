"""Mesh axes, and over which of them each dimension of a parameter is sharded: one table."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

ROW_AXES = ("replica", "data", "fsdp")  # mesh axes that rows are sharded over
HEAD_AXIS = "tensor"  # mesh axis that heads are sharded over
GATHERED_AXIS = "fsdp"  # mesh axis that parameters are gathered over when they are used
AXES = (*ROW_AXES, HEAD_AXIS)

# Mesh axes of each parameter's dimensions, by the last names of its path. What is not listed
# (norms, temperatures) is small and lives on every device.
PARAMETERS: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embedding",): ("tensor", "fsdp"),
    ("head",): ("fsdp", "tensor"),
    ("attention", "query"): (None, "fsdp", "tensor"),
    ("attention", "key"): (None, "fsdp", "tensor"),
    ("attention", "value"): (None, "fsdp", "tensor"),
    ("attention", "out"): (None, "tensor", "fsdp"),
    ("mlp", "gate"): (None, "fsdp", "tensor"),
    ("mlp", "up"): (None, "fsdp", "tensor"),
    ("mlp", "down"): (None, "tensor", "fsdp"),
}

# Of an adapter's two matrices the outer axes are those of its kernel.
PARAMETERS |= {
    ("lora", kernel, matrix): (None, axis, None) if matrix == "a" else (None, None, axis)
    for (_, *kernels), (_, *axes) in tuple(PARAMETERS.items())
    for kernel in kernels
    for matrix, axis in zip("ab", axes, strict=True)
}

# The same for what lanes have cached in training (cached_context.py).
CACHED = {
    ("cached", "k"): (None, ROW_AXES, None, "tensor", None),
    ("cached", "v"): (None, ROW_AXES, None, "tensor", None),
    ("cached", "segments"): (ROW_AXES, None),
}


def platform(mesh: Mesh | AbstractMesh | None) -> str:
    """Where what is on this mesh runs, or is compiled for: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


class KernelSharding(NamedTuple):
    """How a layer's kernel is sharded where it is stored, and where it is multiplied with."""

    stored: NamedSharding
    gathered: NamedSharding


def kernel_shardings(mesh: Mesh | AbstractMesh | None) -> dict[str, KernelSharding]:
    """Of every kernel of a layer, by its own name ("query", and "query/a" of its adapter).

    {} where there is no mesh.
    """
    if mesh is None:
        return {}
    found = {}
    for (_, *name), (_, *axes) in PARAMETERS.items():
        if name:  # of a layer: without the axis that layers are stacked on
            gathered = [None if axis == GATHERED_AXIS else axis for axis in axes]
            found["/".join(name)] = KernelSharding(
                stored=NamedSharding(mesh, PartitionSpec(*axes)),
                gathered=NamedSharding(mesh, PartitionSpec(*gathered)),
            )
    return found
