"""Runs of the baselines that the paper compares with, from experiment files alone."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from runs import bind, refused_untouched

from fot_jax import cli

# Documents of four windows; of 8 lanes, each sees two of its earlier windows.
MEMORIZING = f"""{runs.DICTIONARY}
train.scheme = @CachedContext()
train.compute = @Compute()
train.evaluation = @Evaluation()
Compute.mesh = @MeshShape()
CachedContext.tokens = 32
CachedContext.lookup = @TopK()
TopK.k = 4
ModelConfig.memory_gate = True
Data.lanes = 8
DictionaryLookup.document_tokens = 64
Checkpoints.every = 5
Evaluation.evals = (@PerplexityByContext(),)
PerplexityByContext.memory_sizes = (0, 32)
PerplexityByContext.lookup = @TopK()
PerplexityByContext.documents = 4
"""
TRANSFORMER_XL = (
    *("ModelConfig.memory_layers = (0, 1)", "ModelConfig.memory_before = True"),
    *("ModelConfig.memory_gate = False", "CachedContext.tokens = 16"),
    *("CachedContext.lookup = @Dense()", "PerplexityByContext.memory_sizes = (0, 16)"),
    "PerplexityByContext.lookup = @Dense()",
)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.gin").write_text(MEMORIZING)
    return tmp_path / "experiment.gin"


@dataclasses.dataclass
class Run:
    bindings: tuple[str, ...]
    workdir: Path


@pytest.fixture(scope="module", params=[(), TRANSFORMER_XL], ids=["memorizing", "transformer_xl"])
def one(request, tmp_path_factory):
    """A run on one device."""
    directory = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch, runs.first_devices(patch, 1):
        assert runs.train(runs.write(directory, MEMORIZING), directory / "run", *request.param) == 0
    return Run(request.param, directory / "run")


def test_a_run_in_two_parts_is_as_in_one(one, experiment, tmp_path, monkeypatch):
    """What is cached is in the checkpoint: step 6 sees windows of steps 4 and 5."""
    with runs.first_devices(monkeypatch, 1):
        for more in (["train.steps = 5"], []):
            bindings = (*one.bindings, *more, "Evaluation.evals = ()")
            assert runs.train(experiment, tmp_path / "two", *bindings) == 0
    of_one, of_two = runs.training_curve(one.workdir), runs.training_curve(tmp_path / "two")
    assert [row["step"] for row in of_one] == list(range(1, 13)) and of_one == of_two
    runs.assert_same_parameters(one.workdir, tmp_path / "two")


def test_many_devices_train_as_one(one, experiment, tmp_path):
    mesh = ("MeshShape.data = 2", "MeshShape.fsdp = 2", "MeshShape.tensor = 2")
    bindings = (*mesh, "Compute.accumulation = 2", *one.bindings, "Evaluation.evals = ()")
    assert runs.train(experiment, tmp_path / "many", *bindings) == 0
    for name in ("loss", "grad_norm"):
        of_one, of_many = (
            np.array([row[name] for row in runs.training_curve(workdir)], float)
            for workdir in (one.workdir, tmp_path / "many")
        )
        np.testing.assert_allclose(of_many, of_one, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("one", [()], ids=["memorizing"], indirect=True)
def test_the_gate_learns(one, capsys):
    """That of the memory layer alone; and `fot convert check` compares it with the rest."""
    gate = runs.parameters(one.workdir)["layers"]["attention"]["memory_gate"]
    assert gate.shape == (2, 2) and not gate[0].any() and (np.abs(gate[1]) > 0.01).all()
    apart = runs.parameters(one.workdir)
    of_layers = 2 * len(jax.tree.leaves(apart.pop("layers")))
    count = len(jax.tree.leaves(apart)) + of_layers
    capsys.readouterr()
    assert cli.main(["convert", "check", str(one.workdir), str(one.workdir)]) == 0
    assert f"{count} tensors compared, {count} the same" in capsys.readouterr().out


def test_from_fot_to_a_memorizing_transformer(experiment, tmp_path, monkeypatch):
    """By experiment files alone: without a gate it has the same parameters (paper §5)."""
    no_gate = ("train.steps = 2", "ModelConfig.memory_gate = False", "Evaluation.evals = ()")
    start = f"train.initialize_from = '{tmp_path / 'fot'}'"
    with runs.first_devices(monkeypatch, 1):
        fot = "train.scheme = @PreviousContext()"
        assert runs.train(experiment, tmp_path / "fot", fot, *no_gate) == 0
        at_rest = "constant_rate.value = 0.0"
        assert runs.train(experiment, tmp_path / "mt", start, at_rest, *no_gate) == 0
    runs.assert_same_parameters(tmp_path / "fot", tmp_path / "mt")


CROSSBATCH = "train.scheme = @PreviousContext()", "ModelConfig.memory_gate = False"


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (
            ["CachedContext.tokens = 24"],
            "CachedContext.tokens = 24 for a local context of 16: give",
        ),
        (
            ["ModelConfig.memory_before = True"],
            "CachedContext.tokens = 32 for a local context of 16: give the same (model.memory_bef",
        ),
        (["ModelConfig.memory_layers = ()"], "the scheme CachedContext needs memory layers"),
        (
            ["train.scheme = @PreviousContext()"],
            "model.memory_gate = True needs the scheme CachedContext: PreviousContext has",
        ),
        (
            [*CROSSBATCH, "ModelConfig.memory_before = True"],
            "model.memory_before puts memory into the window before, of which PreviousContext may",
        ),
        (
            [*CROSSBATCH, "ModelConfig.memory_layers = ()"],
            "the scheme PreviousContext is for memory layers, and the model has none: name some",
        ),
        (["train.d = @SwitchAtStep()"], "the scheme CachedContext has no d (asked for d=2)"),
    ],
)
def test_what_does_not_fit_is_named(experiment, capsys, bindings, message):
    assert message in refused_untouched(capsys, "train", "experiment.gin", *bind(*bindings))


def test_there_is_no_pytorch_code_for_them(experiment, tmp_path, capsys, monkeypatch):
    with runs.first_devices(monkeypatch, 1):
        no_evals = "train.steps = 1", "Evaluation.evals = ()"
        assert runs.train(experiment, tmp_path / "run", *no_evals) == 0
    capsys.readouterr()
    assert cli.main(["convert", "to-hf", "run", "converted"]) == 2
    assert "model.memory_gate = True: there is no PyTorch code" in capsys.readouterr().err
    assert not (tmp_path / "converted").exists()
