"""Weights that are damaged, of other types, or of another model than config.json says."""

import json
import os
import shutil
import sys

import llamas
import numpy as np
import pytest
import torch
from read_tensors import assert_same, expected, parameters, refused
from safetensors.numpy import save_file

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    llamas.save(directory, shards="20KB")
    return directory


@pytest.fixture
def copy(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_missing_shard(copy):
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    assert refused(copy) == (
        f"{shard}: missing, though model.safetensors.index.json names it: get it again"
    )


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
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
            "model.layers.0.mlp.gate_proj.weight is [48, 32], but [50, 32] by config.json: correct",
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
    model = llamas.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    content = model.state_dict() | content if isinstance(content, dict) else content
    torch.save(content, tmp_path / "pytorch_model.bin")


def test_a_pickle_where_there_is_no_torch(tmp_path, monkeypatch):
    pickled(tmp_path, {})
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refused(tmp_path) == (
        f"{tmp_path / 'pytorch_model.bin'}: a pickle, which is read by torch alone: install it "
        "(pip install 'fot_jax[torch]'), or give safetensors"
    )


def test_a_pickle_where_torch_is_not_safe(tmp_path, monkeypatch):
    pickled(tmp_path, {})
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    message = refused(tmp_path)
    assert "a pickle, which torch 2.5.1+cpu does not read safely: install 2.6 or newer" in message


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.norm.weight": Trap()}, "damaged, or holds more than tensors: get it again"),
        ([torch.ones(2)], "holds a list, not named tensors"),
        (
            {"model.norm.weight": torch.ones(32, dtype=torch.int8)},
            "model.norm.weight is of type torch.int8: have F32, F16, BF16",
        ),
        ({"model.norm.weight": 3}, "is no tensor: save tensors alone"),
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
