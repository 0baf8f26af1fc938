"""Compiling for TPU slices that are not there."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import runs

from fot_jax import cli
from fot_jax.common import topologies
from fot_jax.tpu_compile import compile
from fot_jax.training.experiment import Compute
from fot_jax.training.partitioning import MeshShape

pytestmark = pytest.mark.needs("libtpu")

EXPERIMENT = f"""{runs.MODEL}
train.data = @Data()
train.optimizer = @adamw
train.learning_rate = @constant_rate()
train.steps = 12
train.scheme = @PreviousContext()
train.compute = @Compute()
train.initialize_from = %gin.REQUIRED
constant_rate.value = 0.01
ModelConfig.local_context = 128
ModelConfig.hidden_size = 256
ModelConfig.head_dim = 128
PreviousContext.d = 4
Data.source = @Text()
Data.lanes = 16
Text.corpora = [@Corpus()]
Corpus.path = %gin.REQUIRED
Compute.topology = "v4-8"
Compute.dtype = "bfloat16"
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "experiment.gin"
    path.write_text(EXPERIMENT)
    return str(path)


def bindings(*lines):
    return [word for line in lines for word in ("--gin", line)]


NAMES = [
    f"{generation}-{chips * chip.cores}"
    for generation, chip in topologies.CHIPS.items()
    for chips in topologies.SHAPES[generation]
]


@pytest.mark.parametrize("name", NAMES)
def test_every_slice_has_the_devices_it_says(name):
    topology = topologies.topology_of(name)
    devices = compile.devices_of(topology)
    assert len(devices) == topology.devices
    assert math.prod(map(int, topology.shape.split("x"))) == topology.chips
    assert {d.platform for d in devices} == {"tpu"}
    assert ("lite" in devices[0].device_kind) == (topology.generation in ("v5e", "v6e"))


def test_several_slices():
    devices = compile.devices_of(topologies.topology_of("v5e-16"), 3)
    mesh = MeshShape(fsdp=4, replica=3).make(devices)
    slices = [{d.slice_index for d in replica.flat} for replica in mesh.devices]
    assert sorted(map(tuple, slices)) == [(0,), (1,), (2,)]


# --- Verdicts ------------------------------------------------------------------------------------


def report(capsys, *argv):
    code = cli.main(["compile", *argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


FSDP = bindings("Compute.mesh = @MeshShape()", "MeshShape.fsdp = 2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The report of the experiment, all of whose parameters train, on two times two devices.

    Of several d the largest is compiled.
    """
    path = tmp_path_factory.mktemp("whole") / "experiment.gin"
    path.write_text(EXPERIMENT)
    of_d = "SwitchAtStep.steps = (1, 2)", "SwitchAtStep.values = (2, 4, 3)"
    of_d = bindings("train.d = @SwitchAtStep()", *of_d)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["compile", str(path), "--json", *FSDP, *of_d]) == 0
    return json.loads(out.getvalue())


def test_what_fits(whole):
    """Without corpus, tokenizer or checkpoint; bytes of the state as they divide over devices."""
    assert whole["fits"]
    assert whole["mesh"] == {"replica": 1, "data": 2, "fsdp": 2, "tensor": 1}
    assert whole["d"] == 4
    E, F, HD, V = 256, 32, 2 * 128, 64
    sharded = 2 * (4 * E * HD + 3 * E * F) + 2 * V * E
    assert whole["parameters"] == 4 * (sharded // 2 + 5 * E)
    assert 2 * whole["parameters"] <= whole["optimizer"] <= 2 * whole["parameters"] + 1024
    assert whole["batch"] == 32 * 128 * 4 * 4 // 4
    assert whole["parameters"] + whole["optimizer"] < whole["used"] < whole["available"]
    assert whole["available"] == round(30.75 * 2**30)
    assert whole["tokens_per_step"] == 16 * 128
    assert whole["model_flops"] < 2 * whole["flops"]
    assert whole["messages"].keys() >= {"collective-permute", "all-gather"}
    parts = [whole[f"{each}_seconds"] for each in ("compute", "memory", "message")]
    assert whole["step_seconds"] == max(parts)


def test_gradients_of_what_trains_alone_are_sent(whole, experiment, capsys):
    """And computed: of one layer of two the MLP trains."""
    _, part = report(capsys, experiment, *FSDP, *bindings('train.trainable = ("layers/1/mlp/*",)'))
    E, F, HD, V = 256, 32, 2 * 128, 64
    frozen = 2 * 4 * E * HD + 3 * E * F + 2 * V * E
    assert whole["least_messages"] - part["least_messages"] == 2 * frozen // 2
    assert part["flops"] < whole["flops"] and part["messages"] != whole["messages"]
    chip = topologies.topology_of("v4-8").chip  # of which there are four, each of them a device
    assert whole["compute_seconds"] == pytest.approx(whole["flops"] / 4 / chip.flops)
    of_chip = whole["memory_traffic"], sum(whole["messages"].values())
    seconds = whole["memory_seconds"], whole["message_seconds"]
    assert seconds == pytest.approx((of_chip[0] / chip.hbm_rate, of_chip[1] / chip.ici_rate))


@pytest.mark.parametrize("generation", topologies.CHIPS)
def test_what_a_program_may_take_is_what_the_compiler_says(generation):
    """Of one that takes 2 TiB, which it writes with other letters."""
    topology = next(topologies.topology_of(n) for n in NAMES if n.startswith(f"{generation}-"))
    mesh = MeshShape().make(compile.devices_of(topology)[:1])
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((2**22, 2**17), jnp.float32, sharding=whole)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: (x @ x.T).sum()).trace(x).lower().compile()
    used, available = compile._out_of_memory(error.value)
    assert used >= 2**41 and available == topology.chip.program_bytes


@pytest.mark.parametrize(
    "said, used, available",
    [
        ("HLO temporaries (2.00T) exceeds available HBM (30.75G).", 2**41, 30.75 * 2**30),
        ("(3.5P) exceeds available HBM (95.74G)", 3.5 * 2**50, 95.74 * 2**30),
        ("Used 16.52G of 15.48G hbm. Exceeded", 16.52 * 2**30, 15.48 * 2**30),
        ("Used 1.02T of 512.5M hbm", 1.02 * 2**40, 512.5 * 2**20),
    ],
)
def test_sizes_of_any_unit(said, used, available):
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")
    assert compile._out_of_memory(error) == (round(used), round(available))


def test_what_does_not_fit(experiment, capsys):
    argv = [
        experiment,
        "--topology",
        "v2-8",
        *bindings("Data.lanes = 8192", "Data.group_lanes = 8"),
    ]
    assert cli.main(["compile", *argv, *bindings("ModelConfig.hidden_size = 4096")]) == 1
    out = capsys.readouterr().out
    assert out.startswith("v2-8: DOES NOT FIT: ") and " of 7.48 GiB that" in out
    assert float(out.split()[4]) > 7.48


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, ds, window, heads", [("v3-8", (10, 32), 256, 2), ("v4-8", (18, 64), 512, 8)]
)
def test_memory_does_not_grow_with_d(experiment, capsys, topology, ds, window, heads):
    """By XLA's blocks, and by the kernels, which hold nothing in HBM where all is small.

    A device receives keys and values from two others or more with each d: one set is computed with
    while the next arrives, which is one set more than where all are of the neighbour.
    """
    temporaries = []
    size = (f"local_context = {window}", f"hidden_size = {heads * 128}", f"num_heads = {heads}")
    size = (*size, f"num_kv_heads = {heads}")
    size = (*(f"ModelConfig.{each}" for each in size), f"Data.lanes = {ds[-1]}")
    for d in ds:
        more = bindings(*size, f"PreviousContext.d = {d}")
        code, got = report(capsys, experiment, "--topology", topology, *more)
        assert code == 0
        temporaries.append(got["temporaries"])
    assert temporaries[1] < 1.1 * temporaries[0]


def test_suggestions(experiment, capsys):
    argv = [experiment, "--topology", "v5e-1", "--suggest"]
    assert cli.main(["compile", *argv]) == 0
    *tried, _, table, bindings_ = _paragraphs(capsys.readouterr().out)
    assert "v5e-1: fits" in table and "MeshShape.data = " in bindings_
    assert all("s a step" in line for line in tried[0].splitlines())


@pytest.mark.parametrize("mesh", [MeshShape(4, 32), MeshShape(1, 4, 2), MeshShape(-1, 3)])
def test_a_slice_that_the_file_has_no_mesh_for(mesh):
    """Others are tried."""
    got = list(compile.suggestions(Compute(mesh=mesh), 4, lambda compute: compute.mesh and SOME))
    assert got


@pytest.mark.parametrize("slices, replicas", [(1, 1), (1, 2), (2, 2), (2, 4)])
def test_the_files_own_mesh_comes_first(slices, replicas):
    own = MeshShape(-1, fsdp=2, replica=replicas)

    def of(compute):
        data = compute.mesh.sizes(16, slices=slices)[1]
        assert data == compute.mesh.data
        return dataclasses.replace(SOME, mesh=compute.mesh)

    first = next(compile.suggestions(Compute(mesh=own, slices=slices), 16, of))
    assert first.mesh == dataclasses.replace(own, data=16 // (2 * replicas))


def _paragraphs(text):
    paragraphs = text.strip().split("\n\n")
    return [paragraphs[0], *paragraphs]


SMALLER_GROUPS = (
    ", or set Data.group_lanes = 8 for 2 microbatches, which changes which negatives there are"
)


@pytest.mark.parametrize(
    "changes, tried, hint",
    [
        ((), {1}, SMALLER_GROUPS),
        (("Data.group_lanes = 4",), {1, 2, 4}, ""),
        (("PreviousContext.d = 16",), {1}, ""),
        (("train.scheme = @NoCrossbatch()",), {1, 2, 4}, ""),
    ],
    ids=str,
)
def test_microbatches_of_whole_groups_are_tried(
    experiment, capsys, monkeypatch, changes, tried, hint
):
    asked = []

    def compiled(program, compute, name):
        asked.append(compute.accumulation)
        return dataclasses.replace(SOME, fits=False)

    monkeypatch.setattr(compile, "compile_program", compiled)
    argv = [experiment, "--topology", "v5e-1", "--suggest", *bindings(*changes)]
    assert cli.main(["compile", *argv]) == 1
    assert set(asked) == tried
    nothing = f"nothing fits: take a larger slice, or fewer tokens a step{hint}"
    assert capsys.readouterr().out.splitlines()[-1] == nothing


def test_fewer_rows_than_devices(monkeypatch, capsys):
    """32 rows on 256 devices: the 8 key/value heads divide, too."""
    asked = []

    def compiled(program, compute, name):
        asked.append(dict(program.mesh.shape))
        return dataclasses.replace(
            SOME, compute_seconds=1.0, memory_seconds=1.0, message_seconds=1.0
        )

    monkeypatch.setattr(compile, "compile_program", compiled)
    path = Path(__file__).parents[2] / "experiments" / "llama3_8b_fot.gin"
    argv = [str(path), "--topology", "v5e-256", "--suggest", "--json"]
    assert cli.main(["compile", *argv]) == 0
    assert {mesh["tensor"] for mesh in asked} == {8}


def test_the_fastest_that_fits_is_suggested():
    """Less recomputation comes first; what does not divide or fit is passed over."""
    asked = []

    def of(compute):
        asked.append(compute)
        if compute.mesh.tensor > 1:
            raise compile.UserError("does not divide")
        fits = compute.remat != "none" and compute.accumulation > 1
        return dataclasses.replace(SOME, fits=fits, remat=compute.remat)

    got = list(compile.suggestions(Compute(), 8, of))
    for mesh in {compute.mesh for compute in asked if compute.mesh.tensor == 1}:
        of_mesh = [(c.accumulation, c.remat) for c in asked if c.mesh == mesh]
        assert of_mesh == [(1, "none"), (1, "dots"), (1, "full"), (2, "none"), (2, "dots")]
    assert sum(each.fits for each in got) == len({c.mesh for c in asked if c.mesh.tensor == 1})


SOME = compile.Report(
    topology="v4-8",
    slices=1,
    mesh={"data": 8},
    remat="none",
    accumulation=1,
    d=None,
    fits=True,
    used=1,
    available=2,
    model_flops=1,
    compile_seconds=1.0,
)


def test_utilisation_is_of_all_slices():
    seconds = dict(compute_seconds=2.0, memory_seconds=1.0, message_seconds=0.5)
    of_three = dataclasses.replace(SOME, slices=3, model_flops=6 * 4 * 275e12, **seconds)
    assert of_three.utilisation == pytest.approx(1)


EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.gin"))
SMALL = ("quickstart", "dictionary_37m", "smollm2_135m_fot")
FOR_PODS = [path for path in EXPERIMENTS if path.stem not in SMALL]


@pytest.mark.parametrize("path", FOR_PODS, ids=lambda path: path.stem)
def test_experiments_divide_over_the_slice_they_name(path, monkeypatch, capsys):
    monkeypatch.setattr(
        compile, "compile_program", lambda *a: dataclasses.replace(SOME, fits=False)
    )
    assert cli.main(["compile", str(path)]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--topology", "v4-7"], "there is no TPU slice 'v4-7': of v4 there are v4-8, v4-16,"),
        (["--topology", "v5litepod-256"], "no TPU slice 'v5litepod-256': names are v5e-256"),
        (["--topology", "h100"], "there is no TPU slice 'h100': names are v2-…, v3-…,"),
        (bindings("Compute.topology = None"), "add --topology v4-128, or set train.compute = @"),
        (bindings("Compute.topology = 'v9-8'"), "there is no TPU slice 'v9-8'"),
        (bindings("Compute.slices = 0"), "Compute.slices = 0"),
        (bindings("Compute.slices = 2"), "MeshShape.replica = 1 is not a multiple of the 2 TPU"),
        (bindings("Data.lanes = 5"), "10 rows of a microbatch do not divide over 4 devices"),
        (["--topology", "v5p-16"], "32 rows"),
    ],
)
def test_bad_input(experiment, capsys, argv, message):
    if message == "32 rows":  # another slice than the mesh is for
        argv = [*argv, *bindings("Compute.mesh = @MeshShape()", "MeshShape.data = 4")]
        message = "mesh replica=1 x data=4 x fsdp=1 x tensor=1 does not use 8 devices"
    assert cli.main(["compile", experiment, *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fot: error: ") and message in err and err.count("\n") == 1


def test_without_libtpu(experiment, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )
    assert cli.main(["compile", experiment]) == 2
    assert "needs libtpu: pip install -e '.[tpu]'" in capsys.readouterr().err


def test_an_error_that_is_not_of_memory_is_raised():
    error = jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile._out_of_memory(error)
