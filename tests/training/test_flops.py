"""FLOPs against those that PyTorch counts while it runs the objective query by query."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.reading import places, visibility
from oracles.training_step import gradient, objective
from tiny import LLAMA, random_params, random_tokens
from torch.utils.flop_counter import FlopCounterMode

from fot_jax.model.config import ModelConfig
from fot_jax.model.lora import KERNELS, Lora
from fot_jax.model.schemes import CachedContext, NoCrossbatch, Packed, PackedTable, PreviousContext
from fot_jax.training.flops import Part, layer_parameters, reading_flops, training_flops

SCHEMES = [
    NoCrossbatch(),
    PreviousContext(d=1),
    PreviousContext(d=3, w=2),
    Packed(pack=3, range=5),
    PackedTable(((0, 0), (1, 2), (0, 3))),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@settings(max_examples=4, deadline=None)
@given(
    groups=st.integers(1, 2),
    window=st.integers(1, 3),
    memory_layers=st.sampled_from([(0, 1), (1,), (0,), ()]),
    kv_heads=st.integers(1, 2),
    shared=st.integers(1, 3),
    mlp=st.sampled_from(["swiglu", "gelu"]),
    tied=st.booleans(),
)
def test_counts_what_the_objective_multiplies(
    scheme, groups, window, memory_layers, kv_heads, shared, mlp, tied
):
    config = ModelConfig(
        vocab_size=13,
        hidden_size=5,
        num_layers=2,
        num_heads=kv_heads * shared,
        num_kv_heads=kv_heads,
        head_dim=4,
        mlp_dim=7,
        memory_layers=memory_layers,
        local_context=window,
        mlp=mlp,
        tie_embeddings=tied,
    )
    group_rows = 3 * scheme.windows
    tokens = random_tokens(config, groups * group_rows, window)
    batch = dict(inputs=tokens, targets=tokens, segment_ids=np.ones_like(tokens))
    batch["weights"] = np.ones(tokens.shape, np.float32)
    with FlopCounterMode(display=False) as counter:
        gradient(config, scheme, random_params(config), batch, group_rows)
    counted = counter.get_total_flops()
    assert training_flops(config, scheme, len(tokens), group_rows) == counted


class ByLayer(list):
    """A stacked parameter in PyTorch, some of whose layers train; a leaf to JAX."""


@pytest.mark.parametrize(
    "layers, head", [((), True), ((2,), True), ((2,), False), ((1, 2), False), ((0, 2), False)]
)
def test_counts_what_training_a_part_multiplies(layers, head):
    config, scheme = dataclasses.replace(LLAMA, local_context=2), PreviousContext(d=2)
    tokens = random_tokens(config, 6, 2)
    batch = dict(inputs=tokens, targets=tokens, segment_ids=np.ones_like(tokens))
    batch["weights"] = np.ones(tokens.shape, np.float32)
    params = random_params(config)

    def leaf(x, trains):
        return torch.tensor(x).double().requires_grad_(trains)

    mine = {name: jax.tree.map(lambda x: leaf(x, False), params[name]) for name in params}
    mine["head"].requires_grad_(head)
    mine["layers"] = jax.tree.map(
        lambda x: ByLayer(leaf(of_layer, i in layers) for i, of_layer in enumerate(x)),
        params["layers"],
    )
    with FlopCounterMode(display=False) as counter:
        objective(config, scheme, mine, batch, 6)[0].backward()
    size = layer_parameters(config)
    part = Part(
        lowest_layer=min(layers, default=config.num_layers),
        matrices=[size if i in layers else 0 for i in range(config.num_layers)],
        adapters=0,
        head=head,
    )
    # Nothing below the head trains: its own input needs no gradient.
    unneeded = 0 if layers else 2 * tokens.size // 2 * config.hidden_size * config.vocab_size
    counted = counter.get_total_flops() + unneeded
    assert training_flops(config, scheme, len(tokens), 6, part) == counted


@pytest.mark.parametrize("names", [("gate", "out"), tuple(KERNELS)])
def test_adapters_cost_the_products_of_their_own_gradients(names):
    """Beside those of x @ (kernel + a @ b): x a and dy b^T, and with each of them a gradient."""
    L, tokens = LLAMA.num_layers, 6 * LLAMA.local_context
    adapters = Lora(rank=2, kernels=names).init(jax.random.key(0), random_params(LLAMA)["layers"])
    del adapters["scale"]
    with FlopCounterMode(display=False) as counter:
        for adapter in adapters.values():
            for a, b in zip(*(torch.tensor(np.asarray(adapter[x])) for x in "ab"), strict=True):
                x, dy = torch.ones(tokens, len(a)), torch.ones(tokens, len(b[0]))
                (x @ a).T @ dy, x.T @ (dy @ b.T)
    size = sum(x.size for x in jax.tree.leaves(adapters)) // L
    frozen, adapted = (
        training_flops(LLAMA, NoCrossbatch(), 6, 6, Part(0, [of_adapters] * L, of_adapters, True))
        for of_adapters in (0, size)
    )
    assert adapted - frozen == counter.get_total_flops()


@pytest.mark.parametrize("memory_layers", [(1,), (0, 1, 2)])
def test_what_is_cached_counts_as_so_many_keys(memory_layers):
    """Each of a row's T queries meets each of them, in every head, forward and twice backward."""
    config = dataclasses.replace(LLAMA, memory_layers=memory_layers)
    T, H, D = config.local_context, config.num_heads, config.head_dim
    without, cached = (
        training_flops(config, scheme, 6, 6) for scheme in (NoCrossbatch(), CachedContext(5 * T))
    )
    assert cached - without == 3 * len(memory_layers) * 6 * H * T * 5 * T * 2 * (2 * D)


@given(
    st.integers(1, 100), st.sampled_from([(), (1,), (0, 2)]), st.sampled_from(["swiglu", "gelu"])
)
def test_reading_counts_every_pair_of_tokens_that_see_each_other(tokens, memory_layers, mlp):
    config = dataclasses.replace(LLAMA, memory_layers=memory_layers, mlp=mlp)
    where = places([tokens], config.local_context, config.local_context)
    if tokens % config.local_context == 0 or tokens < config.local_context:  # else cut elsewhere
        local, beyond = visibility(where).sum(2)  # keys that each token sees
        stays = where[:, 0] == where[-1, 0]
        last = max(memory_layers, default=0)
        layers = np.where(stays, config.num_layers, last)
        looking = np.where(stays, len(memory_layers), len([x for x in memory_layers if x < last]))
        per_score = 4 * config.num_heads * config.head_dim
        scores = per_score * (local * layers + beyond * looking).sum()
        of_layer = random_params(config)["layers"]["attention"]
        stored = sum(of_layer[name][0].size for name in ("key", "value")) * bool(memory_layers)
        products = 2 * (layers * layer_parameters(config) + ~stays * stored).sum()
        assert reading_flops(config, tokens) == products + scores
    kernels = random_params(config)["layers"]
    matrices = [kernels["attention"][name] for name in ("query", "key", "value", "out")]
    matrices += [x for x in kernels["mlp"].values()]
    assert config.num_layers * layer_parameters(config) == sum(x.size for x in matrices)
