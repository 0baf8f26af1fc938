"""Checkpoints written and read slice by slice, against those of manager.py."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny import tiny

from fot_jax.checkpoints import stream
from fot_jax.checkpoints.array_checksums import array_checksums, slice_checksum
from fot_jax.checkpoints.manager import Checkpointer
from fot_jax.checkpoints.restore import restore_model, restore_params
from fot_jax.common.errors import UserError
from fot_jax.common.trees import leaves_by_path, tree_of_leaves
from fot_jax.model import lora

CONFIG = tiny()


def parameters(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "embedding": (61, 32),
        "final_norm/scale": (32,),
        "layers/attention/query": (3, 32, 32),
        "layers/mlp_norm/scale": (3, 32),
        "layers/mlp/up": (3, 32, 48),
    }
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def streams(values, seen=lambda name, index: None):
    def of(name, x):
        def read(index):
            seen(name, index)
            return x if index is None else x[index]

        return stream.StreamedArray(x.shape, x.dtype, name.startswith("layers/"), read)

    return {name: of(name, x) for name, x in values.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_streamed_is_read_like_any_checkpoint(tmp_path, dtype):
    values, seen = parameters(dtype), []
    stream.save(tmp_path / "run", CONFIG, streams(values, lambda *of: seen.append(of)))
    assert len(seen) == len(set(seen)) == 2 + 3 * 3  # each slice once
    config, params = restore_model(tmp_path / "run")
    assert config == CONFIG
    for name, x in leaves_by_path(params).items():
        assert x.dtype == dtype
        np.testing.assert_array_equal(np.asarray(x), values[name])
    assert sorted(leaves_by_path(params)) == sorted(values)


def saved(directory, values):
    """The same, saved by a run, with an optimizer's state."""
    params = tree_of_leaves({name: jnp.asarray(x) for name, x in values.items()})
    store = Checkpointer(directory / "checkpoints")
    meta = {"model": dataclasses.asdict(CONFIG)}
    store.save(4, params, {"mu": params}, {}, meta)
    store.close()


def test_no_run_goes_on_from_what_is_converted(tmp_path):
    """It has no state of an optimizer; its parameters are for another run to begin with."""
    values = parameters()
    stream.save(tmp_path / "run", CONFIG, streams(values))
    params = tree_of_leaves(
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in values.items()}
    )
    with pytest.raises(UserError) as error:
        Checkpointer(tmp_path / "run" / "checkpoints").restore_latest(params, {"mu": params})
    assert str(error.value) == (
        f"{tmp_path}/run: a converted model, no run: set train.initialize_from = '{tmp_path}/run', "
        "and choose another workdir"
    )


@pytest.mark.parametrize("how", ["streamed", "saved"])
def test_slices_are_read_back(tmp_path, how):
    values = parameters()
    if how == "streamed":
        stream.save(tmp_path, CONFIG, streams(values))
    else:
        saved(tmp_path, values)
    content = stream.Reader(tmp_path)
    assert content.config == CONFIG and content.directory == tmp_path
    assert content.arrays == {name: (x.shape, x.dtype) for name, x in values.items()}
    for name in ("layers/mlp/up", "embedding", "layers/attention/query", "final_norm/scale"):
        if not name.startswith("layers/"):
            np.testing.assert_array_equal(content.read(name), values[name])
        for layer in (2, 0, 1) if name.startswith("layers/") else ():
            np.testing.assert_array_equal(content.read(name, layer), values[name][layer])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_adapters_are_merged_to_the_same_bits(tmp_path, monkeypatch, dtype):
    """By slices, in whole kernels, or on a mesh: or a memory would be one of another model."""
    monkeypatch.setattr(lora, "BLOCK", 1_000)
    rng = np.random.default_rng(1)
    shapes = {"query/a": (32, 16), "query/b": (16, 32), "up/a": (32, 16), "up/b": (16, 48)}
    adapters = {f"layers/lora/{name}": rng.normal(size=(3, *x)) for name, x in shapes.items()}
    adapters["layers/lora/scale"] = np.array([0.3, 0.7, 1.1])
    values = parameters(dtype)
    saved(tmp_path, values | {name: x.astype(np.float32) for name, x in adapters.items()})
    mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (2, 4)), ("x", "y"))
    axes = {"layers/attention/query": (None, None, "y"), "layers/mlp/up": (None, "y", "x")}
    shards = {}
    for name, x in values.items():
        spec = jax.sharding.PartitionSpec(*axes.get(name, ()))
        sharding = jax.sharding.NamedSharding(mesh, spec)
        shards[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    content = stream.Reader(tmp_path)
    for params in (None, tree_of_leaves(shards)):
        found = leaves_by_path(restore_params(tmp_path, params).params)
        assert sorted(found) == sorted(content.arrays) == sorted(values)
        for name in axes:
            assert params is None or found[name].sharding == shards[name].sharding
            for layer, x in enumerate(np.asarray(found[name])):
                np.testing.assert_array_equal(content.read(name, layer), x)
    for kernel in axes:
        a, b = (adapters[f"layers/lora/{kernel.split('/')[-1]}/{x}"] for x in "ab")
        want = values[kernel] + adapters["layers/lora/scale"][:, None, None] * (a @ b)
        got = content.read(kernel)
        assert got.dtype == dtype
        error = ml_dtypes.finfo(dtype).eps
        np.testing.assert_allclose(np.float64(got), want, rtol=error, atol=1e-5)


@pytest.mark.parametrize("how", ["streamed", "saved"])
def test_damage_is_noticed(tmp_path, how):
    """Whichever byte of the parameters is changed or lost, a read of everything fails."""
    values = parameters()
    if how == "streamed":
        stream.save(tmp_path, CONFIG, streams(values))
    else:
        saved(tmp_path, values)
    folder = tmp_path / "checkpoints" / ("0" if how == "streamed" else "4")
    files = [path for path in sorted((folder / "params").rglob("*")) if path.is_file()]
    rng = np.random.default_rng(0)
    noticed = 0

    def read_all():
        content = stream.Reader(tmp_path)
        found = {
            (name, layer): content.read(name, layer)
            for name, (shape, _) in content.arrays.items()
            for layer in (range(shape[0]) if name.startswith("layers/") else (None,))
        }
        for (name, layer), x in found.items():
            np.testing.assert_array_equal(x, values[name] if layer is None else values[name][layer])

    read_all()
    for file in [*files, folder / "meta" / "metadata"]:
        whole = file.read_bytes()
        at = int(rng.integers(len(whole)))
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]):
            file.write_bytes(damaged)
            try:
                read_all()  # of no use to this reader, that byte, or
            except UserError as error:
                assert "is damaged: restore the checkpoint from a copy" in str(error)  # noqa: PT017
                noticed += 1
        file.write_bytes(whole)
    assert noticed > len(files) / 2
    read_all()


@given(
    arrays.arrays(
        st.sampled_from([np.float32, np.float16, np.int8, np.uint32]),
        arrays.array_shapes(min_dims=2, max_dims=3, max_side=9),
    )
)
@settings(deadline=None, max_examples=50)
def test_checksums_of_slices_add_up(x):
    parts = [slice_checksum(part, i * part.size) for i, part in enumerate(x)]
    assert sum(parts) % 2**32 == array_checksums([jax.device_put(x)])[0]


def test_checksum_of_a_large_slice():
    """Of which each of eight devices has a part."""
    x = np.random.default_rng(0).normal(size=(3, 1_500_000)).astype(np.float32)
    mesh = jax.sharding.Mesh(jax.devices(), "all")
    parts = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "all"))
    assert slice_checksum(x, 0) == array_checksums([jax.device_put(x, parts)])[0]


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoint here"):
        stream.Reader(tmp_path)
