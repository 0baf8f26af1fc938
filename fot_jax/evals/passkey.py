"""Pass keys: is a number found again, however long the text and wherever it stood (paper §4)?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import LARGEST_SEED, UserError, because_of, check_range
from fot_jax.common.progress import bar
from fot_jax.data.documents import DocumentSource
from fot_jax.data.synthetic import Passkey, draw_passkey
from fot_jax.evals import plots
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig, all_of_a_text, check_texts, last_context
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Dense, Lookup


@configurable
@dataclasses.dataclass(frozen=True)
class PasskeyRetrieval:
    """The share of pass keys that the model writes down, all digits right, by length and depth.

    Attributes:
      lengths: tokens of prompt and answer, at most: the filler is repeated as often as fits.
      depths: places of the number, evenly from the start of the filler to its end.
      keys: numbers asked for at each length and depth.
      rows: so many texts are read side by side.
      windows_apart: whether windows are read each as if it were the only one, as PreviousContext
        trains (and texts one by one). The time then grows with the length, not with its square.
      lookup, storage: of memory, as MemoryConfig.
      seed: of the numbers.
      name: of the plot, and in results.
    """

    lengths: tuple[int, ...] = (4_096, 16_384, 65_536)
    depths: int = 5
    keys: int = 4
    rows: int = 4
    windows_apart: bool = False
    lookup: Lookup = Dense()
    storage: str | None = None
    seed: int = 0
    name: str = "passkey"

    def __post_init__(self):
        check_range("PasskeyRetrieval", 1, keys=self.keys, rows=self.rows)
        check_range("PasskeyRetrieval", 2, depths=self.depths)
        check_range("PasskeyRetrieval", 0, LARGEST_SEED, seed=self.seed)
        if not self.lengths:
            raise UserError("PasskeyRetrieval.lengths = (): give one length or more")
        for length in self.lengths:
            check_range("PasskeyRetrieval", 1, 2**30, lengths=length)
        check_texts("PasskeyRetrieval", self.rows, self.storage, self.lookup)

    def check(self, model: ModelConfig, source: DocumentSource) -> None:
        """Raises UserError where number and question are longer than a length."""
        for _ in self._texts(source.vocabulary, min(self.lengths), 0.0):
            pass

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """One row a length and depth: tokens read, depth from 0 to 1, accuracy, numbers asked for.

        Of the source only the vocabulary is used.

        Raises:
          UserError: as of check.
        """
        memory = all_of_a_text(lm.config, self.storage, self.lookup)
        lm = lm.for_memory(memory)
        rows = []
        cells = [(length, depth) for length in self.lengths for depth in range(self.depths)]
        total = sum(length for length, _ in cells) * self.keys
        with bar(total, name=self.name) as progress:
            for length, depth in cells:
                share = depth / (self.depths - 1)
                texts = list(self._texts(source.vocabulary, length, share))
                if self.windows_apart and lm.config.memory_layers:
                    found = sum(_retrieved_apart(lm, *text, memory, progress) for text in texts)
                else:
                    starts = range(0, self.keys, self.rows)
                    side_by_side = (texts[start : start + self.rows] for start in starts)
                    found = sum(_retrieved(lm, each, memory, progress) for each in side_by_side)
                rows.append(
                    {
                        "length": length,
                        "depth": share,
                        "accuracy": found / self.keys,
                        "keys": self.keys,
                    }
                )
        return rows

    def _texts(self, vocabulary, length: int, depth: float) -> Iterator[tuple]:
        """(prompt, answer) tokens of every number."""
        source = Passkey(document_tokens=length, vocabulary=vocabulary)
        rng = np.random.default_rng((self.seed, length, round(1000 * depth)))
        for _ in range(self.keys):
            key = draw_passkey(rng, training=False)
            with because_of(f"PasskeyRetrieval.lengths has {length}"):
                fillers = source.draw_fillers(rng, key)
            before = round(depth * len(fillers))
            yield source.prompt_and_answer(key, fillers[:before], fillers[before:])

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Accuracy of each length, over all depths."""
        return {f"{self.name}/{length}": accuracy for length, accuracy in _by_length(rows).items()}

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The rows as text: a line a length."""
        depths = sorted({row["depth"] for row in rows})
        cells = {(row["length"], row["depth"]): row["accuracy"] for row in rows}
        head = " ".join(f"{f'at {100 * depth:.0f} %':>8}" for depth in depths)
        lines = [f"{'length (tokens)':>16} {head} {'all':>8}"]
        for length, accuracy in _by_length(rows).items():
            found = " ".join(f"{cells[length, depth]:8.3f}" for depth in depths)
            lines.append(f"{length:16,d} {found} {accuracy:8.3f}")
        return "\n".join(lines)

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """A heat map: depth by length."""
        figure, axes = plots.new()
        lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
        cells = {(row["length"], row["depth"]): 100 * row["accuracy"] for row in rows}
        shares = [[cells[length, depth] for length in lengths] for depth in depths]
        image = axes.imshow(shares, aspect="auto", vmin=0, vmax=100, cmap="RdYlGn")
        axes.set_xticks(range(len(lengths)), [plots.short(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes.set_xlabel("length of the text (tokens)")
        axes.set_ylabel("place of the number in the filler")
        axes.grid(False)
        figure.colorbar(image, label="numbers retrieved (%)")
        plots.save(figure, path)


def _retrieved(lm: LanguageModel, texts, memory: MemoryConfig, progress) -> int:
    """How many of the numbers the model writes down."""
    prompts, answers = zip(*texts, strict=True)
    new_tokens = max(map(len, answers))
    written = lm.generate(
        [prompt.tolist() for prompt in prompts],
        new_tokens,
        temperature=0,
        memory=memory,
        last_context_length=last_context(lm.config, new_tokens),
        progress=progress,
    )
    pairs = zip(written, answers, strict=True)
    return sum(new[: len(answer)] == answer.tolist() for new, answer in pairs)


def _retrieved_apart(lm: LanguageModel, prompt, answer, memory: MemoryConfig, progress) -> bool:
    """Whether the model writes the number down, having read windows apart but for the last."""
    context = lm.config.local_context
    before, last = np.split(prompt, [max(0, len(prompt) - last_context(lm.config, len(answer)))])
    windows, rest = np.split(before, [len(before) - len(before) % context])
    shared, state = dataclasses.replace(memory, shared=True), None
    for part in (windows.reshape(-1, context), rest[None]):
        if part.size:
            begun = {"memory": shared} if state is None else {"state": state}
            state = lm.remember(part, progress=progress, **begun)
    written = lm.generate(last.tolist(), len(answer), temperature=0, state=state, progress=progress)
    return written == answer.tolist()


def _by_length(rows) -> dict[int, float]:
    lengths = sorted({row["length"] for row in rows})
    of_length = {n: [row["accuracy"] for row in rows if row["length"] == n] for n in lengths}
    return {n: sum(found) / len(found) for n, found in of_length.items()}
