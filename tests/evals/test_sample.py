"""A sample: the prompt that is read, and what the model writes after it."""

import dataclasses

import numpy as np
import pytest
from readers import OfBytes

from fot_jax.common.errors import UserError
from fot_jax.data.documents import Document
from fot_jax.data.vocabulary import Bytes
from fot_jax.evals.sample import Sample
from fot_jax.inference.state import MemoryConfig


class Recorder(OfBytes):
    """In place of a language model with windows of 16: writes the same five letters."""

    class config:  # noqa: N801
        local_context = 16
        memory_layers = (1,)
        memory_before = False

    def generate(self, tokens, max_new_tokens, **options):
        self.called = tokens, max_new_tokens, options
        return list(b"hello")


class Text:
    vocabulary = Bytes()

    def __init__(self, *texts):
        self._documents = [
            Document(np.frombuffer(text, np.uint8).astype(np.int32), np.ones(len(text)))
            for text in texts
        ]

    def documents(self, split):
        assert split == "test"
        return iter(self._documents)


def test_continues_the_start_of_the_first_document():
    lm = Recorder()
    text = bytes(range(97, 123)) * 4
    evaluation = Sample(80, 5, memory=40, temperature=0.5, split="test", seed=3)
    (row,) = evaluation.run(lm, Text(text, b"another"))
    tokens, count, options = lm.called
    assert (tokens, count) == (list(text[:80]), 5)
    assert options == {
        "temperature": 0.5,
        "seed": 3,
        "last_context_length": 16,
        "memory": MemoryConfig(40),
    }
    assert row == {"prompt": text[16:80].decode(), "continuation": "hello"}
    assert evaluation.table([row]) == f"…{row['prompt']} ▌hello"
    assert evaluation.scalars([row]) == {}


def test_a_model_that_sees_the_window_before_has_a_memory_of_one_window():
    class TransformerXL(Recorder):
        class config(Recorder.config):  # noqa: N801
            memory_before = True

    lm = TransformerXL()
    Sample(split="test").run(lm, Text(b"abc"))
    assert lm.called[2]["memory"] == MemoryConfig(16)


def test_a_model_without_memory_keeps_the_prompt_in_its_window():
    """Which would be emptied of a whole one, with the first token that is written."""

    class Plain(Recorder):
        class config(Recorder.config):  # noqa: N801
            memory_layers = ()

    for lm, each in ((Plain(), Sample(new_tokens=5)), (Recorder(), Sample(memory=0, new_tokens=5))):
        dataclasses.replace(each, split="test").run(lm, Text(b"abc"))
        assert lm.called[2]["last_context_length"] == 16 - 5
        assert lm.called[2]["memory"] == MemoryConfig(0)


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="the test split has no document to sample from"):
        Sample(split="test").run(Recorder(), Text())
