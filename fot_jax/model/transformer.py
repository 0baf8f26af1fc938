"""The transformer, in two families, as pure functions of parameters and inputs.

The paper family: pre-LN, GELU MLP, q and k L2-normalised with a learned temperature per head, no
positions in memory layers. The LLaMA family: RMSNorm, SwiGLU, rotary positions, memory keys as if
at position 0 of the local window. Each difference is a field of `ModelConfig`, so that the
families mix.

Parameters of all layers are stacked on a leading axis; the layers between two memory layers run as
one `lax.scan`, so compile time does not grow with depth. How a trained model reads with a memory is
in inference.py.

Letters: R rows, T tokens of a row, E model dim, H heads, K key/value heads, D head dim, F mlp dim,
V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range
from fot_jax.model import cached_context, crossbatch, layout, schemes
from fot_jax.model.cached_context import Cached

# Beyond what anyone trains, and far below where shapes and tables of positions are too large to be
# made at all.
_LARGEST = {
    "vocab_size": 2**27,
    "hidden_size": 2**20,
    "num_layers": 2**14,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**14,
    "mlp_dim": 2**22,
    "local_context": 2**22,
}
ROPE_SCALINGS = ("llama3", "linear", "dynamic", "yarn")


@configurable
@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed so that a model reads further than it was first trained.

    Attributes:
      factor: how much further.
      low_freq_factor, high_freq_factor: of "llama3".
      original_max_position: tokens that the model was trained on before ("llama3", "yarn"), or
        beyond which "dynamic" would change anything.
      kind: as config.json names it.
        "llama3" (LLaMA 3.1 and later): wavelengths above original_max_position / low_freq_factor
        grow by `factor`, those below original_max_position / high_freq_factor stay, those between
        are interpolated.
        "linear": all wavelengths grow by `factor`.
        "dynamic": none do within original_max_position tokens, and windows are no longer.
        "yarn" (arXiv 2309.00071): frequencies that turn beta_fast times or more within
        original_max_position stay, those that turn beta_slow times or less shrink by `factor`;
        queries and keys grow by attention_factor.
      beta_fast, beta_slow, attention_factor: of "yarn"; the last None: 0.1 ln(factor) + 1.
      truncate: of "yarn": between which dimensions it interpolates is rounded to whole ones.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    kind: str = "llama3"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in ROPE_SCALINGS:
            raise UserError(
                f"RopeScaling.kind = {self.kind!r}: choose one of {', '.join(ROPE_SCALINGS)}"
            )
        longest = {"original_max_position": self.original_max_position}
        check_range("RopeScaling", 1, factor=self.factor, **longest)
        betas = {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
        check_range("RopeScaling", 1e-6, 1e6, **betas, attention_factor=self.attention_factor)
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise UserError(
                f"RopeScaling.low_freq_factor = {self.low_freq_factor} must be above 0 and below "
                f"RopeScaling.high_freq_factor = {self.high_freq_factor}"
            )

    @property
    def score_factor(self) -> float:
        """What rotated queries times rotated keys are multiplied by, beside the frequencies."""
        if self.kind != "yarn":
            return 1.0
        attention_factor = self.attention_factor
        if attention_factor is None:
            attention_factor = 0.1 * math.log(self.factor) + 1
        return attention_factor**2


@configurable
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the parameters and the function of a model.

    `local_context` is the window that positions are trained for. How a long text is read where
    nobody says otherwise is part of it as it is of LongLLaMA's config.json: the last two fields.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    memory_layers: tuple[int, ...]
    local_context: int
    norm: str = "rmsnorm"  # or "layernorm"
    norm_epsilon: float = 1e-6
    mlp: str = "swiglu"  # or "gelu"
    qk_norm: bool = False  # L2-normalise q and k per head, with a learned temperature
    memory_positions: bool = True  # rotary on local q and k of memory layers
    # Keys of memory stand where they were, a window before; else all at the window's first place.
    memory_before: bool = False
    # Memory layers merge memory and window through a learned gate per head; else in one softmax.
    memory_gate: bool = False
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    # Tokens of a text that stay in the window at its end; None: LongLLaMA's 1,024. (At most all.)
    last_context_length: int | None = None
    # float32, bfloat16, float16 or int8; None: the type that the model computes in.
    memory_dtype: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "memory_layers", tuple(sorted(set(self.memory_layers))))
        for name, most in _LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise UserError(f"model.{name} = {value!r}: give a whole number from 1 to {most:,}")
        check_range("model", 1, 1e18, rope_theta=self.rope_theta)
        check_range("model", 0, 1, norm_epsilon=self.norm_epsilon)
        last = {"last_context_length": self.last_context_length}
        check_range("model", 1, 2**31 - 1, whole=True, **last)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads = {self.num_heads} is not a multiple of model.num_kv_heads = "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim = {self.head_dim} is odd: rotary needs an even one")
        if self.memory_before and not self.memory_positions:
            raise UserError(
                "model.memory_before gives keys of memory positions, model.memory_positions = "
                "False takes them away: change one of them"
            )
        scaling = self.rope_scaling
        if scaling is not None:
            if scaling.kind == "yarn" and self.rope_theta == 1:
                raise UserError(
                    'model.rope_theta = 1: RopeScaling.kind = "yarn" needs a larger one'
                )
            if scaling.kind == "dynamic" and self.local_context > scaling.original_max_position:
                raise UserError(
                    f"model.local_context = {self.local_context}: where it is longer than "
                    f"{scaling.original_max_position}, dynamic scaling would turn every token by "
                    "how long the text is: give at most that"
                )
        for layer in self.memory_layers:
            if not 0 <= layer < self.num_layers:
                raise UserError(
                    f"model.memory_layers has {layer}, but layers are numbered 0 … "
                    f"{self.num_layers - 1}"
                )
        for field, allowed in (
            ("norm", ("rmsnorm", "layernorm")),
            ("mlp", ("swiglu", "gelu")),
            ("memory_dtype", (None, "float32", "bfloat16", "float16", "int8")),
        ):
            if getattr(self, field) not in allowed:
                names = ", ".join(map(str, allowed))
                raise UserError(f"model.{field} = {getattr(self, field)!r}: choose one of {names}")

    def differences(self, other: ModelConfig) -> dict[str, tuple[Any, Any]]:
        """Fields that two models do not share, with both values, but for rounding to float32.

        Files of other programs have, say, 9.99999975e-06 where 1e-5 was meant.
        """
        names = [field.name for field in dataclasses.fields(self)]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if not _same(*pair)}


def _same(a: Any, b: Any) -> bool:
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return all(map(_same, dataclasses.astuple(a), dataclasses.astuple(b)))
    if isinstance(a, float) and isinstance(b, float):
        return np.float32(a) == np.float32(b)
    return a == b


class Output(NamedTuple):
    """What a forward pass gives beside the hidden states of its last layer."""

    hidden: Float[Array, "R T E"]  # normalised, ready for `Transformer.logits`
    positive_mass: Float[Array, " memory_layers"] | None
    cached: Cached | None  # with this window in it


# Activations that each remat policy keeps for the backward pass; "none" keeps all of them.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # By name: policies do not see the product inside of `linear`'s own gradient.
    "dots": jax.checkpoint_policies.save_only_these_names("product", "attention"),
}


class Transformer(nn.Module):
    """A decoder with memory layers.

    Attributes:
      config: shapes and function.
      dtype: type of activations and matrix products; parameters are float32.
      remat: "none", "dots" (keep matrix products and attention) or "full" (keep layer inputs
        only). Covers memory layers like all others.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config
        if self.remat not in ("none", *REMAT_POLICIES):
            raise UserError(f"remat = {self.remat!r}: choose one of none, dots, full")
        self.embedding = self.param(
            "embedding", nn.initializers.normal(c.hidden_size**-0.5), (c.vocab_size, c.hidden_size)
        )
        self.layers = self.param("layers", _init_layers, c)
        self.final_norm = self.param("final_norm", _init_norm, c)
        if not c.tie_embeddings:
            self.head = self.param("head", _kernel, (c.hidden_size, c.vocab_size))

    def __call__(
        self,
        tokens: Int[Array, "R T"],
        segments: Int[Array, "R T"],
        plan: crossbatch.Plan,
        *,
        keep: schemes.Scheme | None = None,
        measure_positive_mass: bool = False,
        cached: Cached | None = None,
    ) -> Output:
        """Runs all layers over windows of tokens.

        Args:
          tokens: token ids below vocab_size.
          segments: document of each token, 0 for padding.
          plan: where rows live and which contexts the memory layers see in training;
            `crossbatch.Plan()` for one device and none.
          keep: hidden states are wanted for this scheme's output rows only; the others leave after
            the last memory layer, where nobody needs them any more.
          measure_positive_mass: also return r_d of every memory layer.
          cached: of the rows' earlier windows, with `keep` a CachedContext.
        """
        c = self.config
        x = self.embedding.astype(self.dtype)[tokens]
        rope = rope_table(c, tokens.shape[1])
        block = _block
        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            block = jax.checkpoint(block, policy=policy, static_argnums=(0, 1, 2))
        role = _Role(True, measure_positive_mass, None if cached is None else keep)
        found = []  # of memory layers
        start = 0
        for layer in (*c.memory_layers, c.num_layers):
            x = self._scan(block, x, segments, rope, plan, start, layer)
            if layer == c.num_layers:
                break
            params = jax.tree.map(lambda p, layer=layer: p[layer], self.layers)
            before = None
            if cached is not None:
                before = (cached.k[len(found)], cached.v[len(found)], cached.segments)
            x, of_layer = block(c, plan, role, params, x, segments, rope, before)
            found.append(of_layer)
            start = layer + 1
            if layer == c.memory_layers[-1] and keep is not None:
                kept = schemes.output_rows(keep, segments)
                if len(kept) % plan.row_devices == 0:  # otherwise they leave at the end
                    x, segments = schemes.output_rows(keep, x), kept
        if keep is not None and len(x) == len(tokens):
            x = schemes.output_rows(keep, x)
        hidden = normalise(c, self.final_norm, x)
        mass = jnp.stack(found) if measure_positive_mass else None
        if cached is not None:
            k, v = (jnp.stack(of_layers) for of_layers in zip(*found, strict=True))
            cached = cached_context.updated(cached, k, v, segments)
        return Output(hidden, mass, cached)

    def _scan(self, block, x, segments, rope, plan, start, stop):
        """Layers start … stop - 1, none of them a memory layer."""
        if start == stop:
            return x

        def body(x, params):
            return block(self.config, plan, _Role(), params, x, segments, rope)[0], None

        return lax.scan(body, x, jax.tree.map(lambda p: p[start:stop], self.layers))[0]

    def logits(self, hidden: Float[Array, "*rows E"]) -> Float[Array, "*rows V"]:
        """Next-token logits of hidden states, float32."""
        params = {"embedding": self.embedding}
        if not self.config.tie_embeddings:
            params["head"] = self.head
        return logits(self.config, params, hidden)


def logits(c: ModelConfig, params, hidden: Float[Array, "*rows E"]) -> Float[Array, "*rows V"]:
    """Next-token logits of hidden states, float32."""
    kernel = params["embedding"].T if c.tie_embeddings else params["head"]
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


Cuts = Mapping[str, layout.Cut]  # of a layer's kernels, by name
NO_CUTS: Cuts = {}


# --- One layer -----------------------------------------------------------------------------------


class _Role(NamedTuple):
    """What a layer does."""

    remembers: bool = False  # it is a memory layer
    measures: bool = False  # r_d
    cached: schemes.CachedContext | None = None  # what it sees in place of crossbatch contexts


def _block(c, plan, role, params, x, segments, rope, cached=None):
    """One layer in training: [R, T, E], and of a memory layer what its role asks for.

    That is r_d where it is measured, keys and values where they are cached, else ().
    """
    R, T, _ = x.shape
    cuts = layout.cuts(plan.mesh)
    q, k, v = queries_keys_values(c, params, x, cuts)
    if role.remembers and not c.memory_positions:
        q_local, k_local = q, k
    else:
        q_local, k_local = positioned(c, q, k, rope)
    k_memory = memory_keys(c, k) if role.remembers else None
    if role.cached is None:
        attended = crossbatch.attention(q_local, k_local, v, segments, plan, k_context=k_memory)
    else:
        gate = params["attention"].get("memory_gate")
        attended = cached_context.attention(
            q_local, k_local, v, segments, *cached, role.cached, plan, gate
        )
    found = ()
    if role.measures:
        found = crossbatch.positive_mass(q_local, k_memory, v, segments, plan)
    elif role.cached is not None:
        found = k_memory, v
    return add_outputs(c, params, x, attended.reshape(R, T, -1), cuts), found


def memory_keys(c: ModelConfig, k: Float[Array, "R T K D"]) -> Float[Array, "R T K D"]:
    """Keys of a window as later windows and other rows see them.

    As if at position 0, that is as projected (paper §3.1); with `memory_before` at their own places
    in the window before, -T … -1.
    """
    T = k.shape[1]
    return rotate(k, rope_table(c, T, start=-T)) if c.memory_before else k


def queries_keys_values(c: ModelConfig, params, x: Float[Array, "R T E"], cuts: Cuts = NO_CUTS):
    """Queries [R, T, H, D], scaled, keys and values [R, T, K, D] of a layer; none rotated."""
    R, T, _ = x.shape
    w = params["attention"]
    h = normalise(c, params["attention_norm"], x)
    q = linear(h, w["query"], cuts.get("query")).reshape(R, T, c.num_heads, c.head_dim)
    k = linear(h, w["key"], cuts.get("key")).reshape(R, T, c.num_kv_heads, c.head_dim)
    v = linear(h, w["value"], cuts.get("value")).reshape(R, T, c.num_kv_heads, c.head_dim)
    if c.qk_norm:
        # scores = <q, k> / tau with 1 / tau = exp(log_scale): the exponential lets it move fast.
        q = _unit(q) * jnp.exp(w["log_scale"])[:, None].astype(x.dtype)
        return q, _unit(k), v
    return q * c.head_dim**-0.5, k, v


def add_outputs(c: ModelConfig, params, x, attended: Float[Array, "R T HD"], cuts: Cuts = NO_CUTS):
    """The rest of a layer: x + attention, then x + mlp(norm(x)): [R, T, E]."""
    x = x + linear(attended, params["attention"]["out"], cuts.get("out"))
    h = normalise(c, params["mlp_norm"], x)
    w = params["mlp"]
    if c.mlp == "swiglu":
        inner = nn.silu(linear(h, w["gate"], cuts.get("gate"))) * linear(h, w["up"], cuts.get("up"))
    else:
        inner = nn.gelu(linear(h, w["up"], cuts.get("up")))
    return x + linear(inner, w["down"], cuts.get("down"))


def linear(
    x: Float[Array, "R T E"], kernel: Float[Array, "E F"], cut: layout.Cut | None = None
) -> Float[Array, "R T F"]:
    """x @ kernel in x's dtype; over a mesh, the kernel is gathered for it in that type."""
    return checkpoint_name(_linear(cut, x, kernel), "product")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(cut, x, kernel):
    """The product.

    Its gradient is written out for two reasons. Autodiff's own asks XLA's CPU backend for a
    transposed copy of the wider activation, which took a fifth of a training step. And over a mesh
    what is kept for the backward pass has to be the kernel as it is cut, and what leaves it a
    gradient that is cut alike: left alone, XLA may reduce activations over all devices instead.
    """
    return x @ _gathered(cut, x, kernel)


def _gathered(cut, x, kernel):
    kernel = kernel.astype(x.dtype)
    return kernel if cut is None else lax.with_sharding_constraint(kernel, cut.gathered)


def _linear_backward(cut, saved, dy):
    x, kernel = saved
    dx = dy @ _gathered(cut, x, kernel).T
    d_kernel = jnp.einsum("rte,rtf->ef", x, dy)
    if cut is not None:
        d_kernel = lax.with_sharding_constraint(d_kernel, cut.sharded)
    return dx, d_kernel.astype(kernel.dtype)


_linear.defvjp(lambda cut, x, kernel: (_linear(cut, x, kernel), (x, kernel)), _linear_backward)


def normalise(c: ModelConfig, params, x: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
    """RMSNorm or LayerNorm over the last axis, in float32."""
    y = x.astype(jnp.float32)
    if c.norm == "layernorm":
        y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + c.norm_epsilon) * params["scale"]
    return (y + params["bias"] if c.norm == "layernorm" else y).astype(x.dtype)


def _unit(x):
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)


# --- Rotary positions ----------------------------------------------------------------------------


def rope_frequencies(c: ModelConfig) -> np.ndarray:
    """Angle per position of each pair of dimensions: [D / 2] float64."""
    frequencies = c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    return frequencies if c.rope_scaling is None else _scaled(c, c.rope_scaling, frequencies)


def _scaled(c: ModelConfig, s: RopeScaling, frequencies: np.ndarray) -> np.ndarray:
    if s.kind == "dynamic":  # and the window no longer than original_max_position
        return frequencies
    if s.kind == "linear":
        return frequencies / s.factor
    if s.kind == "llama3":
        turns = s.original_max_position * frequencies / (2 * np.pi)  # over the original context
        keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    else:

        def pair(turns: float) -> float:
            """Which pair of dimensions turns so often over the original context."""
            wavelength = s.original_max_position / (turns * 2 * np.pi)
            return c.head_dim / 2 * np.log(wavelength) / np.log(c.rope_theta)

        low, high = pair(s.beta_fast), pair(s.beta_slow)
        if s.truncate:
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0), min(high, c.head_dim - 1)
        between = high - low or 0.001
        keep = 1 - (np.arange(c.head_dim // 2) - low) / between
    keep = np.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / s.factor)


def rope_table(c: ModelConfig, length: int, start: int = 0) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of positions start … start + length - 1: two [T, 1, D / 2] float32."""
    angles = np.arange(start, start + length)[:, None, None] * rope_frequencies(c)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def positioned(c: ModelConfig, q: Float[Array, "R T H D"], k: Float[Array, "R T K D"], rope):
    """Queries and keys with rotary positions. Memory keys, as if at position 0, are as projected:

    what YaRN multiplies both with is therefore in the queries.
    """
    q, k = rotate(q, rope), rotate(k, rope)
    return (q if c.rope_scaling is None else q * c.rope_scaling.score_factor), k


def rotate(x: Float[Array, "R T H D"], rope) -> Float[Array, "R T H D"]:
    """Rotary positions in the half-split layout of Hugging Face weights; computed in float32."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


# --- Initial parameters --------------------------------------------------------------------------


def _kernel(key, shape, scale: float = 1.0):
    """Normal with standard deviation scale / sqrt(fan in), fan in being the axis before last."""
    return jax.random.normal(key, shape, jnp.float32) * (scale * shape[-2] ** -0.5)


def _init_norm(key, c: ModelConfig, layers: tuple[int, ...] = ()):
    del key
    scale = jnp.ones((*layers, c.hidden_size), jnp.float32)
    return (
        {"scale": scale, "bias": jnp.zeros_like(scale)}
        if c.norm == "layernorm"
        else {"scale": scale}
    )


def _init_layers(key, c: ModelConfig):
    L, E, F, D = c.num_layers, c.hidden_size, c.mlp_dim, c.head_dim
    keys = iter(jax.random.split(key, 7))
    # Layers that write into the residual stream start smaller, so that its size does not grow
    # with depth.
    into_residual = (2 * L) ** -0.5
    attention = {
        "query": _kernel(next(keys), (L, E, c.num_heads * D)),
        "key": _kernel(next(keys), (L, E, c.num_kv_heads * D)),
        "value": _kernel(next(keys), (L, E, c.num_kv_heads * D)),
        "out": _kernel(next(keys), (L, c.num_heads * D, E), into_residual),
    }
    if c.memory_gate:
        attention["memory_gate"] = jnp.zeros((L, c.num_heads), jnp.float32)
    if c.qk_norm:
        attention["log_scale"] = jnp.full((L, c.num_heads), np.log(10.0), jnp.float32)
    mlp = {
        "up": _kernel(next(keys), (L, E, F)),
        "down": _kernel(next(keys), (L, F, E), into_residual),
    }
    if c.mlp == "swiglu":
        mlp["gate"] = _kernel(next(keys), (L, E, F))
    return {
        "attention_norm": _init_norm(None, c, (L,)),
        "attention": attention,
        "mlp_norm": _init_norm(None, c, (L,)),
        "mlp": mlp,
    }
