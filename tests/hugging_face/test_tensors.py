"""Files of tensors, read and written, against safetensors, torch and transformers."""

import json
import os
import shutil
import sys

import llamas
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fot_jax.errors import UserError
from fot_jax.hugging_face import config as configs
from fot_jax.hugging_face import tensors

pytestmark = pytest.mark.torch


def reader(directory):
    return tensors.Reader(directory, configs.read(directory))


def parameters(directory):
    """All of ours, in float32, and their type."""
    content = reader(directory)
    found = {}
    for each in tensors.of_model(content.config):
        x = content.read(each.path, each.layer)
        shape, dtype = content.arrays[each.path]
        assert (x.dtype, x.shape) == (dtype, shape if each.layer is None else shape[1:])
        found[each.name] = x.T if each.transposed else x
    return found


def expected(model):
    return {
        name: x.detach().numpy()
        for name, x in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }


def assert_same(found, wanted):
    assert sorted(found) == sorted(wanted)
    for name, x in wanted.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), x)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("files", ["one", "several", "pickle", "pickles", "old pickle"])
def test_every_kind_of_file(tmp_path, files, dtype):
    shards = "20KB" if files == "several" else "5GB"
    model = llamas.save(tmp_path, dtype=getattr(torch, dtype), shards=shards)
    if "pickle" in files:
        state = {k: x.to(getattr(torch, dtype)) for k, x in model.state_dict().items()}
        (tmp_path / "model.safetensors").unlink()
        old = {"_use_new_zipfile_serialization": files != "old pickle"}
        if files == "pickles":
            names = sorted(state)
            where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
            for file in set(where.values()):
                torch.save({n: state[n] for n in names if where[n] == file}, tmp_path / file)
            index = {"weight_map": where}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            torch.save(state, tmp_path / "pytorch_model.bin", **old)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 or files != "several"
    found = parameters(tmp_path)
    assert_same(found, expected(model))
    assert {x.dtype.name for x in found.values()} == {dtype}


def test_a_head_that_is_tied_and_saved_all_the_same_and_angles_are_passed_over(tmp_path):
    model = llamas.save(tmp_path, tie_word_embeddings=True)
    content = llamas.load(tmp_path / "model.safetensors")
    content["lm_head.weight"] = content["model.embed_tokens.weight"]
    content["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(content, tmp_path / "model.safetensors")
    assert_same(parameters(tmp_path), expected(model))


def test_layers_of_different_types_are_read_as_float32(tmp_path):
    model = llamas.save(tmp_path)
    content = llamas.load(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    content[name] = content[name].astype(ml_dtypes.bfloat16)
    save_file(content, tmp_path / "model.safetensors")
    wanted = expected(model)
    wanted[name] = content[name].astype(np.float32)
    found = parameters(tmp_path)
    assert_same(found, wanted)
    assert found[name].dtype == np.float32


@pytest.mark.parametrize("size", [10**9, 20_000, 1])
def test_what_is_written_is_read_by_safetensors(tmp_path, monkeypatch, size):
    monkeypatch.setattr(tensors, "SHARD", size)
    source, output = tmp_path / "a", tmp_path / "b"
    llamas.save(source, dtype=torch.bfloat16, num_key_value_heads=2)
    output.mkdir()
    content, counted = reader(source), []
    tensors.write(
        output, content.config, lambda path: content.arrays[path][1], content.read, counted.append
    )
    assert llamas.contents(output) == llamas.contents(source)
    files = sorted(path.name for path in output.iterdir())
    total = sum(len(x[2]) for x in llamas.contents(source).values())
    assert sum(counted) == total
    if size == 10**9:
        assert files == ["model.safetensors"]
        return
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    for name, file in index["weight_map"].items():
        assert name in llamas.load(output / file)
    largest = max(len(x[2]) for x in llamas.contents(source).values())
    count = len(files) - 1
    assert files[0] == f"model-00001-of-{count:05d}.safetensors" and count > 1
    for file in files[:-1]:
        bytes_of = sum(x.nbytes for x in llamas.load(output / file).values())
        assert bytes_of <= max(size, largest)


# --- What is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    llamas.save(directory, shards="20KB")
    return directory


@pytest.fixture
def copy(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "copy")
    return tmp_path / "copy"


def refused(directory):
    with pytest.raises(UserError) as error:
        reader(directory)
    return str(error.value)


def test_a_missing_shard(copy):
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    assert refused(copy) == (
        f"{shard}: missing, though model.safetensors.index.json names it: get it again"
    )


@pytest.mark.parametrize("how", ["nowhere", "elsewhere"])
def test_an_index_that_names_a_tensor_where_there_is_none(copy, how):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    name = "model.norm.weight" if how == "elsewhere" else "model.other.weight"
    file = next(file for file in files if file != index["weight_map"].get(name))
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))
    assert refused(copy).startswith(f"{copy / file}: has no tensor {name}, though the index says")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(copy, text):
    (copy / "model.safetensors.index.json").write_text(text)
    assert "damaged: it has no weight_map" in refused(copy)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", ""])
def test_an_index_that_leads_elsewhere(copy, file):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))
    assert "outside the directory" in refused(copy)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_damaged_shard(copy, cut):
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:cut])
    assert refused(copy).startswith(f"{shard}: damaged (")


def test_no_weights(copy):
    for file in copy.glob("model*"):
        file.unlink()
    assert refused(copy).startswith(
        f"{copy}: no model.safetensors (or index, or pytorch_model.bin)"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 4}, "has no tensor model.layers.3.input_layernorm.weight"),
        (
            {"num_hidden_layers": 2},
            "self_attn.q_proj.weight is no tensor of a LLaMA: the model is of another",
        ),
        (
            {"intermediate_size": 50},
            "model.layers.0.mlp.gate_proj.weight is [48, 32], but [50, 32] by config.json: mend",
        ),
        ({"vocab_size": 62}, "model.embed_tokens.weight is [61, 32], but [62, 32] by config.json"),
        ({"num_key_value_heads": 2}, "k_proj.weight is [32, 32], but [8, 32] by config.json"),
    ],
)
def test_files_that_contradict_config_json(copy, fields, message):
    llamas.edit(copy, **fields)
    assert message in refused(copy)


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_types_that_are_no_weights(tmp_path, dtype):
    llamas.save(tmp_path)
    content = llamas.load(tmp_path / "model.safetensors")
    content["model.norm.weight"] = content["model.norm.weight"].astype(dtype)
    save_file(content, tmp_path / "model.safetensors")
    kind = {np.int8: "I8", np.float64: "F64"}[dtype]
    assert f"model.norm.weight is of type {kind}: have F32, F16, BF16" in refused(tmp_path)


def pickled(tmp_path, content):
    llamas.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")


def test_a_pickle_where_there_is_no_torch(tmp_path, monkeypatch):
    pickled(tmp_path, {})
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refused(tmp_path) == (
        f"{tmp_path / 'pytorch_model.bin'}: a pickle, which is read by torch alone: install it "
        "(pip install 'fot_jax[torch]'), or give safetensors"
    )


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.norm.weight": Trap()}, "damaged, or holds more than tensors: get it again"),
        ([torch.ones(2)], "holds a list, not named tensors"),
        ({"model.norm.weight": torch.ones(2, dtype=torch.int8)}, "is torch.int8: have float32"),
        ({"model.norm.weight": 3}, "is no tensor: have float32"),
    ],
)
def test_a_pickle_of_other_things(tmp_path, content, message):
    pickled(tmp_path, content)
    assert message in refused(tmp_path)


def test_a_damaged_pickle(tmp_path):
    pickled(tmp_path, {"model.norm.weight": torch.ones(2)})
    path = tmp_path / "pytorch_model.bin"
    for cut in (0, 10, 200):
        path.write_bytes(path.read_bytes()[: cut or None][:-1] if cut else b"")
        assert refused(tmp_path).startswith(f"{path}: damaged, or holds more than tensors")


def test_a_pickle_of_parameters(tmp_path):
    model = llamas.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {name: torch.nn.Parameter(x) for name, x in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(parameters(tmp_path), expected(model))


def test_a_pipe_in_the_place_of_a_file(tmp_path):
    llamas.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert refused(tmp_path).startswith(f"{tmp_path}: no model.safetensors (or index")
