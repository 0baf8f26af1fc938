"""The command line: what it says about bad input, and what it leaves behind."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import matplotlib.image
import pytest
import runs
from runs import DICTIONARY, EVALUATED, bind, refused, refused_untouched

from fot_jax import cli
from fot_jax.common.errors import UserError
from fot_jax.data import tasks
from fot_jax.data.sentencepiece_vocabulary import TrainedSentencePiece
from fot_jax.data.vocabulary import Bytes
from fot_jax.evals import provenance
from fot_jax.evals.perplexity import PerplexityByContext
from fot_jax.evals.sample import Sample
from fot_jax.training import checks

ROOT = Path(__file__).parents[1]

# Two documents side by side, two windows of 16 bytes of each, negatives from the other.
TEXT = f"""{runs.MODEL}
train.data = @Data()
train.optimizer = @adamw
train.learning_rate = @constant_rate()
train.steps = 2
train.scheme = @Packed()
constant_rate.value = 0.01
ModelConfig.vocab_size = 258
Data.source = @Text()
Data.lanes = 2
Text.corpora = [@Corpus()]
Text.tokenizer = @Bytes()
Packed.pack = 2
"""


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a checkpoint of step 2."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "experiment.gin").write_text(DICTIONARY)
    with runs.first_devices(pytest.MonkeyPatch(), 1):
        assert runs.train(directory / "experiment.gin", directory / "run", "train.steps = 2") == 0
    return directory / "run"


@pytest.mark.parametrize(
    "kernel, tunables, wanted",
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.a=1", "glibc.a=1:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),
        ("[always] madvise never", None, None),
        (None, None, None),
    ],
)
def test_the_process_asks_for_huge_pages_where_it_must(
    kernel, tunables, wanted, tmp_path, monkeypatch
):
    """It starts anew with the same words, once."""
    monkeypatch.setattr(cli, "_HUGE_PAGES", tmp_path / "enabled")
    if kernel is not None:
        (tmp_path / "enabled").write_text(f"{kernel}\n")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    monkeypatch.setattr(sys, "argv", ["fot", "--help"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "fot_jax", "--help"])
    started = []

    def execve(*arguments):
        started.append(arguments)
        sys.exit()

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        cli.run()
    assert [environment["GLIBC_TUNABLES"] for *_, environment in started] == [wanted] * bool(wanted)
    assert all(words[1:] == ["-m", "fot_jax", "--help"] for _, words, _ in started)


def test_the_workdir_is_named_after_the_experiment(here):
    for steps, experiment in ((1, "experiment.gin"), (2, "workdirs/experiment/config.gin")):
        no_evaluation = "train.evaluation = @Evaluation()", "Evaluation.evals = ()"
        argv = ["train", experiment, *bind(f"train.steps = {steps}", *no_evaluation)]
        assert cli.main(argv) == 0
        assert [path.name for path in (here / "workdirs").iterdir()] == ["experiment"]
        assert runs.steps_saved(here / "workdirs" / "experiment")[-1] == steps


# --- Data ----------------------------------------------------------------------------------------


def refused_texts(capsys, here, *bindings):
    (here / "text.gin").write_text(TEXT + 'Corpus.path = "texts"\n')
    return refused_untouched(capsys, "train", "text.gin", "--workdir", "run", *bind(*bindings))


def write_split(here, text, rows=4, split="train"):
    (here / "texts").mkdir(exist_ok=True)
    lines = (json.dumps({"text": text}) for _ in range(rows))
    (here / "texts" / f"{split}.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
def test_texts_that_cannot_be_trained_on(here, capsys):
    assert refused_texts(capsys, here).startswith("texts: no such directory: set Corpus.path to")
    write_split(here, "a text for validation alone", split="valid")
    assert refused_texts(capsys, here) == (
        "texts: no train split (there is: valid): a split is a file train.jsonl or train.jsonl.gz "
        "or train-00000.jsonl.gz, or a directory train of .jsonl.gz files"
    )
    write_split(here, "", rows=0)
    assert refused_texts(capsys, here) == "texts: the train split is empty: give it some rows"
    write_split(here, "a text of some length", rows=5)
    with (here / "texts" / "train.jsonl").open("a") as file:
        file.write('\n{"text": "cut o')
    line = refused_texts(capsys, here)
    assert line.startswith("texts/train.jsonl:6: broken row, not JSON")
    assert line.endswith("correct or remove it")
    write_split(here, "a short text")
    line = refused_texts(capsys, here, "Corpus.min_document_length = 15")
    assert line.startswith("texts: no training document of 15 tokens or more in shard 0 of 1")
    assert refused_texts(capsys, here, "ModelConfig.vocab_size = 257").startswith(
        "the tokenizer has 258 tokens, the model a vocabulary of 257: raise the model's vocab_size"
    )


@pytest.mark.slow
def test_texts_that_are_all_too_short_for_memory(here, capsys):
    """Noticed after a thousand of them, of which a step takes some twenty."""
    write_split(here, "a short text", rows=600)
    (here / "text.gin").write_text(TEXT + 'Corpus.path = "texts"\n')
    argv = ["train", "text.gin", *bind("train.steps = 70", "Data.lanes = 16")]
    assert refused(capsys, *argv, "--workdir", "run") == (
        "the first 1000 documents have at most 14 tokens: none is longer than a window of 16, so "
        "memory layers would never see an earlier part of their own document: set "
        "min_document_length, or a smaller model.local_context"
    )
    line = refused(capsys, *argv, "--workdir", "run[1]")  # of which Orbax would read nothing
    assert line.startswith("run[1]: '[' in the path")
    argv += bind("train.scheme = @NoCrossbatch()")
    (here / "plain" / "hugging_face" / "a").mkdir(parents=True)
    message = "files are kept there of the model that a run begins with, and these are of no run"
    assert message in refused_untouched(capsys, *argv, "--workdir", "plain")
    assert (here / "plain" / "hugging_face" / "a").exists()
    (here / "plain" / "config.gin").write_text("")  # of a run that was killed at step 0
    assert cli.main([*argv, "--workdir", "plain"]) == 0
    assert not (here / "plain" / "hugging_face").exists()


@pytest.mark.parametrize("other", [0, 1])
def test_processes_that_would_read_other_documents(here, capsys, monkeypatch, other):
    calls = itertools.count()
    monkeypatch.setattr(checks, "all_values", lambda x: [x, x, x ^ (next(calls) == other)])
    what = ("tokenizer", "documents")[other]
    assert refused_untouched(capsys, "train", "experiment.gin", "--workdir", "run") == (
        f"process 2 has another {what} than process 0: give all machines the same files and "
        "settings"
    )


def test_what_needs_no_cache(here, capsys):
    line = refused_untouched(capsys, "cache", "experiment.gin", "--output", "cache")
    assert line == "Data.source is a DictionaryLookup, only @Text() has a cache: give that"


@pytest.mark.slow
def test_a_cache_is_of_the_tokenizer_that_training_takes(here, trained):
    """That of the checkpoint it starts from."""
    write_split(here, "a short text")
    shutil.copytree(trained, here / "start")
    vocabulary = TrainedSentencePiece(280).train(["a short text " * 99])
    vocabulary.save(here / "start" / "vocabulary")
    start = "START = 'start'", "train.initialize_from = %START", "Corpus.path = 'texts'"
    (here / "text.gin").write_text("\n".join((TEXT, *start)))
    assert cli.main(["cache", "text.gin", "--output", "cache"]) == 0
    source = tasks.Text([tasks.Corpus("texts")], vocabulary, cache_dir="cache")
    _, document = next(source.stream(0, 1, 0))
    assert vocabulary.decode(document.tokens) == "a short text"
    mixture = (
        *("Data.source = @Mixture()", "Mixture.weights = (1, 1, 1)"),
        "Mixture.sources = (@Passkey(), @Text(), @other/Text())",
        *("other/Text.corpora = (@other/Corpus(),)", "other/Corpus.min_document_length = 3"),
        *("train.evaluation = @Evaluation()", "Evaluation.every = 1"),
        *("Evaluation.source = @other/Text()", "Evaluation.during = (@PerplexityByContext(),)"),
        *("PerplexityByContext.source = @held/Text()", "held/Corpus.min_document_length = 4"),
        "held/Text.corpora = (@other/Corpus(), @held/Corpus())",
    )
    assert cli.main(["cache", "text.gin", "--output", "both", *bind(*mixture)]) == 0
    for least in (0, 3, 4):
        corpus = tasks.Corpus("texts", min_document_length=least)
        next(tasks.Text([corpus], vocabulary, cache_dir="both").stream(0, 1, 0))
    assert len(list((here / "both").iterdir())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("d", [1, 2])
def test_a_document_in_two_lanes_is_a_negative_of_itself(here, caplog, d):
    """Where lanes see each other."""
    write_split(here, "a text that is longer than two windows, " * 9)
    scheme = "train.scheme = @PreviousContext()", f"PreviousContext.d = {d}"
    (here / "text.gin").write_text("\n".join((TEXT, *scheme, "Corpus.path = 'texts'")))
    assert cli.main(["train", "text.gin", "--workdir", "run"]) == 0
    assert caplog.text.count("two lanes read the same document") == d - 1


@pytest.mark.slow
def test_an_empty_cache(here, capsys):
    write_split(here, "a short text")
    (here / "text.gin").write_text(TEXT + 'Corpus.path = "texts"\n')
    argv = ["cache", "text.gin", "--output", "cache", *bind("Corpus.min_document_length = 15")]
    assert refused(capsys, *argv) == (
        "texts: the train split has no document of 15 tokens or more: lower min_document_length"
    )
    assert list((here / "cache").iterdir()) == []


# --- Evaluations ---------------------------------------------------------------------------------


def test_evaluations_that_are_not_for_the_model(here, trained, capsys):
    """Said before training, not at its end, and before another evaluation."""
    plain = bind("ModelConfig.memory_layers = ()", "train.scheme = @NoCrossbatch()")
    argv = ["train", "experiment.gin", "--workdir", "run", *plain]
    of_memory = bind("Evaluation.evals = (@PerplexityByContext(), @PositiveMass())")
    line = "PositiveMass is of memory layers, and the model has none: leave it out"
    assert refused_untouched(capsys, *argv, *of_memory) == line
    during = bind("Evaluation.during = (@RetrievalTable(),)", "Evaluation.every = 4")
    assert refused_untouched(capsys, *argv, *during).startswith("RetrievalTable is of memory")
    measured = bind("train.positive_mass_every = 10")
    line = "train.positive_mass_every = 10: r_d is of memory layers in crossbatch, and there are "
    assert refused_untouched(capsys, *argv, *measured).startswith(line)
    plain = bind("train.scheme = @NoCrossbatch()")  # and a memory layer
    argv_of_one = ["train", "experiment.gin", "--workdir", "run", *plain, *measured]
    assert refused_untouched(capsys, *argv_of_one).startswith(line)
    many = bind(
        "Evaluation.evals = (@PerplexityByContext(), @RetrievalTable())",
        "RetrievalTable.queries = 17",
    )
    line = refused_untouched(capsys, *evaluate(trained, "--output", "results/all.json", *many))
    assert line == "RetrievalTable.queries = 17: give at most the local context, 16"


def test_evaluations_of_a_split_that_is_not_there(here, trained, capsys, caplog):
    """Said before training, and before a model is loaded, here one that cannot be."""
    write_split(here, "a text of some length")
    (here / "text.gin").write_text(TEXT + EVALUATED + 'Corpus.path = "texts"\n')
    argv = ["train", "text.gin", "--workdir", "run", *bind("Data.lanes = 4")]
    during = "Evaluation.evals = ()", "Evaluation.during = (@Sample(),)", "Evaluation.every = 1"
    other = "PerplexityByContext.source = @Text()", "Data.source = @Passkey()"
    line = "texts: no valid split (there is: train): a split is a file valid.jsonl or "
    for more in (["--dry_run"], [], bind(*during), bind(*other)):
        assert refused_untouched(capsys, *argv, *more).startswith(line)
    write_split(here, "", rows=0, split="valid")
    assert refused_untouched(capsys, *argv) == "texts: the valid split is empty: give it some rows"
    shutil.rmtree(here / "texts")
    assert cli.main([*argv, "--dry_run"]) == 0  # to be trained elsewhere
    assert "to evaluate is not known here: texts: no such directory" in caplog.text
    shutil.copytree(trained, here / "run")
    for file in (here / "run" / "checkpoints" / "2" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    line = refused_untouched(capsys, *evaluate("run", *bind('PerplexityByContext.split = "dev"')))
    assert line.startswith("DictionaryLookup has no split 'dev'")


def test_a_dry_run_of_what_is_elsewhere(here, trained, capsys, caplog):
    """Directories, the harness; the tokenizer is that of the checkpoint that it starts from."""
    asked = (
        "Evaluation.evals = (@FewShot(), @LmEval())",
        *("FewShot.path = 'nowhere'", "FewShot.form = 'trec'"),
        *("LmEval.tasks = ('one',)", "LmEval.include_path = 'nowhere'"),
    )
    argv = ["train", "experiment.gin", *bind(*asked)]
    assert cli.main([*argv, "--dry_run"]) == 0
    for name in ("FewShot", "LmEval"):
        assert f"whether all is there to evaluate is not known here: {name}" in caplog.text
    assert refused_untouched(capsys, *argv).startswith("FewShot.path = 'nowhere': no such dir")
    (here / "text.gin").write_text(TEXT + 'Corpus.path = "texts"\nModelConfig.vocab_size = 100\n')
    argv = ["train", "text.gin", "--dry_run", *bind("Data.lanes = 4")]
    for more in ([], bind('train.initialize_from = "nowhere"')):
        assert refused_untouched(capsys, *argv, *more).startswith("the tokenizer has 258 tokens")
    for more in (bind(f'train.initialize_from = "{trained}"'), ["--workdir", str(trained)]):
        assert cli.main([*argv, *more]) == 0


# --- Checkpoints ---------------------------------------------------------------------------------


def test_checkpoints_of_another_experiment(here, trained, capsys):
    shutil.copytree(trained, here / "run")
    argv = ["train", "experiment.gin", "--workdir", "run"]
    line = refused_untouched(capsys, *argv, *bind("ModelConfig.mlp_dim = 40"))
    assert re.fullmatch(
        r".*run/checkpoints/2: parameter layers/mlp/down is \(2, 32, 16\) in the checkpoint and "
        r"\(2, 40, 16\) in this experiment: use the configuration it was saved with, or another "
        "workdir",
        line,
    )
    line = refused_untouched(capsys, *argv, *bind("ModelConfig.tie_embeddings = True"))
    assert "parameter head of the checkpoint is not part of this experiment" in line
    line = refused_untouched(capsys, *argv, *bind("train.optimizer = @adafactor"))
    assert "/checkpoints/2: optimizer state " in line
    line = refused_untouched(capsys, *argv, *bind("Data.lanes = 5"))
    assert line.startswith("the checkpoint's data was saved with (lanes of a group, ")
    line = refused_untouched(capsys, *argv, *bind("DictionaryLookup.value_length = 2"))
    assert "the checkpoint's data was saved with DictionaryLookup.value_length = 1, this" in line
    line = refused_untouched(capsys, *argv, *bind("Data.lane_groups = 2"))
    assert "lane group" in line
    start = bind('train.initialize_from = "run"', "ModelConfig.num_layers = 3")
    line = refused(capsys, "train", "experiment.gin", "--workdir", "other", *start)
    assert "(2, 16, 16) in the checkpoint and (3, 16, 16) in this experiment" in line
    start = bind('train.initialize_from = "nowhere"')
    assert refused(capsys, "train", "experiment.gin", "--workdir", "other", *start) == (
        "nowhere: does not exist: give a workdir or a step inside its checkpoints"
    )


def evaluate(checkpoint, *more):
    return ["evaluate", "experiment.gin", "--checkpoint", str(checkpoint), *more]


def test_evaluates_what_the_experiment_evaluates(here, trained, capsys):
    """Rows and plot; the same numbers from a workdir and from the step in it."""
    assert cli.main(evaluate(trained, "--output", "results/all.json")) == 0
    assert "perplexity_by_context" in capsys.readouterr().out
    results = json.loads((here / "results" / "all.json").read_text())
    assert results["checkpoint"] == str(trained)
    assert set(results["made"]) == {"command", "commit", "jax", "device"}
    rows = results["perplexity_by_context"]
    assert [row["memory"] for row in rows] == [0, 16]
    there = {path.name for path in (here / "results").iterdir()}
    assert there == {"all.json", "all.perplexity_by_context.png"}
    image = matplotlib.image.imread(here / "results" / "all.perplexity_by_context.png")
    assert image.shape[:2] == (675, 1050) and image.std() > 0.05
    step = trained / "checkpoints" / "2"
    assert cli.main(evaluate(step, "--output", "again.json")) == 0
    assert json.loads((here / "again.json").read_text())["perplexity_by_context"] == rows
    assert cli.main(evaluate(trained)) == 0  # only prints
    assert len(list(here.iterdir())) == 4


def test_tables_of_characters_that_the_terminal_has_not(here, trained):
    """Of a sample, say; nothing that was measured is lost."""
    samples = bind("Evaluation.evals = (@Sample(),)", "Sample.new_tokens = 4")
    argv = [sys.executable, "-m", "fot_jax", *evaluate(trained, "--output", "x.json"), *samples]
    ascii_ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(argv, env=ascii_, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((here / "x.json").read_text())["sample"]


def test_a_workdir_that_is_something_else(here, trained, capsys):
    """Of which the weights would be read afterwards, or that has no state of an optimizer."""
    (here / "hf").mkdir()
    (here / "hf" / "config.json").write_text("{}")
    line = refused_untouched(capsys, "train", "experiment.gin", "--workdir", "hf")
    assert line.startswith("hf: a Hugging Face directory, whose weights would be read in place of")


def test_results_name_the_code_that_was_there_at_the_start(here, trained, monkeypatch):
    """Which others may be committed after, while it runs."""

    def takes_long(*arguments):
        monkeypatch.setattr(provenance, "_commit", lambda: "later")
        return [{"memory": 0, "perplexity": 2.0, "accuracy": 0.5, "tokens": 3.0}]

    monkeypatch.setattr(PerplexityByContext, "run", takes_long)
    assert cli.main(evaluate(trained, "--output", "all.json")) == 0
    assert json.loads((here / "all.json").read_text())["made"]["commit"] != "later"


def test_checkpoints_that_cannot_be_evaluated(here, trained, capsys):
    output = "--output", "results.json"
    assert refused_untouched(capsys, *evaluate("nowhere", *output)) == (
        "nowhere: does not exist: give a workdir or a step inside its checkpoints"
    )
    assert refused_untouched(capsys, *evaluate(here, *output)).endswith(
        "no checkpoint here: give a workdir or a step inside its checkpoints"
    )
    (here / "model.gguf").write_bytes(b"GGUF")
    assert refused_untouched(capsys, *evaluate("model.gguf", *output)) == (
        "model.gguf: make a workdir of it: fot convert from-hf model.gguf WORKDIR"
    )
    shutil.copytree(trained, here / "run")
    shutil.rmtree(here / "run" / "vocabulary")
    line = refused_untouched(capsys, *evaluate("run", *output))
    assert line == "run/vocabulary: no vocabulary here: there is no vocabulary.json"
    Bytes().save(here / "run" / "vocabulary")
    line = refused_untouched(capsys, *evaluate("run", *output))
    assert line == (
        "run: the tokenizer has 258 tokens, the model's embedding 64 rows: get both from the same "
        "model"
    )
    shutil.rmtree(here / "run" / "vocabulary")  # and so of no tokenizer: the experiment's is taken
    (here / "run" / "hugging_face").mkdir()
    (here / "run" / "hugging_face" / "config.json").write_text("{}")
    (here / "text.gin").write_text(TEXT + EVALUATED + 'Corpus.path = "texts"\n')
    argv = ["evaluate", "text.gin", "--checkpoint", "run", *output]
    assert refused_untouched(capsys, *argv) == line
    shutil.copytree(trained / "vocabulary", here / "run" / "vocabulary", dirs_exist_ok=True)
    for file in (here / "run" / "checkpoints" / "2" / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:500])
    line = refused_untouched(capsys, *evaluate("run", *output))
    assert line.startswith("run/checkpoints: of checkpoints 2 none can be read (2: params: ")
    assert line.endswith("restore one from a copy, or start in another workdir")


@pytest.mark.parametrize("path", ["https://host/x", "file:///x", "s3://bucket/x", "a\0b"])
def test_paths_that_are_none(here, trained, capsys, path):
    message = f"{path!r} is no path: give one of this machine, or gs://BUCKET/..."
    initialize = bind(f"train.initialize_from = {path!r}")
    for argv in (
        ["train", "experiment.gin", "--workdir", path],
        ["train", "experiment.gin", *initialize],
        evaluate(path),
        evaluate(trained, "--output", path),
    ):
        assert refused(capsys, *argv) == message


@pytest.mark.parametrize("name", ["config.gin", "metrics.jsonl", "metrics.jsonl.partial"])
def test_workdirs_where_a_file_cannot_be_written(here, trained, capsys, name):
    shutil.copytree(trained, here / "run")
    (here / "run" / "metrics.jsonl").write_text("cut o")  # so it is written anew
    (here / "run" / name).unlink(missing_ok=True)
    (here / "run" / name).mkdir()
    argv = ["train", "experiment.gin", "--workdir", "run", *bind("train.steps = 3")]
    assert refused(capsys, *argv) == (
        f"run/{name}: Is a directory: fix that, or choose another place"
    )


def test_workdirs_that_cannot_keep_checkpoints(here, trained, capsys):
    (here / "file").write_text("")
    (here / "run").mkdir()
    (here / "run" / "checkpoints").write_text("")
    for workdir, why in (
        ("file", "file: cannot be written (File exists)"),
        ("file/run", "file/run: cannot be written (Not a directory)"),
        ("run", f"{here}/run/checkpoints: cannot keep checkpoints here (File exists)"),
    ):
        line = refused_untouched(capsys, "train", "experiment.gin", "--workdir", workdir)
        assert line == f"{why}: choose another workdir"
        # One that still reads would abort the process when it exits.
        assert "prefetch" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    "vocabulary, message",
    [
        ("[[", "damaged, not JSON"),
        ("[" * 100_000, "damaged, not JSON"),
        ("[]", "not a JSON object"),
        ('{"kind": "Symbols", "names": ["a", "a", "</s>"]}', "damaged (names must be"),
        ('{"kind": "Symbols", "names": [1, [2]]}', "damaged (names must be"),
        ('{"kind": "Abacus", "sha256": 3}', "a vocabulary of unknown kind"),
    ],
    ids=range(6),
)
def test_damaged_vocabularies(here, trained, capsys, vocabulary, message):
    shutil.copytree(trained, here / "run")
    (here / "run" / "vocabulary" / "vocabulary.json").write_text(vocabulary)
    line = refused_untouched(capsys, *evaluate("run"))
    assert line.startswith(f"run/vocabulary/vocabulary.json: {message}")


@pytest.mark.slow
def test_texts_of_another_vocabulary_than_the_checkpoint(here, trained, capsys):
    write_split(here, "none of the words is a symbol", split="valid")
    (here / "text.gin").write_text(TEXT + EVALUATED + 'Corpus.path = "texts"\n')
    line = refused_untouched(capsys, "evaluate", "text.gin", "--checkpoint", trained)
    assert line.startswith("'none' is none of the 64 symbols")


def test_what_was_measured_is_kept(here, trained, capsys, monkeypatch):
    """Where drawing fails, of which an older plot stays, or a later evaluation is refused."""
    (here / "results.perplexity_by_context.png").write_bytes(b"older")

    def fail(self, rows, path):
        path.write_bytes(b"half")
        raise UserError("no ink left: buy some")

    def refuse(self, lm, source):
        raise UserError("no words left: find some")

    results = here / "results.json"
    output = evaluate(trained, "--output", "results.json")
    with monkeypatch.context() as patch:
        patch.setattr(PerplexityByContext, "plot", fail)
        assert refused(capsys, *output) == "no ink left: buy some"
    measured = json.loads(results.read_text())["perplexity_by_context"]
    assert (here / "results.perplexity_by_context.png").read_bytes() == b"older"
    monkeypatch.setattr(Sample, "run", refuse)
    evals = bind("Evaluation.evals = (@Sample(), @PerplexityByContext())")
    before = results.read_text()
    assert refused(capsys, *output, *evals) == "no words left: find some"
    assert results.read_text() == before
    evals = bind("Evaluation.evals = (@PerplexityByContext(), @Sample())")
    assert refused(capsys, *output, *evals) == "no words left: find some"
    content = json.loads(results.read_text())
    assert set(content) == {"checkpoint", "made", "perplexity_by_context"}
    assert content["perplexity_by_context"] == measured


@pytest.mark.parametrize("output", [".", "pipe"])
def test_output_that_is_no_file(here, trained, capsys, output):
    os.mkfifo(here / "pipe")
    line = refused_untouched(capsys, *evaluate(trained, "--output", output))
    assert line == f"{output}: not a file: give the name of one, new or to be replaced"


def test_output_that_would_be_a_plot(here, trained, capsys):
    line = refused_untouched(capsys, *evaluate(trained, "--output", "results/x.png"))
    assert line == "results/x.png: plots have such names, and this is JSON: give another"


def test_nothing_to_evaluate(here, trained, capsys):
    argv = evaluate(trained, "--output", "results.json", *bind("Evaluation.evals = ()"))
    line = refused_untouched(capsys, *argv)
    assert line == "the experiment evaluates nothing: set Evaluation.evals"


def test_names_that_results_have_already(here, trained, capsys):
    argv = evaluate(trained, *bind('PerplexityByContext.name = "made"'))
    assert "the name 'made' of an evaluation: results have it" in refused_untouched(capsys, *argv)


def test_output_that_cannot_be_written(here, trained, capsys):
    argv = evaluate(trained, "--output", "experiment.gin/results.json")
    assert refused_untouched(capsys, *argv) == (
        "experiment.gin/results.json: cannot be written (File exists): choose another place"
    )


# --- Signals -------------------------------------------------------------------------------------


def test_buckets_that_cannot_be_read(here, capsys, monkeypatch):
    """TensorFlow reads them, and has errors of its own."""
    import tensorflow as tf

    what = "Could not resolve host when reading metadata of gs://bucket/tokenizer.model"

    def fail(args):
        raise tf.errors.FailedPreconditionError(None, None, f"{what}\n  In call to configurable")

    monkeypatch.setattr(cli, "_train", fail)
    line = refused(capsys, "train", "experiment.gin")
    assert line.startswith(f"{what}: log in (gcloud auth application-default login), or correct")


def test_libtpu_is_silent_where_there_is_no_tpu(here):
    """It is installed for `fot compile`."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    argv = [sys.executable, "-m", "fot_jax", "train", "experiment.gin", "--dry_run"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "nothing written" in done.stdout
    assert "TPU" not in done.stderr


def test_interrupted_before_there_is_anything_to_save():
    code = """if True:
        import signal
        from fot_jax import cli
        cli._train = lambda args: signal.raise_signal(signal.SIGINT)
        cli.main(["train", "experiment.gin"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "fot: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_cache_that_is_stopped_leaves_nothing(here, monkeypatch, signum):
    write_split(here, "a short text")
    (here / "text.gin").write_text(TEXT + 'Corpus.path = "texts"\n')
    monkeypatch.setattr(tasks, "write_split", lambda *args: signal.raise_signal(signum))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["cache", "text.gin", "--output", "cache"])
    assert stopped.value.code == 128 + signum
    assert list((here / "cache").iterdir()) == []


# --- What is loaded ------------------------------------------------------------------------------


def test_help_answers_at_once():
    """`python -m fot_jax` is `fot`; neither loads anything heavy to say what it can do."""
    code = """if True:
        import sys
        from fot_jax.cli import main
        try:
            main(["--help"])
        except SystemExit as exit:
            print(exit.code, *{name.split(".")[0] for name in sys.modules}, file=sys.stderr)
    """
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    code, *loaded = ran.stderr.split()
    assert code == "0" and "fot_jax" in loaded
    assert not {"jax", "numpy", "flax", "gin", "tensorflow", "seqio", "matplotlib"} & set(loaded)
    for verb in ("train", "evaluate", "generate", "cache", "bench"):
        assert f"    {verb} " in ran.stdout
    module = subprocess.run(
        [sys.executable, "-m", "fot_jax", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert (module.returncode, module.stdout) == (0, ran.stdout)


@pytest.mark.parametrize(
    "argv", [[], ["trian"], ["train"], ["evaluate", "x.gin"], ["generate"], ["bench", "x"]], ids=str
)
def test_wrong_words_are_answered_with_usage(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: fot")


@pytest.mark.slow
def test_made_up_data_needs_no_tensorflow(here, tmp_path):
    """Training, evaluation and TensorBoard events where TensorFlow and SeqIO are not installed."""
    code = """if True:
        import sys
        from importlib.machinery import PathFinder
        class Without(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                if name.split(".")[0] not in ("tensorflow", "seqio", "tensorflow_datasets"):
                    return super().find_spec(name, path, target)
        sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
        from fot_jax.cli import main
        sys.exit(main())
    """
    argv = runs.arguments(here / "experiment.gin", here / "run", "train.steps = 2")
    process = runs.start(argv, ("-c", code))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert runs.steps_saved(here / "run") == [2]
    assert (here / "run" / "plots" / "perplexity_by_context.png").exists()
    (events,) = (here / "run").glob("events.out.tfevents.*")
    assert b"perplexity_by_context/valid/memory_16" in events.read_bytes()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "UNKNOWN: Gloo all-reduce failed: [external/gloo/pair.cc:538] Read error "
            "[127.0.0.1]:52145: Connection reset by peer\n  In call to configurable 'train'",
            "fot: error: another process of this run is gone (Connection reset by peer): see what "
            "that one said\n",
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_that_another_process_is_gone_is_one_line(monkeypatch, capsys, error, said):
    def main():
        raise jax.errors.JaxRuntimeError(error)

    codes = []
    monkeypatch.setattr(cli, "main", main)
    monkeypatch.setattr(cli, "_use_huge_pages", lambda: None)  # which starts a process anew
    monkeypatch.setattr(cli.os, "_exit", codes.append)
    with pytest.raises(SystemExit):
        cli.run()
    err = capsys.readouterr().err
    assert codes == [1] and (err == said if said else "Traceback" in err and error in err)
