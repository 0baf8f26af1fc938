"""`fot convert check`: whether two checkpoints, of either kind each, are the same model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from fot_jax.checkpoints import loading
from fot_jax.common.progress import bar
from fot_jax.convert import Reader, open_checkpoint
from fot_jax.data.vocabulary import Symbols
from fot_jax.hugging_face import tensors
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import SETTINGS_OF_READING, all_of_a_text
from fot_jax.model.lookup import Dense

_PROBE, _WINDOW = 200, 64  # tokens read, in windows of so many


class Difference(NamedTuple):
    """The largest difference between two arrays."""

    size: float  # infinite where one of them is no number and the other is
    largest: float  # of the values themselves
    where: tuple[int, ...]


def largest_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """The largest difference between two arrays of one shape, computed in float32."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | np.isnan(a) & np.isnan(b), 0, np.abs(a - b))
    apart = np.where(np.isnan(apart), np.inf, apart)
    where = np.unravel_index(apart.argmax(), apart.shape)
    return Difference(float(apart[where]), float(np.abs(a).max()), tuple(map(int, where)))


def check(a: epath.PathLike, b: epath.PathLike) -> bool:
    """Compares two checkpoints, of either kind each, and prints where they differ most.

    Their configurations, but for rounding to float32; then tensors one by one; then logits of a
    text that is read as each of them reads it and, where their memory differs, of the same text
    without memory: in float32, for which both models are held, one after the other. The last line
    says whether they agree.

    Returns:
      Whether they are the same, but for the rounding where their types differ.

    Raises:
      UserError: one of them cannot be read.
    """
    # The same parameters, whatever the window; texts are read in one that both have.
    ours, theirs = (open_checkpoint(path, window=1) for path in (a, b))
    differences = {
        name: pair
        for name, pair in ours.config.differences(theirs.config).items()
        if name not in SETTINGS_OF_READING or None not in pair  # one of them leaves it open
    }
    for name, (one, other) in differences.items():
        print(f"{name}: {one} in {a}, {other} in {b}")
    same_tensors, apart = _check_tensors(ours, theirs)
    of_memory = [name for name in differences if name.startswith("memory_")]
    if ours.config.vocab_size == theirs.config.vocab_size:
        window = min(_WINDOW, ours.config.local_context, theirs.config.local_context)
        _check_logits(a, b, ours.config.vocab_size, window, bool(of_memory))
    if (
        same_tensors
        and differences
        and {*differences} <= {*of_memory, *SETTINGS_OF_READING, "local_context"}
    ):
        print(f"the same model, but for {', '.join(differences)}")
    agree = same_tensors and not differences
    settings = f"{', '.join(differences)}; " if differences else ""
    print(f"agree: {apart}" if agree else f"differ: {settings}{apart}")
    return agree


def _check_tensors(ours: Reader, theirs: Reader) -> tuple[bool, str]:
    """Prints the largest difference between tensors.

    Returns whether there is none but for rounding, and what it was, with what is passed.
    """
    there = {(each.path, each.layer): each for each in tensors.of_model(theirs.config)}
    compared = identical = rounded = 0
    worst, worst_of = Difference(0.0, 0.0, ()), None
    same, types = True, set()
    listed = tensors.by_parameter(ours.config)
    with bar(len(listed), "tensor") as progress:
        for each in listed:
            progress(1)
            other = there.pop((each.path, each.layer), None)
            if other is None or other.shape != each.shape:
                shape = "missing" if other is None else list(other.shape)
                print(f"{each.name}: {list(each.shape)} and {shape}")
                same = False
                continue
            x, y = (r.read(each.path, each.layer) for r in (ours, theirs))
            found = largest_difference(x.T, y.T) if each.transposed else largest_difference(x, y)
            compared, identical = compared + 1, identical + (found.size == 0)
            if found.size and x.dtype != y.dtype:
                name = _rounded_to(x, y)
                types.add(name or min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize).name)
                rounded += name is not None
            if found.size > worst.size:
                worst, worst_of = found, each.name
    for each in there.values():
        print(f"{each.name}: missing and {list(each.shape)}")
        same = False
    after = f", {rounded} after rounding" if rounded else ""
    print(f"{compared} tensors compared, {identical} the same{after}")
    if worst_of is not None:
        print(
            f"largest difference: {worst.size:.3g} (values up to {worst.largest:.3g}) in "
            f"{worst_of} at {list(worst.where)}"
        )
    others = "" if same else "tensors of other shapes; "
    tolerance = f"rounding to {', '.join(sorted(types))}" if types else "none"
    apart = f"{others}largest difference of tensors {worst.size:.3g}, tolerance {tolerance}"
    return same and identical + rounded == compared, apart


def _rounded_to(x: np.ndarray, y: np.ndarray) -> str | None:
    """The type of the one of two arrays that is the other one, rounded to it; None: neither is."""
    for one, other in ((x, y), (y, x)):
        if largest_difference(one.astype(other.dtype), other).size == 0:
            return other.dtype.name
    return None


def _check_logits(
    a: epath.PathLike, b: epath.PathLike, vocab_size: int, window: int, plain: bool
) -> None:
    """Prints the largest difference between logits; `plain`: without memory, too."""

    def logits(path) -> list[np.ndarray]:
        config, params = loading.load_model(path, np.dtype(np.float32), window)
        found = []
        for layers in (config.memory_layers, ())[: 1 + plain]:
            config = dataclasses.replace(config, local_context=window, memory_layers=layers)
            lm = LanguageModel(config, params)
            memory = all_of_a_text(config, "float32", Dense())
            found.append(lm.logits(tokens, last_context_length=max(1, window // 2), memory=memory))
        return found

    vocabulary = loading.vocabulary_of(a)
    tokens = np.arange(_PROBE) * 7919 % vocab_size
    if vocabulary is not None and not isinstance(vocabulary, Symbols):  # cannot encode a text
        text = Path(__file__).read_text()[: 20 * _PROBE]
        tokens = np.resize(vocabulary.encode(text), _PROBE) % vocab_size
    tokens = tokens[None]
    ways = ("each with its own memory", "without memory") if plain else ("with memory",)
    for way, x, y in zip(ways, *map(logits, (a, b)), strict=True):
        found = largest_difference(x, y)
        print(
            f"logits of {_PROBE} tokens in windows of {window}, {way}: largest difference "
            f"{found.size:.3g} (values up to {found.largest:.3g}) at token {found.where[1]}, entry "
            f"{found.where[2]}"
        )
