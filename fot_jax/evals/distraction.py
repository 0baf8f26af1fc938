"""Distraction: how much attention stays with the own document among others (paper §3.3)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import LARGEST_SEED, UserError, check_range
from fot_jax.common.progress import bar
from fot_jax.data.documents import DocumentSource
from fot_jax.evals import plots
from fot_jax.inference.language_model import LanguageModel
from fot_jax.model import crossbatch, lora
from fot_jax.model.config import ModelConfig
from fot_jax.model.schemes import PreviousContext
from fot_jax.model.transformer import Transformer


@configurable
@dataclasses.dataclass(frozen=True)
class PositiveMass:
    """r_d: the share of the attention to d previous contexts that the own document's gets.

    Measured as in training, on windows of held-out documents: each looks at the window before it
    and at those before the windows of d - 1 others. A model that is distracted gives each of them
    about 1 / d; one that is not, most to its own. (Of a plain transformer it can be measured where
    the experiment names memory layers, and trains with NoCrossbatch.)

    Attributes:
      ds: crossbatch dimensions; the largest is how many documents are read side by side.
      batches: of them, from places drawn anew.
      split: of the source.
      seed: of the places.
      name: of the plot, and in results.
    """

    ds: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    batches: int = 4
    split: str = "valid"
    seed: int = 0
    name: str = "positive_mass"

    def __post_init__(self):
        check_range("PositiveMass", 1, batches=self.batches)
        check_range("PositiveMass", 0, LARGEST_SEED, seed=self.seed)
        if not self.ds:
            raise UserError("PositiveMass.ds = (): give one d or more")
        for d in self.ds:
            check_range("PositiveMass", 1, 4096, ds=d)

    def check(self, model: ModelConfig, source: DocumentSource) -> None:
        """Raises UserError for a model without memory layers, or where the split is not there."""
        if not model.memory_layers:
            raise UserError(
                "PositiveMass is of memory layers, and the model has none: leave it out"
            )
        source.check_split(self.split)

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """One row a d and memory layer: d, layer, mass.

        Raises:
          UserError: a model without memory layers; fewer documents of two windows than the largest
            d.
        """
        self.check(lm.config, source)
        lm = lm.on_one_device()
        c, ds = lm.config, sorted(set(self.ds))
        params = {name: x for name, x in lm.params.items() if name != "layers"}
        params["layers"] = jax.tree.map(lambda *layers: jnp.stack(layers), *lm.params["layers"])
        model = Transformer(c, dtype=lm.params["embedding"].dtype, lora=lora.of(params))
        documents = self._documents(source, 2 * c.local_context, ds[-1])
        rng = np.random.default_rng(self.seed)
        batches = [
            self._batch(documents, ds[-1], c.local_context, rng) for _ in range(self.batches)
        ]
        rows = []
        with bar(len(ds) * len(batches), "measurement", name=self.name) as progress:
            for d in ds:
                plan = _plan(d, 2 * ds[-1], c.num_heads, c.local_context)
                masses = []
                for tokens in batches:
                    masses.append(np.asarray(_measure(model, plan, params, tokens)))
                    progress(1)
                for layer, mass in zip(c.memory_layers, np.mean(masses, 0), strict=True):
                    rows.append({"d": d, "layer": layer, "mass": float(mass)})
        return rows

    def _documents(self, source: DocumentSource, tokens: int, needed: int) -> list[np.ndarray]:
        """Tokens of the first documents of the split that are long enough."""
        of_split = (document.tokens for document in source.documents(self.split))
        long = (each for each in itertools.islice(of_split, 10_000) if len(each) >= tokens)
        documents = list(itertools.islice(long, 4 * self.batches * needed))
        if len(documents) < needed:
            raise UserError(
                f"the {self.split} split has {len(documents)} documents of two windows ({tokens} "
                f"tokens), PositiveMass.ds asks for {needed} side by side: lower it, or choose "
                "another split"
            )
        return documents

    def _batch(self, documents, lanes: int, window: int, rng) -> np.ndarray:
        """Two consecutive windows of every lane, each of another document: [2 * lanes, window]."""
        chosen = rng.choice(len(documents), lanes, replace=False)
        texts = []
        for tokens in (documents[i] for i in chosen):
            start = rng.integers(len(tokens) - 2 * window + 1)
            texts.append(tokens[start : start + 2 * window].reshape(2, window))
        return np.concatenate(texts).astype(np.int32)

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Mass of every layer and d."""
        return {f"{self.name}/layer_{row['layer']}/d_{row['d']}": row["mass"] for row in rows}

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The rows as text: a line a d."""
        layers = sorted({row["layer"] for row in rows})
        cells = {(row["d"], row["layer"]): row["mass"] for row in rows}
        head = " ".join(f"{f'layer {layer}':>9}" for layer in layers)
        lines = [f"{'d':>5} {head} {'1 / d':>9}"]
        for d in sorted({row["d"] for row in rows}):
            masses = " ".join(f"{cells[d, layer]:9.3f}" for layer in layers)
            lines.append(f"{d:5d} {masses} {1 / d:9.3f}")
        return "\n".join(lines)

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """Mass against d, with 1 / d beside it, as a PNG."""
        figure, axes = plots.new()
        ds = sorted({row["d"] for row in rows})
        for layer in sorted({row["layer"] for row in rows}):
            masses = [row["mass"] for row in rows if row["layer"] == layer]
            axes.plot(ds, masses, "o-", label=f"layer {layer}")
        axes.plot(ds, [1 / d for d in ds], "k:", label="1 / d")
        plots.sizes_along(axes, ds)
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("d: previous contexts, of which one is of the own document")
        axes.set_ylabel("attention to the own document")
        axes.legend(fontsize=10)
        plots.save(figure, path)


@functools.cache  # of equal plans two are not the same to jit, which would compile anew
def _plan(d: int, rows: int, heads: int, window: int) -> crossbatch.Plan:
    return crossbatch.make_plan(PreviousContext(d), rows, heads=heads, window=window)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(model: Transformer, plan: crossbatch.Plan, params, tokens):
    """r_d of every memory layer; all tokens are of documents, none is padding."""
    segments = jnp.ones_like(tokens)
    out = model.apply({"params": params}, tokens, segments, plan, measure_positive_mass=True)
    return out.positive_mass
