"""Meshes, and where parameters, optimizer states and rows go on them."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from tiny import LLAMA, PAPER, shapes_of

from fot_jax.common.errors import UserError
from fot_jax.common.trees import leaves_by_path
from fot_jax.model import crossbatch, schemes
from fot_jax.model.transformer import Transformer
from fot_jax.training import optimizers, partitioning
from fot_jax.training.partitioning import MeshShape
from fot_jax.training.step import TrainState, make_train_step

EVEN = dataclasses.replace(LLAMA, vocab_size=64)


# --- Meshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, sizes",
    [
        (MeshShape(), (1, 8, 1, 1)),
        (MeshShape(fsdp=2, tensor=2), (1, 2, 2, 2)),
        (MeshShape(2, 1, 4), (1, 2, 1, 4)),
        (MeshShape(-1, 8, 1), (1, 1, 8, 1)),
        (MeshShape(replica=2, tensor=2), (2, 2, 1, 2)),
    ],
)
def test_mesh_uses_every_device_once(shape, sizes):
    mesh = shape.make()
    assert mesh.devices.shape == sizes
    assert mesh.axis_names == ("replica", "data", "fsdp", "tensor")
    assert list(mesh.devices.flat) == jax.devices()
    assert dict(shape.make_abstract().shape) == dict(mesh.shape)


def test_mesh_of_some_devices():
    mesh = MeshShape(tensor=3).make(jax.devices()[2:8])
    assert [[device.id for device in row] for row in mesh.devices[0, :, 0]] == [
        [2, 3, 4],
        [5, 6, 7],
    ]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a pod, as far as a mesh looks at it."""

    id: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v3"
    slice_index: int | None = None


def test_devices_of_a_process_are_neighbours():
    """By id they are not on a TPU: process 0 of a v3-32 has 0 … 3 and 8 … 11 (JAX's own guide)."""
    chips = [Chip(i, i // 4 % 2) for i in range(16)]
    mesh = MeshShape(fsdp=2, tensor=2).make(chips)
    assert [chip.id for chip in mesh.devices.flat] == [
        *(0, 1, 2, 3, 8, 9, 10, 11),
        *(4, 5, 6, 7, 12, 13, 14, 15),
    ]


def test_a_replica_lies_in_one_slice():
    """Whatever order the devices of two slices of two hosts come in."""
    order = np.random.default_rng(0).permutation(16)
    chips = [Chip(int(i), int(i) // 4 ^ 2, slice_index=int(i) // 8) for i in order]
    mesh = MeshShape(replica=4, fsdp=2, tensor=2).make(chips)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert slices.reshape(4, -1).tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]
    with pytest.raises(UserError, match="replica = 1 is not a multiple of the 2 TPU slices"):
        MeshShape(fsdp=2).make(chips)
    with pytest.raises(UserError, match="replica=4 x data=-1 x fsdp=3 x tensor=1 does not use"):
        MeshShape(fsdp=3, replica=4).make(chips)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MeshShape(fsdp=0), r"MeshShape\.fsdp = 0: give 1 or more devices$"),
        (lambda: MeshShape(tensor=-1), r"MeshShape\.tensor = -1: give 1 or more devices$"),
        (lambda: MeshShape(fsdp=2.0), r"MeshShape\.fsdp = 2\.0: give 1 or more devices$"),
        (lambda: MeshShape(data=0), r"MeshShape\.data = 0: give 1 or more devices \(-1: all"),
        (lambda: MeshShape(data=-2), r"MeshShape\.data = -2: give 1 or more devices \(-1: all"),
        (
            lambda: MeshShape(data=4).make(),
            "replica=1 x data=4 x fsdp=1 x tensor=1 does not use 8 devices",
        ),
        (lambda: MeshShape(data=16).make(), "data=16 x fsdp=1 x tensor=1 does not use 8"),
        (lambda: MeshShape(fsdp=3).make(), "data=-1 x fsdp=3 x tensor=1 does not use 8"),
        (lambda: MeshShape(tensor=16).make(), "data=-1 x fsdp=1 x tensor=16 does not use 8"),
        (lambda: MeshShape(fsdp=3).make_abstract(), "data=-1 x fsdp=3 x tensor=1 does not use"),
        (lambda: MeshShape(tensor=16).make_abstract(), "data=-1 x fsdp=1 x tensor=16 does not"),
    ],
)
def test_bad_meshes(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_on_more_devices_than_are_here_can_be_traced(accumulation):
    mesh = MeshShape(data=32, fsdp=2, tensor=2).make_abstract()
    assert mesh.size == 128 > jax.device_count()
    scheme = schemes.PreviousContext(d=4)
    plan = crossbatch.make_plan(
        scheme, 256 // accumulation, group_rows=32, mesh=mesh, heads=EVEN.num_heads, window=8
    )
    optimizer = optimizers.adamw(0.1)
    params = shapes_of(EVEN)
    state = TrainState(jnp.int32(0), params, jax.eval_shape(optimizer.init, params))
    batch = {
        name: jax.ShapeDtypeStruct((256, 8), dtype, sharding=partitioning.rows(mesh))
        for name, dtype in dict(
            inputs=jnp.int32, targets=jnp.int32, segment_ids=jnp.int32, weights=jnp.float32
        ).items()
    }
    partitioning.shardings(state, mesh)
    step = make_train_step(Transformer(EVEN), optimizer, scheme, plan, accumulation)
    after, info = jax.eval_shape(step, state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert info.grad_squares.shape == (len(jax.tree.leaves(params)),)


# --- Parameters and optimizer states -------------------------------------------------------------


def pieces(tree, mesh):
    """{path: how many pieces each dimension is cut into}, from arrays placed on devices."""
    of = partitioning.shardings(tree, mesh)
    placed = jax.tree.map(lambda x, s: jax.device_put(jnp.zeros(x.shape, x.dtype), s), tree, of)

    def cut(leaf):
        shards = {tuple(map(str, shard.index)) for shard in leaf.addressable_shards}
        by_dimension = tuple(len({index[i] for index in shards}) for i in range(leaf.ndim))
        assert len(shards) == np.prod(by_dimension, dtype=int)
        return by_dimension

    return {name: cut(leaf) for name, leaf in leaves_by_path(placed).items()}


# Written out for fsdp 4 and tensor 2: what a projection reads from the residual stream is over
# fsdp, its heads or inner units over tensor, and so is the vocabulary.
SHARDED = {
    "embedding": (2, 4),
    "head": (4, 2),
    "layers/attention/query": (1, 4, 2),
    "layers/attention/key": (1, 4, 2),
    "layers/attention/value": (1, 4, 2),
    "layers/attention/out": (1, 2, 4),
    "layers/mlp/gate": (1, 4, 2),
    "layers/mlp/up": (1, 4, 2),
    "layers/mlp/down": (1, 2, 4),
}


@pytest.mark.parametrize("family", [LLAMA, PAPER], ids=["llama", "paper"])
def test_every_kernel_is_sharded_and_nothing_else(family):
    params = shapes_of(dataclasses.replace(family, vocab_size=64))
    got = pieces(params, MeshShape(1, 4, 2).make())
    small = ("scale", "bias", "log_scale")
    assert {name for name in got if name.split("/")[-1] not in small} <= SHARDED.keys()
    for name, cut in got.items():
        assert cut == SHARDED.get(name, (1,) * len(cut)), name


def test_data_axis_replicates_parameters():
    for cut in pieces(shapes_of(EVEN), MeshShape().make()).values():
        assert set(cut) <= {1}


def test_adamw_moments_go_where_their_parameters_are():
    params = shapes_of(EVEN)
    state = jax.eval_shape(optimizers.adamw(0.1).init, params)
    got = pieces(state, MeshShape(1, 4, 2).make())
    for moment in ("mu", "nu"):
        of = {name.split(f"{moment}/")[1]: cut for name, cut in got.items() if f"{moment}/" in name}
        assert of == pieces(params, MeshShape(1, 4, 2).make())


@pytest.mark.parametrize("factor", [8, 10**6])  # statistics of matrices factored, and not
def test_adafactor_statistics_are_replicated_when_factored(factor):
    params = shapes_of(EVEN)
    state = jax.eval_shape(optimizers.adafactor(0.1, min_dim_size_to_factor=factor).init, params)
    got = pieces(state, MeshShape(1, 4, 2).make())
    shapes = {name: leaf.shape for name, leaf in leaves_by_path(state).items()}
    whole = {name: leaf.shape for name, leaf in leaves_by_path(params).items()}
    sharded = set()
    for name, cut in got.items():
        parameter = next((p for p in SHARDED if name.endswith(p.removeprefix("layers/"))), None)
        if parameter is not None and shapes[name] == whole[parameter]:
            assert cut == SHARDED[parameter], name
            sharded.add(name)
        else:
            assert set(cut) <= {1}, name
    # The running mean of updates is always as large as the parameters; the second moment only
    # when it is not factored.
    assert len(sharded) == len(SHARDED) * (1 if factor == 8 else 2)


@pytest.mark.parametrize(
    "change, shape, message",
    [
        (
            dict(vocab_size=61),
            MeshShape(4, 1, 2),
            r"^embedding \(61, 32\): 61 does not divide over mesh axis tensor of 2",
        ),
        (
            dict(hidden_size=36),
            MeshShape(1, 8, 1),
            r"^embedding \(64, 36\): 36 does not divide over mesh axis fsdp of 8",
        ),
        (
            dict(mlp_dim=49),
            MeshShape(4, 1, 2),
            r"^layers/mlp/down \(3, 49, 32\): 49 does not divide over mesh axis tensor of 2",
        ),
        (
            dict(num_kv_heads=1, head_dim=4),
            MeshShape(1, 1, 8),
            r"^layers/attention/key \(3, 32, 4\): 4 does not divide over mesh axis tensor of 8",
        ),
    ],
)
def test_parameters_that_do_not_divide(change, shape, message):
    params = shapes_of(dataclasses.replace(EVEN, **change))
    with pytest.raises(UserError, match=message):
        partitioning.shardings(params, shape.make())


def test_a_state_that_does_not_divide_names_its_parameter():
    params = shapes_of(dataclasses.replace(EVEN, mlp_dim=49))
    state = TrainState(jnp.int32(0), {}, jax.eval_shape(optax.trace(0.9).init, params))
    with pytest.raises(UserError, match=r"^opt_state/trace/layers/mlp/down \(3, 49, 32\): 49 does"):
        partitioning.shardings(state, MeshShape(4, 1, 2).make())


# --- Rows ----------------------------------------------------------------------------------------


def test_rows_go_over_replica_data_and_fsdp():
    mesh = MeshShape(1, 2, 2, replica=2).make()
    batch = jax.device_put(np.arange(24).reshape(8, 3), partitioning.rows(mesh))
    for place, device in np.ndenumerate(mesh.devices):
        (shard,) = (s for s in batch.addressable_shards if s.device == device)
        replica, _, fsdp, _ = place
        first = 2 * (2 * replica + fsdp)
        np.testing.assert_array_equal(shard.data, batch[first : first + 2])


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 4])] * 3),
    chips=st.sampled_from([1, 2, 4, 8]),
    per_device=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_processes_share_out_the_rows(sizes, chips, per_device, seed):
    """In order, in equal parts, all rows; those of a process are those its devices hold."""
    devices = int(np.prod(sizes))
    chips = min(chips, devices)
    processes = devices // chips
    owners = np.random.default_rng(seed).permutation(np.repeat(np.arange(processes), chips))
    mesh = MeshShape(*sizes).make([Chip(i, int(owner)) for i, owner in enumerate(owners)])
    rows = per_device * sizes[0] * sizes[1]
    on = partitioning.rows(mesh).devices_indices_map((rows,))
    for process in range(processes):
        owned = partitioning.owned_rows(mesh, rows, process)
        held = [range(rows)[on[d][0]] for d in mesh.devices.flat if d.process_index == process]
        assert set(owned) == set().union(*held)
        assert len(owned) == max(per_device, rows // processes)
        assert owned.start == process * rows // processes // per_device * per_device


def test_this_process_owns_all_rows_when_alone():
    assert partitioning.owned_rows(MeshShape(2, 2, 2).make(), 12) == range(12)


def test_rows_that_do_not_divide():
    with pytest.raises(UserError, match=r"12 rows of a batch do not divide over 8 devices \(mesh"):
        partitioning.owned_rows(MeshShape().make(), 12)
    with pytest.raises(UserError, match="6 rows of a batch do not divide over 4 devices"):
        partitioning.owned_rows(MeshShape(2, 2, 2).make(), 6)


@pytest.mark.parametrize("of_group", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("of_process", [1, 2, 3, 4, 6, 8, 12, 24])
def test_groups_are_read_by_every_process_that_has_rows_of_them(of_process, of_group):
    for start in range(0, 24, of_process):
        rows = range(start, start + of_process)
        groups, mine = partitioning.groups_of(rows, of_group)
        assert list(groups) == sorted({row // of_group for row in rows})
        read = [group * of_group + i for group in groups for i in range(of_group)]
        assert read[mine] == list(rows)


def test_a_mesh_that_deals_rows_is_refused():
    chips = np.array([Chip(i, i % 2) for i in range(4)]).reshape(1, 4, 1, 1)
    with pytest.raises(ValueError, match="rows of process 1 lie apart"):
        partitioning.owned_rows(Mesh(chips, partitioning.AXES), 8, process=1)


def test_a_cpu_is_taken_for_several_devices(tmp_path):
    """The same steps; what the step needs is what all of them need."""
    experiment = runs.write(tmp_path, f"{runs.DICTIONARY}train.compute = @Compute()\n")
    program = "import sys, jax, fot_jax.cli as cli; print(cli.main(sys.argv[1:]), jax.devices())"
    environment = runs.with_devices(1)
    flags = environment.pop("XLA_FLAGS")
    environment["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    needed = []
    for count in (1, 2):
        bindings = f"Compute.cpu_devices = {count}", "ModelConfig.mlp_dim = 4096"
        argv = runs.arguments(experiment, tmp_path / f"{count}", *bindings)
        command = [sys.executable, "-c", program, *argv]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        code, devices = done.stdout.splitlines()[-1].split(maxsplit=1)
        assert code == "0" and devices.count("CpuDevice") == count, done.stderr
        needed.append(float(re.search(r"MB of memory: ([\d.]+) MB", done.stderr)[1]))
    one, two = (runs.training_curve(tmp_path / name) for name in "12")
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert needed[1] == pytest.approx(2 * needed[0], rel=0.05)  # each has all parameters
