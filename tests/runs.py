"""Whole runs for tests: a tiny experiment, `fot` in this process or its own, what they leave."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from fot_jax import cli
from fot_jax.checkpoints.restore import restore_params
from fot_jax.checkpoints.steps import complete_steps
from fot_jax.training.partitioning import MeshShape

MODEL = """
train.model = @ModelConfig()
ModelConfig.vocab_size = 64
ModelConfig.hidden_size = 16
ModelConfig.num_layers = 2
ModelConfig.num_heads = 2
ModelConfig.num_kv_heads = 2
ModelConfig.head_dim = 8
ModelConfig.mlp_dim = 32
ModelConfig.memory_layers = (1,)
ModelConfig.local_context = 16
"""

# A single step on a corpus of texts; tests add the model, and Corpus.path.
ONE_STEP_ON_TEXT = """
train.data = @Data()
train.optimizer = @adamw
train.learning_rate = @constant_rate()
train.steps = 1
train.scheme = @PreviousContext()
train.checkpoints = @Checkpoints()
constant_rate.value = 0.01
Data.source = @Text()
Data.lanes = 2
Text.corpora = [@Corpus()]
Text.tokenizer = @Bytes()
"""

# Embedding and head 64 x 16 each; a layer: 4 matrices 16 x 16 and 3 of 16 x 32, 2 norms; a norm.
PARAMETERS = 2 * 64 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16

# A step: 4 documents of 32 tokens, a window of definitions and one of questions; 16 answers.
DICTIONARY = f"""{MODEL}
train.data = @Data()
train.optimizer = @adamw
train.learning_rate = @constant_rate()
train.steps = 12
train.log_every = 1
train.scheme = @PreviousContext()
train.checkpoints = @Checkpoints()
constant_rate.value = 0.01
Data.source = @DictionaryLookup()
Data.lanes = 4
DictionaryLookup.document_tokens = 32
DictionaryLookup.key_length = 1
DictionaryLookup.value_length = 1
PreviousContext.advance = 2
Checkpoints.every = 4
"""

EVALUATED = """
train.evaluation = @Evaluation()
Evaluation.evals = (@PerplexityByContext(),)
PerplexityByContext.memory_sizes = (0, 16)
"""

EVALUATED_TWICE = """
train.evaluation = @Evaluation()
Evaluation.evals = (@PerplexityByContext(), @Sample())
Evaluation.during = (@during/PerplexityByContext(),)
PerplexityByContext.memory_sizes = (0, 16)
PerplexityByContext.split = "test"
during/PerplexityByContext.split = "valid"
Sample.new_tokens = 4
Sample.memory = 16
"""

# With these documents the first right answers come at step 4.
SWITCHING = f"""{DICTIONARY}{EVALUATED_TWICE}
Data.seed = 4
train.d = @SwitchAtAccuracy()
SwitchAtAccuracy.threshold = 0.01
SwitchAtAccuracy.values = (1, 3)
"""

PACKED = f"""{MODEL}
train.data = @Data()
train.optimizer = @adamw
train.learning_rate = @cosine()
train.steps = 150
train.log_every = 4
train.scheme = @Packed()
train.compute = @Compute()
train.checkpoints = @Checkpoints()
cosine.max_value = 0.01
cosine.min_value = 0.001
cosine.warmup_steps = 10
cosine.steps = 150
ModelConfig.vocab_size = 258
Data.source = @Text()
Data.lanes = 4
Data.lane_groups = 2
Data.group_lanes = 2
Text.corpora = [@Corpus()]
Text.tokenizer = @Bytes()
Packed.pack = 2
Packed.range = 2
Compute.accumulation = 2
Checkpoints.every = 7
"""


@contextlib.contextmanager
def first_devices(monkeypatch, count):
    """Runs see the first of this process's devices alone."""
    make = MeshShape.make
    with monkeypatch.context() as patch:
        patch.setattr(MeshShape, "make", lambda shape: make(shape, jax.devices()[:count]))
        yield


def write(directory, experiment):
    path = directory / "experiment.gin"
    path.write_text(experiment)
    return path


def write_corpus(directory, documents=24, seed=0):
    """Made-up prose; every split the same kind."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(60)]
    directory.mkdir(exist_ok=True)
    for split in ("train", "valid", "test"):
        texts = (" ".join(rng.choices(words, k=rng.randrange(5, 40))) for _ in range(documents))
        lines = (json.dumps({"text": text}) for text in texts)
        (directory / f"{split}.jsonl").write_text("\n".join(lines))
    return directory


def arguments(experiment, workdir, *bindings):
    """The command line of a run."""
    gin = [word for binding in bindings for word in ("--gin", binding)]
    return ["train", str(experiment), "--workdir", str(workdir), *gin]


def train(experiment, workdir, *bindings):
    """A run in this process; returns the exit code."""
    return cli.main(arguments(experiment, workdir, *bindings))


def with_devices(count):
    """The environment of a process with so many devices: what XLA compiles here is found there."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={count}")
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(argv, program=("-m", "fot_jax"), nohup=False, **options):
    """`python -m fot_jax`, or another program, as a process with one device."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        return subprocess.Popen(
            [sys.executable, *program, *argv],
            cwd=Path(__file__).parents[1],
            env=with_devices(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
    finally:
        signal.signal(signal.SIGHUP, before)


# --- What a run left -----------------------------------------------------------------------------

OF_THE_CLOCK = {
    *(
        "time",
        "data_wait_seconds",
        "tokens_per_second",
        "seconds_per_step",
        "utilisation",
        "goodput",
    ),
}


def curve(workdir):
    """The lines of metrics.jsonl, without what time it took."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: x for k, x in row.items() if k not in OF_THE_CLOCK} for row in rows]


def training_curve(workdir):
    """The same, without evaluations."""
    return [row for row in curve(workdir) if "loss" in row]


def parameters(path):
    """Parameters of a workdir's newest checkpoint, or of a step in it."""
    return jax.tree.map(np.asarray, restore_params(path).params)


def assert_same_parameters(a, b):
    a, b = parameters(a), parameters(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def steps_saved(workdir):
    return complete_steps(Path(workdir) / "checkpoints")


def files(directory):
    """Name and content of every file."""
    found = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


# --- What is refused -----------------------------------------------------------------------------


def bind(*bindings):
    return [word for binding in bindings for word in ("--gin", binding)]


def refused(capsys, *argv):
    """The one line that a command is refused with."""
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 2
    said = capsys.readouterr()
    # What was said before the refusal stands on lines of its own.
    *_, line = said.err.splitlines()
    assert said.err.count("fot: error: ") == 1 and line.startswith("fot: error: ")
    assert said.err.endswith(f"{line}\n") and "Traceback" not in said.err
    return line.removeprefix("fot: error: ")


def refused_untouched(capsys, *argv):
    """The same, when nothing else may be said, nor anything written."""
    before = files(Path.cwd()), set(Path.cwd().rglob("*"))
    line = refused(capsys, *argv)
    assert (files(Path.cwd()), set(Path.cwd().rglob("*"))) == before
    return line
