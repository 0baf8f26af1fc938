"""Perplexity by context: what is scored, with which memory, and how it is drawn."""

import dataclasses
import math

import jax
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
from tiny import tiny, untrained

from fot_jax.common.errors import UserError
from fot_jax.data.documents import Document
from fot_jax.evals.perplexity import PerplexityByContext
from fot_jax.inference import segment_files
from fot_jax.inference.state import MemoryConfig
from fot_jax.model.lookup import Dense, IndexedTopK, TopK

WINDOW = 8
CONFIG = tiny(vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, local_context=WINDOW)


@pytest.fixture(scope="module")
def lm():
    return untrained(CONFIG, change=lambda params: jax.tree.map(lambda x: 3 * x, params))


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
    """(sum, weights, right) over targets start + 1 … stop, window by window, by hand."""
    first = max(0, start - -(-size // WINDOW) * WINDOW)
    logits = lm.logits(
        document.tokens[None, first:stop], last_context_length=WINDOW, memory=MemoryConfig(size)
    )
    logits = np.asarray(logits[0, start - first :], np.float64)
    targets = document.tokens[start + 1 : stop + 1]
    weight = document.weights[start + 1 : stop + 1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -(log_p[np.arange(len(targets)), targets] * weight).sum()
    return nats, weight.sum(), ((logits.argmax(-1) == targets) * weight).sum()


def test_rows_are_means_over_the_same_tokens(lm):
    """Scored: 16 tokens beyond the largest memory, or the second half of a document too short."""
    source = Documents(12, 80, 33, 41, 27)
    evaluation = PerplexityByContext((0, 16, 20), documents=3, scored_tokens=48, rows=2)
    rows = evaluation.run(lm, source)
    assert [row["memory"] for row in rows] == [0, 16, 20]
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


def test_documents_too_short_for_the_memory_give_their_second_half(lm, caplog):
    source = Documents(45)
    evaluation = PerplexityByContext((0, 256), documents=2, scored_tokens=128)
    rows = evaluation.run(lm, source)
    assert [(row["full"], row["documents"]) for row in rows] == [(1, 1), (0, 1)]
    assert "memories of 256 tokens and more are not full" in caplog.text
    caplog.clear()
    both = evaluation.run(
        lm, Documents(45, 329)
    )  # the other has 320 inputs, of which 64 are scored
    assert [(row["full"], row["documents"]) for row in both] == [(2, 2), (1, 2)]
    assert "of 1 of 2 documents" in caplog.text
    caplog.clear()
    evaluation.run(lm, Documents(329))
    assert not caplog.text
    for row in rows:  # 40 inputs are whole windows, the second half of them from window 2 on
        total, weights, _ = nats_of(lm, source.all[0], 16, 40, row["memory"])
        assert row["tokens"] == weights
        assert row["nats"] == pytest.approx(total / weights, rel=1e-5)


def test_documents_share_a_memory(lm):
    """Two at a time: a memory of 32 has the last 16 tokens of each (multi-doc)."""
    source = Documents(81, 57, 57, 81)
    evaluation = PerplexityByContext((32,), documents=4, scored_tokens=128, rows=2, multi_doc=True)
    (row,) = evaluation.run(lm, source)
    sums = np.zeros(3)
    for pair, stop in (((0, 3), 64), ((1, 2), 56)):  # the longest first; scored from 32 on
        documents = [source.all[i] for i in pair]
        tokens = np.stack([document.tokens[16:stop] for document in documents])
        memory = MemoryConfig(32, shared=True)
        logits = np.asarray(lm.logits(tokens, last_context_length=WINDOW, memory=memory), float)
        for document, out in zip(documents, logits[:, 16:], strict=True):
            targets, weight = (x[33 : stop + 1] for x in (document.tokens, document.weights))
            log_p = out - np.log(np.exp(out).sum(-1, keepdims=True))
            sums += (
                -(log_p[np.arange(stop - 32), targets] * weight).sum(),
                weight.sum(),
                ((out.argmax(-1) == targets) * weight).sum(),
            )
    assert row["tokens"] == sums[1]
    assert row["nats"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
    assert row["accuracy"] == pytest.approx(sums[2] / sums[1])
    alone = dataclasses.replace(evaluation, multi_doc=False).run(lm, source)[0]
    assert abs(alone["nats"] - row["nats"]) > 1e-4


def test_batches_are_even_so_that_every_memory_is_full(lm):
    """Three documents, two at a time at most: a batch of one reads as much as fills its memory."""
    source = Documents(161, 160, 159)
    evaluation = PerplexityByContext((64,), documents=3, scored_tokens=48, rows=2, multi_doc=True)
    (row,) = evaluation.run(lm, source)
    alone = nats_of(lm, source.all[0], 64, 80, 64)
    pair = [document.tokens[32:80] for document in source.all[1:]]
    shared = MemoryConfig(64, shared=True)
    logits = lm.logits(np.stack(pair), last_context_length=WINDOW, memory=shared)
    sums = np.asarray(alone)
    for document, out in zip(source.all[1:], np.asarray(logits[:, 32:], float), strict=True):
        targets, weight = document.tokens[65:81], document.weights[65:81]
        log_p = out - np.log(np.exp(out).sum(-1, keepdims=True))
        right = ((out.argmax(-1) == targets) * weight).sum()
        sums = sums + (-(log_p[np.arange(16), targets] * weight).sum(), weight.sum(), right)
    assert row["tokens"] == sums[1]
    assert row["nats"] == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_shared_or_not_the_same_tokens_are_scored(lm):
    """Without memory nothing is shared: the curves start from one point."""
    source = Documents(161, 120, 70, 45)
    evaluation = PerplexityByContext((0, 64), documents=4, scored_tokens=128, rows=2)
    alone, shared = (
        dataclasses.replace(evaluation, multi_doc=multi_doc).run(lm, source)
        for multi_doc in (False, True)
    )
    assert alone[0]["nats"] == pytest.approx(shared[0]["nats"], rel=1e-6)
    assert [row["tokens"] for row in alone] == [row["tokens"] for row in shared]
    assert abs(alone[1]["nats"] - shared[1]["nats"]) > 1e-4


def test_no_document_gives_more_than_its_share(lm):
    """Also where it is too short for the memory: its last tokens then."""
    source = Documents(81)
    evaluation = PerplexityByContext((0, 256), documents=1, scored_tokens=16)
    for row in evaluation.run(lm, source):
        total, weights, _ = nats_of(lm, source.all[0], 64, 80, row["memory"])
        assert row["tokens"] == weights
        assert row["nats"] == pytest.approx(total / weights, rel=1e-5)


def test_padding_does_not_enter_a_shared_memory(lm):
    """Beside a document much longer than it, the shorter one leaves nothing after its end."""
    source = Documents(161, 33)
    evaluation = PerplexityByContext((64,), documents=2, scored_tokens=256, rows=2, multi_doc=True)
    (row,) = evaluation.run(lm, source)
    short = source.all[1]
    source.all[1] = short._replace(
        tokens=np.concatenate([short.tokens, np.zeros(7, np.int32)]),
        weights=np.concatenate([short.weights, np.zeros(7, np.float32)]),
    )
    assert evaluation.run(lm, source)[0] == row


def test_lookup_and_storage_are_those_of_the_memory(lm):
    source = Documents(161)
    evaluation = PerplexityByContext((64,), documents=1, scored_tokens=64)
    dense, few, rounded = (
        dataclasses.replace(evaluation, **changes).run(lm, source)[0]["nats"]
        for changes in ({}, {"lookup": TopK(2)}, {"storage": "int8"})
    )
    assert abs(dense - few) > 1e-3 and 1e-7 < abs(dense - rounded) < 0.1
    with pytest.raises(UserError, match="TopK.k = 65 is larger than the memory of 64 tokens"):
        PerplexityByContext((0, 64, 128), lookup=TopK(65))
    with pytest.raises(UserError, match="storage = 'int3': choose one of"):
        PerplexityByContext(storage="int3")


def test_an_index_that_leads_to_all_keys_changes_nothing(lm, monkeypatch):
    monkeypatch.setattr(segment_files, "TOKENS", 16)
    source, sizes = Documents(161, 90), (0, 200)  # so much that nothing is forgotten
    exact, indexed = (
        PerplexityByContext(sizes, scored_tokens=128, lookup=lookup, rows=1).run(lm, source)
        for lookup in (TopK(2), IndexedTopK(2, visited=1_000))
    )
    for a, b in zip(exact, indexed, strict=True):
        assert a["nats"] == pytest.approx(b["nats"], rel=1e-5)
    with pytest.raises(UserError, match="PerplexityByContext.rows = 4 with IndexedTopK.*rows = 1"):
        PerplexityByContext(lookup=IndexedTopK())


@pytest.mark.parametrize("multi_doc", [False, True])
def test_a_memory_with_an_index_holds_about_its_size(lm, monkeypatch, caplog, multi_doc):
    """It begins anew when it has twice as many tokens: 64 slots at least are no segment yet."""
    monkeypatch.setattr(segment_files, "TOKENS", 16)
    evaluation = PerplexityByContext(
        (0, 16, 64),
        documents=2,
        scored_tokens=320,
        lookup=IndexedTopK(2, visited=1_000),
        rows=2 if multi_doc else 1,
        multi_doc=multi_doc,
    )
    source = Documents(300, 240)
    none, small, large = evaluation.run(lm, source)
    assert "memory_at_most" not in none and none["tokens"] == small["tokens"] == large["tokens"]
    assert (small["memory_at_most"], small["indexed"]) == ((16, 0) if multi_doc else (24, 0))
    assert 64 < large["memory_at_most"] < 128 and large["indexed"] >= 64
    assert not caplog.text
    lines = [line.split() for line in evaluation.table([none, small, large]).splitlines()]
    assert lines[0][-3:] == ["at", "most", "indexed"] and lines[1][-2:] == ["0", "0"]
    assert lines[3][-2:] == [str(large["memory_at_most"]), str(large["indexed"])]
    dataclasses.replace(evaluation, memory_sizes=(0, 16)).run(lm, source)
    assert "no memory had more than the 16 tokens that are looked up without" in caplog.text


def test_no_memory_is_the_window_alone(lm):
    """What stands before the window of a token changes nothing."""
    source = Documents(49, seed=1)
    (document,) = source.all
    evaluation = PerplexityByContext((0, 24), documents=1, scored_tokens=16)
    no_memory, with_memory = evaluation.run(lm, source)
    changed = document.tokens.copy()
    changed[:24] = (changed[:24] + 7) % CONFIG.vocab_size
    source.all = [document._replace(tokens=changed)]
    again, other = evaluation.run(lm, source)
    assert again == no_memory
    assert abs(other["nats"] - with_memory["nats"]) > 1e-3


def test_a_plain_model_is_evaluated_once(lm):
    config = dataclasses.replace(CONFIG, memory_layers=())
    plain = dataclasses.replace(lm, config=config)
    for lookup in (Dense(), TopK(4)):
        (row,) = PerplexityByContext((0, 16, 64), lookup=lookup).run(plain, Documents(49))
        assert row["memory"] == 0


def test_models_with_less_memory_are_measured_on_the_same_tokens(lm):
    """A plain one, and one that sees the window before its own and no more."""
    evaluation, source = PerplexityByContext((8, 0, 24, 4), documents=2), Documents(49, 70)
    of_all = evaluation.run(lm, source)
    (plain,) = evaluation.run(
        dataclasses.replace(lm, config=dataclasses.replace(CONFIG, memory_layers=())), source
    )
    before = dataclasses.replace(CONFIG, memory_layers=(0, 1), memory_before=True)
    of_before = evaluation.run(dataclasses.replace(lm, config=before), source)
    assert plain["nats"] == pytest.approx(of_all[0]["nats"], rel=1e-5)  # with a memory of 0
    assert [row["memory"] for row in of_before] == [0, 4, 8]
    larger = PerplexityByContext((0, 24), documents=2)
    assert [
        row["memory"] for row in larger.run(dataclasses.replace(lm, config=before), source)
    ] == [
        0,
        8,  # all that it uses
    ]
    assert {row["tokens"] for row in (*of_all, plain, *of_before)} == {plain["tokens"]}


def test_documents_of_another_source(lm):
    class Elsewhere(Documents):
        def with_vocabulary(self, vocabulary):
            assert vocabulary == "that of the run"
            return self

    source, other = Documents(49), Elsewhere(70, seed=3)
    source.vocabulary = "that of the run"
    rows = PerplexityByContext((0, 16), source=other).run(lm, source)
    assert rows == PerplexityByContext((0, 16)).run(lm, other)


def test_short_documents_are_refused(lm):
    message = "the valid split has no document longer than two windows of 8 tokens"
    with pytest.raises(UserError, match=message):
        PerplexityByContext().run(lm, Documents(16, 3))
    PerplexityByContext((0, 8)).run(lm, Documents(17))  # 16 inputs and a last target


def test_documents_whose_scored_tokens_do_not_count_are_refused(lm):
    source = Documents(49)
    source.all[0].weights[:-1] = 0  # and what is left over of whole windows is not scored
    with pytest.raises(UserError, match="no token that PerplexityByContext scores of the valid"):
        PerplexityByContext((0, 8), scored_tokens=8).run(lm, source)
    source.all[0].weights[12] = 1
    row, _ = PerplexityByContext((0, 8), scored_tokens=8).run(lm, source)
    assert row["tokens"] == 1


ROWS = [
    {"memory": 0, "perplexity": 9.5, "accuracy": 0.125, "tokens": 1000.0},
    {"memory": 128, "perplexity": 8.25, "accuracy": 0.25, "tokens": 1000.0},
    {"memory": 2048, "perplexity": 7.125, "accuracy": 0.5, "tokens": 1000.0},
]


def test_table_and_scalars_have_every_row():
    evaluation = PerplexityByContext(split="test", name="isabelle")
    table = evaluation.table(ROWS).splitlines()
    assert [line.split() for line in table[1:]] == [
        ["0", "9.500", "0.125", "1,000"],
        ["128", "8.250", "0.250", "1,000"],
        ["2048", "7.125", "0.500", "1,000"],
    ]
    assert evaluation.scalars(ROWS) == {
        "isabelle/test/memory_0": 9.5,
        "isabelle/test/memory_128": 8.25,
        "isabelle/test/memory_2048": 7.125,
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
    PerplexityByContext(multi_doc=True).plot(rows, path)
    label = "memory beyond the local window (tokens, shared by documents)"
    assert figures[1].axes[0].get_xlabel() == label
