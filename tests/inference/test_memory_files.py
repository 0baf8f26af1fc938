"""Memories on disk: identical after a turn through files; damage and mistakes are noticed."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import runs
from readers import config_of, model_of, random_text
from tiny import random_params

from fot_jax.common.checksums import seal
from fot_jax.common.errors import UserError
from fot_jax.inference import memory_files
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig
from fot_jax.model.lookup import TopK
from fot_jax.model.transformer import Transformer


def over(lm, devices):
    """The same model on several devices."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), ("memory",))
    return dataclasses.replace(lm, mesh=mesh)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "name, dtype, config",
    [
        ("llama", "bfloat16", MemoryConfig()),
        ("paper", "float32", MemoryConfig(storage="float16", shared=True)),
        ("paper", "float32", MemoryConfig(100, storage="int8")),  # a ring that has gone around
        ("llama", "bfloat16", MemoryConfig(0)),
    ],
    ids=str,
)
def test_a_loaded_memory_gives_identical_logits(tmp_path, name, dtype, config):
    model = Transformer(config_of(name), dtype=dtype)
    lm = LanguageModel.of(model, random_params(config_of(name)))
    text, more = random_text(2, 320), random_text(2, 192, seed=1)
    state = lm.read(text, memory=config, last_context_length=20)
    lm.save_memory(state, tmp_path / "a")
    loaded = lm.load_memory(tmp_path / "a")
    assert loaded.config == config
    lm.save_memory(loaded, tmp_path / "b")
    assert runs.files(tmp_path / "a") == runs.files(tmp_path / "b")
    want = lm.logits(more, state=state)
    np.testing.assert_array_equal(lm.logits(more, state=loaded), want)


def test_of_one_device_onto_eight_and_back(tmp_path, monkeypatch):
    """In several chunks of each file; what each device holds is its own."""
    monkeypatch.setattr(memory_files, "CHUNK", 2**12)
    lm, more = model_of("llama"), random_text(2, 50, seed=1)
    state = lm.read(random_text(2, 1000))
    lm.save_memory(state, tmp_path / "one")
    assert len(runs.files(tmp_path / "one")) > 30
    eight = over(lm, 8)
    sharded = eight.load_memory(tmp_path / "one", TopK(20))
    assert sharded.config.lookup == TopK(20)
    eight.save_memory(sharded, tmp_path / "eight")
    back = lm.load_memory(tmp_path / "eight")
    n = int(state.memory.appended[0])
    for a, b in zip(state.memory.layers, back.memory.layers, strict=True):
        assert_same(a.k.x[:, :, :n], b.k.x[:, :, :n])
        assert_same(a.v.x[:, :, :n], b.v.x[:, :, :n])
    # Read on there.
    sharded = eight.load_memory(tmp_path / "one")
    got = eight.logits(more, state=sharded)
    np.testing.assert_allclose(got, lm.logits(more, state=state), atol=1e-5)
    eight.save_memory(sharded, tmp_path / "on")
    on = lm.load_memory(tmp_path / "on")
    n = int(state.memory.appended[0])
    assert on.memory.appended.tolist() == [n, n]
    for a, b in zip(state.memory.layers, on.memory.layers, strict=True):
        np.testing.assert_allclose(a.k.x[:, :, :n], b.k.x[:, :, :n], atol=1e-5)


@pytest.mark.parametrize(
    "storage, rows", [("float32", 3), ("bfloat16", 1), ("int8", 3), ("int4", 1)]
)
def test_arrays_are_read_as_they_were_cut(tmp_path, monkeypatch, storage, rows):
    """Those of scales, and of a window's marks, have fewer bytes a token than those of keys."""
    monkeypatch.setattr(memory_files, "CHUNK", 2**12)
    lm = model_of("llama")
    mask = np.arange(620) >= 37 * np.arange(rows)[:, None]
    memory = MemoryConfig(storage=storage)
    state = lm.read(random_text(rows, 620), mask=mask, memory=memory)
    lm.save_memory(state, tmp_path / "m")
    more = random_text(rows, 50, seed=1)
    want = lm.logits(more, state=state)
    for read_with in (2**10, 2**12, 2**24):
        monkeypatch.setattr(memory_files, "CHUNK", read_with)
        loaded = lm.load_memory(tmp_path / "m")
        np.testing.assert_array_equal(lm.logits(more, state=loaded), want)


def test_of_a_short_text_that_was_written_on(tmp_path):
    """Nothing has left the window, though there was room for it."""
    lm = model_of("llama")
    state = lm.read([1, 2, 3])
    lm.generate([4], 70, temperature=0, state=state.copy())
    next(lm.stream([[4]], 70, state=state, when_read=lambda s: lm.save_memory(s, tmp_path / "m")))
    loaded = lm.load_memory(tmp_path / "m")
    assert loaded.places.tolist() == [4] and loaded.memory.slots == 0
    more = random_text(1, 192)
    want = lm.logits(more, state=lm.read([4], state=lm.read([1, 2, 3])))
    np.testing.assert_allclose(lm.logits(more, state=loaded), want, atol=1e-6)


# --- Mistakes ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    lm = model_of("llama")
    lm.save_memory(lm.read(random_text(1, 300)), tmp_path / "memory")
    return lm, tmp_path / "memory"


def test_of_another_model(saved):
    lm, path = saved
    other = dataclasses.replace(lm, config=dataclasses.replace(lm.config, rope_theta=5.0))
    message = f"{path}: the memory of another model, with rope_theta = 10000.0 and not 5.0: load"
    with pytest.raises(UserError, match=message):
        other.load_memory(path)
    params = jax.tree.map(lambda x: x + 1e-6, lm.params)
    with pytest.raises(UserError, match="with other parameters, of another run or step: load"):
        LanguageModel(lm.config, params).load_memory(path)
    params = jax.tree.map(lambda x: x.astype("bfloat16"), lm.params)
    with pytest.raises(UserError, match="was computed in float32, not in bfloat16: load the model"):
        LanguageModel(lm.config, params).load_memory(path)


@pytest.mark.parametrize(
    "setting", [{"last_context_length": 32}, {"memory_dtype": "int8"}], ids=str
)
def test_of_the_same_model_that_reads_otherwise(saved, setting):
    """No key or value depends on it: also of memories that were saved with it."""
    lm, path = saved
    other = dataclasses.replace(lm, config=dataclasses.replace(lm.config, **setting))
    assert_same(lm.load_memory(path).memory, other.load_memory(path).memory)
    state = lm.load_memory(path)
    other.save_memory(state, path)
    content = json.loads((path / "memory.json").read_text())["content"]
    content["fingerprint"]["model"] |= setting
    (path / "memory.json").write_text(json.dumps(seal(content)))
    for each in (lm, other):
        assert_same(state.memory, each.load_memory(path).memory)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no memory here: give a directory that"):
        model_of("llama").load_memory(tmp_path)


def test_damage_is_noticed(saved):
    """Any byte of any file changed, or any file missing."""
    lm, path = saved
    rng = np.random.default_rng(0)
    whole = path.parent / "whole"
    shutil.copytree(path, whole)
    want = lm.logits(random_text(1, 9), state=lm.load_memory(path))
    files = sorted(p for p in path.rglob("*") if p.is_file())
    assert len(files) > 10
    for file in files:
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 0x10
        file.write_bytes(content)
        try:
            state = lm.load_memory(path)
        except UserError as error:
            assert "damaged" in str(error) or "another" in str(error)
            assert "\n" not in str(error)
        else:  # a byte of a name or of white space in zarr's own description
            assert file.name == "zarr.json"
            np.testing.assert_array_equal(lm.logits(random_text(1, 9), state=state), want)
        file.write_bytes((whole / file.relative_to(path)).read_bytes())
    for a, b in (("memory_0_k_x", "memory_0_v_x"), ("window_0_0_k", "window_0_0_v")):
        for source, target in ((a, b), (b, a)):
            shutil.rmtree(path / target)
            shutil.copytree(whole / source, path / target)
        with pytest.raises(UserError, match="damaged .*is not what was written"):
            lm.load_memory(path)
        for each in (a, b):
            shutil.rmtree(path / each)
            shutil.copytree(whole / each, path / each)
    data = next(f for f in files if f.name != "zarr.json" and f.parent != path)
    data.unlink()
    with pytest.raises(UserError, match="damaged"):
        lm.load_memory(path)


def test_nothing_else_is_replaced(saved):
    lm, path = saved
    state = lm.read(random_text(1, 80))
    lm.save_memory(state, path)  # an older memory is
    assert json.loads((path / "memory.json").read_text())["content"]["appended"] == [16]
    link = path.parent / "link"
    link.symlink_to(path)
    lm.save_memory(lm.read(random_text(1, 90)), link)
    assert link.is_symlink() and lm.load_memory(path).memory.appended.tolist() == [26]
    link.unlink()
    other = path.parent / "thesis"
    other.mkdir()
    (other / "chapter").write_text("1")
    inside = path / "notes"
    for place in (other, other / "chapter", path):
        if place is path:
            inside.write_text("mine")
        with pytest.raises(UserError, match="not a memory, so it is not replaced: give a new name"):
            lm.save_memory(state, place)
    assert (other / "chapter").read_text() == "1" and inside.read_text() == "mine"
    (other / "memory.json").write_text((path / "memory.json").read_text())
    with pytest.raises(UserError, match="not a memory, so it is not replaced: give a new name"):
        lm.save_memory(state, other)
    with pytest.raises(UserError, match="cannot be written"):
        lm.save_memory(state, other / "chapter" / "memory")
    assert sorted(p.name for p in path.parent.iterdir()) == ["memory", "thesis"]
