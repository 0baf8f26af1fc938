"""What programs cost, against figures worked out by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from tiny import LLAMA, shapes_of

from fot_jax.model import crossbatch, schemes, trained
from fot_jax.model.attention import tpu
from fot_jax.model.attention.partial_softmax import LOOP_SCOPE
from fot_jax.model.transformer import Transformer
from fot_jax.tpu_compile import costs
from fot_jax.training import optimizers
from fot_jax.training.step import TrainState, make_train_step

F32 = 4


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


# --- Products ------------------------------------------------------------------------------------


def flops(function, *arguments, devices=1):
    return costs.product_flops(jax.make_jaxpr(function)(*arguments).jaxpr, devices)


A, B = np.zeros((3, 5), np.float32), np.zeros((5, 7), np.float32)
ONCE = 2 * 3 * 5 * 7


def test_a_product():
    assert flops(lambda a, b: a @ b + 1, A, B) == ONCE
    assert (
        flops(lambda a, b: jnp.einsum("rij,rjk->ik", a, b), np.ones((2, 3, 5)), np.ones((2, 5, 7)))
        == 2 * ONCE
    )


def test_products_in_loops_and_branches():
    def scanned(a, b):
        return lax.scan(lambda x, _: (x + (a @ b).sum(), None), 0.0, length=11)[0]

    def bounded(a, b, n):
        with jax.named_scope(LOOP_SCOPE.format(6)):
            return lax.fori_loop(0, n, lambda i, x: x + (a @ b).sum(), 0.0)

    def either(a, b, n):
        return lax.cond(n > 0, lambda: (a @ b @ b.T).sum(), lambda: (a @ b).sum())

    assert flops(scanned, A, B) == 11 * ONCE
    assert flops(bounded, A, B, 4) == 6 * ONCE
    assert flops(either, A, B, 4) == 2 * ONCE
    assert flops(jax.checkpoint(jax.jit(scanned)), A, B) == 11 * ONCE


def test_products_of_every_device(mesh):
    spec = PartitionSpec("a")
    product = jax.shard_map(
        lambda a, b: a @ b, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )
    assert flops(product, np.ones((6, 5)), B, devices=8) == 8 * ONCE


def step_flops(remat="none", trains=None):
    """Of a step of 4 rows of 8 tokens, every second of which leaves after the memory layer."""
    scheme, params = schemes.PreviousContext(d=2), shapes_of(LLAMA)
    plan = crossbatch.make_plan(scheme, 4, heads=LLAMA.num_heads, window=8)
    optimizer = optimizers.adamw(0.1)
    part = trains and trained.select(params, LLAMA, trains)
    model = Transformer(LLAMA, remat=remat, trained=part)
    moments = jax.eval_shape(optimizer.init, jax.eval_shape(part.take, params) if part else params)
    state = TrainState(jnp.int32(0), params, moments)
    names = dict(inputs=jnp.int32, targets=jnp.int32, segment_ids=jnp.int32, weights=jnp.float32)
    batch = {name: jax.ShapeDtypeStruct((4, 8), dtype) for name, dtype in names.items()}
    step = make_train_step(model, optimizer, scheme, plan)
    return costs.product_flops(step.trace(state, batch).jaxpr.jaxpr)


def test_kept_attention_is_not_computed_again():
    """remat "dots" keeps all products and attention; "full" computes a whole forward pass again."""
    none, dots, full = map(step_flops, ("none", "dots", "full"))
    assert dots == none < full < 4 / 3 * none


def test_kernels_that_do_not_train_have_no_gradients():
    c = LLAMA
    layer = c.hidden_size * (2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.mlp_dim)
    head = c.hidden_size * c.vocab_size
    gradients = 2 * 4 * 8 * 2 * layer + 2 * 2 * 8 * (layer + head)  # 2 of 3 layers have all rows
    assert step_flops() - step_flops(trains=["*norm*"]) == gradients


def test_what_the_kernels_of_tpus_say(monkeypatch):
    """Of two lanes of two windows of two tiles each: forward, and gradients by queries and keys."""
    monkeypatch.setattr(crossbatch, "engine_of", lambda mesh, window: tpu)
    heads, T, tile, D = 4, 1024, 512, 128
    plan = crossbatch.make_plan(schemes.PreviousContext(d=2), 4, heads=heads, window=T)

    def gradients(q, k, v, segments):
        def attention(q, k, v):
            return crossbatch.attention(q, k, v, segments, plan, k)

        out, vjp = jax.vjp(attention, q, k, v)
        return vjp(out)

    q, k = (jax.ShapeDtypeStruct((4, T, n, D), jnp.bfloat16) for n in (heads, 2))
    jaxpr = jax.make_jaxpr(gradients)(q, k, k, jax.ShapeDtypeStruct((4, T), jnp.int32)).jaxpr

    def kernels(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                yield eqn.params["cost_estimate"]
            else:
                yield from itertools.chain(*map(kernels, costs._jaxprs_in(eqn.params)))

    pairs = {"local": 4, "contexts": 4 * 2}  # as many for each row as the most have
    product = 2 * heads * T * T * D
    a_pair = heads * (T // tile) ** 2 * 2 * tile * D * 2  # two blocks of 2 bytes for each of tiles
    want = [
        (products * n * product // (2 if which == "local" else 1), n * a_pair)
        for which, n in pairs.items()
        for products in (2, 3, 4)
    ]
    assert sorted((x.flops, x.bytes_accessed) for x in kernels(jaxpr)) == sorted(want)
    assert costs.product_flops(jaxpr) == sum(flops for flops, _ in want)


# --- Traffic -------------------------------------------------------------------------------------


def traffic_of(function, *arguments):
    return costs.traffic(jax.jit(function).lower(*arguments).compile().as_text())


def around(mesh, function, axes=("a", "b")):
    spec = PartitionSpec(axes)
    return functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False
    )(function)


RING = [(i, (i + 1) % 4) for i in range(4)]


@pytest.mark.parametrize(
    "kind, of_one, sent",
    [
        ("all-gather", lambda x: lax.all_gather(x, "b").sum(0), 3 * 24),
        ("all-reduce", lambda x: lax.psum(x, "b"), 2 * 24 * 3 // 4),
        (
            "reduce-scatter",
            lambda x: jnp.tile(lax.psum_scatter(x, "b", tiled=True), 4),
            24 * 3 // 4,
        ),
        ("all-to-all", lambda x: lax.all_to_all(x, "b", 0, 0, tiled=True), 24 * 3 // 4),
        ("collective-permute", lambda x: lax.ppermute(x, "b", RING), 24),
        ("all-reduce", lambda x: lax.psum(x, ("a", "b")), 2 * 24 * 7 // 8),
    ],
)
@pytest.mark.parametrize("times", [1, 5])
def test_messages(mesh, kind, of_one, sent, times):
    """24 numbers on each device, among 4 devices or all 8, in a loop and not."""

    def several(x):
        return lax.scan(lambda x, _: (of_one(x) * 0.5, None), x, length=times)[0]

    x = jax.ShapeDtypeStruct(
        (8 * 24,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("a", "b")))
    )
    got = traffic_of(around(mesh, several), x)
    assert got.messages == {kind: times * sent * F32}
    assert got.counts == {kind: times}


def test_collectives_of_one_kind_are_counted_each(mesh):
    sharding = NamedSharding(mesh, PartitionSpec(("a", "b")))
    x = jax.ShapeDtypeStruct((8 * 24,), jnp.float32, sharding=sharding)
    back = [(j, i) for i, j in RING]
    both = around(mesh, lambda x: lax.ppermute(x, "b", RING) * jnp.sin(lax.ppermute(x, "b", back)))
    got = traffic_of(both, x)
    assert got.counts == {"collective-permute": 2}
    assert got.messages == {"collective-permute": 2 * 24 * F32}


def test_memory_is_read_and_written_once():
    x = np.zeros(1000, np.float32)
    assert traffic_of(lambda x: jnp.sin(x) + 1, x).memory == 2 * 1000 * F32


def test_a_loop_reads_what_it_slices():
    """Ten rows of an array that is never read whole, each added to a sum."""
    rows = np.zeros((10, 1 << 16), np.float32)

    def total(rows):
        return lax.fori_loop(0, 10, lambda i, x: x + jnp.sin(rows[i]), jnp.zeros(1 << 16))

    row = (1 << 16) * F32
    assert 10 * 3 * row <= traffic_of(total, rows).memory <= 10 * 4 * row + 2 * row


def test_a_loop_without_a_known_end_is_as_long_as_its_name_says():
    def some(x, n):
        with jax.named_scope(LOOP_SCOPE.format(7)):
            return lax.fori_loop(0, n, lambda i, x: jnp.sin(x), x)

    def memory(length):
        return traffic_of(some, np.zeros(length, np.float32), 3).memory

    assert memory(2000) - memory(1000) >= 7 * 2 * 1000 * F32
