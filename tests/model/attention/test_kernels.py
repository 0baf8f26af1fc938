"""Attention by the kernels for TPUs and GPUs, interpreted here, against brute force in float64."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossbatch_checks import check, mesh_of, ours, random_inputs
from jax.experimental import pallas as pl
from oracles.crossbatch import brute_force, visibility

from fot_jax.model import crossbatch
from fot_jax.model.attention import gpu, tpu
from fot_jax.model.attention.engine import engine_of
from fot_jax.model.schemes import NoCrossbatch, Packed, PackedTable, PreviousContext


@pytest.fixture(params=[tpu, gpu], ids=["tpu", "gpu"])
def interpreted(request, monkeypatch):
    """Plans choose kernels whatever the device, which then are interpreted."""

    def with_tile(tile: int):
        monkeypatch.setattr(crossbatch, "engine_of", lambda mesh, window: request.param)
        monkeypatch.setattr(crossbatch.partial_softmax, "tile_of", lambda length: min(tile, length))
        monkeypatch.setattr(gpu, "BLOCK", 2)
        interpreted = functools.partial(pl.pallas_call, interpret=True)
        monkeypatch.setattr(request.param.pl, "pallas_call", interpreted)
        return request.param

    return with_tile


OF_BOTH = [
    (PreviousContext(d=3, w=2), 4, 4, 8, 4, 4, 2),  # two tiles a row, grouped queries
    (PreviousContext(d=2), 4, 2, 6, 6, 4, 1),  # two crossbatch groups
    (PackedTable(((0, 0), (1, 2), (2, 5), (3, 4))), 3, 3, 4, 2, 2, 2),
]


@pytest.mark.parametrize(
    "interpreted, scheme, lanes, group_lanes, window, tile, heads, kv_heads",
    [
        *((kernels, *each) for kernels in (tpu, gpu) for each in OF_BOTH),
        (tpu, NoCrossbatch(), 2, 2, 8, 4, 2, 2),
        (gpu, Packed(pack=3, range=7), 3, 3, 8, 4, 2, 1),
    ],
    indirect=["interpreted"],
)
def test_forward_and_gradients(
    interpreted, scheme, lanes, group_lanes, window, tile, heads, kv_heads
):
    interpreted(tile)
    check(scheme, lanes, group_lanes, window, heads, kv_heads, 4, seed=window)


@pytest.mark.parametrize(
    "interpreted, scheme",
    [(tpu, PreviousContext(d=5)), (gpu, Packed(pack=4, range=9))],
    indirect=["interpreted"],
)
def test_around_a_ring_of_devices(interpreted, scheme):
    interpreted(2)
    check(scheme, 8, 8, 4, 4, 2, 4, seed=1, mesh=mesh_of(1, 2, 2, 2))


def test_bfloat16(interpreted):
    """To the precision of its products, which is what the blocks of XLA have too."""
    kernels = interpreted(8)
    scheme = PreviousContext(d=2)
    inputs = random_inputs(3, 8, 16, 2, 2, 8)
    plan = crossbatch.make_plan(scheme, 8, heads=2, window=16)
    assert plan.engine is kernels
    half = [x.astype(jnp.bfloat16) for x in inputs[:5]]
    out, grads = ours(plan, *half, inputs[5])
    want, want_grads, _ = brute_force(*half, visibility(scheme, 8, 8, inputs[5]))
    for got, wanted in zip((out, *grads), (want, *want_grads), strict=True):
        error = np.abs(np.asarray(got, np.float64) - wanted)
        assert error.max() < 0.03 * np.abs(wanted).max()


def test_positive_mass(interpreted):
    scheme, inputs = PreviousContext(d=4, w=2), random_inputs(5, 12, 8, 4, 2, 4)
    q, _, k_context, v, _, segments = inputs

    def mass():
        plan = crossbatch.make_plan(scheme, 12, heads=4, window=8)
        return crossbatch.positive_mass(q, k_context, v, segments, plan), plan.engine

    blocks, engine = mass()
    kernels = interpreted(4)
    got, kernel_engine = mass()
    assert (engine, kernel_engine) == (crossbatch.partial_softmax, kernels)
    np.testing.assert_allclose(got, blocks, rtol=1e-5)


@pytest.mark.parametrize(
    "window, kv_heads, dim, dtype",
    [(256, 8, 64, jnp.bfloat16), (96, 2, 100, jnp.bfloat16), (1024, 4, 128, jnp.float32)],
)
def test_compiles_for_gpus(monkeypatch, window, kv_heads, dim, dtype):
    """As far as a machine without one can: to what Triton's compiler is given."""
    monkeypatch.setattr(crossbatch, "engine_of", lambda mesh, window: gpu)
    plan = crossbatch.make_plan(PreviousContext(d=2), 4, heads=8, window=window)

    def gradients(q, k, v, segments):
        def f(q, k, v):
            return crossbatch.attention(q, k, v, segments, plan, k)

        out, vjp = jax.vjp(f, q, k, v)
        return vjp(out)

    q, k = (jax.ShapeDtypeStruct((4, window, heads, dim), dtype) for heads in (8, kv_heads))
    segments = jax.ShapeDtypeStruct((4, window), jnp.int32)
    lowered = jax.jit(gradients).trace(q, k, k, segments).lower(lowering_platforms=("cuda",))
    # Local and context attention: forward, gradients of queries, gradients of keys and values.
    assert lowered.as_text().count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 6


def test_devices_that_have_kernels(monkeypatch):
    def engine(platform, kind, window=256, **of_device):
        device = types.SimpleNamespace(platform=platform, device_kind=kind, **of_device)
        monkeypatch.setattr(jax, "devices", lambda: [device])
        return engine_of(None, window).__name__.split(".")[-1]

    assert engine("tpu", "TPU v3") == engine("cpu", "cpu") == "partial_softmax"
    assert engine("tpu", "TPU v5 lite") == "tpu"
    assert {engine("tpu", "TPU v5 lite", window) for window in range(128, 4097, 128)} == {"tpu"}
    assert engine("tpu", "TPU v5 lite", 200) == "partial_softmax"
    assert engine("gpu", "NVIDIA H100", compute_capability="9.0") == "gpu"
    assert engine("gpu", "NVIDIA B200", 48, compute_capability="10.0") == "gpu"
    assert engine("gpu", "NVIDIA H100", 72, compute_capability="9.0") == "partial_softmax"
    assert engine("gpu", "Tesla V100", compute_capability="7.0") == "partial_softmax"
    assert engine("gpu", "AMD Instinct", compute_capability="gfx942") == "partial_softmax"
