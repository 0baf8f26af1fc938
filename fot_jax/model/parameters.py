"""Initial parameters; and parameters as training has them, stacked, and as inference does, a tree
for each layer.

Letters: L layers, E model dim, F mlp dim, D head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax.model.config import ModelConfig
from fot_jax.model.lora import NAME, Lora

# --- Initial parameters --------------------------------------------------------------------------


def init_kernel(key, shape, scale: float = 1.0):
    """Normal with standard deviation scale / sqrt(fan in), fan in being the axis before last."""
    return jax.random.normal(key, shape, jnp.float32) * (scale * shape[-2] ** -0.5)


def init_norm(key, c: ModelConfig, layers: tuple[int, ...] = ()):
    """A norm that changes nothing: [*layers, E] of ones, and zeros where there is a bias."""
    del key
    scale = jnp.ones((*layers, c.hidden_size), jnp.float32)
    return (
        {"scale": scale, "bias": jnp.zeros_like(scale)}
        if c.norm == "layernorm"
        else {"scale": scale}
    )


def init_layers(key, c: ModelConfig, lora: Lora | None = None):
    """Parameters of all layers, stacked on a leading axis, float32."""
    key_of_adapters = key
    L, E, F, D = c.num_layers, c.hidden_size, c.mlp_dim, c.head_dim
    keys = iter(jax.random.split(key, 7))
    # Layers that write into the residual stream start smaller, so that its size does not grow
    # with depth.
    into_residual = (2 * L) ** -0.5
    attention = {
        "query": init_kernel(next(keys), (L, E, c.num_heads * D)),
        "key": init_kernel(next(keys), (L, E, c.num_kv_heads * D)),
        "value": init_kernel(next(keys), (L, E, c.num_kv_heads * D)),
        "out": init_kernel(next(keys), (L, c.num_heads * D, E), into_residual),
    }
    if c.memory_gate:
        attention["memory_gate"] = jnp.zeros((L, c.num_heads), jnp.float32)
    if c.qk_norm:
        attention["log_scale"] = jnp.full((L, c.num_heads), np.log(10.0), jnp.float32)
    mlp = {
        "up": init_kernel(next(keys), (L, E, F)),
        "down": init_kernel(next(keys), (L, F, E), into_residual),
    }
    if c.mlp == "swiglu":
        mlp["gate"] = init_kernel(next(keys), (L, E, F))
    layers = {
        "attention_norm": init_norm(None, c, (L,)),
        "attention": attention,
        "mlp_norm": init_norm(None, c, (L,)),
        "mlp": mlp,
    }
    if lora is not None:
        layers[NAME] = lora.init(key_of_adapters, layers)
    return layers


# --- Layer by layer ------------------------------------------------------------------------------


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
