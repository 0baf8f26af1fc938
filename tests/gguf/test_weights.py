"""Models in .gguf files against transformers' own reader of them, and what they were made of."""

import shutil

import gguf
import ggufs
import llamas
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fot_jax.cli import main
from fot_jax.gguf.weights import File, config_of
from fot_jax.inference.language_model import LanguageModel

pytestmark = pytest.mark.torch
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def fot(*argv):
    return main(["convert", *map(str, argv)])


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
)
def test_every_type_as_transformers_reads_it(tmp_path, kind):
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = llamas.make(**{**GROUPED, **(wide if kind in ggufs.BLOCKS else {})})
    ggufs.write(tmp_path / "a.gguf", model, kind)
    assert fot("from-hf", tmp_path / "a.gguf", tmp_path / "b", "--memory_layers", "0") == 0
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf").eval()
    tokens = llamas.random_tokens(2, 16)
    found = LanguageModel.load(tmp_path / "b").logits(tokens, last_context_length=16)
    np.testing.assert_allclose(found, llamas.logits(theirs, tokens), atol=1e-4)
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert fot("to-hf", tmp_path / "b", tmp_path / "c") == 0
    assert {name for name, *_ in llamas.contents(tmp_path / "c").values()} >= {dtype}


LLAMA3 = {**llamas.SHAPES["llama 3"], **GROUPED}
OF_MODELS = {
    "multi-head, tied": {**SIZES, "tie_word_embeddings": True},
    "head_dim": {**GROUPED, "head_dim": 24},
    "rope theta": {**GROUPED, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
    "llama 3": LLAMA3,
}


def with_factors(tensors, config):
    base = 1 / config.rope_parameters["rope_theta"] ** (
        np.arange(0, config.head_dim, 2) / config.head_dim
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = (base / scaled.numpy()).astype(np.float32)
    return {**tensors, "rope_freqs.weight": ggufs.encoded(factors, "F32", None)}


@pytest.mark.parametrize("name", OF_MODELS)
def test_equals_the_model_that_it_was_made_of(tmp_path, name):
    """transformers' own reader takes no notice of Llama 3's scaling."""
    model = llamas.make(**OF_MODELS[name])
    change = (lambda x: with_factors(x, model.config)) if name == "llama 3" else lambda x: x
    ggufs.write(tmp_path / "a.gguf", model, change=change)
    assert fot("from-hf", tmp_path / "a.gguf", tmp_path / "b", "--local_context", 16) == 0
    tokens = llamas.random_tokens(2, 16)
    found = LanguageModel.load(tmp_path / "b").logits(tokens, last_context_length=16)
    np.testing.assert_allclose(found, llamas.logits(model, tokens), atol=1e-4)
    assert fot("to-hf", tmp_path / "b", tmp_path / "c") == 0
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "c")
    np.testing.assert_allclose(
        llamas.logits(again, tokens), llamas.logits(model, tokens), atol=1e-4
    )
    assert again.config.rope_parameters == model.config.rope_parameters


@settings(max_examples=60, deadline=None)
@given(
    factor=st.floats(1.5, 64),
    low=st.sampled_from([0.5, 1.0, 2.0]),
    ratio=st.floats(2, 8),
    original=st.integers(512, 16384),
    theta=st.sampled_from([10_000.0, 500_000.0]),
)
def test_frequencies_of_llama_3(tmp_path_factory, factor, low, ratio, original, theta):
    """Of models whose longest wavelengths, as Llama 3's, are longer than what it was trained on."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low * ratio,
        "original_max_position_embeddings": original,
    }
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=1, rope_parameters=rope, max_position_embeddings=2**20
    )
    path = tmp_path_factory.mktemp("rope") / "a.gguf"
    tiny = llamas.make(
        hidden_size=128, num_attention_heads=1, num_hidden_layers=1, rope_theta=theta
    )
    ggufs.write(path, tiny, change=lambda x: with_factors(x, config))
    found = config_of(File(path))
    config.rope_parameters = {**found["rope_scaling"], "rope_theta": theta}
    again, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    config.rope_parameters = rope
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    np.testing.assert_allclose(again, wanted, rtol=2e-3)


@pytest.mark.parametrize(
    "written, read",
    [
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"rope__scale_linear": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scaling__factor": 1.0}, None),
        ({"rope__scaling__type": "none", "rope__scale_linear": 4.0}, None),
        (
            {"rope__scaling__type": "linear", "rope__scale_linear": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 8.0,
                "rope__scaling__original_context_length": 4096,
                "rope__scaling__yarn_beta_fast": 16.0,
            },
            {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 16.0,
            },
        ),
        ({"rope__scaling__type": "none"}, None),
    ],
)
def test_other_scaling(tmp_path, written, read):
    ggufs.write(tmp_path / "a.gguf", llamas.make(**GROUPED), **written)
    assert config_of(File(tmp_path / "a.gguf"))["rope_scaling"] == read


def test_a_model_in_several_files(tmp_path, capsys):
    model = llamas.make(**GROUPED)
    ggufs.write(tmp_path / "a.gguf", model, split=8)
    first, second, *_, last = sorted(tmp_path.glob("a-*.gguf"))
    assert fot("from-hf", first, tmp_path / "b") == 0
    tokens = llamas.random_tokens(2, 16)
    found = LanguageModel.load(tmp_path / "b").logits(tokens, last_context_length=16)
    np.testing.assert_allclose(found, llamas.logits(model, tokens), atol=1e-4)
    line = refused(capsys, "from-hf", second, tmp_path / "c")
    assert line == f"fot: error: {second}: is not the first of its files: give {first.name}"
    beside = first.with_name("a-00001-of-00000.gguf")
    shutil.copy(first, beside)
    assert "is named as if there were 1" in refused(capsys, "from-hf", beside, tmp_path / "c")
    whole = second.read_bytes()
    shutil.copy(last, second)
    line = refused(capsys, "from-hf", first, tmp_path / "c")
    assert line == f"fot: error: {first}: part 2 of it is another part by its settings"
    second.write_bytes(whole)
    last.unlink()
    assert f"{last}: missing" in refused(capsys, "from-hf", first, tmp_path / "c")


def refused(capsys, *argv):
    """The one line."""
    capsys.readouterr()
    assert fot(*argv) == 2 and not argv[-1].exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def without(name):
    return lambda tensors: {x: tensor for x, tensor in tensors.items() if x != name}


def with_another(name, shape=(4,)):
    return lambda tensors: {**tensors, name: ggufs.encoded(np.ones(shape, "f4"), "F32", None)}


@pytest.mark.parametrize(
    "how, line",
    [
        ({"architecture": "qwen3"}, "general.architecture = 'qwen3' is not supported"),
        ({"expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"block_count": None}, "llama.block_count is missing"),
        ({"block_count": 4}, "has no tensor blk.3.attn_norm.weight"),
        ({"rope__dimension_count": 8}, "rope.dimension_count = 8, but heads of 16 dimensions"),
        ({"rope__scaling__type": "longrope"}, "'longrope' is not supported: have linear, yarn"),
        ({"change": without("blk.1.ffn_up.weight")}, "has no tensor blk.1.ffn_up.weight"),
        ({"change": without("token_embd.weight")}, "has no matrix token_embd.weight"),
        ({"change": with_another("blk.0.attn_q.bias")}, "blk.0.attn_q.bias is none of a LLaMA"),
        ({"change": with_another("output.weight", (61, 32))}, "output.weight is [61, 32], but"),
        ({"change": with_another("rope_freqs.weight", (8,))}, None),
        ({"change": with_another("token_embd.weight")}, "a.gguf: has no matrix token_embd.weight"),
        ({"kind": "Q2_K"}, "is of type Q2_K: have F32, F16, BF16, Q8_0"),
        (
            {"change": with_another("rope_freqs.weight", (8,)), "rope__scale_linear": 4.0},
            "llama.rope.scaling.type = 'linear' beside rope_freqs.weight",
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 8.0,
                "rope__scaling__original_context_length": 4096,
                "rope__scaling__yarn_log_multiplier": 0.1,
            },
            "rope.scaling.yarn_log_multiplier = 0.1",
        ),
        ({"logit_scale": 0.5}, "llama.logit_scale = 0.5 is not supported"),
        (
            {"byte_order": gguf.GGUFEndian.BIG, "kind": "Q8_0"},
            "of a machine with the other byte order: convert it with gguf-convert-endian",
        ),
    ],
)
def test_what_is_refused(tmp_path, capsys, how, line):
    wide = {"hidden_size": 256, "intermediate_size": 256} if "kind" in how else {}
    ggufs.write(tmp_path / "a.gguf", llamas.make(**{**GROUPED, **wide}), **how)
    if line is None:  # factors of 1
        assert fot("from-hf", tmp_path / "a.gguf", tmp_path / "b") == 0
    else:
        assert line in refused(capsys, "from-hf", tmp_path / "a.gguf", tmp_path / "b")


@pytest.mark.parametrize("size", [0, 3, 20, 200, 5_000, 40_000, None])
def test_files_that_are_cut_off_or_hold_no_text(tmp_path, capsys, size):
    ggufs.write(tmp_path / "whole.gguf", llamas.make(**GROUPED))
    content = (tmp_path / "whole.gguf").read_bytes()
    assert len(content) > 40_000
    changed = content.replace(b"</s>", b"<\xffs>") if size is None else content[:size]
    (tmp_path / "a.gguf").write_bytes(changed)
    line = refused(capsys, "from-hf", tmp_path / "a.gguf", tmp_path / "b")
    assert line.endswith("a.gguf: damaged, or no .gguf file: get it again")
