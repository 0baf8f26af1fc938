"""Dictionary accuracy: what is read, what is asked about it, and how answers are counted."""

import dataclasses
import types

import jax
import matplotlib.image
import numpy as np
import pytest
from tiny import tiny, untrained

from fot_jax.common.errors import UserError
from fot_jax.data.files import SPLITS
from fot_jax.data.synthetic import KEY, QUESTION, DictionaryLookup, Passkey
from fot_jax.evals.dictionary import DictionaryAccuracy
from fot_jax.inference import forward, segment_files
from fot_jax.inference.language_model import Scores
from fot_jax.inference.segment_files import Segments
from fot_jax.inference.state import MemoryConfig
from fot_jax.model.lookup import Dense, IndexedTopK, TopK

TASK = DictionaryLookup(document_tokens=64, key_length=2, value_length=3)  # 4 records of 7 a half
SIZES = (32, 100, 640)  # 1, 3 and 20 windows: 4, 12, 80 records


class Scholar:
    """Remembers definitions, but for some; answers questions value by value."""

    def __init__(self, forgets=lambda key: False, memory_layers=(1,)):
        self.config = types.SimpleNamespace(
            memory_layers=memory_layers, memory_before=False, local_context=TASK.half
        )
        self.forgets, self.asked = forgets, []

    def for_memory(self, memory):
        return self

    def remember(self, windows, *, rows, progress, memory=None, state=None):
        assert rows == 2 and (memory is None) != (state is None)
        if memory is not None:
            assert memory == MemoryConfig(640, False, storage="int8", lookup=TopK(5), shared=True)
        state = state or types.SimpleNamespace(known={})
        state.copy = lambda: state
        for window in windows:
            for record in window[:28].reshape(4, 7):
                assert record[0] == KEY
                key = tuple(record[1:3])
                assert key not in state.known
                state.known[key] = None if self.forgets(key) else record[4:]
        return state

    def score(self, tokens, *, last_context_length, state):
        assert tokens.shape == (2, TASK.half) and last_context_length == TASK.half
        correct = np.ones((2, TASK.half - 1), bool)  # right where it does not count
        for row, of_row in zip(tokens, correct, strict=True):
            records = row[:28].reshape(4, 7)
            assert (records[:, 0] == QUESTION).all()
            asked = [tuple(record[1:3]) for record in records]
            assert len(set(asked)) == 4
            self.asked.append(asked)
            for i, record in enumerate(records):
                known = state.known[asked[i]]  # it was read
                right = np.zeros(3, bool) if known is None else known == record[4:]
                of_row[7 * i + 3 : 7 * i + 6] = right
        return Scores(None, correct)


def evaluation(**changes):
    given = {"sizes": SIZES, "windows": 6, "rows": 2, "lookup": TopK(5), "storage": "int8"}
    return DictionaryAccuracy(**{**given, **changes})


def test_all_is_found_by_one_who_forgets_nothing():
    rows = evaluation().run(Scholar(), TASK)
    asked = {"accuracy": 1.0, "tokens": 6 * 4 * 3}
    assert rows == [{"dictionary": size, **asked} for size in (32, 96, 640)]


def test_accuracy_is_the_share_of_what_was_asked():
    scholar = Scholar(forgets=lambda key: key[0] % 3 == 0)
    rows = evaluation().run(scholar, TASK)
    for row, asked in zip(rows, np.split(np.array(scholar.asked), 3), strict=True):
        assert row["accuracy"] == pytest.approx((asked[..., 0] % 3 > 0).mean())
    assert 0 < rows[-1]["accuracy"] < 1
    # Of a large dictionary, other windows ask about other keys.
    assert len({key for asked in scholar.asked[12:] for key in asked}) > 12


def test_a_seed_says_what_is_asked():
    def asked(seed):
        scholar = Scholar()
        evaluation(seed=seed).run(scholar, TASK)
        return scholar.asked

    assert asked(0) == asked(0) != asked(1)


def model(memory_layers, local_context):
    config = tiny(vocab_size=64, memory_layers=memory_layers, local_context=local_context)
    return untrained(config, change=lambda params: jax.tree.map(lambda x: 3 * x, params))


def documents(seed, sizes, windows):
    """Dictionary and questions of each size, with what is asked: as the evaluation draws them."""
    dictionary = TASK.dictionary(np.random.default_rng((seed, 0)), sizes[-1] // 32 * 4)
    for size in sizes:
        rng = np.random.default_rng((seed, size))
        n = size // 32 * 4
        read = [TASK.half_document(KEY, dictionary.of(slice(i, i + 4))) for i in range(0, n, 4)]
        for _ in range(windows):
            asked = dictionary.of(rng.choice(n, 4, replace=False))
            yield np.concatenate([*read, TASK.half_document(QUESTION, asked)])


def shares(lm, texts, windows, **options):
    """Of value tokens that are the most likely ones, over so many texts at a time."""
    weights = TASK.weights_of_questions()
    right = []
    for text in texts:
        logits = lm.logits(text[None], **options)
        right.append((logits[0].argmax(-1)[:-1] == text[1:])[-32:][weights > 0].mean())
    return np.reshape(right, (-1, windows)).mean(1)


def test_a_model_with_memory_answers_as_if_it_read_the_text():
    """Of one window of definitions: with more, these would see each other."""
    lm = model((1,), 32)
    rows = evaluation(sizes=(32,), windows=40, storage=None, lookup=Dense()).run(lm, TASK)
    want = shares(lm, documents(0, (32,), 40), 40, last_context_length=32)
    assert rows[0]["accuracy"] == pytest.approx(want[0]) and want[0] > 0


@pytest.mark.parametrize("in_files", [False, True])
def test_an_index_that_visits_all_keys_is_exact(tmp_path, monkeypatch, in_files):
    """Segments are made small, so that there are some; the directory is empty afterwards."""
    monkeypatch.setattr(segment_files, "TOKENS", 64)
    with_closed, places = Segments.with_closed, []

    def recorded(self, *args):
        places.append(self.directory)
        return with_closed(self, *args)

    monkeypatch.setattr(Segments, "with_closed", recorded)
    lm, given = model((1,), 32), {"sizes": (320, 640), "windows": 40, "storage": None}
    index = {"lookup": IndexedTopK(5, 640), "directory": str(tmp_path) if in_files else None}
    indexed = evaluation(**given, **index)
    indexed.check(lm.config, TASK)
    want = evaluation(**given).run(lm, TASK)
    assert indexed.run(lm, TASK) == want and want[-1]["accuracy"] > 0
    assert len(places) == 9  # the last 64 tokens are in none
    for place in places:
        assert place.is_relative_to(tmp_path) if in_files else place is None
    assert not list(tmp_path.iterdir())


def test_a_model_on_several_devices():
    """A memory with an index is read on one of them."""
    lm = model((1,), 32)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("memory",))
    spread = dataclasses.replace(lm, params=forward.replicate(mesh, lm.params), mesh=mesh)
    each = evaluation(sizes=(32,), lookup=IndexedTopK(5, 640))
    assert each.run(spread, TASK) == each.run(lm, TASK)


def test_a_directory_that_is_not_there(tmp_path):
    config = model((1,), 32).config
    with pytest.raises(UserError, match="missing' is no directory that can be written"):
        evaluation(directory=str(tmp_path / "missing")).check(config, TASK)


def test_a_model_without_memory_has_it_all_in_its_window(monkeypatch):
    monkeypatch.setattr("fot_jax.evals.dictionary.LONGEST_WINDOW", 96)
    lm = model((), 64)
    rows = evaluation(windows=40).run(lm, TASK)
    assert [row["dictionary"] for row in rows] == [32, 96]  # 640 do not fit
    wide = dataclasses.replace(lm, config=dataclasses.replace(lm.config, local_context=128))
    want = shares(wide, documents(0, (32, 96), 40), 40, last_context_length=128)
    assert [row["accuracy"] for row in rows] == pytest.approx(want.tolist())


def test_a_model_that_sees_the_window_before_is_asked_about_that():
    lm = model((1,), 32)
    config = dataclasses.replace(lm.config, memory_before=True, memory_positions=True)
    assert evaluation()._sizes(config, TASK) == [32]
    with pytest.raises(UserError, match="sizes are all more than the window before, of 32 tokens"):
        evaluation(sizes=(96, 640)).check(config, TASK)


def test_a_model_without_memory_and_dictionaries_that_are_all_too_large(monkeypatch):
    monkeypatch.setattr("fot_jax.evals.dictionary.LONGEST_WINDOW", 96)
    with pytest.raises(UserError, match="sizes are all more than the 96 tokens that it is given"):
        evaluation(sizes=(640,)).run(Scholar(memory_layers=()), TASK)


def test_what_the_rows_become(tmp_path):
    rows = [
        {"dictionary": 512, "accuracy": 0.9986, "tokens": 1600},
        {"dictionary": 2**24, "accuracy": 0.9211, "tokens": 1600},
    ]
    each = DictionaryAccuracy()
    want = {"dictionary_accuracy/512": 0.9986, "dictionary_accuracy/16777216": 0.9211}
    assert each.scalars(rows) == want
    assert "16,777,216" in each.table(rows) and "0.9211" in each.table(rows)
    each.plot(rows, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png", format="png").shape[0] > 300


@pytest.mark.parametrize(
    ("changes", "source", "message"),
    [
        ({"sizes": ()}, TASK, "DictionaryAccuracy.sizes = ()"),
        ({"sizes": (0,)}, TASK, "DictionaryAccuracy.sizes = 0"),
        (
            {"sizes": (4, 32)},
            TASK,
            "DictionaryAccuracy.sizes has 4: TopK.k = 5 is larger",
        ),
        ({"sizes": (20, 32)}, TASK, "DictionaryAccuracy.sizes has 20, less than a window of 32"),
        ({"windows": 5}, TASK, "DictionaryAccuracy.windows = 5 is not a multiple of"),
        ({"seed": -1}, TASK, "DictionaryAccuracy.seed = -1"),
        (
            {"directory": "gs://bucket/x"},
            TASK,
            "DictionaryAccuracy.directory: gs://bucket/x: files in",
        ),
        ({}, Passkey(), "asks about a DictionaryLookup, not a Passkey"),
        ({"sizes": (32 * 1000,)}, TASK, "a dictionary of 4000 records, but DictionaryLookup.key_l"),
    ],
)
def test_what_does_not_fit_is_named(changes, source, message):
    with pytest.raises(UserError) as raised:
        evaluation(**changes).run(Scholar(), source)
    assert message in str(raised.value)


def test_documents_are_made_of_the_same_parts():
    """Of which training's own are tested elsewhere."""
    document = next(TASK.documents(SPLITS[0]))
    np.testing.assert_array_equal(document.weights[32:64], TASK.weights_of_questions())
    assert not document.weights[:32].any()
