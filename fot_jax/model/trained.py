"""Training a part of the parameters: which, and how they are taken out and put back.

Parameters of all layers are stacked on a leading axis, so that a part may have some layers of an
array. The others have no gradient and no optimizer state.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fot_jax.common.errors import UserError
from fot_jax.common.trees import leaves_by_path, tree_of_leaves
from fot_jax.model import lora
from fot_jax.model.config import ModelConfig

_STACKED = "layers/"
_SCALE = f"layers/{lora.NAME}/scale"  # a constant


@dataclasses.dataclass(frozen=True)
class Trained:
    """The part of the parameters that training changes.

    Attributes:
      parameters: (path, layers) in order; layers is None for what is not stacked by layer.
    """

    parameters: tuple[tuple[str, tuple[int, ...] | None], ...]

    def take(self, params: Any) -> dict[str, Any]:
        """The part: a tree like the parameters', its stacked arrays having its layers alone."""
        leaves = leaves_by_path(params)
        return tree_of_leaves(
            {path: _taken(leaves[path], layers) for path, layers in self.parameters}
        )

    def put(self, params: Any, part: Any) -> dict[str, Any]:
        """The parameters with the part in its place."""
        leaves, new = leaves_by_path(params), leaves_by_path(part)
        for path, layers in self.parameters:
            whole = layers is None or len(layers) == len(leaves[path])
            leaves[path] = new[path] if whole else leaves[path].at[_at(layers)].set(new[path])
        return tree_of_leaves(leaves)

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Layers start … stop - 1 in stretches, within each of which the same parameters train."""
        sets = [set(layers) for _, layers in self.parameters if layers is not None]
        for layer in range(start + 1, stop):
            if any((layer in each) != (layer - 1 in each) for each in sets):
                yield start, layer
                start = layer
        yield start, stop

    def stack(self, layers: Any, part: Any, start: int, stop: int) -> dict[str, Any]:
        """Stacked parameters of a stretch of layers: of the part those that train.

        Args:
          layers: parameters of all layers, stacked.
          part: the part's, stacked.
        """
        leaves, new = leaves_by_path(layers), leaves_by_path(part)
        found = {path: leaf[start:stop] for path, leaf in leaves.items()}
        for path, of_part in self.parameters:
            if of_part is not None and start in of_part:
                first, path = of_part.index(start), path.removeprefix(_STACKED)
                found[path] = new[path][first : first + stop - start]
        return tree_of_leaves(found)

    def matrices(self, params: Any) -> list[int]:
        """Elements of each layer's matrices that train."""
        leaves = leaves_by_path(params)
        counts = [0] * len(params["layers"]["attention"]["query"])
        for path, layers in self.parameters:
            for layer in layers or ():
                if leaves[path].ndim == 3:
                    counts[layer] += math.prod(leaves[path].shape[1:])
        return counts


def _taken(leaf: Any, layers: tuple[int, ...] | None) -> Any:
    return leaf if layers is None or len(layers) == len(leaf) else leaf[_at(layers)]


def _at(layers: tuple[int, ...]) -> np.ndarray:
    return np.asarray(layers, np.int32)


def select(params: Any, c: ModelConfig, patterns: Sequence[str]) -> Trained:
    """The part that patterns name, and all adapters.

    Args:
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      patterns: of names such as "embedding" or "layers/8/attention/query", with * for any text; a
        memory layer's parameters are also "memory_layers/8/attention/query".

    Raises:
      UserError: a pattern that no parameter has, or nothing that trains.
    """
    names: dict[str, list[tuple[str, int | None]]] = {}
    for path, leaf in leaves_by_path(params).items():
        if path.startswith(_STACKED):
            rest = path.removeprefix(_STACKED)
            for layer in range(len(leaf)):
                names[f"layers/{layer}/{rest}"] = [(path, layer)]
                if layer in c.memory_layers:
                    names[f"memory_layers/{layer}/{rest}"] = [(path, layer)]
        else:
            names[path] = [(path, None)]
    chosen: set[tuple[str, int | None]] = set()
    for pattern in (*patterns, *([f"layers/*/{lora.NAME}/*/*"] if lora.split(params)[1] else [])):
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise UserError(
                f"train.trainable has {pattern!r}, which no parameter is named: names are such as "
                f"{', '.join(_examples(names))}, with * for any text"
            )
        chosen.update(place for name in matching for place in names[name])
    layers: dict[str, list[int] | None] = {}
    for path, layer in sorted(chosen, key=lambda place: (place[0], place[1] or 0)):
        if layer is None:
            layers[path] = None
        elif path != _SCALE:
            layers.setdefault(path, []).append(layer)
    if not layers:
        raise UserError("train.trainable = (): nothing trains: name parameters, or set train.lora")
    return Trained(tuple((p, x if x is None else tuple(x)) for p, x in layers.items()))


def _examples(names: Mapping[str, Any]) -> list[str]:
    """A name of each kind: of no layer, of the first, of a memory layer."""
    wanted = ("embedding", "layers/0/attention/query", "memory_layers/")
    found = (next((n for n in names if n.startswith(start)), None) for start in wanted)
    return [name for name in found if name is not None]
