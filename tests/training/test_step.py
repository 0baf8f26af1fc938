"""Training steps against a float64 objective in PyTorch, on one device and on eight."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import together
from tiny import LLAMA, PAPER, lane_segments, random_params, random_tokens

from fot_jax.common.trees import leaves_by_path, tree_of_leaves
from fot_jax.model import cached_context, crossbatch
from fot_jax.model.schemes import (
    CachedContext,
    NoCrossbatch,
    Packed,
    PackedTable,
    PreviousContext,
)
from fot_jax.model.transformer import Transformer
from fot_jax.training import partitioning
from fot_jax.training import step as steps
from fot_jax.training.partitioning import MeshShape
from fot_jax.training.step import (
    TrainState,
    make_positive_mass,
    make_train_step,
    token_sums,
)

T = 4
SMALL = dataclasses.replace(  # grouped queries; a memory layer, then a scanned one
    LLAMA, vocab_size=64, num_layers=2, memory_layers=(0,), local_context=T
)
DEEPER = dataclasses.replace(PAPER, memory_layers=(0, 2), local_context=T, memory_scaling=0.3)

# The update is the gradient, exactly: the state of sgd without momentum keeps it.
SGD = optax.sgd(1.0, momentum=0.0)


def gradient(*args, **how):
    """The oracle's; its import takes torch, which step_of_processes.py can do without."""
    from oracles import training_step

    return training_step.gradient(*args, **how)


@functools.cache
def make_batch(config, scheme, lanes, seed=0):
    """Documents that end anywhere, some padding, and tokens of weight 0, 1 and 2.

    The first lanes hardly count, so that a mean of microbatches' means would be another number.
    """
    rng = np.random.default_rng(seed)
    segments = lane_segments(lanes, scheme.windows, T, seed)
    weights = rng.choice(np.float32([0, 1, 2]), segments.shape) * (segments > 0)
    weights[: len(weights) // 4] *= rng.random((len(weights) // 4, T)) < 0.3
    return {
        "inputs": random_tokens(config, len(segments), T, seed),
        "targets": random_tokens(config, len(segments), T, seed + 1),
        "segment_ids": segments,
        "weights": weights,
    }


@functools.cache
def step_of(
    config,
    scheme,
    lanes,
    group_lanes,
    *,
    accumulation=1,
    remat="none",
    mesh=None,
    z_loss=0.0,
):
    """(params, batch) -> (state before, state after, info) of one compiled step."""
    mesh = None if mesh is None else MeshShape(*mesh).make()
    rows = lanes * scheme.windows
    plan = crossbatch.make_plan(
        scheme,
        rows // accumulation,
        group_rows=group_lanes * scheme.windows,
        mesh=mesh,
        heads=config.num_heads,
        window=T,
    )
    step = make_train_step(
        Transformer(config, remat=remat), SGD, scheme, plan, accumulation, z_loss
    )

    def place(tree, by):
        return jax.device_put(tree, jax.devices()[0] if mesh is None else by(tree))

    def placed(params, batch):
        state = TrainState(np.int32(7), params, SGD.init(params))
        return (
            place(state, lambda tree: partitioning.shardings(tree, mesh)),
            place(batch, lambda tree: partitioning.rows(mesh)),
        )

    def run(params, batch):
        state, batch = placed(params, batch)
        before = jax.tree.map(np.array, state)
        after, info = step(state, batch)
        assert int(after.step) == 8
        if mesh is not None:
            jax.tree.map(
                lambda x, wanted: (
                    wanted.is_equivalent_to(x.sharding, x.ndim) or pytest.fail(str(x))
                ),
                after,
                partitioning.shardings(after, mesh),
            )
        return before, after, jax.tree.map(np.asarray, info)

    return run


@functools.cache
def expected(config, scheme, lanes, group_lanes, z_loss):
    batch = make_batch(config, scheme, lanes)
    params = random_params(config)
    return gradient(config, scheme, params, batch, group_lanes * scheme.windows, z_loss)


def check(config, scheme, lanes, group_lanes, **how):
    """One step's gradient, update and report are those of the float64 objective."""
    run = step_of(config, scheme, lanes, group_lanes, **how)
    before, after, info = run(random_params(config), make_batch(config, scheme, lanes))
    want, sums = expected(config, scheme, lanes, group_lanes, how.get("z_loss", 0.0))
    assert_gradient(after.opt_state[0].trace, want)
    assert_update(before.params, after.params, want)
    for name, value in sums.items():
        np.testing.assert_allclose(getattr(info.sums, name), value, rtol=1e-5, err_msg=name)
    squares = [np.square(g).sum() for g in jax.tree.leaves(want)]
    np.testing.assert_allclose(info.grad_squares, squares, rtol=1e-4)
    np.testing.assert_allclose(info.grad_norm, np.sqrt(sum(squares)), rtol=1e-5)
    assert info.applied


def assert_gradient(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, wanted in leaves_by_path(want).items():
        leaf = functools.reduce(lambda tree, key: tree[key], name.split("/"), got)
        assert np.linalg.norm(wanted) > 1e-3, name
        error = np.linalg.norm(leaf - wanted) / np.linalg.norm(wanted)
        assert error < 1e-5, f"{name}: {error}"


def assert_update(before, after, gradient):
    jax.tree.map(
        lambda b, a, g: np.testing.assert_allclose(a, b - g, atol=1e-5), before, after, gradient
    )


# --- Loss and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, scheme, z_loss",
    [
        (SMALL, NoCrossbatch(), 0.0),
        (SMALL, PreviousContext(d=3), 0.0),
        (SMALL, Packed(pack=3, range=4), 0.0),
        (SMALL, PackedTable(), 0.1),
        (DEEPER, PreviousContext(d=2, w=2), 0.1),
    ],
    ids=lambda x: None if isinstance(x, float) else x.norm if x in (SMALL, DEEPER) else str(x),
)
def test_step_is_gradient_descent_on_the_objective(config, scheme, z_loss):
    check(config, scheme, 6, 3, z_loss=z_loss)


GROUPED = (SMALL, PreviousContext(d=3), 16, 4)
IN_TWO = dict(accumulation=2, remat="dots")


@pytest.mark.parametrize(
    "how",
    [
        IN_TWO,
        dict(accumulation=4, remat="full"),
        dict(mesh=(8, 1, 1), accumulation=4),  # 4 output rows, fewer than there are devices
        dict(mesh=(1, 4, 2), remat="full"),
    ],
    ids=str,
)
def test_how_it_is_computed_does_not_matter(how):
    check(*GROUPED, **how)


def test_packed_rows_over_devices_with_accumulation():
    check(SMALL, Packed(pack=4, range=5), 8, 4, mesh=(4, 1, 2), accumulation=2)


# Scheme, lanes, lanes of a crossbatch group, microbatches: on 8 devices, groups are of more than 2.
ACROSS = [
    (scheme, 16, 16 // accumulation, accumulation)
    for scheme in (PreviousContext(d=3), Packed(pack=4, range=5))
    for accumulation in (1, 2, 4)
]
ACROSS_PROCESSES = (ACROSS[5],)  # tests/tpu/test_local.py has the other scheme


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, mesh",  # each mesh and each number of microbatches with both schemes; case 2 is above
    [(0, (1, 4, 2)), (1, (4, 1, 2)), (3, (8, 1, 1)), (4, (1, 4, 2)), (5, (4, 1, 2))],
    ids=str,
)
def test_any_mesh_and_any_microbatches(case, mesh):
    *how, accumulation = ACROSS[case]
    check(SMALL, *how, mesh=mesh, accumulation=accumulation)


@pytest.mark.slow
def test_four_processes(tmp_path):
    """With negatives from one process to another."""
    script = Path(__file__).with_name("step_of_processes.py")
    codes, said = together.ended(together.start([script, tmp_path], 4, devices=2))
    assert codes == [0] * 4, said
    for number, (scheme, lanes, group_lanes, _) in enumerate(ACROSS_PROCESSES):
        want, sums = expected(SMALL, scheme, lanes, group_lanes, 0.0)
        with np.load(tmp_path / f"{number}.npz") as got:
            np.testing.assert_allclose(got["loss"], sums["loss"], rtol=1e-5)
            leaves = {name: got[name] for name in got if name != "loss"}
            assert_gradient(tree_of_leaves(leaves), want)


@pytest.mark.parametrize(
    "config", [SMALL, dataclasses.replace(DEEPER, memory_scaling=0.0)], ids=["llama", "paper"]
)
def test_one_cached_window_is_previous_context_without_its_gradients(config):
    """FoT with d = 1 and a stop-gradient, where parameters did not change meanwhile (paper §5)."""
    lanes, scheme = 4, CachedContext(T)
    batch, params = make_batch(config, PreviousContext(), lanes), random_params(config)
    want, sums = gradient(config, PreviousContext(), params, batch, 2 * lanes, detached=True)
    with_gradients, _ = gradient(config, PreviousContext(), params, batch, 2 * lanes)
    before, now = ({k: x[place::2] for k, x in batch.items()} for place in (0, 1))
    model, plan = Transformer(config), crossbatch.Plan()
    nothing = cached_context.empty(config, scheme, lanes, jnp.float32)
    # batch_sums is called outside of jit.
    params, before, now = jax.tree.map(jnp.asarray, (params, before, now))
    *_, cached = steps.batch_sums(model, {"params": params}, nothing, before, scheme, plan)

    def objective(params):
        loss, sums, _ = steps.batch_sums(model, {"params": params}, cached, now, scheme, plan)
        return loss / now["weights"].sum(), sums

    got, got_sums = jax.jit(jax.grad(objective, has_aux=True))(params)
    assert_gradient(got, want)
    for name in ("loss", "correct", "weights"):
        assert float(getattr(got_sums, name)) == pytest.approx(sums[name], rel=1e-5)
    kernels = (x["layers"]["attention"]["key"] for x in (want, with_gradients))
    assert not np.allclose(*kernels, rtol=1e-2)


# --- Token weights and padding -------------------------------------------------------------------


def trace_and_sums(params, batch):
    _, after, info = step_of(*GROUPED, **IN_TWO)(params, batch)
    return jax.tree.map(np.asarray, (after.opt_state[0].trace, info.sums))


def test_tokens_without_weight_have_no_loss():
    """Their targets are of no consequence; those of others are."""
    batch = make_batch(*GROUPED[:3])
    other = (batch["targets"] + 1) % SMALL.vocab_size
    ignored = batch | {"targets": np.where(batch["weights"] == 0, other, batch["targets"])}
    want = trace_and_sums(random_params(SMALL), batch)
    jax.tree.map(np.testing.assert_array_equal, trace_and_sums(random_params(SMALL), ignored), want)
    counted = batch | {"targets": np.where(batch["weights"] > 0, other, batch["targets"])}
    assert trace_and_sums(random_params(SMALL), counted)[1].loss != want[1].loss


def test_padding_is_seen_by_nobody():
    """Whatever tokens it has. A whole lane is padding, and its neighbours' negatives with it."""
    batch = dict(make_batch(*GROUPED[:3]))
    batch["segment_ids"] = batch["segment_ids"].copy()
    batch["segment_ids"][8:10] = 0
    batch["weights"] = batch["weights"] * (batch["segment_ids"] > 0)
    other = (batch["inputs"] + 1) % SMALL.vocab_size
    params = random_params(SMALL)
    changed = batch | {"inputs": np.where(batch["segment_ids"] == 0, other, batch["inputs"])}
    want = trace_and_sums(params, batch)
    jax.tree.map(np.testing.assert_array_equal, trace_and_sums(params, changed), want)
    negatives = batch | {"inputs": np.where(np.arange(32)[:, None] == 10, other, batch["inputs"])}
    assert trace_and_sums(params, negatives)[1].loss != want[1].loss


def test_a_batch_without_any_weight_changes_nothing():
    batch = make_batch(*GROUPED[:3])
    batch = batch | {"weights": np.zeros_like(batch["weights"])}
    before, after, info = step_of(*GROUPED, **IN_TWO)(random_params(SMALL), batch)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert info.applied and info.grad_norm == 0
    assert info.sums == (0, 0, 0, 0)


# --- Cross-entropy in chunks ---------------------------------------------------------------------


def sizes_of_arrays(jaxpr):
    """Elements of every array that a program computes, loops and recomputation included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sizes_of_arrays(inner)


@pytest.mark.parametrize(
    "tied, length, at_once, devices, held",
    [
        (False, 12, 10**9, 1, 12),  # tokens of a row whose logits are held at once
        (False, 12, 5, 1, 4),
        (False, 12, 5, 2, 6),  # a device has half of the rows
        (True, 12, 6, 1, 6),
        (True, 12, 0.1, 1, 1),
        (True, 7, 5, 1, 1),  # a length that only 7 divides
    ],
)
def test_cross_entropy_in_chunks_is_that_of_the_whole(
    monkeypatch, tied, length, at_once, devices, held
):
    rows, config = 12, dataclasses.replace(SMALL, vocab_size=100, tie_embeddings=tied)
    monkeypatch.setattr(steps, "LOGITS_AT_ONCE", at_once * rows * config.vocab_size)
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(config.hidden_size, config.vocab_size))
    hidden = rng.normal(size=(rows, length, config.hidden_size))
    targets = rng.integers(0, config.vocab_size, (rows, length))
    weights = rng.choice([0.0, 1.0, 2.5], (rows, length))
    logits = hidden @ kernel
    targets[0] = logits[0].argmax(-1)  # so that some are right
    log_z = np.log(np.exp(logits).sum(-1))
    p = np.exp(logits - log_z[..., None])
    onehot = np.eye(config.vocab_size)[targets]
    expected = {
        "loss": ((log_z - (logits * onehot).sum(-1)) * weights).sum(),
        "z_loss": (log_z**2 * weights).sum(),
        "correct": ((logits.argmax(-1) == targets) * weights).sum(),
        "weights": weights.sum(),
    }
    d_logits = 3 * (p - onehot + 0.1 * 2 * log_z[..., None] * p) * weights[..., None]
    mesh = None if devices == 1 else MeshShape(devices).make(jax.devices()[:devices])

    def objective(kernel, hidden):
        params = random_params(config) | ({"embedding": kernel.T} if tied else {"head": kernel})
        inputs = hidden, targets, jnp.float32(weights)
        value, sums = token_sums(Transformer(config), {"params": params}, *inputs, 0.1, mesh)
        return 3 * value, sums

    differentiate = jax.grad(objective, argnums=(0, 1), has_aux=True)
    args = jnp.float32(kernel), jnp.float32(hidden)
    (d_kernel, d_hidden), sums = jax.jit(differentiate)(*args)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(sums, name), value, rtol=1e-5, err_msg=name)
    for got, want in (
        (d_kernel, np.einsum("rte,rtv->ev", hidden, d_logits)),
        (d_hidden, np.einsum("rtv,ev->rte", d_logits, kernel)),
    ):
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    largest = max(sizes_of_arrays(jax.make_jaxpr(differentiate)(*args).jaxpr))
    logits_held = rows * held * config.vocab_size
    assert largest == max(logits_held, kernel.size, hidden.size)


# --- Not finite ----------------------------------------------------------------------------------


def broken(how):
    params = jax.tree.map(np.copy, random_params(SMALL))
    if how == "nan in an embedding":
        params["embedding"][make_batch(*GROUPED[:3])["inputs"][-1, -1]] = np.nan
    elif how == "inf in a scale":
        params["final_norm"]["scale"][3] = np.inf
    elif how == "after a huge learning rate":
        params = jax.tree.map(lambda x: x * np.float32(1e30), params)
    return params


@pytest.mark.parametrize(
    "how", ["nan in an embedding", "inf in a scale", "after a huge learning rate"]
)
def test_update_that_is_not_finite_is_skipped(how):
    run = step_of(*GROUPED, **IN_TWO)
    before, after, info = run(broken(how), make_batch(*GROUPED[:3]))
    assert not info.applied
    assert not np.isfinite(info.grad_squares.sum())
    jax.tree.map(np.testing.assert_array_equal, after[1:], before[1:])


def test_squares_tell_which_gradient_is_not_finite():
    """A huge normalised state before a tiny head: logits as ever, but the head's gradient huge."""
    params = broken("not at all")
    params["final_norm"]["scale"] *= np.float32(1e25)
    params["head"] *= np.float32(1e-25)
    run = step_of(*GROUPED, **IN_TWO)
    before, after, info = run(params, make_batch(*GROUPED[:3]))
    assert not info.applied and np.isfinite(info.sums.loss)
    finite = zip(leaves_by_path(params), np.isfinite(info.grad_squares), strict=True)
    assert [name for name, is_finite in finite if not is_finite] == ["head"]
    jax.tree.map(np.testing.assert_array_equal, after[1:], before[1:])


def test_a_skipped_update_caches_nothing():
    """What was computed on the way may not be finite either."""
    scheme, params = CachedContext(T), random_params(SMALL)
    plan = crossbatch.make_plan(scheme, 4, heads=SMALL.num_heads, window=T)
    step = make_train_step(Transformer(SMALL), SGD, scheme, plan)
    batch = dict(make_batch(SMALL, NoCrossbatch(), 4))
    for bad in (False, True):
        cached = cached_context.empty(SMALL, scheme, 4, jnp.float32)
        before = jax.tree.map(np.array, cached)
        weights = batch["weights"] + (np.float32("nan") if bad else 0)
        state = TrainState(jnp.int32(0), jax.tree.map(jnp.array, params), SGD.init(params), cached)
        after, info = step(state, {**batch, "weights": weights})
        assert bool(info.applied) != bad
        assert np.array_equal(after.cached.k, before.k) == bad


# --- Schedules of d ------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 3])
def test_a_step_leaves_the_state_as_it_came(d):
    """In types, so that each d compiles once, whatever d the steps before had."""
    scheme = PreviousContext().with_d(d)
    params = random_params(SMALL)
    state = jax.device_put(TrainState(np.int32(0), params, SGD.init(params)))
    plan = crossbatch.make_plan(scheme, 8, heads=SMALL.num_heads, window=T)
    step = make_train_step(Transformer(SMALL), SGD, scheme, plan)
    after, _ = jax.eval_shape(step, state, make_batch(SMALL, scheme, 4))

    def types(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    assert types(after) == types(jax.eval_shape(lambda x: x, state))


# --- Positive attention mass ---------------------------------------------------------------------


def positive_mass(config, scheme, lanes, group_lanes, *, accumulation=1, mesh=None):
    mesh = None if mesh is None else MeshShape(*mesh).make()
    rows, T = lanes * scheme.windows, config.local_context
    plan = crossbatch.make_plan(
        scheme,
        rows // accumulation,
        group_rows=group_lanes * scheme.windows,
        mesh=mesh,
        heads=config.num_heads,
        window=T,
    )
    tokens = random_tokens(config, rows, T)
    segments = np.repeat(1 + np.arange(lanes, dtype=np.int32), scheme.windows)[:, None]
    batch = {"inputs": tokens, "segment_ids": np.broadcast_to(segments, tokens.shape)}
    measure = make_positive_mass(Transformer(config), plan, accumulation)
    return np.asarray(measure(random_params(config), batch))


def test_positive_mass_of_an_untrained_model():
    """No context is like another one: each gets its share of the attention of every layer."""
    config = dataclasses.replace(DEEPER, local_context=16)
    mass = positive_mass(config, PreviousContext(d=5, w=2), 16, 16)
    assert mass.shape == (2,)
    np.testing.assert_allclose(mass, 2 / 6, rtol=0.1)


def test_positive_mass_without_negatives():
    mass = positive_mass(SMALL, PreviousContext(d=1), 4, 4)
    np.testing.assert_allclose(mass, [1.0], rtol=1e-6)


@pytest.mark.parametrize("mesh", [None, (8, 1, 1)])
def test_positive_mass_is_that_of_the_first_microbatch(mesh):
    """Which is what the plan is for: rows of other microbatches would be taken for its own."""
    got = positive_mass(SMALL, PreviousContext(d=3), 16, 4, accumulation=2, mesh=mesh)
    np.testing.assert_allclose(got, whole_mass(), rtol=1e-5)


@functools.cache
def whole_mass():
    return positive_mass(SMALL, PreviousContext(d=3), 8, 4)
