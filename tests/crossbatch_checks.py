"""Crossbatch as tests ask it: on random inputs, beside the oracle."""

import jax
import numpy as np
from jax.sharding import Mesh
from oracles.crossbatch import brute_force, visibility

from fot_jax.model import crossbatch, layout


def mesh_of(*sizes):
    """A mesh of the eight devices."""
    return Mesh(np.asarray(jax.devices()[:8]).reshape(sizes), layout.AXES)


def random_inputs(seed, rows, window, heads, kv_heads, dim, documents=3, padding=True):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q, d_out = normal(rows, window, heads, dim), normal(rows, window, heads, dim)
    k, k_context, v = (normal(rows, window, kv_heads, dim) for _ in range(3))
    # Documents in runs along a row, as a lane gives them; some rows start with padding.
    segments = np.sort(rng.integers(0 if padding else 1, documents + 1, (rows, window)), axis=1)
    return q, k, k_context, v, d_out, segments.astype(np.int32)


def ours(plan, q, k, k_context, v, d_out, segments):
    @jax.jit
    def run(q, k, k_context, v, d_out, segments):
        def f(q, k, k_context, v):
            return crossbatch.attention(q, k, v, segments, plan, k_context)

        out, vjp = jax.vjp(f, q, k, k_context, v)
        return out, vjp(d_out)

    return jax.tree.map(np.asarray, run(q, k, k_context, v, d_out, segments))


def check(scheme, lanes, group_lanes, window, heads, kv_heads, dim, seed, mesh=None):
    rows, group = lanes * scheme.windows, group_lanes * scheme.windows
    inputs = random_inputs(seed, rows, window, heads, kv_heads, dim)
    plan = crossbatch.make_plan(
        scheme, rows, group_rows=group, mesh=mesh, heads=heads, window=window
    )
    out, grads = ours(plan, *inputs)
    expected, expected_grads, _ = brute_force(
        *inputs[:5], visibility(scheme, rows, group, inputs[5])
    )
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=1e-5)
    for name, got, want in zip(("q", "k", "k_context", "v"), grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5, err_msg=f"gradient of {name}")
