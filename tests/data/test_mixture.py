"""Mixtures: proportions, and every source's documents in its own order, resumed or not."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_synthetic import contents, take

from fot_jax.common.errors import UserError
from fot_jax.data.corpus import Corpus
from fot_jax.data.documents import single_source_position
from fot_jax.data.lanes import Lanes
from fot_jax.data.mixture import Mixture
from fot_jax.data.sentencepiece_vocabulary import TrainedSentencePiece
from fot_jax.data.synthetic import DictionaryLookup, Passkey
from fot_jax.data.tasks import Text, cache
from fot_jax.data.vocabulary import Bytes

SHORT = Passkey(document_tokens=300, eval_documents=3)
LONG = Passkey(document_tokens=500, eval_documents=2)
LONGER = Passkey(document_tokens=700, eval_documents=4)


def source_of(document):
    """Its index in (SHORT, LONG, LONGER)."""
    return int(np.searchsorted([300, 500], len(document.tokens) - 1))


def mixture(*weights):
    return Mixture((SHORT, LONG, LONGER)[: len(weights)], weights)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(0.1, 10), min_size=2, max_size=3),
    st.integers(0, 2),
    st.integers(0, 2**40),
    st.integers(0, 40),
)
def test_each_source_in_its_own_order_from_any_position(weights, shard, seed, stop):
    source = mixture(*weights)
    whole = take(source, 40, shard, 3, seed)
    for i, each in enumerate(source.sources):
        of_source = [document for _, document in whole if source_of(document) == i]
        alone = [document for _, document in take(each, len(of_source), shard, 3, seed)]
        assert contents(of_source) == contents(alone)
    position = whole[stop - 1][0] if stop else (0, 0)
    rest = take(mixture(*weights), 40 - stop, shard, 3, seed, position)
    assert contents(document for _, document in rest) == contents(
        document for _, document in whole[stop:]
    )
    assert [at for at, _ in rest] == [at for at, _ in whole[stop:]]


def test_proportions():
    drawn = [source_of(document) for _, document in take(mixture(1, 6, 3), 2000)]
    shares = np.bincount(drawn) / 2000
    np.testing.assert_allclose(shares, [0.1, 0.6, 0.3], atol=0.03)


def test_orders_differ_by_shard_and_seed():
    orders = [
        [source_of(document) for _, document in take(mixture(1, 1), 30, shard, 2, seed)]
        for shard in range(2)
        for seed in range(2)
    ]
    assert len(set(map(tuple, orders))) == 4


def test_a_split_is_of_each_source_in_turn():
    source = mixture(1, 1, 1)
    of_each = (each.documents("test") for each in (SHORT, LONG, LONGER))
    in_turn = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*of_each)))
    assert contents(source.documents("test")) == contents(in_turn)
    source.check_split("test")
    with pytest.raises(UserError, match="no split 'dev'"):
        source.check_split("dev")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "texts").mkdir()
    rows = [json.dumps({"text": f"Document {i}. " * 40}) + "\n" for i in range(7)]
    (tmp_path / "texts" / "train.jsonl").write_text("".join(rows))
    return Text(corpora=(Corpus(path=str(tmp_path / "texts")),), tokenizer=Bytes())


def test_all_are_tokenized_as_the_first_is(text):
    source = Mixture((SHORT, text), (1, 1))
    pieces = Bytes()
    assert source.vocabulary == pieces
    assert [each.vocabulary for each in source.with_vocabulary(pieces).sources] == [pieces] * 2
    other = Mixture((SHORT, DictionaryLookup()), (1, 1))
    for ask in (lambda: take(other, 1), lambda: other.vocabulary):
        with pytest.raises(UserError, match="DictionaryLookup has its own 64 symbols"):
            ask()


def test_lanes_go_on_after_epochs_of_text(text):
    """The state of lanes holds the epoch of each source."""
    source = Mixture((SHORT, text), (1, 3))
    layout = {"lanes": 4, "window": 64, "groups": 2, "seed": 3}
    lanes = Lanes(source, **layout)
    whole = [next(lanes) for _ in range(60)]
    for stop in (0, 1, 30, 59):
        lanes = Lanes(source, **layout)
        for _ in itertools.repeat(None, stop):
            next(lanes)
        state = lanes.state_of(lanes.snapshot())
        resumed = Lanes(source, **layout)
        resumed.restore(state)
        for batch in whole[stop:]:
            again = next(resumed)
            assert all((again[name] == batch[name]).all() for name in batch)
    position = state[0]["position"]
    assert len(position) == 6 and position[4] > 0  # epochs of text


def test_settings_are_of_what_is_read(text, tmp_path):
    """A cache is of the mixture's vocabulary, and all of the source that there is."""
    cache(text, tmp_path / "cache")
    shutil.rmtree(tmp_path / "texts")
    own = dataclasses.replace(text, tokenizer=TrainedSentencePiece(), cache_dir=tmp_path / "cache")
    source = Mixture((SHORT, own), (1, 1))
    settings = source.settings()
    assert len(take(source, 9)) == 9
    assert settings == source.with_vocabulary(source.vocabulary).settings()


def test_a_source_without_documents_says_so_before_the_first(text):
    """However rarely it is drawn."""
    source = Mixture((SHORT, text), (1, 1e-9))
    with pytest.raises(UserError, match="texts: no training document in shard 7 of 8: lower"):
        take(source, 1, 7, 8)
    assert len(take(source, 3, 6, 8)) == 3


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ((SHORT,), (1,), "Mixture.sources: name two or more"),
        ((), (), "Mixture.sources: name two or more"),
        ((SHORT, Mixture((SHORT, LONG), (1, 1))), (1, 1), "none of which is a Mixture"),
        ((SHORT, LONG), (1,), "Mixture.weights are 1 for 2 sources"),
        ((SHORT, LONG), (1, 0), r"Mixture.weights = \(1, 0\): give numbers above 0"),
        ((SHORT, LONG), (1, float("nan")), "give numbers above 0"),
        ((SHORT, LONG), (1, float("inf")), "give numbers above 0"),
    ],
)
def test_what_is_no_mixture(sources, weights, message):
    with pytest.raises(UserError, match=message):
        Mixture(sources, weights)


def test_the_state_of_another_source():
    (*_, (position, _)) = take(mixture(1, 1), 3)
    with pytest.raises(UserError, match="data is of 2 sources, Mixture.sources names 3"):
        take(mixture(1, 1, 1), 1, position=position)
    with pytest.raises(UserError, match="data is of 1 sources, Mixture.sources names 2"):
        take(mixture(1, 1), 1, position=(0, 7))
    with pytest.raises(UserError, match="data is of a Mixture of 2 sources, Data.source is none"):
        single_source_position(position)
    for source in (SHORT, Text()):
        with pytest.raises(UserError, match="of a Mixture of 2 sources"):
            take(source, 1, position=position)
