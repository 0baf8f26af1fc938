"""Perplexity by context: what is scored, with which memory, and how it is drawn."""

import dataclasses
import math

import jax
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from fot_jax.data.lanes import Document
from fot_jax.errors import UserError
from fot_jax.evals.perplexity import PerplexityByContext
from fot_jax.generate import LanguageModel
from fot_jax.model import crossbatch, memory
from fot_jax.model.transformer import ModelConfig, Transformer

WINDOW = 8
CONFIG = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    memory_layers=(1,),
    local_context=WINDOW,
)


@pytest.fixture(scope="module")
def lm():
    model = Transformer(CONFIG)
    tokens = np.zeros((1, WINDOW), np.int32)
    params = model.init(jax.random.key(1), tokens, tokens, crossbatch.Plan())["params"]
    return LanguageModel(model, jax.tree.map(lambda x: 3 * x, params))


class Documents:
    """A source with documents of these lengths; every third token has no weight."""

    def __init__(self, *lengths, seed=0):
        rng = np.random.default_rng(seed)
        self.all = [
            Document(
                rng.integers(0, CONFIG.vocab_size, n, dtype=np.int32),
                (np.arange(n) % 3 > 0).astype(np.float32),
            )
            for n in lengths
        ]

    def documents(self, split):
        assert split == "valid"
        yield from self.all


def nats_of(lm, document, start, stop, size):
    """(sum, weights) over targets start + 1 … stop, window by window through the model itself."""
    state = memory.empty(CONFIG, 1, size)
    total = weights = right = 0.0
    for at in range(max(0, start - size), stop, WINDOW):
        tokens = document.tokens[None, at : at + WINDOW]
        segments = np.ones_like(tokens)
        arguments = {"params": lm.params}, tokens, segments, crossbatch.Plan()
        out = lm.model.apply(*arguments, memory=state if size else None)
        state = state.append(out.window, segments)
        if at < start:
            continue
        logits = lm.model.apply({"params": lm.params}, out.hidden, method="logits")[0]
        logits = np.asarray(logits, np.float64)
        targets = document.tokens[at + 1 : at + WINDOW + 1]
        weight = document.weights[at + 1 : at + WINDOW + 1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= (log_p[np.arange(WINDOW), targets] * weight).sum()
        right += ((logits.argmax(-1) == targets) * weight).sum()
        weights += weight.sum()
    return total, weights, right


def test_rows_are_means_over_the_same_tokens(lm):
    """Scored: 16 tokens beyond the largest memory, or the second half of a document too short."""
    source = Documents(12, 80, 33, 41, 27)
    evaluation = PerplexityByContext((0, 16, 20), documents=3, scored_tokens=16)
    rows = evaluation.run(lm, source)
    assert [row["memory"] for row in rows] == [0, 16, 24]  # whole windows
    scored = (
        (source.all[1], 24, 40),  # of 79 targets, the first 16 that a full memory is read before
        (source.all[3], 24, 40),
        (source.all[2], 24, 32),
    )
    for row in rows:
        sums = np.sum([nats_of(lm, *part, row["memory"]) for part in scored], axis=0)
        assert row["tokens"] == sums[1]
        assert row["nats"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(sums[0] / sums[1]), rel=1e-4)
        assert row["accuracy"] == pytest.approx(sums[2] / sums[1])
    assert len({row["tokens"] for row in rows}) == 1
    assert len({round(row["nats"], 4) for row in rows}) == 3  # memory is of consequence


def test_documents_too_short_for_the_memory_give_their_second_half(lm):
    source = Documents(45)
    rows = PerplexityByContext((0, 256), documents=2, scored_tokens=64).run(lm, source)
    for row in rows:  # 40 inputs are whole windows, the second half of them from window 2 on
        total, weights, _ = nats_of(lm, source.all[0], 16, 40, row["memory"])
        assert row["tokens"] == weights
        assert row["nats"] == pytest.approx(total / weights, rel=1e-5)


def test_no_memory_is_the_window_alone(lm):
    """What stands before the window of a token changes nothing."""
    source = Documents(49, seed=1)
    (document,) = source.all
    evaluation = PerplexityByContext((0, 24), scored_tokens=16)
    no_memory, with_memory = evaluation.run(lm, source)
    changed = document.tokens.copy()
    changed[:24] = (changed[:24] + 7) % CONFIG.vocab_size
    source.all = [document._replace(tokens=changed)]
    again, other = evaluation.run(lm, source)
    assert again == no_memory
    assert abs(other["nats"] - with_memory["nats"]) > 1e-3


def test_a_plain_model_is_evaluated_once(lm):
    config = dataclasses.replace(CONFIG, memory_layers=())
    plain = LanguageModel(Transformer(config), lm.params)
    (row,) = PerplexityByContext((0, 16, 64)).run(plain, Documents(49))
    assert row["memory"] == 0


def test_short_documents_are_refused(lm):
    message = "the valid split has no document longer than two windows of 8 tokens"
    with pytest.raises(UserError, match=message):
        PerplexityByContext().run(lm, Documents(16, 3))
    PerplexityByContext((0, 8)).run(lm, Documents(17))  # 16 inputs and a last target


ROWS = [
    {"memory": 0, "perplexity": 9.5, "accuracy": 0.125},
    {"memory": 128, "perplexity": 8.25, "accuracy": 0.25},
    {"memory": 2048, "perplexity": 7.125, "accuracy": 0.5},
]


def test_table_and_scalars_have_every_row():
    evaluation = PerplexityByContext(split="test")
    table = evaluation.table(ROWS).splitlines()
    assert [line.split() for line in table[1:]] == [
        ["0", "9.500", "0.125"],
        ["128", "8.250", "0.250"],
        ["2048", "7.125", "0.500"],
    ]
    assert evaluation.scalars(ROWS) == {
        "test_perplexity/memory_0": 9.5,
        "test_perplexity/memory_128": 8.25,
        "test_perplexity/memory_2048": 7.125,
    }


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2]], ids=lambda rows: f"{len(rows)} rows")
def test_plot(tmp_path, monkeypatch, rows):
    figures = []
    save = matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    path = tmp_path / "plot.partial"  # a name that says nothing of its format
    PerplexityByContext(split="test").plot(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "memory beyond the local window (tokens)"
    assert axes.get_ylabel() == "test perplexity per token"
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[r["memory"], r["perplexity"]] for r in rows]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [{0: "0", 128: "128", 2048: "2K"}[row["memory"]] for row in rows]
    assert {text.get_text() for text in axes.texts} == {f"{r['perplexity']:.2f}" for r in rows}
    drawn = axes.get_window_extent()
    for text in axes.texts:  # nothing hangs over the edge
        box = text.get_window_extent()
        assert drawn.x0 <= box.x0 and box.x1 <= drawn.x1 and box.y1 <= drawn.y1
    assert matplotlib.image.imread(path, format="png").std() > 0.05
