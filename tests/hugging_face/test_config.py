"""config.json of many releases of transformers, and those that are no LLaMA."""

import dataclasses
import json

import hypothesis
import pytest
from hypothesis import strategies as st
from tiny import tiny

from fot_jax.common.errors import UserError
from fot_jax.hugging_face import config as configs
from fot_jax.model.config import ModelConfig, RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 16,
}
OURS = tiny(num_heads=8, num_kv_heads=8, head_dim=4, memory_layers=(), local_context=16)
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def read(tmp_path, values, **how):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return configs.read(tmp_path, **how)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"hidden_act": "silu", "attention_bias": False, "pretraining_tp": 1}, {}),
        ({"mlp_bias": None, "architectures": None, "partial_rotary_factor": 1.0}, {}),
        ({"num_key_value_heads": 2, "head_dim": 6}, {"num_kv_heads": 2, "head_dim": 6}),
        ({"head_dim": None, "rope_scaling": None}, {}),
        (
            {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
            {"norm_epsilon": 1e-5, "tie_embeddings": True},
        ),
        ({"rope_theta": 1000000}, {"rope_theta": 1e6}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}, {"rope_theta": 50.0}),
        (
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {
                "rope_theta": 7.0,
                "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 512),
                "local_context": 512,
            },
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **LLAMA3}},
            {
                "rope_theta": 7.0,
                "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 512),
                "local_context": 512,
            },
        ),
        ({"model_type": "mistral", "sliding_window": None}, {}),
        ({"model_type": "mistral"}, {"num_kv_heads": 8}),
        (
            {"model_type": "mistral", "num_attention_heads": 16, "head_dim": 4},
            {"num_heads": 16, "num_kv_heads": 8},
        ),
        (
            {"model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": None},
            {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8},
        ),
        ({"model_type": "mistral", "sliding_window": 16}, {}),
        ({"sliding_window": 8}, {}),  # which LLaMA code does not read
        (
            {
                "model_type": "longllama",
                "architectures": ["LongLlamaForCausalLM"],
                "mem_layers": [1, 2],
                "mem_positionals": False,
                "mem_dtype": "bfloat16",
                "mem_attention_grouping": None,
                "last_context_length": 8,
                "torch_attention": False,
            },
            {
                "memory_layers": (1, 2),
                "memory_positions": False,
                "memory_dtype": "bfloat16",
                "last_context_length": 8,
            },
        ),
        (
            {"mem_layers": [1], "mem_dtype": "torch.float16"},
            {"memory_layers": (1,), "memory_dtype": "float16"},
        ),
        # Of LongLLaMA's configuration class, for files that leave it out.
        ({"mem_layers": [1]}, {"memory_layers": (1,), "memory_dtype": "bfloat16"}),
        ({"mem_layers": [], "mem_dtype": "bfloat16"}, {}),
    ],
)
def test_what_config_json_says(tmp_path, fields, expected):
    assert read(tmp_path, LLAMA | fields) == dataclasses.replace(OURS, **expected)


def test_a_window_no_longer_than_the_sliding_one(tmp_path):
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 15}
    assert read(tmp_path, mistral, local_context=15).local_context == 15


def test_memory_layers_and_window_are_the_callers(tmp_path):
    found = read(tmp_path, LLAMA, memory_layers=(2, 1), local_context=8)
    assert found == dataclasses.replace(OURS, memory_layers=(1, 2), local_context=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2"}, 'model_type = "qwen2" is not supported: have "llama", "mistral"'),
        ({"model_type": None}, "model_type = null is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "which is no language model"),
        ({"attention_bias": True}, "attention_bias = true is not supported: have false"),
        ({"mlp_bias": True}, "mlp_bias = true is not supported"),
        ({"is_causal": False}, "is_causal = false is not supported: have true"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported: have "silu"'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        (
            {"model_type": "mistral", "max_position_embeddings": None},
            "sliding_window = 4096 is shorter than the window of 131072 tokens",
        ),
        (
            {"model_type": "mistral", "sliding_window": 15},
            "fot convert from-hf --local_context 15, or less",
        ),
        ({"hidden_size": None}, "hidden_size is missing: add it"),
        ({"hidden_size": "many"}, 'hidden_size = "many": give a number above 0'),
        ({"hidden_size": 33}, "hidden_size = 33 is not a multiple of num_attention_heads = 8"),
        ({"vocab_size": 0.5}, "vocab_size = 0.5: give a whole number"),
        ({"vocab_size": True}, "vocab_size = true: give a number above 0"),
        ({"num_key_value_heads": 3}, "model.num_heads = 8 is not a multiple"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no": give true or false'),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "rope_scaling.partial_rotary_factor = 0.5 is not supported",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "RopeScaling.factor = 0.5: give 1"),
        ({"mem_layers": [1], "mem_dtype": "int4"}, 'mem_dtype = "int4" is not supported: have'),
        ({"last_context_length": 0}, "last_context_length = 0: give a number above 0"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": 3}, "rope_scaling = 3: give an object"),
        ({"mem_layers": [7]}, "model.memory_layers has 7, but layers are numbered 0 … 2"),
        ({"mem_layers": "1,2"}, "mem_layers = 1,2: give a list"),
        ({"rope_theta": float("inf")}, "rope_theta = Infinity: give a number above 0"),
        ({"hidden_size": 2**70}, "give a number above 0"),
        ({"attention_bias": 0}, "attention_bias = 0 is not supported: have false"),
        ({"max_position_embeddings": float("nan")}, "max_position_embeddings = NaN: give"),
    ],
)
def test_what_is_no_llama(tmp_path, fields, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, LLAMA | fields)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 100_000])
def test_what_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="not (JSON|a JSON object)"):
        configs.read(tmp_path)


def test_no_config_json(tmp_path):
    with pytest.raises(UserError, match="no config.json: give a Hugging Face model directory"):
        configs.read(tmp_path)


@st.composite
def models(draw):
    heads = draw(st.sampled_from([1, 2, 5, 6]))  # 5 do not divide the width
    layers = draw(st.integers(1, 4))
    scaling = st.builds(RopeScaling, st.floats(1, 64), st.just(1.0), st.floats(2, 8), st.just(32))
    remembers = draw(st.sets(st.integers(0, layers - 1)))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 99)),
        hidden_size=12 * draw(st.integers(1, 4)),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=draw(st.sampled_from([n for n in (1, 2, 3, 6) if heads % n == 0])),
        head_dim=2 * draw(st.integers(1, 8)),
        mlp_dim=draw(st.integers(1, 99)),
        memory_layers=tuple(draw(st.sets(st.integers(0, layers - 1), min_size=1)))
        if remembers
        else (),
        local_context=draw(st.integers(1, 4096)),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        norm_epsilon=draw(st.sampled_from([1e-6, 1e-5])),
        mlp=draw(st.sampled_from(["swiglu", "gelu"])),
        qk_norm=draw(st.booleans()),
        memory_positions=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        rope_theta=draw(st.floats(1, 1e6)),
        rope_scaling=draw(st.none() | scaling),
        last_context_length=draw(st.integers(1, 4096)) if remembers else None,
        memory_dtype=draw(st.sampled_from(["float32", "bfloat16"])) if remembers else None,
        memory_scaling=draw(st.sampled_from([0.0, 0.1])) if remembers else 0.0,
    )


@hypothesis.given(c=models())
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
def test_any_model_comes_back(tmp_path, c):
    written = configs.content(c, "bfloat16", {"bos_token_id": 1, "eos_token_id": 2})
    assert read(tmp_path, written) == c


def test_best_keys_alone_are_asked_for_when_reading(tmp_path, caplog):
    c = dataclasses.replace(OURS, memory_layers=(1,))
    assert read(tmp_path, configs.content(c, "bfloat16", {})).memory_layers == (1,)
    assert not caplog.text
    read(tmp_path, configs.content(c, "bfloat16", {}) | {"mem_topk": 32})
    assert "config.json: mem_topk = 32 holds in PyTorch: fot generate takes --k" in caplog.text


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_a_type_of_memory_that_pytorch_has_not(stored, caplog):
    c = dataclasses.replace(OURS, memory_layers=(1,), memory_dtype=stored)
    assert configs.content(c, "bfloat16", {})["mem_dtype"] == "bfloat16"
    assert f"model.memory_dtype = '{stored}': PyTorch keeps memory in bfloat16" in caplog.text
