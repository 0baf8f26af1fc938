"""Whole runs: resumed, evaluated, repeated; what they write, and where they start."""

import contextlib
import dataclasses
import json
import logging
import random
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from runs import (
    DICTIONARY,
    PACKED,
    SWITCHING,
    curve,
    parameters,
    steps_saved,
    training_curve,
    write,
    write_corpus,
)
from tiny import tiny

from fot_jax import cli
from fot_jax import train as train_module
from fot_jax.checkpoints.manager import Checkpointer
from fot_jax.common.errors import UserError
from fot_jax.data.corpus import Corpus
from fot_jax.data.sentencepiece_vocabulary import TrainedSentencePiece
from fot_jax.data.synthetic import DictionaryLookup
from fot_jax.data.tasks import Text
from fot_jax.evals.perplexity import PerplexityByContext
from fot_jax.evals.sample import Sample
from fot_jax.model.schemes import PreviousContext
from fot_jax.training.optimizers import adamw
from fot_jax.training.schedules import constant_rate

# --- Resuming ------------------------------------------------------------------------------------


class Programs(logging.Handler):
    """Counts what JAX compiles, by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def emit(self, record):
        if name := re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()):
            self.counts[name[1]] = self.counts.get(name[1], 0) + 1

    @contextlib.contextmanager
    def watch(self):
        logger = logging.getLogger("jax._src.dispatch")
        jax.config.update("jax_log_compiles", True)  # jax.log_compiles is of one thread alone
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            jax.config.update("jax_log_compiles", False)


EVERY_STEP = """
Checkpoints.every = 1
Checkpoints.keep_last = 100
Evaluation.every = 5
train.positive_mass_every = 3
"""


@dataclasses.dataclass
class Run:
    experiment: Path
    workdir: Path
    programs: dict[str, int]

    def copy(self, to):
        shutil.copytree(self.workdir, to)
        return to


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps on one device, in this process, with a checkpoint of every step."""
    directory = tmp_path_factory.mktemp("trained")
    experiment = write(directory, SWITCHING + EVERY_STEP)
    programs = Programs()
    with runs.first_devices(pytest.MonkeyPatch(), 1), programs.watch():
        assert runs.train(experiment, directory / "run") == 0
    return Run(experiment, directory / "run", programs.counts)


def switch_seen_at(run):
    """The step whose accuracy is the first to reach the threshold."""
    return next(row["step"] for row in training_curve(run.workdir) if row["accuracy"] > 0.01)


def test_d_switches_two_steps_after_the_accuracy_and_stays(trained):
    """Two: the accuracy of a step is fetched while the next one runs."""
    switch = switch_seen_at(trained) + 2
    assert 3 <= switch < 12
    ds = {row["step"]: row["d"] for row in training_curve(trained.workdir)}
    assert ds == {step: 1 if step < switch else 3 for step in range(1, 13)}


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1])
def test_resumes_around_the_switch_of_d(trained, tmp_path, one_device, after):
    """From the step whose accuracy decides about d, and the one in which it waits to."""
    workdir = trained.copy(tmp_path / "run")
    stop = switch_seen_at(trained) + after
    for step in steps_saved(workdir):
        if step > stop:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    assert runs.train(trained.experiment, workdir) == 0
    assert curve(workdir) == curve(trained.workdir)
    runs.assert_same_parameters(workdir, trained.workdir)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_resumes_from_a_damaged_checkpoint_or_says_why_not(trained, tmp_path, one_device, seed):
    """Any file of the two newest checkpoints, or of the vocabulary, damaged in any way."""
    workdir, draw = trained.copy(tmp_path / "run"), random.Random(seed)
    folders = workdir / "checkpoints" / "12", workdir / "checkpoints" / "11", workdir / "vocabulary"
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    file = draw.choice(files)
    content = bytearray(file.read_bytes())
    damage = draw.choice(["flip", "flip", "cut", "empty", "remove"])
    if damage == "remove" or not content:
        file.unlink()
    elif damage == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    else:
        file.write_bytes(content[: draw.randrange(len(content))] if damage == "cut" else b"")
    code = runs.train(trained.experiment, workdir)
    if code == 0:
        assert curve(workdir) == curve(trained.workdir)
        runs.assert_same_parameters(workdir, trained.workdir)
    else:
        assert code == 2 and file.parent == workdir / "vocabulary"


@pytest.mark.slow
def test_resuming_as_another_function_is_said(tmp_path, one_device, caplog, capsys):
    experiment = write(tmp_path, runs.DICTIONARY)
    steps = ("train.steps = 2", "Checkpoints.every = 2")
    assert runs.train(experiment, tmp_path / "run", *steps) == 0
    assert runs.train(experiment, tmp_path / "run", "train.steps = 3") == 0
    assert "was trained with" not in caplog.text
    other = ("train.steps = 4", "ModelConfig.rope_theta = 20000.0")
    assert runs.train(experiment, tmp_path / "run", *other) == 0
    said = f"{tmp_path / 'run'} was trained with rope_theta = 10000.0, this run has 20000.0"
    assert said in caplog.text
    caplog.clear()
    other = ("train.steps = 5", "ModelConfig.memory_scaling = 0.1")
    assert runs.train(experiment, tmp_path / "run", *other) == 0
    assert "was trained with memory_scaling = 0.0, this run has 0.1" in caplog.text
    heads = [f"ModelConfig.{name} = 4" for name in ("num_heads", "num_kv_heads", "head_dim")]
    capsys.readouterr()
    assert runs.train(experiment, tmp_path / "run", "train.steps = 6", *heads) == 2
    wanted = f"{tmp_path / 'run'} has num_heads = 2, this run 4: set the model's num_heads to 2"
    assert capsys.readouterr().err.endswith(f"{wanted}\n")


def test_resumes_with_more_steps(trained, tmp_path, one_device):
    """After an end where no evaluation during training is due, and one where it is: made good."""
    for steps in (3, 5, 12):
        assert runs.train(trained.experiment, tmp_path, f"train.steps = {steps}") == 0
    rows = curve(tmp_path)
    (at_3,) = (row for row in rows if row["step"] == 3 and "loss" not in row)
    assert set(at_3) > {"step"}  # of the evaluation at its end, which is not made again
    assert [row for row in rows if row is not at_3] == curve(trained.workdir)
    runs.assert_same_parameters(tmp_path, trained.workdir)


def test_a_finished_run_is_only_evaluated(trained, tmp_path, one_device, capsys, monkeypatch):
    read, stream = [], DictionaryLookup.stream
    watched = lambda *args: (read.append(args), stream(*args))[1]  # noqa: E731
    monkeypatch.setattr(DictionaryLookup, "stream", watched)
    workdir = trained.copy(tmp_path / "run")
    before = runs.files(workdir / "checkpoints")
    shutil.rmtree(workdir / "plots")
    assert runs.train(trained.experiment, workdir) == 0
    assert "perplexity_by_context" in capsys.readouterr().out
    assert not read  # nothing that has been read is skipped
    assert curve(workdir) == curve(trained.workdir)
    assert runs.files(workdir / "checkpoints") == before
    assert (workdir / "plots" / "perplexity_by_context.png").exists()


@pytest.mark.parametrize("error", [UserError, OSError])
def test_evaluations_that_are_refused_while_they_run(
    trained, tmp_path, one_device, capsys, monkeypatch, error
):
    """A line says so, and training goes on; after its end what others measured is kept."""
    run = PerplexityByContext.run

    def run_of_test(self, lm, source):
        if self.split == "valid":
            raise error("no documents left: restore them")
        return run(self, lm, source)

    def refuse(self, lm, source):
        raise UserError("no words left: find some")

    monkeypatch.setattr(PerplexityByContext, "run", run_of_test)
    monkeypatch.setattr(Sample, "run", refuse)
    workdir = trained.copy(tmp_path / "run")
    for step in (10, 11, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert runs.train(trained.experiment, workdir) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "fot: error: no words left: find some"
    line = "step 10: perplexity_by_context is left out: no documents left: restore them"
    assert [each for each in said if "left out" in each] == [line]
    kept = [row for row in curve(trained.workdir) if "loss" in row or row["step"] != 10]
    assert curve(workdir) == kept
    assert steps_saved(workdir)[-1] == 12


def test_fewer_steps_than_done_are_refused(trained, tmp_path, one_device, capsys):
    workdir = trained.copy(tmp_path / "run")
    before = runs.files(workdir)
    assert runs.train(trained.experiment, workdir, "train.steps = 11") == 2
    assert capsys.readouterr().err == (
        f"fot: error: {workdir} has a checkpoint of step 12, beyond train.steps = 11: raise "
        "train.steps, or choose another workdir\n"
    )
    assert runs.files(workdir) == before


# --- What a workdir holds ------------------------------------------------------------------------


def test_a_workdir_holds_what_the_readme_says(trained):
    there = {path.name for path in trained.workdir.iterdir()}
    (events,) = (name for name in there if name.startswith("events.out.tfevents."))
    want = {"config.gin", "metrics.jsonl", "checkpoints", "plots", "vocabulary"}
    assert there == {*want, events}
    assert steps_saved(trained.workdir) == list(range(1, 13))
    plots = list((trained.workdir / "plots").iterdir())
    assert [plot.name for plot in plots] == ["perplexity_by_context.png"]
    assert plots[0].read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_config_gin_repeats_the_run(trained, tmp_path, one_device):
    assert runs.train(trained.workdir / "config.gin", tmp_path / "again") == 0
    assert curve(tmp_path / "again") == curve(trained.workdir)
    runs.assert_same_parameters(tmp_path / "again", trained.workdir)
    config = (trained.workdir / "config.gin").read_text()
    assert (tmp_path / "again" / "config.gin").read_text() == config


def test_metrics_have_what_was_asked_for_at_its_steps(trained):
    rows = curve(trained.workdir)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 13))
    for row in training:
        assert row["perplexity"] == pytest.approx(np.exp(row["loss"]))
        assert row["accuracy"] * 16 == int(row["accuracy"] * 16)
        assert row["learning_rate"] == pytest.approx(0.01)
        assert row["grad_norm"] > 0 and row["skipped"] == 0
    mass = {row["step"]: row.get("positive_mass/layer_1") for row in training}
    assert [step for step, share in mass.items() if share is not None] == [3, 6, 9, 12]
    for row in training:
        if row["step"] % 3 == 0 and row["d"] == 1:
            assert mass[row["step"]] == pytest.approx(1)
        elif row["step"] % 3 == 0:
            assert 0.1 < mass[row["step"]] < 0.9  # untrained: about 1 / d
    assert {row["d"] for row in training if row["step"] % 3 == 0} == {1, 3}
    evaluated = {row["step"]: set(row) - {"step"} for row in rows if "loss" not in row}
    names = {
        split: {f"perplexity_by_context/{split}/memory_{n}" for n in (0, 16)}
        for split in ("valid", "test")
    }
    assert evaluated == {5: names["valid"], 10: names["valid"], 12: names["test"]}


def test_a_save_is_no_part_of_the_steps_around_it(tmp_path, one_device, monkeypatch, capsys):
    """Nor compiling part of the time left. By the clock, a save here takes a day."""
    save, clock, day, days = Checkpointer.save, time.perf_counter, 86_400, [0]

    def slow(*args, **kwargs):
        days[0] += 1
        save(*args, **kwargs)

    monkeypatch.setattr(Checkpointer, "save", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + day * days[0])
    experiment = write(tmp_path, runs.DICTIONARY)
    assert runs.train(experiment, tmp_path / "run", "Checkpoints.every = 6") == 0
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith(("compiling", "step "))]
    assert said[0] == "compiling the training step" and said[1].startswith("step 1/12  loss ")
    assert ["ETA" in line for line in said[1:]] == [False, *[True] * 11]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    _, *rows = [json.loads(line) for line in lines]  # the first step is compiled
    assert len(rows) == 11
    assert all(row["seconds_per_step"] < day and row["utilisation"] <= 1 for row in rows)


@pytest.mark.slow
def test_a_step_is_compiled_once_for_each_d(trained, tmp_path, one_device):
    assert trained.programs["train_step"] == 2
    drawn = "train.d = @DrawnEachStep()", "DrawnEachStep.values = (1, 3)"
    programs = Programs()
    with programs.watch():
        assert runs.train(trained.experiment, tmp_path, *drawn, "train.steps = 8") == 0
    ds = [row["d"] for row in training_curve(tmp_path)]
    assert sum(a != b for a, b in zip(ds, ds[1:], strict=False)) >= 2
    assert programs.counts["train_step"] == 2


def test_a_run_that_is_resumed_within_the_steps_of_its_profile(tmp_path, one_device):
    experiment, workdir = write(tmp_path, DICTIONARY), tmp_path / "run"
    for steps, last in ((3, 3), (4, 4), (5, 4)):  # a trace may not go on beyond the run
        limited = f"train.profile_steps = (2, {last})", f"train.steps = {steps}"
        assert runs.train(experiment, workdir, *limited) == 0
        assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == min(steps, 4) - 2


# --- Where a run starts --------------------------------------------------------------------------


def test_initialize_from_takes_parameters_and_nothing_else(trained, tmp_path, one_device):
    """A fresh AdamW moves every parameter that has a gradient by the learning rate."""
    start = f'train.initialize_from = "{trained.workdir}"'
    first_step = "train.steps = 1", "constant_rate.value = 0.001", "adamw.weight_decay = 0.0"
    assert runs.train(trained.experiment, tmp_path, start, *first_step) == 0
    rows = training_curve(tmp_path)
    assert [row["step"] for row in rows] == [1]
    assert rows[0]["d"] == 1  # the schedule starts again too
    before, after = parameters(trained.workdir), parameters(tmp_path)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        moved = np.abs(y - x)[y != x]
        assert moved.max() < 0.001001
        assert np.median(moved) == pytest.approx(0.001, rel=0.01)


@pytest.mark.slow
def test_the_vocabulary_is_that_of_the_workdir_or_of_the_checkpoint(tmp_path, one_device):
    """Where the corpus has changed since, and with it the tokenizer that it would give."""
    corpus = write_corpus(tmp_path / "corpus")
    text = (
        *("Text.tokenizer = @TrainedSentencePiece()", "TrainedSentencePiece.pieces = 300"),
        *("ModelConfig.vocab_size = 300", f'Corpus.path = "{corpus}"', "Checkpoints.every = 1"),
    )
    experiment = write(tmp_path, PACKED)

    def run(workdir, steps, *more):
        assert (
            runs.train(experiment, tmp_path / workdir, *text, f"train.steps = {steps}", *more) == 0
        )
        return runs.files(tmp_path / workdir / "vocabulary")

    source = Text((Corpus(str(corpus)),), TrainedSentencePiece(300))
    first = source.vocabulary
    vocabulary = run("run", 1)
    assert vocabulary["tokenizer.model"] == first.model
    write_corpus(corpus, seed=1)
    assert dataclasses.replace(source).vocabulary != first
    assert run("run", 2) == vocabulary
    assert run("tuned", 1, f'train.initialize_from = "{tmp_path / "run"}"') == vocabulary


@pytest.mark.slow
def test_documents_to_evaluate_have_the_vocabulary_of_the_run(tmp_path, one_device, capsys):
    """As `fot evaluate` reads them."""
    corpus, other = (write_corpus(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    bindings = (
        *("Text.tokenizer = @TrainedSentencePiece()", "TrainedSentencePiece.pieces = 300"),
        *("ModelConfig.vocab_size = 300", f'Corpus.path = "{corpus}"', "train.steps = 1"),
        *("train.evaluation = @Evaluation()", "Evaluation.evals = (@PerplexityByContext(),)"),
        *("PerplexityByContext.memory_sizes = (0,)", "Evaluation.source = @other/Text()"),
        *("other/Text.corpora = [@other/Corpus()]", f'other/Corpus.path = "{other}"'),
        "other/Text.tokenizer = @Bytes()",
    )
    experiment = write(tmp_path, PACKED)
    assert runs.train(experiment, tmp_path / "run", *bindings) == 0
    (trained,) = (row for row in runs.curve(tmp_path / "run") if "loss" not in row)
    argv = ["evaluate", str(experiment), "--checkpoint", str(tmp_path / "run")]
    output = ["--output", str(tmp_path / "results.json")]
    assert cli.main([*argv, *output, *runs.bind(*bindings)]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["perplexity_by_context"]
    assert row["perplexity"] == pytest.approx(
        trained["perplexity_by_context/valid/memory_0"], rel=1e-4
    )


# --- What is not finite --------------------------------------------------------------------------


HUGE = "constant_rate.value = 1e30"  # throws the parameters out of reach at step 13


@pytest.mark.parametrize(
    "every, then",
    [(2, ""), (1, " (remove those from 13 on, which may have parameters that are broken)")],
)
def test_stops_when_nothing_is_finite_any_more(trained, tmp_path, one_device, capsys, every, then):
    workdir = trained.copy(tmp_path / "run")
    often = f"Checkpoints.every = {every}", "Checkpoints.keep_last = 2", "train.max_skipped = 3"
    assert runs.train(trained.experiment, workdir, HUGE, *often, "train.steps = 40") == 2
    *said, error = capsys.readouterr().err.splitlines()
    skips = [line for line in said if "update skipped" in line]
    assert skips == [
        f"step {step}: the gradient of embedding is not finite: update skipped"
        for step in (14, 15, 16, 17)
    ]
    assert error == (
        "fot: error: step 17: the gradient of embedding is not finite, for more than 3 steps in a "
        f"row: stopped; the last good checkpoint is that of step 12{then}: lower the learning rate "
        "or look at the data"
    )
    assert steps_saved(workdir)[-1] == (13 if then else 12)
    shutil.rmtree(workdir / "checkpoints" / "13", ignore_errors=True)
    runs.assert_same_parameters(workdir, trained.workdir)
    assert [row["skipped"] for row in training_curve(workdir)][12:] == [0, 1, 2, 3]


def test_a_run_that_ends_while_updates_are_skipped_keeps_the_good_checkpoint(
    trained, tmp_path, one_device
):
    workdir, seldom = trained.copy(tmp_path / "run"), ("Checkpoints.every = 50",)
    for steps, kept in ((15, [*range(1, 13), 15]), (16, [*range(1, 13), 15, 16])):
        settings = HUGE, *seldom, "Checkpoints.keep_last = 1", f"train.steps = {steps}"
        assert runs.train(trained.experiment, workdir, *settings) == 0
        assert steps_saved(workdir) == kept
    for step in (15, 16):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    settings = *seldom, "Checkpoints.keep_last = 1", "train.steps = 13"
    assert runs.train(trained.experiment, workdir, *settings) == 0
    assert steps_saved(workdir) == [13]


@dataclasses.dataclass(frozen=True)
class OneBadDocument(DictionaryLookup):
    """The tenth document has this weight on its answers."""

    weight: float = 1.0

    def stream(self, shard, shards, seed, position=(0, 0)):
        for place, document in super().stream(shard, shards, seed, position):
            if place == (0, 10):
                document = document._replace(weights=document.weights * np.float32(self.weight))
            yield place, document


@pytest.mark.parametrize(
    "weight, what", [(np.nan, "the gradient of embedding"), (1e38, "the loss")], ids=str
)
def test_a_step_that_is_not_finite_is_skipped_and_named(tmp_path, one_device, capsys, weight, what):
    """Documents 9 … 12 are those of step 3."""

    def run(steps, workdir=tmp_path, every=1):
        return train_module.train(
            str(workdir),
            tiny(vocab_size=64, local_context=16),
            train_module.Data(OneBadDocument(32, 1, 1, weight=weight), lanes=4),
            adamw,
            constant_rate(0.01, warmup_steps=100),
            steps,
            scheme=PreviousContext(advance=2),
            checkpoints=train_module.Checkpoints(every=every, keep_last=9),
            log_every=1,
        )

    assert run(3) is None and run(5) is None
    skips = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert skips == [f"step 3: {what} is not finite: update skipped"]
    runs.assert_same_parameters(tmp_path / "checkpoints" / "3", tmp_path / "checkpoints" / "2")
    rows = training_curve(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
    assert rows[2]["loss"] is None and np.isfinite(rows[4]["loss"])
    # The optimizer counts updates, not steps.
    rates = [row["learning_rate"] for row in rows]
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 3e-4, 4e-4])
    assert not np.array_equal(*(parameters(tmp_path / "checkpoints" / n)["head"] for n in "35"))
    assert run(5, tmp_path / "seldom", every=3) is None
    assert steps_saved(tmp_path / "seldom") == [4, 5]  # what was due at step 3 is saved at 4


# --- Meshes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mesh_changes_nothing(tmp_path, monkeypatch):
    more = "train.compute = @Compute()\nCompute.mesh = @MeshShape()\nPreviousContext.d = 3\n"
    experiment = write(tmp_path, DICTIONARY + more)
    size = "Data.lanes = 8", "train.steps = 4"

    def losses(name, *mesh):
        assert runs.train(experiment, tmp_path / name, *size, *mesh) == 0
        rows = training_curve(tmp_path / name)
        return [[row["loss"], row["grad_norm"]] for row in rows]

    with runs.first_devices(monkeypatch, 1):
        want = losses("one")
    got = losses("four by two", "MeshShape.data = 4", "MeshShape.tensor = 2")
    np.testing.assert_allclose(got, want, rtol=1e-4)
