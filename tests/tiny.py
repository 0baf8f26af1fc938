"""Models of a few thousand parameters, their parameters, and tokens for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax.inference.language_model import LanguageModel
from fot_jax.model import crossbatch
from fot_jax.model.config import ModelConfig
from fot_jax.model.transformer import Transformer


def tiny(**changes):
    """A LLaMA with grouped queries, windows of 8 tokens, and a memory layer among three."""
    config = ModelConfig(
        vocab_size=61,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        memory_layers=(1,),
        local_context=8,
    )
    return dataclasses.replace(config, **changes)


LLAMA = tiny()
PAPER = tiny(
    norm="layernorm",
    mlp="gelu",
    qk_norm=True,
    memory_positions=False,
    tie_embeddings=True,
    num_kv_heads=4,
)


@functools.cache
def random_params(config):
    """Parameters in which every leaf matters: also norms, biases and temperatures are random."""
    rng = np.random.default_rng(0)

    def random(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "memory_gate":
            return noise
        if name in ("scale", "bias", "log_scale"):
            return {"scale": 1.0, "bias": 0.0, "log_scale": 2.3}[name] + 0.3 * noise
        return noise * (leaf.shape[-1 if name == "embedding" else -2] ** -0.5)

    return jax.tree_util.tree_map_with_path(random, shapes_of(config))


def shapes_of(config, **how):
    tokens = jnp.zeros((1, 2), jnp.int32)
    init = functools.partial(Transformer(config, **how).init, plan=crossbatch.Plan())
    return jax.eval_shape(init, jax.random.key(0), tokens, tokens)["params"]


def random_tokens(config, rows, window, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, window), np.int32)


def plan_of(config, scheme, tokens):
    rows, window = tokens.shape
    return crossbatch.make_plan(scheme, rows, heads=config.num_heads, window=window)


@functools.partial(jax.jit, static_argnames=("config", "plan", "keep", "dtype", "remat"))
def forward(config, params, tokens, segments, plan, *, keep=None, **how):
    """Logits of every position."""
    model = Transformer(config, **how)
    out = model.apply({"params": params}, tokens, segments, plan, keep=keep)
    return model.apply({"params": params}, out.hidden, method="logits")


def lane_segments(lanes, windows, window, seed=0):
    """Documents along each lane, some ending inside a window; one lane starts with padding."""
    rng = np.random.default_rng(seed)
    length = windows * window
    ends = rng.random((lanes, length)) < 2 / length
    segments = 1 + np.cumsum(ends, axis=1) + (length + 1) * np.arange(lanes)[:, None]
    segments[-1, : window // 2] = 0
    return segments.reshape(lanes * windows, window).astype(np.int32)


def untrained(config, vocabulary=None, change=lambda params: params, dtype=jnp.float32):
    """A LanguageModel with the parameters that training begins with, changed."""
    params = jax.tree.map(lambda x: x, _initial(config))  # a tree of its own, to change
    return LanguageModel.of(Transformer(config, dtype=dtype), change(params), vocabulary)


@functools.cache
def _initial(config):
    tokens = np.zeros((1, config.local_context), np.int32)
    init = functools.partial(Transformer(config).init, plan=crossbatch.Plan())
    return jax.jit(init)(jax.random.key(1), tokens, tokens)["params"]
