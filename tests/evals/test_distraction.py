"""Positive mass: by hand from the attention scores, and of models of which it is known."""

import dataclasses

import jax
import matplotlib.image
import numpy as np
import pytest
from tiny import tiny, untrained

from fot_jax.common.errors import UserError
from fot_jax.data.documents import Document
from fot_jax.evals import distraction
from fot_jax.evals.distraction import PositiveMass
from fot_jax.model.lora import Lora, joined
from fot_jax.training import partitioning
from fot_jax.training.partitioning import MeshShape

WINDOW = 8
CONFIG = tiny(
    num_layers=1,
    num_kv_heads=4,
    memory_layers=(0,),
    memory_positions=False,
    qk_norm=True,
    local_context=WINDOW,
)


def lm_of(config=CONFIG, change=lambda params: params):
    return untrained(config, change=change)


class Documents:
    """Every document has a token of its own, over and over, or random ones."""

    def __init__(self, lengths, alike=True):
        rng = np.random.default_rng(0)
        self.all = [
            Document(np.full(n, i + 1) if alike else rng.integers(0, 31, n), np.ones(n, np.float32))
            for i, n in enumerate(lengths)
        ]

    def check_split(self, split):
        assert split == "valid"

    def documents(self, split):
        return iter(self.all)


def masses(rows):
    return {row["d"]: row["mass"] for row in rows}


def with_scale(scale):
    def change(params):
        attention = params["layers"]["attention"]
        attention["log_scale"] = np.full_like(attention["log_scale"], np.log(scale))
        attention["key"] = attention["query"]  # a token attends to those like it
        return params

    return change


def test_a_model_that_tells_nothing_apart_gives_each_context_the_same():
    rows = PositiveMass(ds=(1, 2, 5)).run(lm_of(change=with_scale(1e-6)), Documents([40] * 5))
    assert masses(rows) == pytest.approx({1: 1.0, 2: 1 / 2, 5: 1 / 5}, rel=1e-3)


def test_a_model_that_tells_documents_apart_stays_with_its_own():
    rows = PositiveMass(ds=(1, 2, 5)).run(lm_of(change=with_scale(200.0)), Documents([40] * 5))
    assert masses(rows) == pytest.approx({1: 1.0, 2: 1.0, 5: 1.0}, rel=1e-3)


def test_by_hand():
    """One layer: keys and queries are those of embeddings, whatever the other tokens are."""
    lm, source = lm_of(change=with_scale(6.0)), Documents([16, 16, 16], alike=False)
    rows = PositiveMass(ds=(3,), batches=1).run(lm, source)

    heads, embedding, layer = CONFIG.num_heads, lm.params["embedding"], lm.params["layers"][0]
    x = np.asarray(embedding, np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon)
    x = (x @ np.asarray(layer["attention"]["query"], np.float64)).reshape(len(x), heads, -1)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    texts = [document.tokens for document in source.all]
    shares = []
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):  # 16 tokens: two windows, at one place only
        for head in range(heads):
            for token in texts[i][WINDOW:]:
                of = [np.exp(6.0 * x[texts[n][:WINDOW], head] @ x[token, head]) for n in (i, j, k)]
                shares.append(of[0].sum() / sum(each.sum() for each in of))
    assert masses(rows)[3] == pytest.approx(np.mean(shares), rel=1e-4)


def test_adapters_beside_the_kernels():
    """Which those of a run in bfloat16 are."""

    def adapted(params):
        params = with_scale(6.0)(params)
        adapters = Lora(2, kernels=("query",)).init(jax.random.key(0), params["layers"])
        b = adapters["query"]["b"]
        adapters["query"]["b"] = 0.3 * jax.random.normal(jax.random.key(1), b.shape)
        return joined(params, adapters)

    each, source = PositiveMass(ds=(3,), batches=1), Documents([16] * 3, alike=False)
    plain, merged, beside = (
        masses(each.run(untrained(CONFIG, change=change, dtype=dtype), source))[3]
        for change, dtype in (
            (with_scale(6.0), "float32"),
            (adapted, "float32"),
            (adapted, "bfloat16"),
        )
    )
    assert beside == pytest.approx(merged, rel=0.005)
    assert merged != pytest.approx(plain, rel=0.02)


def test_short_documents_are_left_out_and_places_drawn():
    lm, source = lm_of(change=with_scale(6.0)), Documents([15, 40, 16, 40, 3], alike=False)
    one = masses(PositiveMass(ds=(3,)).run(lm, source))
    assert one == masses(PositiveMass(ds=(3,)).run(lm, source))
    assert one != masses(PositiveMass(ds=(3,), seed=1).run(lm, source))


def test_every_memory_layer(tmp_path):
    config = dataclasses.replace(CONFIG, num_layers=3, memory_layers=(0, 2))
    each = PositiveMass(ds=(2, 4))
    rows = each.run(lm_of(config), Documents([40] * 4))
    assert [(row["d"], row["layer"]) for row in rows] == [(2, 0), (2, 2), (4, 0), (4, 2)]
    assert set(each.scalars(rows)) == {
        f"positive_mass/layer_{layer}/d_{d}" for layer in (0, 2) for d in (2, 4)
    }
    lines = each.table(rows).splitlines()
    assert len(lines) == 3 and lines[2].split()[0] == "4" and lines[2].split()[-1] == "0.250"
    each.plot(rows, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png", format="png").shape[0] > 300


def test_evaluations_of_a_run_compile_once():
    for _ in range(2):
        PositiveMass(ds=(2,), batches=1).run(lm_of(), Documents([30] * 2))
        compiled = distraction._measure._cache_size()
        PositiveMass(ds=(2,), batches=1).run(lm_of(), Documents([30] * 2))
        assert distraction._measure._cache_size() == compiled


def test_a_model_on_several_devices(monkeypatch):
    """Measured on one of them: kernels are not for parameters that are spread over several."""
    measure = distraction._measure

    def on_one(model, plan, params, tokens):
        assert {len(x.devices()) for x in jax.tree.leaves(params)} == {1}
        return measure(model, plan, params, tokens)

    monkeypatch.setattr(distraction, "_measure", on_one)
    one, source = lm_of(), Documents([40] * 3, alike=False)
    mesh = MeshShape(data=2, fsdp=2).make(jax.devices()[:4])
    lm = lm_of(change=lambda params: jax.device_put(params, partitioning.shardings(params, mesh)))
    assert lm.mesh is not None and not lm.params["embedding"].sharding.is_fully_replicated
    each = PositiveMass(ds=(1, 3), batches=1)  # 6 rows would not go on four devices
    assert masses(each.run(lm, source)) == pytest.approx(masses(each.run(one, source)), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"ds": ()}, CONFIG, "PositiveMass.ds = ()"),
        ({"ds": (0,)}, CONFIG, "PositiveMass.ds = 0"),
        ({"batches": 0}, CONFIG, "PositiveMass.batches = 0"),
        ({"ds": (5,)}, CONFIG, "the valid split has 4 documents of two windows (16 tokens)"),
        ({}, dataclasses.replace(CONFIG, memory_layers=()), "the model has none"),
    ],
)
def test_what_does_not_fit_is_named(changes, config, message):
    with pytest.raises(UserError) as raised:
        PositiveMass(**changes).run(lm_of(config), Documents([40] * 4))
    assert message in str(raised.value)
