"""LanguageModel: reading with a memory and writing on, against float64 and step by step."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fot_jax.errors import UserError
from fot_jax.generate import LanguageModel
from fot_jax.model.transformer import Transformer

sys.path.append(str(Path(__file__).parent / "model"))
from test_transformer import LLAMA, PAPER, float64_logits, random_params

C = 8  # local context
FAMILIES = pytest.mark.parametrize("family", [LLAMA, PAPER], ids=["llama", "paper"])


@functools.cache
def model_of(family, **changes):
    config = dataclasses.replace(family, memory_layers=(0, 2), **changes)
    # Larger logits: choices that rounding does not change.
    params = jax.tree.map(lambda x: x, random_params(config))
    return LanguageModel(Transformer(config), params)


def logits(lm, tokens, reach):
    """Of one document, token by token in float64; windows see `reach` windows before their own."""
    n = len(tokens)
    windows = -(-n // C)
    padded = np.zeros(windows * C, np.int32)
    padded[:n] = tokens
    row, place = np.divmod(np.arange(windows * C), C)
    distance = row[:, None] - row
    earlier = (distance > 0) & (distance <= reach)
    local = (distance == 0) & (place[:, None] >= place)
    seen = np.stack([local, earlier], axis=1).reshape(windows, C, 2, windows, C)
    out = float64_logits(lm.model.config, lm.params, padded.reshape(windows, C), seen)
    return out.reshape(windows * C, -1)[:n]


def random_documents(lm, rows, length, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, lm.model.config.vocab_size, (rows, length + 1), dtype=np.int32)


# --- Score ---------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("reach", [0, 1, 3, 6])
def test_score_equals_float64(family, reach):
    """Also where the memory, a ring, has gone around twice, and where it never fills."""
    lm = model_of(family)
    documents = random_documents(lm, 2, 5 * C)
    scores = lm.score(documents[:, :-1], documents[:, 1:], capacity=reach * C)
    assert scores.nats.shape == scores.correct.shape == (2, 5 * C)
    for row, document in enumerate(documents):
        want = logits(lm, document[:-1], reach)
        log_z = np.log(np.exp(want).sum(-1))
        nats = log_z - want[np.arange(5 * C), document[1:]]
        np.testing.assert_allclose(scores.nats[row], nats, atol=2e-4)
    # The memory is of consequence where there is any: the last window is read differently.
    other = lm.score(documents[:, C:-1], documents[:, C + 1 :], capacity=reach * C)
    change = np.abs(other.nats[:, -C:] - scores.nats[:, -C:]).max()
    assert change > 1e-2 if reach > 3 else change < 1e-4 if reach == 0 else True


@FAMILIES
def test_correct_is_the_most_likely_token(family):
    lm = model_of(family)
    (document,) = random_documents(lm, 1, 3 * C)
    best = logits(lm, document[:-1], 2).argmax(-1)
    targets = np.where(np.arange(3 * C) % 3 == 0, best, document[1:]).astype(np.int32)
    scores = lm.score(document[None, :-1], targets[None], capacity=2 * C)
    np.testing.assert_array_equal(scores.correct[0], targets == best)


def test_score_without_memory_layers(monkeypatch):
    """A plain model reads windows of their own, whatever memory it is offered."""
    lm = model_of(LLAMA)
    config = dataclasses.replace(lm.model.config, memory_layers=())
    plain = LanguageModel(Transformer(config), lm.params)
    documents = random_documents(lm, 2, 3 * C)
    scores = [
        model.score(documents[:, :-1], documents[:, 1:], capacity=capacity).nats
        for model, capacity in ((lm, 0), (plain, 0), (plain, 2 * C))
    ]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-5)


# --- Generate ------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("length", [1, C - 1, C, C + 1, 3 * C])
def test_greedy_tokens_are_the_most_likely_ones(family, length):
    """Around the ends of windows, where the local context moves into memory."""
    lm = model_of(family)
    prompt = random_documents(lm, 1, length, seed=length)[0, :-1].tolist()
    new = lm.generate(prompt, C + 3, capacity=2 * C, temperature=0)
    text = prompt[:]
    for _ in range(C + 3):
        text.append(int(logits(lm, np.asarray(text), reach=2)[-1].argmax()))
    assert new == text[length:]


def test_draws_follow_the_distribution():
    """At several temperatures; the same seed draws the same text."""
    lm = model_of(LLAMA)
    prompt = random_documents(lm, 1, C + 4)[0, :-1].tolist()
    want = logits(lm, np.asarray(prompt), reach=1)[-1]
    draw = functools.partial(lm.generate, prompt, 1, capacity=C)
    for temperature in (0.5, 1.5):
        drawn = [draw(temperature=temperature, seed=seed)[0] for seed in range(400)]
        p = np.exp(want / temperature) / np.exp(want / temperature).sum()
        frequency = np.bincount(drawn, minlength=len(p)) / len(drawn)
        assert np.abs(frequency - p).max() < 5 * (p.max() * (1 - p.max()) / len(drawn)) ** 0.5
        assert p.max() > 3 / len(p)  # not just noise
    long = functools.partial(lm.generate, prompt, 12, capacity=C)
    assert long(seed=3) == long(seed=3) != long(seed=4)


@FAMILIES
def test_generates_without_memory(family):
    """No slots, or no memory layers: the window alone."""
    lm = model_of(family)
    prompt = random_documents(lm, 1, 2 * C + 3)[0, :-1].tolist()
    new = lm.generate(prompt, 4, capacity=0, temperature=0)
    text = prompt[:]
    for _ in range(4):
        text.append(int(logits(lm, np.asarray(text), reach=0)[-1].argmax()))
    assert new == text[len(prompt) :]
    config = dataclasses.replace(lm.model.config, memory_layers=(), memory_positions=True)
    plain = LanguageModel(Transformer(config), lm.params)
    longer = plain.generate(prompt, 4, capacity=2 * C, temperature=0)
    assert longer == plain.generate(prompt, 4, capacity=0, temperature=0)


# --- Bad input -----------------------------------------------------------------------------------


def test_bad_input():
    lm = model_of(LLAMA)
    tokens = np.zeros((1, 2 * C), np.int32)
    message = "12 tokens with a memory of 8 do not divide into windows of 8"
    with pytest.raises(UserError, match=message):
        lm.score(tokens[:, :12], tokens[:, :12], capacity=C)
    with pytest.raises(UserError, match="a memory of 12 does not divide into windows of 8"):
        lm.generate([1], 1, capacity=12)
    with pytest.raises(UserError, match="the prompt is empty"):
        lm.generate([], 1, capacity=C)
    outside = "token {} is outside the model's vocabulary of 61: the text was tokenized for another"
    for token in (61, -1):
        with pytest.raises(UserError, match=outside.format(token)):
            lm.generate([1, token], 1, capacity=C)
        with pytest.raises(UserError, match=outside.format(token)):
            lm.score(tokens + token, tokens, capacity=C)
