"""The named models have the published numbers of parameters, and trace in a moment."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fot_jax.common.configurable import configurables_of
from fot_jax.common.errors import UserError
from fot_jax.inference import forward
from fot_jax.model import crossbatch, memory, sizes
from fot_jax.model.lookup import TopK
from fot_jax.model.parameters import parameters_by_layer
from fot_jax.model.schemes import PackedTable, PreviousContext
from fot_jax.model.transformer import Transformer

NAMED = list(configurables_of(sizes))
EXPERIMENTS = (Path(__file__).parents[2] / "experiments").rglob("*.gin")
IN_EXPERIMENTS = {name for path in EXPERIMENTS for name in re.findall(r"@(\w+)", path.read_text())}


@pytest.mark.parametrize(
    "name, published",
    [
        (sizes.openllama_3b, 3_426_473_600),
        (sizes.openllama_7b, 6_738_415_616),
        (sizes.code_llama_7b, 6_738_546_688),
        (sizes.llama3_2_1b, 1_235_814_400),
        (sizes.llama3_1_8b, 8_030_261_248),
        (sizes.smollm2_135m, 134_515_008),
    ],
)
def test_parameters_as_published(name, published):
    assert sizes.parameter_count(name()) == published
    assert sizes.parameter_count(name(memory_layers=())) == published  # memory adds none


@pytest.mark.parametrize(
    "name, published, unit, with_embeddings",
    [
        (sizes.fot_37m, 37, 10**6, False),
        (sizes.fot_184m, 184, 10**6, True),
        (sizes.fot_600m, 6, 10**8, False),
        (sizes.fot_1_2b, 12, 10**8, False),
    ],
)
def test_parameters_of_the_paper_to_the_digits_of_the_name(name, published, unit, with_embeddings):
    config = name()
    count = sizes.parameter_count(config)
    # The 37M model's 64 embeddings do not show; tied embeddings are counted once.
    count -= 0 if with_embeddings else config.vocab_size * config.hidden_size
    # "37M" is rounded down from 37.8M; the others are to the nearest.
    assert published in (count // unit, round(count / unit))


@pytest.mark.parametrize(
    "name",
    [name for name in NAMED if name.__name__ not in IN_EXPERIMENTS],
    ids=lambda name: name.__name__,
)
def test_every_size_traces_in_training(name):
    """Loss gradient of the whole model on a pod's mesh, without allocating it.

    Sizes that experiment files name are traced with those: test_experiments.py.
    """
    config = name(num_layers=4, memory_layers=(1,))
    scheme = PreviousContext(d=2) if config.qk_norm else PackedTable()
    rows = 8 * scheme.windows
    tensor = 1 if config.num_kv_heads % 2 else 2
    mesh = Mesh(
        np.asarray(jax.devices()[:8]).reshape(1, -1, 1, tensor),
        ("replica", "data", "fsdp", "tensor"),
    )
    plan = crossbatch.make_plan(
        scheme, rows, mesh=mesh, heads=config.num_heads, window=config.local_context
    )
    model = Transformer(config, dtype=jnp.bfloat16, remat="full")
    tokens = jax.ShapeDtypeStruct((rows, config.local_context), jnp.int32)
    init = functools.partial(model.init, plan=crossbatch.Plan())
    params = jax.eval_shape(init, jax.random.key(0), tokens, tokens)["params"]

    def loss(params, tokens):
        out = model.apply({"params": params}, tokens, tokens, plan, keep=scheme)
        return model.apply({"params": params}, out.hidden, method="logits").sum(), out

    grads, out = jax.eval_shape(jax.grad(loss, has_aux=True), params, tokens)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grads) == jax.tree.map(
        lambda x: (x.shape, np.float32), params
    )
    kept = 8 * len(range(scheme.windows)[scheme.output_place()])
    assert out.hidden.shape == (kept, config.local_context, config.hidden_size)


@pytest.mark.parametrize("name", NAMED, ids=lambda name: name.__name__)
def test_every_size_traces_at_inference(name):
    """A piece read with a memory of a million tokens, without allocating anything.

    Of four layers, two of which have a memory: each is traced by itself, and those of a kind alike.
    """
    config = name(num_layers=4, memory_layers=(1, 2))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = functools.partial(Transformer(config).init, plan=crossbatch.Plan())
    shape = jax.eval_shape
    params = shape(init, jax.random.key(0), tokens, tokens)["params"]
    params = shape(functools.partial(parameters_by_layer, dtype=jnp.bfloat16), params)
    cache = shape(lambda: forward.empty_cache(config, 2, jnp.bfloat16))
    state = shape(lambda: memory.empty(config, 2, 2**20, "int8"))
    vectors = 2 * 2 * len(config.memory_layers) * config.num_kv_heads * 2**20
    assert 0 < sum(x.size for x in jax.tree.leaves(state)) - vectors * (config.head_dim + 1) < 9
    for T in (1, config.local_context):
        piece = jnp.zeros((2, T), jnp.int32)
        read = functools.partial(forward.run, config, TopK(128), None)
        hidden, after = shape(read, params, cache, state, piece, piece > 0, piece[:, 0])
        assert hidden.shape == (2, T, config.hidden_size) and hidden.dtype == jnp.bfloat16
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), cache
        )


def test_overrides_change_only_what_they_name():
    config = sizes.openllama_3b(memory_layers=(13,), local_context=1024)
    assert config.memory_layers == (13,) and config.local_context == 1024
    plain = dataclasses.replace(config, memory_layers=(6, 12, 18), local_context=2048)
    assert plain == sizes.openllama_3b()


@pytest.mark.parametrize(
    "override, message",
    [
        ({"memory_layer": (8,)}, "no field 'memory_layer': did you mean memory_layers"),
        ({"n_heads": 8}, "no field 'n_heads': did you mean num_heads"),
        ({"zzz": 1}, "no field 'zzz': have vocab_size, hidden_size"),
        ({"memory_layers": (12,)}, "memory_layers has 12, but layers are numbered 0 … 11"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(UserError, match=message):
        sizes.fot_184m(**override)
