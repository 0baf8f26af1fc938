"""Rotary positions of a directory, in every spelling: transformers' own on the same directory."""

import json
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fot_jax.common.errors import UserError
from fot_jax.hugging_face import config as configs
from fot_jax.model.rope import rope_frequencies

pytestmark = pytest.mark.torch

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ANY_TEXT = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    deadline=None,
    max_examples=300,
)


def theirs(directory):
    """Frequencies, and the factor of queries and keys."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(directory))
    return rotary.inv_freq.double().numpy(), rotary.attention_scaling


def ours(config):
    scaling = config.rope_scaling
    return rope_frequencies(config), 1.0 if scaling is None else math.sqrt(scaling.score_factor)


def shipped(directory):
    """Of the PyTorch files that come with a converted model."""
    import torch

    from fot_jax.pytorch import modeling_fot
    from fot_jax.pytorch.configuration_fot import FotLlamaConfig

    config = FotLlamaConfig.from_pretrained(directory)
    config.local_context = 2
    cos, sin = modeling_fot.rope_table(config)
    angles = torch.atan2(sin[1].double(), cos[1].double()).numpy()  # of position 1
    return angles, modeling_fot.attention_factor(config)


def assert_same(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5)
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)


def optional(fields):
    """Objects with some of the fields, or with null there."""
    return st.fixed_dictionaries(
        {}, optional={name: st.none() | value for name, value in fields.items()}
    )


FACTOR = st.floats(1, 64) | st.integers(1, 16)
LENGTH = st.integers(8, 8192)
YARN = {
    "attention_factor": st.floats(0.5, 2),
    "beta_fast": st.floats(2, 64) | st.integers(2, 64),
    "beta_slow": st.floats(0.1, 2),
    "mscale": st.floats(0.1, 2),
    "mscale_all_dim": st.floats(0.1, 2),
    "truncate": st.booleans(),
}


@st.composite
def spellings(draw):
    """config.json with a scaling, wherever and however releases of transformers wrote it."""
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3"]))
    scaling = {draw(st.sampled_from(["type", "rope_type"])): kind}
    values = LLAMA | draw(optional({"head_dim": st.sampled_from([16, 48])}))
    values["max_position_embeddings"] = draw(LENGTH)
    if kind != "default":
        scaling["factor"] = draw(FACTOR)
    if kind == "llama3":
        low = draw(st.floats(0.5, 2))
        scaling |= {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.1, 4))}
    if kind == "yarn":
        scaling |= draw(optional(YARN))
        scaling |= draw(st.sampled_from([{}, {"finetuned": True}]))
    if kind in ("yarn", "llama3"):
        for place in draw(st.sampled_from([(), (scaling,), (values,), (scaling, values)])):
            place["original_max_position_embeddings"] = draw(LENGTH)
    for place in draw(st.sampled_from([(), (scaling,), (values,), (scaling, values)])):
        place["rope_theta"] = draw(st.floats(100, 1e6) | st.integers(100, 10**7))
    if draw(st.booleans()):
        return values | {"rope_parameters": scaling}
    other = {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}
    beside = draw(st.sampled_from([{}, {"rope_parameters": other}, {"rope_parameters": None}]))
    return values | {"rope_scaling": scaling} | beside


@hypothesis.given(values=spellings())
@ANY_TEXT
def test_positions_are_those_of_transformers(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    wanted = theirs(tmp_path)
    config = configs.read(tmp_path)
    assert_same(ours(config), wanted)
    assert_same(shipped(tmp_path), wanted)
    # And of what is written for them.
    again = configs.content(config, "float32", {})
    (tmp_path / "config.json").write_text(json.dumps(again))
    assert_same(theirs(tmp_path), wanted)
    assert_same(shipped(tmp_path), wanted)
    assert configs.read(tmp_path) == config


def test_dynamic_scaling_is_for_windows_in_which_it_is_none(tmp_path):
    scaling = {"type": "dynamic", "factor": 2.0}
    values = LLAMA | {"max_position_embeddings": 64, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert configs.read(tmp_path, local_context=64).local_context == 64
    with pytest.raises(UserError, match="model.local_context = 65: .* give at most that"):
        configs.read(tmp_path, local_context=65)


@pytest.mark.parametrize("kind", ["longrope", "proportional", "su", "ntk", "mrope"])
def test_other_kinds_are_named(tmp_path, kind):
    values = LLAMA | {"rope_scaling": {"rope_type": kind, "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f'rope_scaling of type "{kind}" is not supported: have'):
        configs.read(tmp_path)
