"""The adapter to the lm-evaluation-harness, on a task of our own."""

import itertools
import json
import re
import types
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from readers import OfBytes

from fot_jax.common.errors import UserError
from fot_jax.data.sentencepiece_vocabulary import TrainedSentencePiece
from fot_jax.data.vocabulary import Bytes
from fot_jax.evals import harness
from fot_jax.evals.harness import LmEval
from fot_jax.inference.language_model import Scores
from fot_jax.inference.state import EVERYTHING, MemoryConfig
from fot_jax.model.lookup import TopK

ANIMALS = [("cow", "moo"), ("dog", "woof"), ("cat", "meow"), ("pig", "oink"), ("owl", "hoot")]
WRONG = {"dog", "owl"}  # what the model gets wrong


def says(animal):
    return "moo" if animal in WRONG else dict(ANIMALS)[animal]


class Speaker(OfBytes):
    """Finds the sound that it believes in likely, letter by letter, and all others unlikely."""

    def __init__(self, memory_layers=(1,)):
        self.config = types.SimpleNamespace(
            memory_layers=memory_layers, local_context=2048, last_context_length=None
        )
        self.files = None
        self.memories, self.sizes, self.last = [], [], set()

    def score(self, texts, *, memory, last_context_length):
        self.last.add(last_context_length)
        assert len({len(text) for text in texts}) == 1 and len(texts) <= 3
        self.memories.append(memory)
        self.sizes.append(len(texts))
        nats = np.full((len(texts), len(texts[0]) - 1), 0.5, np.float32)
        for row, text in zip(nats, texts, strict=True):
            assert text[0] == Bytes.bos
            question, said, answer = Bytes().decode(text).partition("\nIt says ")
            if said:
                right = says(question.split()[-1].rstrip("?")) == answer
                row[-len(answer) :] = 0.1 if right else 3.0
        return Scores(nats, nats < 1)

    def generate(self, prompts, max_new_tokens, *, memory, last_context_length, **options):
        self.last.add(last_context_length)
        self.memories.append(memory)
        assert options["temperature"] == 0 and options["stop"] == (Bytes.eos,)
        assert options["until"](Bytes().encode("moo\n")) and len(prompts) <= 3
        written = []
        for prompt in prompts:
            question = Bytes().decode(prompt).removesuffix("\nIt says")
            animal = question.split()[-1].rstrip("?")
            written.append(Bytes().encode(f" {says(animal)}\nWhat next?")[:max_new_tokens])
        return written


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {directory}/{name}.jsonl
test_split: test
output_type: {kind}
doc_to_text: "What of the {{{{animal}}}}?\\nIt says"
"""
CHOICES = """
doc_to_choice: "{{sounds}}"
doc_to_target: "{{place}}"
metric_list:
  - metric: acc
"""
OF_A_METRIC = "\n    aggregation: mean\n    higher_is_better: true"
WRITTEN = """
doc_to_target: " {{sound}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    ignore_case: true
"""
ROLLED = """
task: rolled
dataset_path: json
dataset_kwargs:
  data_files:
    test: {directory}/choices.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{animal}}}}"
metric_list:
  - metric: byte_perplexity
"""
DRAWING = """
import random

RNG = random.Random(42)

def ask(doc):
    return f"{RNG.random()}?"
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory with three tasks about the same animals."""
    directory = tmp_path_factory.mktemp("tasks")
    sounds = sorted(sound for _, sound in ANIMALS)
    rows = [
        {"animal": animal, "sound": sound, "sounds": sounds, "place": sounds.index(sound)}
        for animal, sound in ANIMALS
    ]
    for name, kind, more in (
        ("choices", "multiple_choice", CHOICES),
        ("written", "generate_until", WRITTEN),
    ):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task = TASK.format(name=name, directory=directory, kind=kind) + more
        (directory / f"{name}.yaml").write_text(task)
    (directory / "rolled.yaml").write_text(ROLLED.format(directory=directory))
    for name, like, there, instead in (
        ("no_data", "choices", "choices.jsonl", "elsewhere.jsonl"),
        ("no_kind", "choices", "multiple_choice", "guessing"),
        ("no_metric", "choices", "metric: acc", f"metric: luck{OF_A_METRIC}"),
    ):
        whole = (directory / f"{like}.yaml").read_text()
        task = whole.replace(f"task: {like}", f"task: {name}").replace(there, instead)
        (directory / f"{name}.yaml").write_text(task)
    return directory


@pytest.fixture(scope="module", autouse=True)
def small_index():
    """Of the harness's 14,000 files, all of which it reads each time, RULER's alone."""
    from lm_eval.tasks import manager

    build, of_harness = manager.TaskIndex.build, Path(manager.__file__).parent

    def build_small(paths):
        return build([path / "ruler" if path == of_harness else path for path in paths])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager.TaskIndex, "build", staticmethod(build_small))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Of data sets, which would otherwise be in the home directory."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def evaluation(tasks, *names, **changes):
    return LmEval(names, include_path=str(tasks), **{"rows": 3, **changes})


def by_metric(rows):
    return {(row["task"], row["metric"].split(",")[0]): row["value"] for row in rows}


@pytest.mark.slow
def test_tasks_score_what_the_model_knows(tasks, tmp_path):
    speaker, each = Speaker(), evaluation(tasks, "choices", "written", "rolled")
    rows = each.run(speaker, None)
    found = by_metric(rows)
    assert found["choices", "acc"] == pytest.approx(3 / 5)
    assert found["written", "exact_match"] == pytest.approx(3 / 5)
    nats = 0.5  # a letter, or the mark before the three of them
    assert found["rolled", "byte_perplexity"] == pytest.approx(np.exp(nats * 4 / 3))
    assert set(speaker.memories) == {MemoryConfig()} and max(speaker.sizes) == 3
    assert speaker.last == {1024}

    assert "lm_eval/choices/acc,none" in each.scalars(rows)
    assert "exact_match" in each.table(rows) and "0.600" in each.table(rows)
    each.plot(rows, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png", format="png").shape[0] > 300


@pytest.mark.slow
def test_as_asked_for(tasks):
    speaker = Speaker()
    rows = evaluation(tasks, "choices", limit=2, lookup=TopK(7), storage="int8").run(speaker, None)
    assert by_metric(rows)["choices", "acc"] == 1 / 2  # cow and dog
    assert set(speaker.memories) == {MemoryConfig(storage="int8", lookup=TopK(7))}
    speaker = Speaker(memory_layers=())
    evaluation(tasks, "choices", "written").run(speaker, None)
    assert set(speaker.memories) == {EVERYTHING}
    assert speaker.last == {2048, 2048 - 12}  # all that fits, beside what is written


def test_questions_do_not_depend_on_what_was_asked_before(tasks):
    """Where a task's code draws from a generator of its own, as ruler_cwe's does."""
    (tasks / "drawing.py").write_text(DRAWING)
    written = (tasks / "written.yaml").read_text().replace("task: written", "task: drawn")
    asks = "doc_to_text: !function drawing.ask\n"
    (tasks / "drawn.yaml").write_text(re.sub("doc_to_text: .*\n", asks, written))
    parrots = [Parrot(3), Parrot(3)]
    for parrot in parrots:
        evaluation(tasks, "drawn", limit=2).run(parrot, None)
    assert parrots[0].asked == parrots[1].asked and len(set(parrots[0].asked)) == 2


class Parrot(Speaker):
    """Writes down the last so many tokens of what it reads."""

    def __init__(self, most):
        super().__init__()
        self.most, self.lengths, self.asked = most, [], []

    def generate(self, prompts, max_new_tokens, **options):
        self.asked += map(tuple, prompts)
        self.lengths += [len(prompt) + max_new_tokens for prompt in prompts]
        return [prompt[-self.most :] for prompt in prompts]


RULER = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)


@pytest.fixture(scope="module")
def english():
    """Tokens of about half a word, as RULER's code wants them."""
    sentences = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
        "Memorize and track the chain(s) of variable assignment hidden in the following text.",
        "Find all variables that are assigned the value in the text above.",
        "One of the special magic numbers for the uuid is: 0123456789-abcdef.",
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ VAR = VAR Question: Answer: jkqxz",
    )
    vocabulary = TrainedSentencePiece(460).train(sentences * 50)
    return vocabulary


@pytest.fixture
def few_questions(monkeypatch):
    """RULER's code makes three of a kind, in place of 500, of which LmEval.limit are asked."""
    from lm_eval.tasks import _yaml_loader
    from lm_eval.tasks.ruler import prepare_niah

    load = _yaml_loader._load_module_with_cache

    def progress_bar(questions, **_):
        return itertools.islice(questions, 3)

    def load_and_patch(path):
        module = load(path)
        if hasattr(module, "tqdm"):
            monkeypatch.setattr(module, "tqdm", progress_bar)
        return module

    monkeypatch.setattr(prepare_niah, "tqdm", progress_bar)
    monkeypatch.setattr(_yaml_loader, "_load_module_with_cache", load_and_patch)


@pytest.mark.slow
@pytest.mark.needs("wonderwords")
@pytest.mark.usefixtures("few_questions")
def test_ruler_by_length(english, tmp_path):
    """All is found in questions that are given back whole, little in their last 2,000 tokens."""
    lengths, parrot = (2_000, 3_500), Parrot(2_000)
    each = LmEval(RULER, lengths=lengths, limit=3, name="ruler")
    parrot.vocabulary = english
    rows = each.run(parrot, None)
    assert [(row["length"], row["task"]) for row in rows] == [
        (n, x) for n in lengths for x in RULER
    ]
    assert {row["metric"] for row in rows} == {"string_match,none"}
    # RULER names some lengths itself, of which the harness has no error of the mean.
    rows_of_both = LmEval(("niah_single_1",), lengths=(2_000, 4_096), limit=3).run(parrot, None)
    errors = [(row["value"] * (1 - row["value"]) / 2) ** 0.5 for row in rows_of_both]
    assert [row["stderr"] for row in rows_of_both] == pytest.approx(errors) and any(errors)
    found = {(row["task"], row["length"]): row["value"] for row in rows}
    assert all(found[task, 2_000] == 1 for task in RULER)
    assert 0 < sum(found[task, 3_500] for task in RULER) < len(RULER)
    asked = np.reshape(parrot.lengths[: -2 * 3], (2, -1))
    assert asked.shape == (2, 3 * len(RULER))
    for length, some in zip(lengths, asked, strict=True):
        assert (length / 2 < some).all() and (some < 1.1 * length).all(), some
    assert each.scalars(rows)["ruler/ruler_vt/string_match,none/2000"] == 1
    assert "ruler_vt            2,000  string_match,none           1.000" in each.table(rows)
    each.plot(rows, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png", format="png").shape[0] > 300


def test_ways_to_find_an_answer_are_told_apart(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(harness.plots, "save", lambda figure, path: drawn.append(figure))
    rows = [
        {"task": task, "metric": metric, "value": 0.5, "stderr": error}
        for task, metric, error in (
            ("gsm8k", "exact_match,strict-match", 0.1),
            ("gsm8k", "exact_match,flexible-extract", 0.1),
            ("arc", "acc,none", None),
            ("wikitext", "bits_per_byte,none", None),  # no share, whatever its number
        )
    ]
    LmEval(("gsm8k", "arc")).plot(rows, tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert len({bar.get_y() for bar in axes.patches}) == 3
    (bars,) = (x for x in axes.collections if len(x.get_segments()) == 3)
    assert [len(ends) for ends in bars.get_segments()] == [2, 2, 0]  # no error is not one of 0
    assert [label.get_text() for label in axes.get_yticklabels()][2] == "arc: acc"


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ("ruler_vt", 9_999, "the demonstration of ruler_vt takes "),  # bytes are too many
        ("ruler_cwe", 1_500, "LmEval.lengths: 1500: a question of ruler_cwe takes "),
        ("ruler_fwe", 300, "LmEval.lengths: 300: a question of ruler_fwe takes "),
        ("longcxt", 300, "LmEval.lengths: 300: a question of ruler_cwe takes "),  # tag of it
        ("ruler", 300, "LmEval.lengths: 300: a question of ruler_cwe takes "),
        (
            "niah_single_1",
            300,
            "cannot load niah_single_1 (ValueError: Could not generate any samp",
        ),
        ("choices", 300, "LmEval.lengths: choices has questions of its own length"),
        ("niah_single_1", None, "AssertionError: No tokenizer or pretrained provided"),
    ],
)
@pytest.mark.slow
def test_lengths_that_cannot_be_had(tasks, task, length, message):
    lengths = None if length is None else (length,)
    with pytest.raises(UserError) as raised:
        evaluation(tasks, task, lengths=lengths).run(Speaker(), None)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tasks: LmEval(()), "LmEval.tasks = ()"),
        (lambda tasks: LmEval(("a",), rows=0), "LmEval.rows = 0"),
        (lambda tasks: LmEval(("a",), lengths=()), "LmEval.lengths = (): give one length or more"),
        (lambda tasks: LmEval(("a",), lengths=(9, 0)), "LmEval.lengths = 0"),
        (lambda tasks: evaluation(tasks, "choices", apply_chat_template=True), "no chat template"),
        (lambda tasks: evaluation(tasks, "choices", "no_such"), "the harness knows no no_such"),
        (lambda tasks: LmEval(("a",), "nowhere"), "LmEval.include_path = 'nowhere': no such dir"),
        (lambda tasks: LmEval(("a",), seed=2**32), "LmEval.seed = 4294967296"),
        (lambda tasks: evaluation(tasks, "no_data"), "the harness cannot load no_data (FileNotFou"),
        (lambda tasks: evaluation(tasks, "no_kind"), "the harness cannot load no_kind ("),
        (lambda tasks: evaluation(tasks, "no_metric"), "LmEval.tasks: no_metric measures nothing"),
    ],
)
def test_what_does_not_fit_is_named(tasks, make, message):
    with pytest.raises(UserError) as raised:
        make(tasks).run(Speaker(), None)
    assert message in str(raised.value)


def test_names_are_looked_up_before_anything_is_loaded(tasks):
    """Of tasks, groups and tags."""
    evaluation(tasks, "choices", "niah_single_1", "ruler", "longcxt").check(None, None)
    with pytest.raises(UserError, match="the harness knows no arc_eas, no_such: see lm-eval ls"):
        evaluation(tasks, "choices", "no_such", "arc_eas").check(None, None)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("lm_eval", "LmEval needs the harness: pip install"),
        ("wonderwords", "LmEval.lengths needs wonderwords: pip install"),
    ],
)
def test_without_the_harness(tasks, monkeypatch, missing, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)
    with pytest.raises(UserError, match=message):
        evaluation(tasks, "niah_single_1", lengths=(2_000,)).check(None, None)
