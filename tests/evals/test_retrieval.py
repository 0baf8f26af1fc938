"""Retrieved keys: those of attention scores by hand in float64, and of a model that copies."""

import dataclasses
import json

import jax
import matplotlib.image
import numpy as np
import pytest
from tiny import tiny, untrained

from fot_jax.common.errors import UserError
from fot_jax.data.documents import Document
from fot_jax.data.vocabulary import Bytes
from fot_jax.evals.retrieval import RetrievalTable
from fot_jax.training import partitioning
from fot_jax.training.partitioning import MeshShape

WINDOW, MEMORY = 8, 100
CONFIG = tiny(
    vocab_size=258,
    num_layers=2,
    memory_layers=(0, 1),
    memory_positions=False,
    qk_norm=True,
    local_context=WINDOW,
)
TEXT = np.random.default_rng(5).integers(97, 123, MEMORY + WINDOW)
GIVEN = {"memory": MEMORY, "queries": 3, "k": 5, "keys": 2, "around": 4}


def lm_of(config=CONFIG, change=lambda params: params):
    return untrained(config, Bytes(), change)


class Documents:
    """A short one, and TEXT."""

    vocabulary = Bytes()

    def check_split(self, split):
        assert split == "valid"

    def documents(self, split):
        weights = np.ones(len(TEXT), np.float32)
        return iter([Document(TEXT[:50], weights[:50]), Document(TEXT, weights)])


def by_hand(lm, k):
    """Shares [queries of the window, heads, MEMORY] in the first layer, of the embeddings alone."""
    layer = jax.tree.map(lambda x: np.asarray(x, np.float64), lm.params["layers"][0])
    x = np.asarray(lm.params["embedding"], np.float64)[TEXT]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon)
    normed *= layer["attention_norm"]["scale"]
    attention = layer["attention"]

    def heads(name, n):
        projected = (normed @ attention[name]).reshape(len(TEXT), n, 8)
        return projected / np.linalg.norm(projected, axis=-1, keepdims=True)

    q, key = heads("query", 4), np.repeat(heads("key", 2), 2, axis=1)
    scores = np.einsum("qhd,mhd->qhm", q[MEMORY:], key[:MEMORY])
    scores *= np.exp(attention["log_scale"])[:, None]
    best = np.argsort(-scores.round(9), -1, kind="stable")[..., :k]  # of equal ones the first
    shares = np.zeros_like(scores)
    np.put_along_axis(shares, best, np.exp(np.take_along_axis(scores, best, -1)), -1)
    return shares / shares.sum(-1, keepdims=True)


def test_shares_and_focus_are_those_of_the_scores():
    lm = lm_of()
    rows = RetrievalTable(**GIVEN, seed=3).run(lm, Documents())
    assert [row["layer"] for row in rows] == [0] * 3 + [1] * 3
    assert [row["query"] for row in rows[:3]] == [row["query"] for row in rows[3:]]
    assert len({row["query"] for row in rows}) == 3
    expected = by_hand(lm, k=5).mean(1)
    for row in rows[:3]:
        mass = expected[row["query"] - MEMORY]
        assert dict(row["mass"]) == pytest.approx(
            {i: mass[i] for i in np.flatnonzero(mass)}, abs=1e-5
        )
        best = np.argsort(-mass.round(6), kind="stable")[:2]
        assert [key["position"] for key in row["found"]] == best.tolist()
        for key, i in zip(row["found"], best, strict=True):
            assert key["share"] == pytest.approx(mass[i], abs=1e-5)
            near = mass[max(0, i - 4) : i + 5].sum()
            assert key["focus"] == pytest.approx(near, abs=1e-5)
    for row in rows:
        assert sum(share for _, share in row["mass"]) == pytest.approx(1, abs=1e-5)


def test_texts_are_of_the_document():
    text = bytes(TEXT.tolist()).decode()
    for row in RetrievalTable(**GIVEN).run(lm_of(), Documents()):
        i = row["query"]
        assert row["text"] == (text[i - 12 : i], text[i], text[i + 1 : i + 13])
        for key in row["found"]:
            i = key["position"]
            assert key["text"] == (
                text[max(0, i - 12) : i],
                text[i],
                text[i + 1 : i + 13][: 99 - i],
            )


def sharp(params):
    """A token attends to those like it, alone."""
    attention = params["layers"]["attention"]
    attention["log_scale"] = np.full_like(attention["log_scale"], np.log(1e4))
    keys = np.asarray(attention["key"]).reshape(1, CONFIG.hidden_size, CONFIG.num_kv_heads, -1)
    attention["query"] = np.repeat(keys, 2, axis=2).reshape(1, CONFIG.hidden_size, -1)
    return params


def test_a_model_that_looks_at_one_place():
    config = dataclasses.replace(CONFIG, num_layers=1, memory_layers=(0,))
    once = np.arange(MEMORY + WINDOW) % 250
    once[MEMORY:] = once[40:48]  # no other token comes twice

    class Once(Documents):
        def documents(self, split):
            return iter([Document(once, np.ones(len(once), np.float32))])

    each = RetrievalTable(**GIVEN)
    rows = each.run(lm_of(config, sharp), Once())
    for row in rows:
        assert row["found"][0]["position"] == row["query"] - 60
        assert row["found"][0]["share"] == pytest.approx(1, abs=1e-3)
    assert each.scalars(rows) == {"retrieval/layer_0/focus": pytest.approx(1, abs=1e-3)}


def test_a_model_on_several_devices():
    one = lm_of()
    mesh = MeshShape(fsdp=2, tensor=2).make(jax.devices()[:4])
    sharded = lm_of(change=lambda x: jax.device_put(x, partitioning.shardings(x, mesh)))
    assert sharded.mesh is not None
    each = RetrievalTable(**GIVEN)
    assert each.run(sharded, Documents()) == each.run(one, Documents())


def test_what_the_rows_become(tmp_path):
    each = RetrievalTable(**GIVEN, name="found")
    rows = each.run(lm_of(), Documents())
    assert set(each.scalars(rows)) == {"found/layer_0/focus", "found/layer_1/focus"}
    lines = each.table(rows).splitlines()
    assert sum("query" in line for line in lines) == 6
    first = rows[0]["found"][0]
    before, token, after = first["text"]
    line = f"{first['share']:8.3f} {first['focus']:8.3f}  {before}[{token}]{after}"
    assert line in lines
    for row in rows:  # that is no formula
        row["text"] = before, "$$", after
    each.plot(rows, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png", format="png").shape[0] > 300


def test_rows_can_be_written_as_json_and_read_back():
    each = RetrievalTable(**GIVEN)
    rows = each.run(lm_of(), Documents())
    assert each.table(json.loads(json.dumps(rows))) == each.table(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": 0}, "RetrievalTable.memory = 0"),
        ({"k": 101}, "RetrievalTable.k = 101 is larger than RetrievalTable.memory = 100"),
        ({"queries": 9}, "RetrievalTable.queries = 9: give at most the local context, 8"),
        ({"keys": 0}, "RetrievalTable.keys = 0"),
        ({"around": -1}, "RetrievalTable.around = -1"),
        ({"memory": 101}, "no document of the valid split has the 109 tokens"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(UserError) as raised:
        RetrievalTable(**(GIVEN | changes)).run(lm_of(), Documents())
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "changes", [{"memory_layers": ()}, {"memory_before": True, "memory_positions": True}], ids=str
)
def test_a_model_without_a_memory_to_choose_from(changes):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match="RetrievalTable is of memory layers"):
        RetrievalTable(**GIVEN).run(lm_of(config), Documents())
