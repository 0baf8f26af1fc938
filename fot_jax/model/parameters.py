"""Parameters as training has them, stacked, and as inference does, a tree for each layer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def parameters_by_layer(params, dtype=jnp.float32, use_up: bool = False):
    """Parameters of training, stacked, as inference wants them: a tuple with a tree per layer.

    (Slices of stacked parameters would be copied for every token.)

    Args:
      dtype: of matrices; vectors are float32.
      use_up: delete each array of `params` once it is split, so that none is held twice.
    """

    def split(x):
        layers = _split(x, dtype)
        if use_up:
            jax.block_until_ready(layers)
            x.delete()
        return layers

    stacked, tree = jax.tree.flatten(params["layers"])
    layers = zip(*(split(x) for x in stacked), strict=True)
    rest = {name: x for name, x in params.items() if name != "layers"}
    rest = jax.tree.map(lambda x: _cast(x, dtype), rest)
    return {**rest, "layers": tuple(jax.tree.unflatten(tree, layer) for layer in layers)}


def _cast(x, dtype):
    return jnp.asarray(x, dtype if x.ndim > 1 else jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def _split(stacked, dtype):
    return tuple(_cast(layer, dtype) for layer in stacked)
