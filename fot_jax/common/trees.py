"""Trees of arrays, and their leaves by path."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as "layers/mlp/down"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def tree_of_leaves(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of leaves by path, the inverse of `leaves_by_path` for such trees."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *outer, last = path.split("/")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), outer, tree)
        node[last] = leaf
    return tree
