"""Which layers of a model would gain most from a memory, before any of them is trained to use one.

The paper takes three layers spread over the model (§4); of a pretrained model it can be measured.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import UserError, check_range
from fot_jax.data.documents import DocumentSource
from fot_jax.evals import plots
from fot_jax.evals.perplexity import PerplexityByContext
from fot_jax.inference.language_model import LanguageModel
from fot_jax.model.config import ModelConfig


@configurable
@dataclasses.dataclass(frozen=True)
class MemoryLayerProbe:
    """Perplexity with a memory in one layer alone, layer by layer, at several sizes.

    The memory layers that the checkpoint has, if it has some, are taken as layers without memory.
    The same tokens are scored each time, as PerplexityByContext scores them.

    Attributes:
      layers: that are tried; None: all.
      memory_sizes: tokens, above 0; without memory the model is measured once.
      documents, scored_tokens, rows, source, split: as of PerplexityByContext.
      name: of the plot, and in results.
    """

    layers: tuple[int, ...] | None = None
    memory_sizes: tuple[int, ...] = (1024, 4096)
    documents: int = 4
    scored_tokens: int = 8_192
    rows: int = 4
    source: DocumentSource | None = None
    split: str = "valid"
    name: str = "memory_layers"

    def __post_init__(self):
        check_range("MemoryLayerProbe", 0, **{"layers": min(self.layers or (0,))})
        check_range("MemoryLayerProbe", 1, **{"memory_sizes": min(self.memory_sizes or (0,))})
        if self.layers == ():
            raise UserError("MemoryLayerProbe.layers = (): give one layer or more, or None")
        self._perplexity(self.memory_sizes)

    def _perplexity(self, sizes: tuple[int, ...]) -> PerplexityByContext:
        return PerplexityByContext(
            memory_sizes=sizes,
            documents=self.documents,
            scored_tokens=self.scored_tokens,
            rows=self.rows,
            source=self.source,
            split=self.split,
            name=self.name,
        )

    def check(self, model: ModelConfig, source: DocumentSource) -> None:
        """Raises UserError where the model has not as many layers, or the split is not there."""
        if self.layers and max(self.layers) >= model.num_layers:
            raise UserError(
                f"MemoryLayerProbe.layers has {max(self.layers)}: the model has layers 0 to "
                f"{model.num_layers - 1}"
            )
        if model.memory_before or model.memory_gate or not model.memory_positions:
            raise UserError(
                "MemoryLayerProbe is for models that a LLaMA can be made into, without "
                "memory_before and memory_gate and with memory_positions"
            )
        self._perplexity(self.memory_sizes).check(model, source)

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """One row a layer and size, the layer None first: layer, memory, perplexity, nats, tokens.

        Raises:
          UserError: as of PerplexityByContext.run.
        """
        layers = range(lm.config.num_layers) if self.layers is None else sorted(set(self.layers))
        probed = [
            dataclasses.replace(lm, config=dataclasses.replace(lm.config, memory_layers=remembers))
            for remembers in ((), *((layer,) for layer in layers))
        ]
        by_layer = self._perplexity(self.memory_sizes).run_each(probed, source)
        kept = ("memory", "perplexity", "nats", "tokens")
        return [
            {"layer": layer, **{name: row[name] for name in kept}}
            for layer, rows in zip((None, *layers), by_layer, strict=True)
            for row in rows
        ]

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """The lowest perplexity, the layer that gives it, and that without memory."""
        none, *others = rows
        best = min(others, key=lambda row: row["nats"])
        return {
            f"{self.name}/best_layer": best["layer"],
            f"{self.name}/best_perplexity": best["perplexity"],
            f"{self.name}/no_memory_perplexity": none["perplexity"],
        }

    def table(self, rows: list[dict[str, Any]]) -> str:
        """A line a layer, from the one that gains most: how much lower perplexity is, by size."""
        none, *others = rows
        sizes = sorted({row["memory"] for row in others})
        cells = {(row["layer"], row["memory"]): row["perplexity"] for row in others}
        layers = sorted({layer for layer, _ in cells}, key=lambda i: cells[i, sizes[-1]])
        head = " ".join(f"{plots.short(size):>16}" for size in sizes)
        lines = [f"without memory {none['perplexity']:.3f}", f"{'layer':>5} {head}"]
        for layer in layers:
            gains = (cells[layer, size] / none["perplexity"] - 1 for size in sizes)
            perplexities = (cells[layer, size] for size in sizes)
            shown = zip(perplexities, gains, strict=True)
            lines.append(f"{layer:5d} " + " ".join(f"{x:8.3f} {gain:+7.2%}" for x, gain in shown))
        return "\n".join(lines)

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """Change of perplexity by layer, a line a size, as a PNG."""
        figure, axes = plots.new()
        none, *others = rows
        for size in sorted({row["memory"] for row in others}):
            of_size = [row for row in others if row["memory"] == size]
            gains = [100 * (row["perplexity"] / none["perplexity"] - 1) for row in of_size]
            label = f"{plots.short(size)} tokens of memory"
            axes.plot([row["layer"] for row in of_size], gains, "o-", label=label)
        axes.axhline(0, color="black", linestyle=":", label="no memory")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("the layer that reads from memory")
        axes.set_ylabel(f"change of {self.split} perplexity (%)")
        axes.legend(fontsize=10)
        plots.save(figure, path)
