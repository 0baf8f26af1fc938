"""Runs of the baselines that the paper compares with, from experiment files alone."""

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


@pytest.mark.parametrize("bindings", [(), TRANSFORMER_XL], ids=["memorizing", "transformer_xl"])
def test_a_run_in_two_parts_is_as_in_one(experiment, tmp_path, bindings, monkeypatch):
    """What is cached is in the checkpoint: step 6 sees windows of steps 4 and 5."""
    with runs.first_devices(monkeypatch, 1):
        assert runs.train(experiment, tmp_path / "one", *bindings) == 0
        assert runs.train(experiment, tmp_path / "two", "train.steps = 5", *bindings) == 0
        assert runs.train(experiment, tmp_path / "two", *bindings) == 0
    one, two = runs.training_curve(tmp_path / "one"), runs.training_curve(tmp_path / "two")
    assert [row["step"] for row in one] == list(range(1, 13)) and one == two
    runs.assert_same_parameters(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("bindings", [(), TRANSFORMER_XL], ids=["memorizing", "transformer_xl"])
def test_many_devices_train_as_one(experiment, tmp_path, bindings, monkeypatch):
    with runs.first_devices(monkeypatch, 1):
        assert runs.train(experiment, tmp_path / "one", *bindings) == 0
    mesh = ("MeshShape.data = 2", "MeshShape.fsdp = 2", "MeshShape.tensor = 2")
    accumulated = ("Compute.accumulation = 2", "Data.group_lanes = 4")
    assert runs.train(experiment, tmp_path / "many", *mesh, *accumulated, *bindings) == 0
    for name in ("loss", "grad_norm"):
        of_one, of_many = (
            [row[name] for row in runs.training_curve(tmp_path / run)] for run in ("one", "many")
        )
        of_one, of_many = (np.array(each, float) for each in (of_one, of_many))
        np.testing.assert_allclose(of_many, of_one, rtol=1e-3, err_msg=name)


def test_the_gate_learns(experiment, tmp_path, monkeypatch, capsys):
    """That of the memory layer alone; and `fot convert check` compares it with the rest."""
    with runs.first_devices(monkeypatch, 1):
        assert runs.train(experiment, tmp_path / "run") == 0
    gate = runs.parameters(tmp_path / "run")["layers"]["attention"]["memory_gate"]
    assert gate.shape == (2, 2) and not gate[0].any() and (np.abs(gate[1]) > 0.01).all()
    apart = runs.parameters(tmp_path / "run")
    of_layers = 2 * len(jax.tree.leaves(apart.pop("layers")))
    count = len(jax.tree.leaves(apart)) + of_layers
    capsys.readouterr()
    assert cli.main(["convert", "check", str(tmp_path / "run"), str(tmp_path / "run")]) == 0
    assert f"{count} tensors compared, {count} the same" in capsys.readouterr().out


def test_from_fot_to_a_memorizing_transformer(experiment, tmp_path, monkeypatch):
    """By experiment files alone: without a gate it has the same parameters (paper §5)."""
    fot = ("train.scheme = @PreviousContext()", "ModelConfig.memory_gate = False")
    start = f"train.initialize_from = '{tmp_path / 'fot'}'"
    with runs.first_devices(monkeypatch, 1):
        assert runs.train(experiment, tmp_path / "fot", "train.steps = 2", *fot) == 0
        more = ("train.steps = 2", "ModelConfig.memory_gate = False", "constant_rate.value = 0.0")
        assert runs.train(experiment, tmp_path / "mt", start, *more) == 0
    runs.assert_same_parameters(tmp_path / "fot", tmp_path / "mt")


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
        (["train.d = @SwitchAtStep()"], "the scheme CachedContext has no d (asked for d=2)"),
    ],
)
def test_what_does_not_fit_is_named(experiment, capsys, bindings, message):
    assert message in refused_untouched(capsys, "train", "experiment.gin", *bind(*bindings))


def test_there_is_no_pytorch_code_for_them(experiment, tmp_path, capsys, monkeypatch):
    with runs.first_devices(monkeypatch, 1):
        assert runs.train(experiment, tmp_path / "run", "train.steps = 1") == 0
    capsys.readouterr()
    assert cli.main(["convert", "to-hf", "run", "converted"]) == 2
    assert "model.memory_gate = True: there is no PyTorch code" in capsys.readouterr().err
    assert not (tmp_path / "converted").exists()
