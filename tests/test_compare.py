"""`fot convert check`: what it says of two checkpoints, and of their logits."""

import re
import shutil

import llamas
import numpy as np
import pytest
from safetensors.numpy import save_file

from fot_jax.cli import main

pytestmark = pytest.mark.torch


def fot(*argv):
    return main(["convert", *map(str, argv)])


def test_checking_the_same(two, capsys):
    fot("to-hf", "b", "c")
    assert fot("check", "b", "c") == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[2] == "agree: largest difference of tensors 0, tolerance none"
    assert lines[0] == "30 tensors compared, 30 the same"
    assert lines[1].startswith(
        "logits of 200 tokens in windows of 16, with memory: largest difference 0 (values up to"
    )


@pytest.mark.parametrize(("dtype", "window"), [("float32", None), ("bfloat16", 12)])
def test_checking_a_model_with_memory_and_what_it_came_from(two, capsys, dtype, window):
    more = [] if window is None else ["--local_context", window]
    fot("from-hf", "a", "c", "--memory_layers", "1", "--dtype", dtype, *more)
    for pair in (("a", "c"), ("c", "a")):
        capsys.readouterr()
        assert fot("check", *pair) == 1
        *lines, last = capsys.readouterr().out.splitlines()
        assert last.startswith("differ: memory_layers")
        lines = [line for line in lines if "largest" not in line]
        values = {"a": "()", "c": "(1,)"}
        first, second = pair
        assert lines[0] == (
            f"memory_layers: {values[first]} in {first}, {values[second]} in {second}"
        )
        assert lines[-1] == "the same model, but for memory_layers" + (
            ", local_context" if window else ""
        )


def test_checking_a_mistral_and_what_was_made_of_it_within_its_sliding_window(tmp_path, capsys):
    llamas.save(tmp_path / "a", "mistral", num_key_value_heads=2, sliding_window=8)
    assert fot("from-hf", tmp_path / "a", tmp_path / "b", "--local_context", 8) == 0
    capsys.readouterr()
    assert fot("check", tmp_path / "a", tmp_path / "b") == 1
    said, *_, logits, same, _ = capsys.readouterr().out.splitlines()
    assert said == f"local_context: 16 in {tmp_path / 'a'}, 8 in {tmp_path / 'b'}"
    assert "tokens in windows of 8, with memory: largest difference 0 (" in logits
    assert same == "the same model, but for local_context"


def apart(capsys):
    """The differences of logits that were printed last."""
    lines = capsys.readouterr().out.splitlines()
    found = {}
    for line in lines:
        if match := re.match("logits of .* of .*, (.*): largest difference ([^ ]+) ", line):
            found[match[1]] = float(match[2])
    return found


def test_what_the_logits_say_of_a_model_with_memory(two, capsys):
    fot("check", "a", "b")
    found = apart(capsys)
    assert found["without memory"] == 0 and found["each with its own memory"] > 0.1
    fot("from-hf", "a", "c", "--memory_layers", "1", "--dtype", "bfloat16")
    capsys.readouterr()
    fot("check", "a", "c")
    assert 0 < apart(capsys)["without memory"] < 0.1
    fot("from-hf", "a", "d", "--memory_layers", "2")
    llamas.edit(two / "a", rope_theta=7.0, rope_parameters=None)
    capsys.readouterr()
    fot("check", "a", "d")
    assert apart(capsys)["without memory"] > 0.1
    llamas.edit(two / "a", mem_layers=[2])
    fot("check", "a", "d")
    assert apart(capsys).keys() == {"with memory"}


def test_numbers_rounded_to_float32_are_the_same(two, capsys):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.1,
        "low_freq_factor": 1.1,
        "high_freq_factor": 4.1,
        "original_max_position_embeddings": 16,
    }
    exact = {"rms_norm_eps": 1e-5, "rope_theta": 10000.1, "rope_parameters": None}
    llamas.edit(two / "a", **exact, rope_scaling=scaling)
    shutil.copytree(two / "a", two / "c")
    rounded = {name: float(np.float32(x)) for name, x in scaling.items() if isinstance(x, float)}
    llamas.edit(
        two / "c",
        rms_norm_eps=9.99999975e-06,
        rope_theta=float(np.float32(10000.1)),
        rope_scaling=scaling | rounded,
    )
    capsys.readouterr()
    assert fot("check", "a", "c") == 0
    assert capsys.readouterr().out.startswith("30 tensors compared, 30 the same")
    for field, value in (("rms_norm_eps", 1.00001e-5), ("rope_scaling", scaling | {"factor": 8})):
        shutil.rmtree(two / "c")
        shutil.copytree(two / "a", two / "c")
        llamas.edit(two / "c", **{field: value})
        assert fot("check", "a", "c") == 1


@pytest.mark.parametrize(("dtype", "pair"), [("bfloat16", "bc"), ("float16", "cb")])
def test_checking_what_was_rounded(two, capsys, dtype, pair):
    fot("to-hf", "b", "c", "--dtype", dtype)
    capsys.readouterr()
    assert fot("check", *pair) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "30 tensors compared, 0 the same, 30 after rounding"
    size = re.match(r"largest difference: ([\d.e-]+) ", lines[1])[1]
    verdict = f"agree: largest difference of tensors {size}, tolerance rounding to {dtype}"
    assert lines[-1] == verdict
    llamas.edit(two / "c", rope_theta=7.0)
    assert fot("check", "b", "c") == 1
    assert "rope_theta: 10000.0 in b, 7.0 in c" in capsys.readouterr().out


@pytest.mark.parametrize(("one", "other"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_checking_what_was_rounded_from_one_half_to_the_other(two, capsys, one, other):
    """In either order; float16 has fewer exponents, bfloat16 fewer digits."""
    fot("to-hf", "b", "c", "--dtype", one)
    content = llamas.load(two / "c" / "model.safetensors")
    content["model.norm.weight"][3] = 3e-7
    save_file(content, two / "c" / "model.safetensors")
    fot("to-hf", "c", "d", "--dtype", other)
    for pair in ("cd", "dc"):
        capsys.readouterr()
        assert fot("check", *pair) == 0
        assert f", tolerance rounding to {other}" in capsys.readouterr().out


def test_checking_what_differs(two, capsys):
    fot("to-hf", "b", "c")
    path = two / "c" / "model.safetensors"
    content = llamas.load(path)
    content["model.layers.2.mlp.down_proj.weight"][5, 7] += 0.25
    content["model.norm.weight"][3] += 0.125
    save_file(content, path)
    capsys.readouterr()
    assert fot("check", "b", "c") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "30 tensors compared, 28 the same"
    assert lines[1].startswith("largest difference: 0.25 (values up to ")
    assert lines[1].endswith("in model.layers.2.mlp.down_proj.weight at [5, 7]")
    assert lines[-1] == "differ: largest difference of tensors 0.25, tolerance none"
    content["model.norm.weight"][3] = np.nan
    save_file(content, path)
    assert fot("check", "b", "c") == 1
    assert "difference: inf" in capsys.readouterr().out


def test_checking_models_of_different_shapes(two, capsys):
    llamas.save(two / "d", num_key_value_heads=2, num_hidden_layers=2, intermediate_size=40)
    assert fot("check", "a", "d") == 1
    out = capsys.readouterr().out
    assert "num_layers: 3 in a, 2 in d" in out and "mlp_dim: 48 in a, 40 in d" in out
    assert "model.layers.0.mlp.up_proj.weight: [48, 32] and [40, 32]" in out
    assert "model.layers.2.self_attn.q_proj.weight: [32, 32] and missing" in out
    assert "; tensors of other shapes; largest difference of tensors " in out.splitlines()[-1]


def test_checking_a_window_of_one_token(two, capsys):
    fot("from-hf", "a", "one", "--memory_layers", "1", "--local_context", "1")
    assert fot("check", "one", "one") == 0
    assert "in windows of 1, with memory: largest difference 0" in capsys.readouterr().out
