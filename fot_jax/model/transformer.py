"""The transformer, in two families, as pure functions of parameters and inputs.

The paper family: pre-LN, GELU MLP, q and k L2-normalised with a learned temperature per head, no
positions in memory layers. The LLaMA family: RMSNorm, SwiGLU, rotary positions, memory keys as if
at position 0 of the local window. Each difference is a field of `ModelConfig`, so that the
families mix.

Parameters of all layers are stacked on a leading axis; the layers between two memory layers run as
one `lax.scan`, so compile time does not grow with depth. How a trained model reads with a memory is
in fot_jax/inference.

Letters: R rows, T tokens of a row, E model dim, H heads, K key/value heads, D head dim, F mlp dim,
V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fot_jax.common.errors import UserError
from fot_jax.model import cached_context, crossbatch, layout, lora, schemes
from fot_jax.model.attention.partial_softmax import AnyArray
from fot_jax.model.cached_context import Cached
from fot_jax.model.config import ModelConfig
from fot_jax.model.linear import adapted_linear, embedded, linear
from fot_jax.model.parameters import init_kernel, init_layers, init_norm
from fot_jax.model.rope import positioned, rope_table, rotate, times
from fot_jax.model.trained import Trained


class Output(NamedTuple):
    """What a forward pass gives beside the hidden states of its last layer."""

    hidden: Float[Array, "R T E"]  # normalised, ready for `Transformer.logits`
    positive_mass: Float[Array, " memory_layers"] | None
    cached: Cached | None  # with this window in it


# Activations that each remat policy keeps for the backward pass, the most first; "none" keeps all.
REMAT_POLICIES = {
    # By name: policies do not see the product inside of `linear`'s own gradient.
    "dots": jax.checkpoint_policies.save_only_these_names("product", "attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nn.Module):
    """A decoder with memory layers.

    Attributes:
      config: shapes and function.
      dtype: type of activations and matrix products; parameters are float32.
      remat: "none", "dots" (keep matrix products and attention) or "full" (keep layer inputs
        only). Covers memory layers like all others.
      lora: adapters of kernels; None: none.
      trained: the part of the parameters that trains; None: all. Where a collection "trained"
        is given, it is that part, and takes the place of those in "params".
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    lora: lora.Lora | None = None
    trained: Trained | None = None

    def setup(self):
        c = self.config
        if self.remat not in ("none", *REMAT_POLICIES):
            raise UserError(f"remat = {self.remat!r}: choose one of none, dots, full")
        embedding = self.param(
            "embedding", nn.initializers.normal(c.hidden_size**-0.5), (c.vocab_size, c.hidden_size)
        )
        self.layers = self.param("layers", init_layers, c, self.lora)
        final_norm = self.param("final_norm", init_norm, c)
        self.embedding = self.get_variable("trained", "embedding", embedding)
        self.trained_layers = self.get_variable("trained", "layers", {})
        self.final_norm = {**final_norm, **self.get_variable("trained", "final_norm", {})}
        if not c.tie_embeddings:
            head = self.param("head", init_kernel, (c.hidden_size, c.vocab_size))
            self.head = self.get_variable("trained", "head", head)

    def __call__(
        self,
        tokens: Int[AnyArray, "R T"],
        segments: Int[AnyArray, "R T"],
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

        Raises:
          UserError: memory_scaling with a CachedContext.
        """
        c = self.config
        if cached is not None and c.memory_scaling:
            raise UserError(
                f"model.memory_scaling = {c.memory_scaling} with a CachedContext: it is for "
                "crossbatch; set it to 0"
            )
        x = embedded(plan.mesh, self.dtype, self.embedding, tokens)
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
            params = jax.tree.map(lambda p: p[0], self._stack(layer, layer + 1))
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

        def body(x, params):
            return block(self.config, plan, _Role(), params, x, segments, rope)[0], None

        stretches = [(start, stop)] if self.trained is None else self.trained.stretches(start, stop)
        for first, end in stretches:
            if first < end:
                x = lax.scan(body, x, self._stack(first, end))[0]
        return x

    def _stack(self, start, stop):
        """Parameters of layers start … stop - 1, stacked."""
        if not self.trained_layers:
            return jax.tree.map(lambda p: p[start:stop], self.layers)
        return self.trained.stack(self.layers, self.trained_layers, start, stop)

    def logits(self, hidden: Float[Array, "*rows E"]) -> Float[Array, "*rows V"]:
        """Next-token logits of hidden states, float32."""
        return logits(self.config, self.head_parameters(), hidden)

    def head_parameters(self) -> dict[str, Array]:
        """The parameter that `logits` reads, by its name."""
        return {"embedding": self.embedding} if self.config.tie_embeddings else {"head": self.head}


def logits(c: ModelConfig, params, hidden: Float[Array, "*rows E"]) -> Float[Array, "*rows V"]:
    """Next-token logits of hidden states, float32."""
    kernel = params["embedding"].T if c.tie_embeddings else params["head"]
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


Shardings = Mapping[str, layout.KernelSharding]  # of a layer's kernels, by name
ONE_DEVICE: Shardings = {}


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
    shardings = layout.kernel_shardings(plan.mesh)
    q, k, v = queries_keys_values(c, params, x, shardings)
    if role.remembers and plan.counts is not None:
        q = scaled_for_memory(c, q, plan.counts * T)
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
    return add_outputs(c, params, x, attended.reshape(R, T, -1), shardings), found


def scaled_for_memory(
    c: ModelConfig, q: Float[Array, "R T H D"], tokens: Int[AnyArray, " R"]
) -> Float[Array, "R T H D"]:
    """Queries of a memory layer, as ModelConfig.memory_scaling says.

    Args:
      tokens: of memory, or of the contexts that the scheme gives each row (in training, with those
        that are hidden, as another document's or as padding).
    """
    if not c.memory_scaling:
        return q
    factor = 1 + c.memory_scaling * jnp.log1p(jnp.asarray(tokens, jnp.float32) / c.local_context)
    return times(q, factor[:, None, None, None])


def memory_keys(c: ModelConfig, k: Float[Array, "R T K D"]) -> Float[Array, "R T K D"]:
    """Keys of a window as later windows and other rows see them.

    As if at position 0, that is as projected (paper §3.1); with `memory_before` at their own places
    in the window before, -T … -1.
    """
    T = k.shape[1]
    return rotate(k, rope_table(c, T, start=-T)) if c.memory_before else k


def queries_keys_values(
    c: ModelConfig, params, x: Float[Array, "R T E"], shardings: Shardings = ONE_DEVICE
):
    """Queries [R, T, H, D], scaled, keys and values [R, T, K, D] of a layer; none rotated."""
    R, T, _ = x.shape
    h = normalise(c, params["attention_norm"], x)
    q = _kernel(params, "query", h, shardings).reshape(R, T, c.num_heads, c.head_dim)
    k = _kernel(params, "key", h, shardings).reshape(R, T, c.num_kv_heads, c.head_dim)
    v = _kernel(params, "value", h, shardings).reshape(R, T, c.num_kv_heads, c.head_dim)
    if c.qk_norm:
        # scores = <q, k> / tau with 1 / tau = exp(log_scale): the exponential lets it move fast.
        log_scale = params["attention"]["log_scale"].astype(jnp.float32)
        return times(_unit(q), jnp.exp(log_scale)[:, None]), _unit(k), v
    return times(q, c.head_dim**-0.5), k, v


def add_outputs(
    c: ModelConfig, params, x, attended: Float[Array, "R T HD"], shardings: Shardings = ONE_DEVICE
):
    """The rest of a layer: x + attention, then x + mlp(norm(x)): [R, T, E]."""
    x = x + _kernel(params, "out", attended, shardings)
    h = normalise(c, params["mlp_norm"], x)
    up = _kernel(params, "up", h, shardings)
    if c.mlp == "swiglu":
        inner = nn.silu(_kernel(params, "gate", h, shardings)) * up
    else:
        inner = nn.gelu(up)
    return x + _kernel(params, "down", inner, shardings)


def _kernel(params, name: str, x: Float[Array, "R T E"], shardings: Shardings):
    """x times a kernel of a layer, with its adapter if it has one: [R, T, F]."""
    kernel = params[lora.KERNELS[name]][name]
    adapter = params.get(lora.NAME, {}).get(name)
    if adapter is None:
        return linear(x, kernel, shardings.get(name))
    of_all = tuple(shardings.get(each) for each in (name, f"{name}/a", f"{name}/b"))
    return adapted_linear(x, kernel, adapter["a"], adapter["b"], params[lora.NAME]["scale"], of_all)


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
