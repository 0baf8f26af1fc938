"""The named models: functions of overrides to ModelConfig (paper §4, §5).

A name gives the shapes and function of a published model, the memory layers of the paper and the
window it was trained on (`local_context`). Any field can be overridden, in an experiment file as
`fot_184m.memory_layers = (6, 8)`; `memory_layers = ()` is the plain model.

The names of the paper's models count different things: 37M, 600M and 1.2B leave the embeddings out,
184M is with them. All other names count every parameter.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError
from fot_jax.model.config import ModelConfig, RopeScaling
from fot_jax.model.crossbatch import Plan
from fot_jax.model.transformer import Transformer


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model, embeddings and head included; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = functools.partial(Transformer(config).init, plan=Plan())
    shapes = jax.eval_shape(init, jax.random.key(0), tokens, tokens)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _override(config: ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    for name in overrides:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"have {', '.join(fields)}"
            raise UserError(f"the model has no field {name!r}: {hint}")
    return dataclasses.replace(config, **overrides)


# --- The paper's models --------------------------------------------------------------------------

_PAPER = ModelConfig(
    vocab_size=32_000,
    hidden_size=1024,
    num_layers=12,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=4096,
    memory_layers=(8,),
    local_context=512,
    norm="layernorm",
    mlp="gelu",
    qk_norm=True,
    memory_positions=False,
    tie_embeddings=True,
)


@configurable
def fot_37m(**overrides: Any) -> ModelConfig:
    """The 37M model of the dictionary lookup, whose vocabulary has 64 tokens."""
    config = dataclasses.replace(
        _PAPER, vocab_size=64, hidden_size=512, head_dim=64, mlp_dim=2048, local_context=256
    )
    return _override(config, overrides)


@configurable
def fot_184m(**overrides: Any) -> ModelConfig:
    """The 184M model of most of the paper's experiments; 32,000 SentencePiece tokens."""
    return _override(_PAPER, overrides)


@configurable
def fot_600m(**overrides: Any) -> ModelConfig:
    """The 600M model (670M with 32,000 embeddings)."""
    config = dataclasses.replace(
        _PAPER,
        hidden_size=2048,
        num_heads=16,
        num_kv_heads=16,
        mlp_dim=8192,
        local_context=2048,
    )
    return _override(config, overrides)


@configurable
def fot_1_2b(**overrides: Any) -> ModelConfig:
    """The 1.2B model (1.27B with 32,000 embeddings): its heads are twice as wide as the model."""
    config = dataclasses.replace(fot_600m(), num_heads=32, num_kv_heads=32, mlp_dim=16_384)
    return _override(config, overrides)


# --- The LLaMA family ----------------------------------------------------------------------------

_OPENLLAMA_7B = ModelConfig(
    vocab_size=32_000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    mlp_dim=11_008,
    memory_layers=(8, 16, 24),
    local_context=2048,
)


@configurable
def openllama_3b(**overrides: Any) -> ModelConfig:
    """OpenLLaMA 3B (first version), with the memory layers of LongLLaMA 3B."""
    config = dataclasses.replace(
        _OPENLLAMA_7B,
        hidden_size=3200,
        num_layers=26,
        head_dim=100,
        mlp_dim=8640,
        memory_layers=(6, 12, 18),
    )
    return _override(config, overrides)


@configurable
def openllama_7b(**overrides: Any) -> ModelConfig:
    """OpenLLaMA 7B (first version), with the memory layers of LongLLaMA 7B."""
    return _override(_OPENLLAMA_7B, overrides)


@configurable
def code_llama_7b(**overrides: Any) -> ModelConfig:
    """Code Llama 7B base, with the memory layers and the window of LongLLaMA-Code 7B."""
    config = dataclasses.replace(
        _OPENLLAMA_7B,
        vocab_size=32_016,
        norm_epsilon=1e-5,
        rope_theta=1e6,
        local_context=4096,
    )
    return _override(config, overrides)


@configurable
def llama3_2_1b(**overrides: Any) -> ModelConfig:
    """Llama 3.2 1B; memory layers spaced like those of LongLLaMA, the window that of Llama 3."""
    config = dataclasses.replace(
        llama3_1_8b(),
        hidden_size=2048,
        num_layers=16,
        head_dim=64,
        mlp_dim=8192,
        memory_layers=(4, 8, 12),
        tie_embeddings=True,
        rope_scaling=RopeScaling(factor=32.0),
    )
    return _override(config, overrides)


@configurable
def llama3_1_8b(**overrides: Any) -> ModelConfig:
    """Llama 3.1 8B; memory layers as in a 7B, the window that of Llama 3 before rope scaling."""
    config = dataclasses.replace(
        _OPENLLAMA_7B,
        vocab_size=128_256,
        num_kv_heads=8,
        mlp_dim=14_336,
        local_context=8192,
        norm_epsilon=1e-5,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(factor=8.0),
    )
    return _override(config, overrides)


@configurable
def smollm2_135m(**overrides: Any) -> ModelConfig:
    """SmolLM2 135M; memory in layers that gain from it before training (MemoryLayerProbe)."""
    config = dataclasses.replace(
        _OPENLLAMA_7B,
        vocab_size=49_152,
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        memory_layers=(18, 20, 24),
        local_context=512,
        norm_epsilon=1e-5,
        rope_theta=100_000.0,
        tie_embeddings=True,
    )
    return _override(config, overrides)
