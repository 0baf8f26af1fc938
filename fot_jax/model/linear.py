"""Products with a layer's kernels, with or without an adapter, rows of the embedding, and the
gradients of both.

The gradients are written out for two reasons. Autodiff's own ask XLA's CPU backend for a transposed
copy of the wider activation, which took a fifth of a training step. And over a mesh what is kept
for the backward pass has to be the kernel as it is sharded, and what leaves it a gradient that is
sharded alike: left alone, XLA may reduce activations over all devices instead.

Letters: R rows, T tokens of a row, E width of a kernel's input, F of its output, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from fot_jax.model import layout
from fot_jax.model.attention.partial_softmax import AnyArray
from fot_jax.model.layout import (
    GATHERED_AXIS,
    HEAD_AXIS,
    PARAMETERS,
    ROW_AXES,
    KernelSharding,
)
from fot_jax.model.rope import times


def linear(
    x: Float[Array, "R T E"], kernel: Float[Array, "E F"], sharding: KernelSharding | None = None
) -> Float[Array, "R T F"]:
    """x @ kernel in x's dtype; over a mesh, the kernel is gathered for it in that type."""
    return checkpoint_name(_linear(sharding, x, kernel), "product")


def adapted_linear(
    x: Float[Array, "R T E"],
    kernel: Float[Array, "E F"],
    a: Float[Array, "E rank"],
    b: Float[Array, "rank F"],
    scale: Float[Array, ""],
    shardings: tuple[KernelSharding | None, ...] = (None, None, None),
) -> Float[Array, "R T F"]:
    """x @ (kernel + scale * a @ b) in x's dtype; `shardings` are those of kernel, a and b."""
    return checkpoint_name(_adapted(shardings, x, kernel, a, b, scale), "product")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(sharding, x, kernel):
    return _product(sharding, x, _gathered(sharding, x, kernel))


def _linear_forward(sharding, x, kernel):
    return _linear(sharding, x, kernel), (x, kernel)


def _linear_backward(sharding, saved, dy):
    x, kernel = saved
    dx = _product(sharding, dy, _gathered(sharding, x, kernel).T)
    return dx, _stored(sharding, _outer(x, dy), kernel)


_linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted(shardings, x, kernel, a, b, scale):
    kernel, a, b = (_gathered(s, x, p) for s, p in zip(shardings, (kernel, a, b), strict=True))
    if _adds_first(x):
        return x @ (kernel + times(a @ b, scale))
    return (_in_float32(x, kernel) + _in_float32(times(x @ a, scale), b)).astype(x.dtype)


def _adapted_forward(shardings, x, kernel, a, b, scale):
    return _adapted(shardings, x, kernel, a, b, scale), (x, kernel, a, b, scale)


def _adapted_backward(shardings, saved, dy):
    x, *stored, scale = saved
    kernel, a, b = (_gathered(s, x, p) for s, p in zip(shardings, stored, strict=True))
    d_inner = times(dy @ b.T, scale)
    if _adds_first(x):
        dx = dy @ (kernel + times(a @ b, scale)).T
    else:
        dx = (_in_float32(dy, kernel.T) + _in_float32(d_inner, a.T)).astype(x.dtype)
    of_product = _outer(x @ a, dy)
    # The kernel's own is left out by the compiler where the kernel does not train.
    gradients = _outer(x, dy), _outer(x, d_inner), times(of_product, scale)
    return (
        dx,
        *(_stored(*each) for each in zip(shardings, gradients, stored, strict=True)),
        (of_product * b).sum().astype(scale.dtype),
    )


_adapted.defvjp(_adapted_forward, _adapted_backward)


def _adds_first(x: Array) -> bool:
    """Whether an adapter is added to its kernel, and one product is left.

    That spares two products and as many passes over activations. In bfloat16 an adapter that is
    small yet would be rounded away: there the two products are added, before they are rounded.
    """
    return jnp.finfo(x.dtype).bits >= 32


def _product(sharding: KernelSharding | None, x: Array, y: Array) -> Array:
    """x @ y in x's dtype."""
    mesh = None if sharding is None else sharding.gathered.mesh
    if x.dtype == jnp.bfloat16 and layout.platform(mesh) == "cpu":
        # XLA's CPU backend multiplies bfloat16 as such only into float32. Elsewhere that would have
        # devices exchange partial sums in float32.
        return _in_float32(x, y).astype(x.dtype)
    return x @ y


def _in_float32(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _outer(x: Float[Array, "R T E"], y: Float[Array, "R T F"]) -> Float[Array, "E F"]:
    """Sum over tokens. The left one is transposed for it, so that is the narrower of the two."""
    if x.shape[-1] <= y.shape[-1]:
        return jnp.einsum("rte,rtf->ef", x, y)
    return jnp.einsum("rtf,rte->fe", y, x).T


def _gathered(sharding: KernelSharding | None, x: Array, kernel: Array) -> Array:
    kernel = kernel.astype(x.dtype)
    return kernel if sharding is None else lax.with_sharding_constraint(kernel, sharding.gathered)


def _stored(sharding: KernelSharding | None, gradient: Array, kernel: Array) -> Array:
    if sharding is not None:
        gradient = lax.with_sharding_constraint(gradient, sharding.stored)
    return gradient.astype(kernel.dtype)


# --- Rows of the embedding -----------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def embedded(
    mesh: Mesh | AbstractMesh | None,
    dtype: Any,
    embedding: Float[Array, "V E"],
    tokens: Int[AnyArray, "R T"],
) -> Float[Array, "R T E"]:
    """The embedding's rows of tokens, in `dtype`.

    Gradients are summed in the embedding's own type. In bfloat16 a sum stops at 256 equal terms,
    and a batch may have a token thousands of times.
    """
    return embedding.astype(dtype)[tokens]


def _embedded_forward(mesh, dtype, embedding, tokens):
    return embedded(mesh, dtype, embedding, tokens), (embedding, tokens)


def _embedded_backward(mesh, dtype, saved, dx):
    embedding, tokens = saved
    if mesh is None:
        return jnp.zeros_like(embedding).at[tokens].add(dx.astype(embedding.dtype)), None
    stored = PartitionSpec(*PARAMETERS["embedding",])

    def of_part(part, tokens, dx):
        # Of all rows that devices gather parameters over, the part's columns alone are sent.
        dx = lax.all_to_all(dx, GATHERED_AXIS, 2, 0, tiled=True).astype(part.dtype)
        tokens = lax.all_gather(tokens, GATHERED_AXIS, tiled=True)
        at = tokens - lax.axis_index(HEAD_AXIS) * len(part)
        at = jnp.where(at < 0, len(part), at)  # negative ones would count from the end
        gradient = jnp.zeros_like(part).at[at].add(dx, mode="drop")
        return lax.psum(gradient, [axis for axis in ROW_AXES if axis != GATHERED_AXIS])

    rows = PartitionSpec(ROW_AXES)
    of_parts = jax.shard_map(
        of_part, mesh=mesh, in_specs=(stored, rows, rows), out_specs=stored, check_vma=False
    )
    return of_parts(embedding, tokens, dx), None


embedded.defvjp(_embedded_forward, _embedded_backward)
