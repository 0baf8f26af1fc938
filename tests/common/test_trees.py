"""Leaves by path, and back."""

from fot_jax.common.trees import leaves_by_path, tree_of_leaves


def test_leaves_by_path():
    tree = {"layers": {"mlp": {"down": 1, "up": 2}}, "norm": 3}
    leaves = {"layers/mlp/down": 1, "layers/mlp/up": 2, "norm": 3}
    assert leaves_by_path(tree) == leaves
    assert tree_of_leaves(leaves) == tree
    assert leaves_by_path(({"a": 1}, [2, 3])) == {"0/a": 1, "1/0": 2, "1/1": 3}
