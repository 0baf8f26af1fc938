"""What an index finds of a model's keys: against softmaxes by hand in float64."""

import dataclasses
import itertools
import json

import jax
import matplotlib.image
import numpy as np
import pytest
from tiny import tiny, untrained

from fot_jax.common.errors import UserError
from fot_jax.data.documents import Document
from fot_jax.data.vocabulary import Bytes
from fot_jax.evals.index_recall import IndexRecall
from fot_jax.inference import forward
from fot_jax.model import clusters
from fot_jax.training import partitioning
from fot_jax.training.partitioning import MeshShape

WINDOW, HEADS = 8, 4
CONFIG = tiny(
    vocab_size=258,
    num_layers=2,
    memory_layers=(0, 1),
    memory_positions=False,
    qk_norm=True,
    local_context=WINDOW,
)
GIVEN = {"memory": 480, "documents": 6, "queries": 20, "k": 4, "visited": (0.05, 0.2, 0.9)}
LENGTHS = (87, 88, 200, 88, 89, 300, 88, 400)  # the first is too short
RNG = np.random.default_rng(7)
TEXTS = [RNG.integers(250, size=n) for n in LENGTHS]


class Documents:
    """Of TEXTS, with so few weights that are not 0."""

    vocabulary = Bytes()

    def __init__(self, weighted=slice(None)):
        self.weighted = weighted

    def check_split(self, split):
        assert split == "valid"

    def documents(self, split):
        for text in TEXTS:
            weights = np.zeros(len(text), np.float32)
            weights[self.weighted] = 1
            yield Document(text, weights)


@pytest.fixture
def small_clusters(monkeypatch):
    monkeypatch.setattr(clusters, "SLOTS", 8)


def lm_of(config=CONFIG, change=lambda params: params):
    return untrained(config, Bytes(), change)


def by_hand(lm, k):
    """Mass of the k best keys of the first layer, of embeddings alone: [3 texts, WINDOW, HEADS]."""
    layer = jax.tree.map(lambda x: np.asarray(x, np.float64), lm.params["layers"][0])

    def heads(name, n, tokens):
        x = np.asarray(lm.params["embedding"], np.float64)[tokens]
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon)
        normed *= layer["attention_norm"]["scale"]
        projected = (normed @ layer["attention"][name]).reshape(*tokens.shape, n, 8)
        return projected / np.linalg.norm(projected, axis=-1, keepdims=True)

    texts = [text for text in TEXTS if len(text) >= 88][:6]
    keys = np.repeat(heads("key", 2, np.concatenate([text[:80] for text in texts])), 2, axis=1)
    q = heads("query", HEADS, np.stack([text[80:88] for text in texts[::2]]))
    scale = np.exp(layer["attention"]["log_scale"])[:, None]
    shares = np.exp(np.einsum("bthd,mhd->bthm", q, keys) * scale)
    return np.sort(shares, -1)[..., -k:].sum(-1) / shares.sum(-1)


@pytest.mark.usefixtures("small_clusters")
def test_mass_is_that_of_the_softmax_and_more_is_found_where_more_is_visited():
    lm = lm_of()
    rows = IndexRecall(**(GIVEN | {"queries": 10_000})).run(lm, Documents())
    assert [row["layer"] for row in rows] == [0] * 4 + [1] * 4
    for of_layer in rows[:4], rows[4:]:
        assert [row["visited"] for row in of_layer] == [0.05, 0.2, 0.9, 1.0]
        for what in ("recall", "mass"):
            found = [row[what] for row in of_layer]
            assert all(a <= b + 1e-6 for a, b in itertools.pairwise(found)) and found[0] < found[-1]
        assert of_layer[0]["recall"] < 0.9 and of_layer[2]["recall"] > 0.95
        assert of_layer[-1]["recall"] == 1
    there = np.array([len(text) > 88 for text in TEXTS if len(text) >= 88][:6:2])
    mass = by_hand(lm, 4)  # the last query of a text of 88 tokens predicts nothing
    counted = np.concatenate([mass[:, :-1].reshape(-1), mass[there, -1].reshape(-1)])
    assert rows[3]["mass"] == pytest.approx(counted.mean(), rel=1e-5)


def test_keys_that_are_stored_in_few_bits_are_found_as_they_are_read():
    """By a model in bfloat16, in which keys of int8 are other numbers than in float32."""
    lm = untrained(CONFIG, Bytes(), dtype="bfloat16")
    each = IndexRecall(**(GIVEN | {"visited": (0.999,)}), storage="int8")
    assert [row["recall"] for row in each.run(lm, Documents())] == [1, 1, 1, 1]


def test_evaluations_of_a_run_compile_once():
    lm, each = lm_of(), IndexRecall(**GIVEN)
    first = each.run(lm, Documents())
    compiled = forward.run._cache_size()
    assert each.run(lm, Documents()) == first and forward.run._cache_size() == compiled


def test_queries_are_of_tokens_that_count():
    """One of each text: number 84 is predicted by the fourth of a window."""
    lm = lm_of()
    rows = IndexRecall(**GIVEN).run(lm, Documents([84]))
    assert rows[3]["mass"] == pytest.approx(by_hand(lm, 4)[:, 3].mean(), rel=1e-5)


@pytest.mark.usefixtures("small_clusters")
def test_a_model_on_several_devices():
    mesh = MeshShape(fsdp=2, tensor=2).make(jax.devices()[:4])
    sharded = lm_of(change=lambda x: jax.device_put(x, partitioning.shardings(x, mesh)))
    each = IndexRecall(**GIVEN)
    assert sharded.mesh is not None
    assert each.run(sharded, Documents()) == each.run(lm_of(), Documents())


def test_what_the_rows_become(tmp_path):
    each = IndexRecall(**GIVEN, name="found")
    rows = each.run(lm_of(), Documents())
    assert each.scalars(rows)["found/layer_1/0.2"] == rows[5]["recall"]
    assert len(each.scalars(rows)) == 6
    head, *lines = each.table(json.loads(json.dumps(rows))).splitlines()
    assert head.split() == ["5", "%", "20", "%", "90", "%", "100", "%"]
    assert lines[3].split() == ["layer", "1", "mass", *(f"{row['mass']:.4f}" for row in rows[4:])]
    each.plot(rows, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png", format="png").shape[0] > 300


@pytest.mark.parametrize(
    ("changes", "documents", "message"),
    [
        ({"k": 481}, Documents(), "IndexRecall.k = 481 is more than the 480 tokens"),
        ({"visited": ()}, Documents(), "IndexRecall.visited = ()"),
        ({"visited": (1.0,)}, Documents(), "IndexRecall.visited = 1.0"),
        ({"memory": 47}, Documents(), "IndexRecall.memory = 47 is less than a window of 8"),
        ({"documents": 9, "memory": 720}, Documents(), "has 7 documents of 88 tokens"),
        ({}, Documents([]), "no token of the windows that ask counts"),
    ],
)
def test_what_does_not_fit_is_named(changes, documents, message):
    with pytest.raises(UserError) as raised:
        IndexRecall(**(GIVEN | changes)).run(lm_of(), documents)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "changes", [{"memory_layers": ()}, {"memory_before": True, "memory_positions": True}], ids=str
)
def test_a_model_without_a_memory_to_index(changes):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match="IndexRecall is of memory layers"):
        IndexRecall(**GIVEN).run(lm_of(config), Documents())
