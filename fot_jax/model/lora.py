"""Low-rank adapters of a layer's kernels (LoRA, arXiv 2106.09685).

A kernel [E, F] becomes kernel + scale * a @ b with a [E, rank], b [rank, F] and scale = alpha /
rank, where only a and b train. They stand in params["layers"]["lora"], stacked by layer like all of
a layer's parameters, with `scale` beside them, so that parameters say by themselves how they merge.
`b` starts at 0: a fresh adapter changes nothing.

(Libraries such as qwix intercept Flax's own Dense modules, of which this model has none.)

Letters: L layers, E width of a kernel's input, F of its output.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range

KERNELS = {
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "out": "attention",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}  # of a layer, and the part of it where each one stands
NAME = "lora"  # of the adapters among a layer's parameters
BLOCK = 2**18  # elements of a kernel that are merged at a time: caches hold them


@configurable
@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters that train in place of the kernels.

    Attributes:
      rank: of a @ b.
      alpha: the product counts alpha / rank times.
      kernels: which of a layer's have adapters; those that the model does not have are left out.
    """

    rank: int = 16
    alpha: float = 32.0
    kernels: tuple[str, ...] = tuple(KERNELS)

    def __post_init__(self):
        check_range("Lora", 1, 2**20, rank=self.rank)
        check_range("Lora", 1e-6, 1e6, alpha=self.alpha)
        if unknown := [name for name in self.kernels if name not in KERNELS]:
            raise UserError(f"Lora.kernels has {unknown[0]!r}: choose from {', '.join(KERNELS)}")
        if not self.kernels:
            raise UserError("Lora.kernels = (): give one or more")

    def init(self, key: jax.Array, layers: Any) -> dict[str, Any]:
        """Adapters for the stacked parameters of all layers, float32: of each kernel a and b.

        Raises:
          UserError: the model has none of the kernels.
        """
        adapters = {"scale": jnp.full(len(layers["attention"]["query"]), self.alpha / self.rank)}
        for i, name in enumerate(KERNELS):
            kernel = layers[KERNELS[name]].get(name)
            if name in self.kernels and kernel is not None:
                L, E, F = kernel.shape
                a = jax.random.normal(jax.random.fold_in(key, i), (L, E, self.rank)) * E**-0.5
                adapters[name] = {"a": a, "b": jnp.zeros((L, self.rank, F))}
        if len(adapters) == 1:
            raise UserError(f"Lora.kernels = {self.kernels}: the model has none of these")
        return adapters


def of(params: Mapping[str, Any]) -> Lora | None:
    """What the adapters among stacked parameters are of, but for alpha, which is in their scale."""
    _, adapters = split(params)
    kernels = tuple(name for name in KERNELS if name in adapters)
    return Lora(adapters[kernels[0]]["a"].shape[-1], kernels=kernels) if kernels else None


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters without their adapters, and the adapters; {} where there are none."""
    layers = dict(params.get("layers", {}))
    adapters = layers.pop(NAME, {})
    return {**params, "layers": layers} if adapters else dict(params), adapters


def joined(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    return {**params, "layers": {**params["layers"], **({NAME: adapters} if adapters else {})}}


def added(
    kernel: Float[Any, "L E F"],
    a: Float[Any, "L E rank"],
    b: Float[Any, "L rank F"],
    scale: Float[Any, " L"],
) -> Float[Any, "L E F"]:
    """The kernels of all layers with their adapters in them, in the kernels' type."""
    return (kernel + scale[:, None, None] * (a @ b)).astype(kernel.dtype)


def merged(params: Mapping[str, Any], add: Callable[..., Any] = added) -> dict[str, Any]:
    """Parameters whose kernels hold what the adapters add: those of a model without any.

    Args:
      add: as `added`.
    """
    params, adapters = split(params)
    layers = dict(params["layers"])
    for name, part in KERNELS.items():
        if name in adapters:
            kernel = layers[part][name]
            kernel = add(kernel, adapters[name]["a"], adapters[name]["b"], adapters["scale"])
            layers[part] = {**layers[part], name: kernel}
    return {**params, "layers": layers}


def added_on_host(
    kernel: Float[np.ndarray, "*L E F"],
    a: Float[np.ndarray, "*L E rank"],
    b: Float[np.ndarray, "*L rank F"],
    scale: Float[np.ndarray, "*L"],
) -> Float[np.ndarray, "*L E F"]:
    """As `added`, the same to the last bit on every machine and for every part of a kernel.

    Saved memories know parameters by their bits, which are those of sums and products of float32
    alone: in a product of matrices the last bit depends on the library, the machine and the shape.
    """
    kernel = np.asarray(kernel)
    a, b, scale = (np.asarray(x, np.float32) for x in (a, b, scale))
    *L, E, F = kernel.shape
    out, rows = np.empty(kernel.shape, kernel.dtype), max(1, BLOCK // F)

    def merge(block: tuple[tuple[int, ...], int]) -> None:
        layer, start = block
        here = (*layer, slice(start, start + rows))
        total = np.zeros(kernel[here].shape, np.float32)
        product = np.empty_like(total)
        for column, row in zip(a[here].T, b[layer], strict=True):
            total += np.multiply(column[:, None], row, out=product)
        out[here] = kernel[here] + scale[layer] * total

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # NumPy computes side by side
        for _ in threads.map(merge, itertools.product(np.ndindex(*L), range(0, E, rows))):
            pass
    return out
