"""Optimizers (paper §5).

Optimizers keep their state in float32 whatever the parameters' type. Layers are stacked on axis 0
under params["layers"], and an optimizer treats them exactly as it would treat separate layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range

_LEAST = 1e-30  # where 0 would divide by 0, or leave no gradient
_LARGEST_DECAY = 0.999999  # of averages, which never change with 1


@configurable
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    clip_norm: float | None = 1.0,
    temperature_rate: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW after clipping by the norm of the whole gradient.

    Decay, times the learning rate, applies to matrices (kernels and embeddings) alone: never to
    norm scales, biases or attention temperatures. The learning rate of these temperatures (of
    models with qk_norm) is `temperature_rate` times that of the rest.
    """
    check_range("adamw", 0, weight_decay=weight_decay, temperature_rate=temperature_rate)
    check_range("adamw", _LEAST, eps=eps, clip_norm=clip_norm)
    check_range("adamw", 0, _LARGEST_DECAY, b1=b1, b2=b2)
    update = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=matrices)
    if temperature_rate != 1.0:
        update = optax.chain(update, optax.masked(optax.scale(temperature_rate), _temperatures))
    return _in_float32(_clipped(update, clip_norm))


@configurable
def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | None = 0.9,
    decay_rate: float = 0.8,
    clipping_threshold: float = 1.0,
    min_dim_size_to_factor: int = 128,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adafactor with updates relative to each parameter's own size, as the paper's small models.

    Second moments of matrices are factored into rows and columns where both dimensions reach
    `min_dim_size_to_factor`; 1 - n^-decay_rate is their decay at update n; each update is clipped
    to a root mean square of `clipping_threshold`, scaled by the learning rate and the parameter's
    root mean square (at least 1e-3), and averaged with decay b1. All of this is per layer.
    `clip_norm` bounds the norm of the whole gradient; the paper names none.
    """
    check_range("adafactor", _LEAST, clipping_threshold=clipping_threshold, clip_norm=clip_norm)
    check_range("adafactor", 1, min_dim_size_to_factor=min_dim_size_to_factor)
    check_range("adafactor", 0, 1, decay_rate=decay_rate)
    check_range("adafactor", 0, _LARGEST_DECAY, b1=b1)
    update = optax.adafactor(
        learning_rate,
        min_dim_size_to_factor=min_dim_size_to_factor,
        decay_rate=decay_rate,
        clipping_threshold=clipping_threshold,
        momentum=b1,
    )
    return _in_float32(_clipped(_per_layer(update), clip_norm))


def matrices(params: Any) -> Any:
    """Which parameters are matrices within their layer: a tree of booleans."""

    def is_matrix(path, leaf):
        stacked = getattr(path[0], "key", None) == "layers"
        return leaf.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _temperatures(params: Any) -> Any:
    """Which parameters are attention temperatures: a tree of booleans."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "log_scale", params)


def _clipped(update, clip_norm):
    return (
        update if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), update)
    )


def _per_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation applied to every layer of params["layers"] on its own."""

    def split(tree):
        layers = tree.get("layers", {})
        if len({len(leaf) for leaf in jax.tree.leaves(layers)}) > 1:
            raise UserError(
                "adafactor trains the same layers of every stacked parameter: change "
                "train.trainable, or take adamw"
            )
        return layers, {name: leaf for name, leaf in tree.items() if name != "layers"}

    def by_layer(function, layers, *more):
        return jax.vmap(function)(layers, *more) if layers else function(layers, *more)

    def init(params):
        layers, others = split(params)
        return {"layers": by_layer(transform.init, layers), "others": transform.init(others)}

    def update(updates, state, params):
        (u_layers, u_others), (p_layers, p_others) = split(updates), split(params)
        u_layers, s_layers = by_layer(transform.update, u_layers, state["layers"], p_layers)
        u_others, s_others = transform.update(u_others, state["others"], p_others)
        together = {**({"layers": u_layers} if u_layers else {}), **u_others}
        return together, {"layers": s_layers, "others": s_others}

    return optax.GradientTransformation(init, update)


def _in_float32(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation computed on float32 copies; the updates come back in float32 too."""

    def cast(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates, state, params):
        return transform.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(lambda params: transform.init(cast(params)), update)
