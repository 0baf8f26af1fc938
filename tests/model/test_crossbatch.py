"""Crossbatch against brute force: every score written out, in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossbatch_checks import check, mesh_of, ours, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.crossbatch import visibility

from fot_jax.common.errors import UserError
from fot_jax.model import crossbatch
from fot_jax.model.schemes import (
    Context,
    NoCrossbatch,
    Packed,
    PackedTable,
    PreviousContext,
    Scheme,
)

schemes = st.one_of(
    st.builds(PreviousContext, d=st.integers(1, 4), w=st.integers(1, 2)),
    st.builds(Packed, pack=st.integers(1, 5), range=st.integers(0, 9)),
    st.sampled_from(
        [PackedTable(), PackedTable(((0, 0), (1, 2), (2, 5), (3, 4))), PackedTable(((0, 3),))]
    ),
    st.just(NoCrossbatch()),
)


@settings(max_examples=20, deadline=None)
@given(
    scheme=schemes,
    groups=st.integers(1, 2),
    group_lanes=st.integers(4, 5),
    window=st.sampled_from([1, 5, 8]),
    kv_heads=st.integers(1, 2),
    ratio=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([2, 8]),
    seed=st.integers(0, 2**31),
)
def test_equals_brute_force(scheme, groups, group_lanes, window, kv_heads, ratio, dim, seed):
    lanes = groups * group_lanes
    check(scheme, lanes, group_lanes, window, kv_heads * ratio, kv_heads, dim, seed)


@pytest.mark.parametrize(
    "contexts, said",
    [
        ([[], [], []], "has 3 rows"),
        ([[4], [], [], []], "row 0 attends to row 4, of rows 0 to 3"),
        ([[], [-1], [], []], "row 1 attends to row -1"),
        ([[], [1], [], []], "row 1 attends to row 1 of its own lane"),
        ([[], [], [3], []], "row 2 attends to row 3 of its own lane"),
        ([[2], [], [], [0, 2, 0]], r"row 3 attends to a row twice: \[0, 2, 0\]"),
        ([[2, 3], [0], [], [2, 1]], None),
    ],
)
def test_contexts_that_no_scheme_may_give(contexts, said):
    class Given(Scheme):
        windows = 2

        def contexts(self, rows):
            return [[Context(row, True) for row in of_row] for of_row in contexts]

    def make():
        crossbatch.make_plan(Given(), 4, heads=1, window=8)

    if said is None:
        return make()
    with pytest.raises(UserError, match=f"Given.*{said}"):
        make()


@pytest.mark.parametrize(
    "tile, strip, budget", [(4, 2, 2), (4, 4, 100), (8, 2, 10**6), (16, 4, 1), (16, 5, 1)]
)
def test_any_tiling_gives_the_same(monkeypatch, tile, strip, budget):
    # Small tiles and steps, so that the paths for long windows run at a size brute force can do.
    monkeypatch.setattr(crossbatch.partial_softmax, "tile_of", lambda length: min(tile, length))
    monkeypatch.setattr(crossbatch.partial_softmax, "STRIP", strip)
    monkeypatch.setattr(crossbatch.partial_softmax, "slots_of", lambda *a: budget)
    for scheme in (PreviousContext(d=3, w=2), Packed(pack=3, range=7)):
        check(scheme, 6, 3, 16, 4, 2, 4, seed=tile + budget)


ACROSS = [
    (PreviousContext(d=3), 8, 8),  # negatives on the next devices, around the end
    (PreviousContext(d=8), 8, 8),
    (PreviousContext(d=2), 16, 4),  # groups smaller than the ring of all devices
    (PreviousContext(d=2), 16, 2),
    (PreviousContext(d=5, w=3), 8, 8),
    (Packed(pack=2, range=15), 8, 8),
    (Packed(pack=4, range=5), 8, 4),
    (Packed(pack=16, range=15), 1, 1),  # one document over all devices
    (PackedTable(((0, 0), (1, 2), (2, 5), (3, 4))), 4, 4),
]
# Every scheme on all devices and on half of them; the other axes in turn.
MESHES = [(shape, of) for of in ACROSS for shape in ((1, 8, 1, 1), (1, 2, 2, 2))]
MESHES += zip([(2, 2, 1, 2), (2, 1, 4, 1), (1, 1, 8, 1)] * 2, ACROSS[::-1], strict=False)


@pytest.mark.parametrize("shape, of", MESHES, ids=str)
def test_on_eight_devices(shape, of):
    check(*of, 4, 4, 2, 4, seed=1, mesh=mesh_of(*shape))


@settings(max_examples=8, deadline=None)
@given(scheme=schemes, seed=st.integers(0, 2**31), tensor=st.sampled_from([None, 1, 2]))
def test_positive_mass(scheme, seed, tensor):
    lanes = 8
    rows = lanes * scheme.windows
    q, _, k_context, v, _, segments = random_inputs(seed, rows, 4, 4, 2, 4)
    mesh = mesh_of(1, 8 // tensor, 1, tensor) if tensor else None
    plan = crossbatch.make_plan(scheme, rows, mesh=mesh, heads=4, window=4)
    got = jax.jit(lambda *a: crossbatch.positive_mass(*a, plan))(q, k_context, v, segments)

    seen = visibility(scheme, rows, rows, segments)
    scores = np.einsum("rthd,ushd->rthus", q, np.repeat(k_context, 2, axis=2)).astype(np.float64)
    weight = np.exp(scores) * seen[:, :, 1][:, :, None]
    same_lane = np.arange(rows)[:, None] // scheme.windows == np.arange(rows) // scheme.windows
    positive = (weight * same_lane[:, None, None, :, None]).sum((3, 4))
    sees = (positive > 0) & (segments > 0)[:, :, None]
    want = (positive[sees] / weight.sum((3, 4))[sees]).mean() if sees.any() else np.nan
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_gradients_reach_the_contexts_of_other_devices():
    mesh = mesh_of(1, 8, 1, 1)
    plan = crossbatch.make_plan(PreviousContext(d=2), 16, mesh=mesh, heads=1, window=2)
    inputs = random_inputs(0, 16, 2, 1, 1, 2, padding=False)
    _, (_, _, d_context, _) = ours(plan, *inputs)
    previous = np.abs(d_context[0::2]).sum((1, 2, 3))
    assert (previous > 0).all() and not d_context[1::2].any()


@pytest.mark.parametrize("family", [PreviousContext, Packed])
def test_with_d_changes_only_d(family):
    name = "d" if family is PreviousContext else "range"
    other = {PreviousContext: {"w": 3, "advance": 2}, Packed: {"pack": 5}}[family]
    assert family(**other).with_d(7) == family(**other, **{name: 7})


def test_longllama_table_reads_as_the_paper():
    """LongLLaMA: per place (positives, negatives) of the 3B model, in the second pack."""
    contexts = PackedTable().contexts(8)
    counts = [(sum(c.positive for c in row), sum(not c.positive for c in row)) for row in contexts]
    assert counts == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 0), (1, 1), (2, 1), (3, 0)]
    assert [c.row for c in contexts[6]] == [5, 4, 3]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PreviousContext(d=9).contexts(16), "PreviousContext.d = 9 is larger than"),
        (lambda: PreviousContext(d=0), "PreviousContext.d = 0: give 1 or more"),
        (lambda: Packed(pack=0), "Packed.pack = 0"),
        (lambda: Packed(range=-1), "Packed.range = -1"),
        (lambda: PackedTable(((1, 0),)), r"PackedTable.table\[0\] = \(1, 0\)"),
        (lambda: NoCrossbatch().with_d(2), "NoCrossbatch has no d"),
        (lambda: PackedTable().with_d(2), "PackedTable has no d"),
        (
            lambda: crossbatch.make_plan(Packed(4), 12, group_rows=8, heads=1, window=4),
            "12 rows of a microbatch are not whole crossbatch groups of 8",
        ),
    ],
)
def test_bad_schemes(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_rows_that_do_not_fit_the_mesh():
    mesh = mesh_of(1, 8, 1, 1)
    with pytest.raises(UserError, match="12 rows of a microbatch do not divide over 8 devices"):
        crossbatch.make_plan(Packed(4), 12, mesh=mesh, heads=1, window=4)
    with pytest.raises(UserError, match="a device has 6 rows, a crossbatch group 4"):
        crossbatch.make_plan(Packed(4), 48, group_rows=4, mesh=mesh, heads=1, window=4)


def test_memory_does_not_grow_with_d():
    """Temporaries of the gradient at 2048 tokens: flat in d, a quarter of the dense formulation."""
    lanes, T, H, D = 16, 2048, 8, 64
    q = jax.ShapeDtypeStruct((lanes, T, H, D), jnp.float32)
    segments = jax.ShapeDtypeStruct((lanes, T), jnp.int32)

    def temporaries(attention, *args):
        grad = jax.grad(lambda *a: attention(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2, 3))
        compiled = jax.jit(grad).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def crossbatched(d):
        plan = crossbatch.make_plan(Packed(pack=2, range=d), lanes, heads=H, window=T)
        return temporaries(
            lambda q, k, kc, v, s: crossbatch.attention(q, k, v, s, plan, kc), q, q, q, q, segments
        )

    def dense(q, k, k_context, v):
        rows = (np.arange(lanes)[:, None] - np.arange(1, 9)) % lanes
        k_all = jnp.concatenate([k[:, None], k_context[rows]], 1).reshape(lanes, -1, H, D)
        v_all = jnp.concatenate([v[:, None], v[rows]], 1).reshape(lanes, -1, H, D)
        causal = jnp.concatenate([jnp.tri(T, dtype=bool), jnp.ones((T, 8 * T), bool)], 1)
        return jax.nn.dot_product_attention(q, k_all, v_all, mask=causal[None, None])

    at_2, at_16 = crossbatched(2), crossbatched(16)
    assert at_16 < 1.1 * at_2
    assert at_16 < temporaries(dense, q, q, q, q) / 4
