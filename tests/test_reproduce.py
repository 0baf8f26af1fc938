"""`python experiments/reproduce`: trains, evaluates, reports; goes on where it was stopped."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import gin
import matplotlib.image
import pytest
import runs

from fot_jax import cli, gin_files
from fot_jax.evals import provenance
from fot_jax.model import sizes
from fot_jax.training.program import Program

ROOT = Path(__file__).parents[1]
REPRODUCE = ROOT / "experiments" / "reproduce"

DICTIONARY = f"""{runs.DICTIONARY}
train.steps = 4
train.evaluation = @Evaluation()
Evaluation.evals = (@DictionaryAccuracy(),)
DictionaryAccuracy.sizes = (16, 64)
DictionaryAccuracy.lookup = @TopK()
TopK.k = 4
"""


@pytest.fixture
def tiny(reproduce, tmp_path, monkeypatch):
    """A figure of one model, and of one that it starts from, twice."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gin").write_text(DICTIONARY)
    figures = sys.modules["figures"]

    def of_seed(seed):
        file, bindings = (str(tmp_path / "tiny.gin"),), (f"Data.seed = {seed}",)
        base = figures.Run(f"base_{seed}", "", file, (*bindings, "train.steps = 2"))
        return [base, figures.Run(f"fot_{seed}", "FoT", file, bindings, base.name)]

    figure = dataclasses.replace(figures.FIGURES["dictionary_cpu"], family="tiny", runs=of_seed)
    monkeypatch.setitem(figures.FIGURES, "tiny", figure)
    return ["tiny", "--seeds", "0,1", "--results", "results"]


@pytest.mark.slow
def test_a_figure(reproduce, tiny, tmp_path, monkeypatch, capsys):
    """Stopped in its second of four runs, it does that and the others, and none twice."""
    record = sys.modules["record"]
    verbs = []

    def stopped(command):
        if "train.steps = -1" in command:
            return 2  # refuses
        name = "--workdir" if command[0] == "train" else "--checkpoint"
        verbs.append((command[0], Path(command[command.index(name) + 1]).name))
        return 143 if len(verbs) == 2 else cli.main(list(command))

    monkeypatch.setattr(record, "fot", stopped)
    assert reproduce.main([*tiny, "--gin", "train.steps = -1"]) == 2
    assert reproduce.main(tiny) == 143  # now with other settings
    assert not list((tmp_path / "results").iterdir())
    assert reproduce.main(tiny) == 0
    trained = [("train", name) for name in ("base_0", "fot_0", "fot_0", "base_1", "fot_1")]
    evaluated = [("evaluate", name) for name in ("fot_0", "fot_1")]
    assert sorted(verbs) == sorted([*trained, *evaluated])

    workdirs = tmp_path / "workdirs" / "reproduce" / "tiny"
    of_seeds = [
        json.loads((workdirs / name / "results.json").read_text())["dictionary_accuracy"]
        for name in ("fot_0", "fot_1")
    ]
    content = json.loads((tmp_path / "results" / "tiny.json").read_text())
    for i, row in enumerate(content["rows"]):
        accuracies = [rows[i]["accuracy"] for rows in of_seeds]
        assert row["dictionary"] == of_seeds[0][i]["dictionary"] == (16, 64)[i]
        assert (row["least"], row["most"]) == (min(accuracies), max(accuracies))
        assert row["accuracy"] == pytest.approx(sum(accuracies) / 2) and row["seeds"] == 2
    assert len(content["rows"]) == 2 and len(content["commands"]) == 6
    assert content["seconds in all"] == sum(content["seconds"].values()) > 0
    # The devices are those of the evaluations: this process leaves them to the ones it starts.
    assert content["made"] == provenance.command_and_code()
    (evaluations,) = content["evaluations"]
    assert evaluations.items() < provenance.provenance().items()
    image = matplotlib.image.imread(tmp_path / "results" / "tiny.png")
    assert image.shape[0] > 300

    capsys.readouterr()
    assert reproduce.main(tiny) == 0  # from what is there
    assert len(verbs) == 7 and "| 16 | " in capsys.readouterr().out

    (workdirs / "fot_1" / "results.json").unlink()
    assert reproduce.main(tiny) == 0
    assert verbs[7:] == [("evaluate", "fot_1")]
    before = runs.files("results")
    for file, text, message in (
        ("progress.json", '{"done": ["tr', "cannot be read (Unterminated string"),
        ("progress.json", "[]", "has no settings: to make it anew, remove "),
        ("progress.json", '{"settings": {}, "done": "train"}', "has no done"),
        (
            "results.json",
            '{"perplexity": []}',
            "has no dictionary_accuracy: to evaluate again, rem",
        ),
    ):
        whole = (workdirs / "fot_0" / file).read_text()
        (workdirs / "fot_0" / file).write_text(text)
        with pytest.raises(SystemExit, match=f"fot_0/{file}: {re.escape(message)}"):
            reproduce.main(tiny)
        (workdirs / "fot_0" / file).write_text(whole)
    with pytest.raises(SystemExit, match="base_0 was made with other settings"):
        reproduce.main([*tiny, "--gin", "train.steps = 5"])
    (workdirs / "fot_0" / "progress.json").unlink()
    with pytest.raises(SystemExit, match="fot_0: no progress.json says what it was made with"):
        reproduce.main(tiny)
    assert len(verbs) == 8 and runs.files("results") == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "base"], "--only base: others start from it, there is nothing to draw"),
        (["--results", "tiny.gin"], "--results tiny.gin: cannot be written (File exists)"),
    ],
)
def test_refused_before_anything_is_trained(reproduce, tiny, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        reproduce.main([*tiny, *argv])
    assert not (tmp_path / "workdirs").exists()


def test_workdirs_are_local(reproduce, tiny, capsys):
    with pytest.raises(SystemExit):
        reproduce.main([*tiny, "--dry_run", "--workdirs", "gs://bucket/x"])
    assert "'gs://bucket/x': give a directory of this machine" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupt_stops_it_with_what_it_has_saved(tmp_path):
    """^C reaches the whole group, and training all the same just once."""
    tiny = [f"ModelConfig.{n} = 16" for n in ("hidden_size", "mlp_dim", "head_dim")]
    argv = ["dictionary_cpu", "--workdirs", str(tmp_path), "--results", str(tmp_path / "results")]
    argv += runs.bind(*tiny, "train.log_every = 1", "train.steps = 100_000")
    program = (str(REPRODUCE),)
    process = runs.start(argv, program, start_new_session=True, bufsize=1)
    while not (line := process.stderr.readline()).startswith("step 3/"):
        assert line, process.stdout.read()
    workdir = tmp_path / "dictionary_cpu" / "short_0"
    progress = json.loads((workdir / "progress.json").read_text())
    assert progress["settings"]["files"] == ["dictionary_cpu_short.gin"]  # if it is killed, too
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in err
    assert "stopped by SIGINT after step" in out + err
    assert len(runs.steps_saved(workdir)) == 1
    progress = json.loads((workdir / "progress.json").read_text())
    assert progress["done"] == [] and progress["seconds"] > 0


# In place of Python: sends a signal to who has started it, and says which ones come back.
SIGNALLED = """#!{python}
import os, pathlib, signal, sys, time
came = pathlib.Path(sys.argv[-1])
def stop(signum, frame):
    came.write_text(signal.Signals(signum).name)
    sys.exit()
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, stop)
time.sleep(0.2)  # until it knows of this process
os.kill(os.getppid(), signal.{how})
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("how", "passed_on"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")]
)
@pytest.mark.usefixtures("reproduce")
def test_signals_are_passed_on(tmp_path, monkeypatch, how, passed_on):
    record, program, came = sys.modules["record"], tmp_path / "program", tmp_path / "came"
    program.write_text(SIGNALLED.format(python=sys.executable, how=how))
    program.chmod(0o755)
    stop = signal.Signals[how]
    monkeypatch.setattr(sys, "executable", str(program))
    before = signal.signal(stop, signal.SIG_DFL)  # these tests may be run with nohup
    try:
        assert record.fot(["train", str(came)]) == 128 + stop
        assert came.read_text() == passed_on
        assert signal.getsignal(stop) == signal.SIG_DFL
    finally:
        signal.signal(stop, before)


@pytest.mark.usefixtures("reproduce")
def test_a_hangup_that_is_ignored_stops_nothing(tmp_path, monkeypatch):
    """As nohup has it."""
    record, program = sys.modules["record"], tmp_path / "program"
    program.write_text("#!/bin/sh\nsleep 0.2; kill -HUP $PPID; sleep 0.2; exit 7\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert record.fot([]) == 7
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ranges_are_over_seeds_and_not_over_what_one_seed_has_several_of():
    """Depths of a pass key, say."""
    sys.path.insert(0, str(REPRODUCE))
    from figures import FIGURES

    def seed(*accuracies):
        lengths = (512, 512, 1024, 1024)
        rows = zip(lengths, accuracies, strict=True)
        return {"passkey": [{"length": length, "accuracy": x} for length, x in rows]}

    figure = FIGURES["passkey_cpu"]
    rows = figure.rows({"FoT": [seed(1, 0, 1, 1), seed(1, 0.5, 0, 0)]})
    assert rows == [
        {"model": "FoT", "length": 512, "accuracy": 0.625, "least": 0.5, "most": 0.75, "seeds": 2},
        {"model": "FoT", "length": 1024, "accuracy": 0.5, "least": 0.0, "most": 1.0, "seeds": 2},
    ]
    *_, last = figure.table(rows).splitlines()
    assert last == "| 1K | 50.0 % (0.0 … 100.0) |"
    rows = figure.rows({"FoT": [seed(None, 0, 1, 1)]})  # as JSON has what was not finite
    assert "nan" in figure.table(rows).splitlines()[-2]


def test_every_figure_has_its_experiments():
    """Their commands, in order; each starts from what a run before it trained."""
    sys.path.insert(0, str(REPRODUCE))
    from figures import FIGURES

    shared = {}  # by family and name: what figures share is the same run
    for figure in FIGURES.values():
        there = set()
        for run in (run for seed in (0, 1, 2) for run in figure.runs(seed)):
            made = run.files, run.bindings, run.start
            assert shared.setdefault((figure.family, run.name), made) == made, run.name
            assert run.name not in there and (run.start is None or run.start in there)
            assert all((REPRODUCE / file).is_file() for file in run.files)
            there.add(run.name)


# Bindings of numbers; with another w, the windows before, a program has more rows of a lane.
OF_NUMBERS = re.compile(r"(?!PreviousContext\.w).* = (-?[\d_.e-]+|\([-\d_.e, ]+\))")


def every_run():
    """Of seed 0, those that figures share once: (family, run, whether its step is another one than
    those before, evaluations that figures show)."""
    sys.path.insert(0, str(REPRODUCE))
    from figures import FIGURES

    every, steps = {}, set()
    for figure in FIGURES.values():
        for run in figure.runs(0):
            if (figure.family, run.name) not in every:
                others = (each for each in run.bindings if not OF_NUMBERS.fullmatch(each))
                step = (*run.files, *others)
                every[figure.family, run.name] = (figure.family, run, step not in steps, set())
                steps.add(step)
            *_, shown = every[figure.family, run.name]
            shown |= {figure.evaluation} if run.model else set()
    return list(every.values())


def fewer_layers(run):
    """Bindings for three, where all have memory: each of them is traced by itself."""
    for size in (sizes.fot_184m, sizes.smollm2_135m):
        name, every = size.__name__, tuple(range(size().num_layers))
        if f"{name}.memory_layers = {every}" in run.bindings:
            return [f"{name}.num_layers = 3", f"{name}.memory_layers = (0, 1, 2)"]
    return []


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, run, traced, shown",
    [pytest.param(*of, id=f"{of[0]}-{of[1].name}") for of in every_run()],
)
def test_every_run_traces(family, run, traced, shown, capsys, monkeypatch):
    """With a tokenizer that is there at once, and on one device what is for a laptop.

    Steps that differ in numbers alone are traced once; all else is done of every run.
    """
    if not traced:
        monkeypatch.setattr(Program, "trace", lambda program: "as another run")
    bindings = [*run.bindings, *fewer_layers(run)]
    if run.start is not None:
        bindings += ['train.initialize_from = "a/checkpoint"']
    if family.endswith("_cpu") or family == "real_model":
        bindings += ["train.compute = @Compute()", "Compute.mesh = @MeshShape()"]
        bindings += ["MeshShape.data = 1"]
    if not run.files[0].startswith(("dictionary", "passkey_cpu_short")):
        bindings += ["Text.tokenizer = @Bytes()"]
    if family == "arxiv":
        bindings += ['Corpus.path = "texts"']
    if family == "c4_finetune":
        bindings += [f'{domain} = "texts"' for domain in ("GITHUB", "ISABELLE", "ARXIV")]
    if family == "real_model":
        domains = ("ISABELLE", "LATEX", "CODE", "BOOKS")
        bindings += [f'{domain} = "{domain}"' for domain in domains]
    files = [str(REPRODUCE / file) for file in run.files]
    code = cli.main(["train", *files, "--dry_run", *runs.bind(*bindings)])
    said = capsys.readouterr()
    assert code == 0 and "nothing written" in said.out, said.err
    evals = gin.get_configurable("Evaluation")().evals if shown else ()
    assert shown <= {each.name for each in evals}
    if any("memory_before = True" in binding for binding in bindings):  # and sees no more
        window = gin_files.value_of("CachedContext.tokens")
        assert any(window in getattr(each, "memory_sizes", ()) for each in evals)
    gin_files.load(files, [*bindings, "Evaluation.evals = ()"])  # as its training does


def test_dry_run():
    """As a process, as it is called."""
    argv = [sys.executable, str(REPRODUCE), "dictionary_cpu", "--dry_run", "--seeds", "7"]
    argv += ["--gin", "train.z_loss = 9"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *_ = lines = done.stdout.splitlines()
    assert all(line.startswith(("fot train ", "fot evaluate ")) for line in lines)
    assert "experiments/reproduce/dictionary_cpu_short.gin" in first and str(ROOT) not in first
    assert "train.seed = 7" in first and "Data.seed = 7" in first
    assert all("--gin 'train.z_loss = 9'" in line for line in lines)


def test_only_some_runs(reproduce, capsys):
    """And what they start from: dry runs, so by their commands."""

    def trained(only):
        assert reproduce.main(["dictionary_cpu", "--dry_run", "--only", only]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [Path(line.split()[4]).name for line in lines if line.startswith("fot train ")]

    assert trained("d1") == ["short_0", "middle_0", "d1_0"]
    assert trained("plain,fot") == ["short_0", "middle_0", "fot_0", "plain_0"]
    with pytest.raises(SystemExit) as ended:
        trained("d1,mt")
    message = "--only d1,mt: no run mt: there is short, middle, fot, d1, plain"
    assert ended.value.code.startswith(message) and "\n" not in ended.value.code


def test_the_command_is_as_it_is_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/fot", "evaluate", "a b.gin"])
    made = provenance.provenance()
    assert made["command"] == "fot evaluate 'a b.gin'"
    for typed, program in (
        ("python -m fot_jax", ROOT / "fot_jax" / "__main__.py"),
        ("python experiments/reproduce", "experiments/reproduce"),
    ):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [str(program), "x"])
        assert provenance.provenance()["command"] == f"{typed} x"


def test_the_commit_is_that_of_the_code(monkeypatch, tmp_path):
    def git(*words):
        who = "-c", "user.name=x", "-c", "user.email=x"
        argv = ["git", "-C", tmp_path, *who, *words]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()

    def commit():
        return provenance.provenance()["commit"]

    package, experiment = tmp_path / "fot_jax", tmp_path / "runs" / "a.gin"
    itself, other = package / "evals" / "provenance.py", package / "model" / "x.py"
    files = itself, other, experiment
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(itself))
    assert commit().startswith("version ")  # no repository
    git("init")
    git("add", experiment)
    git("commit", "-m", "someone else's")
    assert commit().startswith("version ")  # one that it is installed in
    git("add", package)
    git("commit", "-m", "ours")
    assert commit() == git("rev-parse", "HEAD")
    for file in files:
        file.write_text("changed")
        assert commit() == f"{git('rev-parse', 'HEAD')}-dirty"
        file.write_text("")
    (tmp_path / "notes.txt").write_text("")
    assert commit() == git("rev-parse", "HEAD")


# --- Numbers of the page -------------------------------------------------------------------------


def perplexities(file, model=None, domain=None):
    """Of a file of results, as the page writes them, by size of the memory (but 512)."""
    content = json.loads((REPRODUCE / "results" / f"{file}.json").read_text())
    rows = content.get("rows") or content[domain or file.rsplit("_", 1)[-1]]
    chosen = (row for row in rows if row.get("model") == model and row["memory"] != 512)
    return [f"{row['perplexity']:.2f}" for row in chosen]


@pytest.mark.parametrize("domain", ["Isabelle", "LaTeX", "code", "books"])
def test_numbers_of_the_page_are_those_of_its_files(domain):
    page = (REPRODUCE / "README.md").read_text().replace("*", "")
    written = re.findall(rf"^\| {domain}, (.+?) \|(.*)$", page, re.M)
    found = [(what, re.findall(r"(?<=\| )[\d.]+(?= \|)", f"|{cells}")) for what, cells in written]
    name, base = domain.lower(), "the model as it is"
    alone = perplexities(f"real_model_unscaled_{name}", base)
    long = alone if domain == "books" else perplexities(f"real_model_long_base_{name}")
    assert found == [
        ("as it is", long),
        ("FoT", perplexities(f"real_model_long_fot_{name}")),
        ("as it is", alone),
        ("FoT", perplexities(f"real_model_unscaled_{name}", "FoT")),
        ("Memorizing Transformer", perplexities("real_model_mt", domain=name)),
    ]


def test_answers_on_the_page_are_those_of_their_file():
    page = (REPRODUCE / "README.md").read_text().replace("*", "")
    content = json.loads((REPRODUCE / "results" / "real_model_long_fot.json").read_text())
    for name, task in (("trec", "TREC"), ("webqs", "WebQS")):
        cells = (f"{100 * x['accuracy']:.1f} ± {100 * x['interval']:.1f} %" for x in content[name])
        assert f"| {task} | {' | '.join(cells)} |" in page
