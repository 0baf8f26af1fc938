"""Tokens as callers give them: checked, and brought into arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from fot_jax.common.errors import UserError
from fot_jax.data.vocabulary import Vocabulary


def is_one_text(tokens: Sequence[Any] | np.ndarray) -> bool:
    """Whether these are the tokens of one text, not several texts."""
    return len(tokens) == 0 or np.ndim(tokens[0]) == 0


def checked(
    tokens: Any, mask: Any, rows: int, vocabulary: Vocabulary | None
) -> tuple[Int[np.ndarray, "B N"], Bool[np.ndarray, "B N"]]:
    """Tokens as int32, and where they are not padding.

    Args:
      rows: of the model's embedding.
      vocabulary: of the model, for what to say where it has more tokens than that.

    Raises:
      UserError: no tokens, or tokens outside the vocabulary; a mask of another shape.
    """
    tokens = whole_numbers(tokens, "tokens", 2)
    if not tokens.size:
        raise UserError("the text is empty: give at least one token")
    if mask is None:
        valid = np.ones(tokens.shape, bool)
    else:
        valid = whole_numbers(mask, "a mask", 2) > 0
    if valid.shape != tokens.shape:
        raise UserError(f"a mask of shape {valid.shape} for tokens of shape {tokens.shape}")
    outside = tokens[(tokens < 0) | (tokens >= rows)]
    if outside.size:
        of_another = "the text was tokenized for another model"
        if vocabulary is not None and outside[0] in range(rows, vocabulary.size):
            of_another = (
                f"the tokenizer has {vocabulary.size}: leave what was added to it out of the text"
            )
        raise UserError(
            f"token {outside[0]} is outside the model's vocabulary of {rows}: {of_another}"
        )
    return tokens.astype(np.int32), valid


def side_by_side(
    prompts: Sequence[Any] | np.ndarray, mask: Any
) -> tuple[Int[np.ndarray, "B N"], Int[np.ndarray, " B"]]:
    """Prompts padded on the right to one length, and the length of each.

    Raises:
      UserError: no prompt, or an empty one; different lengths with a mask; no whole numbers.
    """
    if not len(prompts) or mask is None and any(len(prompt) == 0 for prompt in prompts):
        raise UserError("the prompt is empty: give at least one token")
    lengths = np.asarray([len(prompt) for prompt in prompts])
    if mask is not None and len(set(lengths)) > 1:
        raise UserError("prompts of different lengths with a mask: pad them to one length")
    arrays = [whole_numbers(prompt, "a prompt", 1) for prompt in prompts]
    return np.stack([padded(array, lengths.max()) for array in arrays]), lengths


def whole_numbers(x: Any, what: str, dimensions: int) -> np.ndarray:
    """An array of so many dimensions, checked to be one of whole numbers (a mask may be bool)."""
    try:
        array = np.asarray(x)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{what} with rows of different lengths: pad them, with a mask") from error
    if (
        array.ndim != dimensions
        or array.size
        and array.dtype.kind not in "iu" + "b" * (what == "a mask")
    ):
        raise UserError(
            f"{what} of shape {array.shape} and type {array.dtype}: give whole numbers, "
            + ("a list of them" if dimensions == 1 else "[documents, length]")
        )
    return array


def padded(x: np.ndarray, width: int) -> np.ndarray:
    """x [..., n] with zeros up to the width."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
