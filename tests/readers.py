"""Models of every kind that read, and what they should say by the rules in NumPy float64."""

import dataclasses
import functools

import numpy as np
import pytest
from oracles import reading as rules
from tiny import LLAMA, PAPER, random_params

from fot_jax.data.vocabulary import Bytes
from fot_jax.inference.language_model import LanguageModel
from fot_jax.model.transformer import Transformer

C = 64  # local context
MODELS = {
    "llama": LLAMA,
    "llama without positions in memory layers": dataclasses.replace(
        LLAMA, memory_positions=False, memory_scaling=0.3
    ),
    "paper": PAPER,
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


@functools.cache
def config_of(name, **changes):
    return dataclasses.replace(MODELS[name], memory_layers=(0, 2), local_context=C, **changes)


@functools.cache
def model_of(name, **changes):
    config = config_of(name, **changes)
    return LanguageModel.of(Transformer(config), random_params(config))


def by_rules(name, tokens, feeds, last=C, valid=None):
    config = config_of(name)
    return rules.read(config, random_params(config), tokens, feeds, last, valid)


class OfBytes:
    """What stands for a LanguageModel has its way from text to tokens and back."""

    vocabulary = Bytes()
    encode, decode = LanguageModel.encode, LanguageModel.decode
    _tokenizer = LanguageModel._tokenizer

    def for_memory(self, memory):
        return self


def random_text(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, LLAMA.vocab_size, (rows, length), dtype=np.int32)


def nats_of(logits, targets):
    log_z = np.log(np.exp(logits).sum(-1))
    return log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


def reach(where, tokens):
    """Which tokens each token sees, if memory keeps the last so many of earlier windows."""
    seen = rules.visibility(where)
    first = np.searchsorted(where[:, 0], where[:, 0])  # of its window
    seen[1] &= np.arange(len(where)) >= first[:, None] - tokens
    return seen
