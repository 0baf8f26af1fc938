"""The probe of layers against perplexity of the model with that memory layer."""

import dataclasses

import jax
import matplotlib.image
import numpy as np
import pytest
from tiny import tiny, untrained

from fot_jax.common.errors import UserError
from fot_jax.data.documents import Document
from fot_jax.evals.memory_layers import MemoryLayerProbe
from fot_jax.evals.perplexity import PerplexityByContext

CONFIG = tiny(vocab_size=31, memory_layers=(0, 2))


class Documents:
    def documents(self, split):
        rng = np.random.default_rng(3)
        for n in (90, 80):
            tokens = rng.integers(0, CONFIG.vocab_size, n, dtype=np.int32)
            yield Document(tokens, np.ones(n, np.float32))


@pytest.fixture(scope="module")
def lm():
    return untrained(CONFIG, change=lambda params: jax.tree.map(lambda x: 3 * x, params))


def with_memory_in(lm, *layers):
    return dataclasses.replace(lm, config=dataclasses.replace(CONFIG, memory_layers=layers))


def test_a_layer_alone(lm):
    perplexity = PerplexityByContext((8, 24), documents=2, scored_tokens=32)
    (without,) = perplexity.run(with_memory_in(lm), Documents())
    wanted = {layer: perplexity.run(with_memory_in(lm, layer), Documents()) for layer in (0, 1, 2)}
    for layers, tried in ((None, (0, 1, 2)), ((2, 1), (1, 2))):
        probe = MemoryLayerProbe(layers, (8, 24), documents=2, scored_tokens=32)
        none, *rows = probe.run(lm, Documents())
        assert [(row["layer"], row["memory"]) for row in rows] == [
            (layer, size) for layer in tried for size in (8, 24)
        ]
        assert none["layer"] is None and none["nats"] == without["nats"]
        for layer in tried:
            found = [row for row in rows if row["layer"] == layer]
            assert [row["nats"] for row in found] == [row["nats"] for row in wanted[layer]]
            assert {row["tokens"] for row in found} == {none["tokens"]}
        assert len({row["nats"] for row in rows}) == len(rows)


def rows_of(perplexities):
    """Of no memory, then of layers 0, 1 … with 1,024 and 4,096 tokens."""
    none, *others = perplexities
    yield {"layer": None, "memory": 0, "perplexity": none, "nats": np.log(none), "tokens": 9.0}
    for i, x in enumerate(others):
        layer, size = i // 2, (1024, 4096)[i % 2]
        row = {"layer": layer, "memory": size, "perplexity": x, "nats": np.log(x), "tokens": 9.0}
        yield row


def test_the_layer_that_gains_most_comes_first(tmp_path):
    probe, rows = MemoryLayerProbe(), list(rows_of([10.0, 9.5, 10.5, 8.0, 7.5]))
    assert [line.split() for line in probe.table(rows).splitlines()] == [
        ["without", "memory", "10.000"],
        ["layer", "1K", "4K"],
        ["1", "8.000", "-20.00%", "7.500", "-25.00%"],
        ["0", "9.500", "-5.00%", "10.500", "+5.00%"],
    ]
    assert probe.scalars(rows) == {
        "memory_layers/best_layer": 1,
        "memory_layers/best_perplexity": 7.5,
        "memory_layers/no_memory_perplexity": 10.0,
    }
    probe.plot(rows, tmp_path / "plot.png")
    assert matplotlib.image.imread(tmp_path / "plot.png").std() > 0.05


def test_what_is_refused():
    for changes, line in (
        ({"layers": ()}, "layers = ()"),
        ({"layers": (-1,)}, "layers = -1"),
        ({"memory_sizes": ()}, "memory_sizes = 0"),
        ({"memory_sizes": (0, 8)}, "memory_sizes = 0"),
    ):
        with pytest.raises(UserError, match=line.replace("(", r"\(").replace(")", r"\)")):
            MemoryLayerProbe(**changes)
    with pytest.raises(UserError, match="layers has 3: the model has layers 0 to 2"):
        MemoryLayerProbe((0, 3)).check(CONFIG, Documents())
    with pytest.raises(UserError, match="without memory_before and memory_gate"):
        MemoryLayerProbe().check(tiny(memory_positions=False), Documents())
