"""A short text that the model writes after a held-out prompt, to look at."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import LARGEST_SEED, UserError, check_range
from fot_jax.data.documents import DocumentSource
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig
from fot_jax.model.config import ModelConfig


@configurable
@dataclasses.dataclass(frozen=True)
class Sample:
    """Continues the start of the first document of a split.

    Attributes:
      prompt_tokens: tokens of the document that the model reads first.
      new_tokens: tokens it then writes.
      memory: tokens kept beyond the local window.
      temperature: 0 for the most likely token each time.
      split: of the source.
      seed: of the draws.
      name: in results.
    """

    prompt_tokens: int = 256
    new_tokens: int = 96
    memory: int = 1024
    temperature: float = 0.7
    split: str = "valid"
    seed: int = 0
    name: str = "sample"

    def __post_init__(self):
        check_range("Sample", 1, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens)
        check_range("Sample", 0, temperature=self.temperature)
        check_range("Sample", 0, 2**30, memory=self.memory)
        check_range("Sample", 0, LARGEST_SEED, seed=self.seed)

    def check(self, model: ModelConfig, source: DocumentSource) -> None:
        """Raises UserError, whatever the model, where the split is not there."""
        source.check_split(self.split)

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """One row: the end of the prompt and what the model wrote.

        Raises:
          UserError: the split is empty.
        """
        document = next(iter(source.documents(self.split)), None)
        if document is None:
            raise UserError(f"the {self.split} split has no document to sample from")
        prompt = document.tokens[: self.prompt_tokens].tolist()
        window, half = lm.config.local_context, lm.config.local_context // 2
        size = self.memory if lm.config.memory_layers else 0
        if lm.config.memory_before:
            size = min(size, lm.config.local_context)  # it sees no more
        new = lm.generate(
            prompt,
            self.new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            # A whole window goes to memory with the first new token; without memory it is lost.
            last_context_length=window if size else max(1, window - min(self.new_tokens, half)),
            memory=MemoryConfig(size),
        )
        return [{"prompt": lm.decode(prompt[-64:]), "continuation": lm.decode(new)}]

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """None."""
        return {}

    def table(self, rows: list[dict[str, Any]]) -> str:
        """Prompt and continuation, with a bar between them."""
        return "\n".join(f"…{row['prompt']} ▌{row['continuation']}" for row in rows)

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """Nothing to draw."""
