"""Pass keys: what is asked, at which lengths and depths, and what counts as found."""

import itertools
import re
import types

import matplotlib.image
import numpy as np
import pytest

from fot_jax.common.errors import UserError
from fot_jax.data.synthetic import FILLER, PASSKEY_QUESTION, TASK, Passkey
from fot_jax.data.vocabulary import Bytes
from fot_jax.evals.passkey import PasskeyRetrieval
from fot_jax.inference.state import EVERYTHING, MemoryConfig, last_context
from fot_jax.model.lookup import Dense, IndexedTopK, TopK

SOURCE = types.SimpleNamespace(vocabulary=Bytes())
STATEMENT = re.compile(r" The pass key is (\d{5})\. Remember it\. \1 is the pass key\. ")


class Reader:
    """Writes down the number of a text, as far as `finds` lets it; remembers what it was asked."""

    def __init__(self, finds=lambda key, text: key, memory_layers=(1,), context=64):
        self.config = types.SimpleNamespace(
            memory_layers=memory_layers, local_context=context, last_context_length=None
        )
        self.finds, self.texts, self.options = finds, [], []

    def for_memory(self, memory):
        return self

    def generate(
        self, prompts, max_new_tokens, *, temperature, memory, last_context_length, progress
    ):
        assert max_new_tokens == 6 and temperature == 0 and len(prompts) <= 2
        assert last_context_length == last_context(self.config, max_new_tokens)
        self.options.append(memory)
        written = []
        for prompt in prompts:
            assert prompt[0] == Bytes.bos
            text = Bytes().decode(prompt)
            (key,) = STATEMENT.findall(text)
            self.texts.append((key, text))
            written.append(Bytes().encode(f" {self.finds(key, text)}")[:max_new_tokens])
        return written


class ReaderOfWindows(Reader):
    """The same of one text, of which it is given all windows but the last to remember."""

    def remember(self, windows, *, memory=None, state=None, progress):
        assert (memory is None) == (state is not None)  # which has its own
        self.options += [memory] if state is None else []
        return [*(state or ()), *windows.tolist()]

    def generate(self, prompt, max_new_tokens, *, temperature, state, progress):
        context, last = self.config.local_context, last_context(self.config, max_new_tokens)
        windows = state or []
        assert all(len(window) == context for window in windows[:-1])
        assert len(prompt) == last or not windows and len(prompt) < last
        options = {"temperature": temperature, "progress": progress}
        options |= {"memory": self.options[-1:], "last_context_length": last}
        whole = [*itertools.chain(*windows), *prompt]
        return super().generate([whole], max_new_tokens, **options)[0]


def evaluation(**changes):
    given = {"lengths": (600, 2000), "depths": 3, "keys": 5, "rows": 2}
    return PasskeyRetrieval(**{**given, **changes})


def test_texts_are_as_long_as_fits_and_the_number_is_at_its_depth():
    reader = Reader()
    rows = evaluation().run(reader, SOURCE)
    assert [(row["length"], row["depth"]) for row in rows] == [
        (length, depth) for length in (600, 2000) for depth in (0.0, 0.5, 1.0)
    ]
    assert all(row["accuracy"] == 1.0 and row["keys"] == 5 for row in rows)
    assert len({key for key, _ in reader.texts}) > 25  # of 30
    assert all(int(key) % 7 == 0 for key, _ in reader.texts)  # numbers that training never sees
    for i, (_, text) in enumerate(reader.texts):
        row = rows[i // 5]
        tokens = 1 + len(text) + len(" 12345")
        assert row["length"] - len(f"{FILLER} ") < tokens <= row["length"]
        before, _, after = STATEMENT.split(text)
        assert before.startswith(TASK) and after.endswith(PASSKEY_QUESTION)
        before, after = before.count(FILLER), after.count(FILLER)
        assert before == round(row["depth"] * (before + after)) and before + after > 0


def test_all_digits_must_be_right():
    wrong = {"0": lambda key: key[:-1] + "x", "5": lambda key: f"1{key}", "9": lambda key: ""}
    reader = Reader(finds=lambda key, text: wrong.get(key[-1], str)(key))
    rows = evaluation(keys=40).run(reader, SOURCE)
    for i, row in enumerate(rows):
        asked = reader.texts[40 * i : 40 * i + 40]
        assert row["accuracy"] == sum(key[-1] not in wrong for key, _ in asked) / 40
        assert 0 < row["accuracy"] < 1


def test_what_comes_after_the_number_does_not_matter():
    reader = Reader(finds=lambda key, text: f"{key} and so on")
    assert all(row["accuracy"] == 1 for row in evaluation().run(reader, SOURCE))


@pytest.mark.parametrize("context", [64, 100, 512, 700, 4096])
def test_windows_apart(context):
    """The same texts and numbers; what is remembered goes into one memory."""
    both, lookup = [], TopK(7)
    for reader in (Reader(context=context), ReaderOfWindows(context=context)):
        apart = isinstance(reader, ReaderOfWindows)
        rows = evaluation(windows_apart=apart, lookup=lookup).run(reader, SOURCE)
        both.append((rows, reader.texts))
    assert both[0] == both[1]
    remembered = [each for each in reader.options if isinstance(each, MemoryConfig)]
    assert set(remembered) == {MemoryConfig(lookup=lookup, shared=True)}


def test_the_number_has_room_in_the_window():
    """It is written in the window of the question."""
    assert last_context(Reader(context=256).config, 6) == 250
    assert last_context(Reader(context=2048).config, 6) == 1024
    assert last_context(Reader(context=4).config, 6) == 1
    assert last_context(Reader(context=4096, memory_layers=()).config, 6) == 4090  # it has no other


def test_windows_apart_of_a_model_without_memory():
    reader = Reader(memory_layers=())
    evaluation(windows_apart=True).run(reader, SOURCE)
    assert set(reader.options) == {EVERYTHING}


def test_memory_is_as_asked_for():
    reader = Reader()
    evaluation(lookup=TopK(7), storage="int8").run(reader, SOURCE)
    assert set(reader.options) == {MemoryConfig(storage="int8", lookup=TopK(7))}
    reader = Reader(memory_layers=())
    evaluation(lookup=Dense()).run(reader, SOURCE)
    assert set(reader.options) == {EVERYTHING}


def test_a_seed_says_which_numbers():
    def asked(seed):
        reader = Reader()
        evaluation(seed=seed).run(reader, SOURCE)
        return reader.texts

    assert asked(0) == asked(0) != asked(1)


def test_what_the_rows_become(tmp_path):
    reader = Reader(finds=lambda key, text: key if len(text) < 1000 else "")
    each = evaluation()
    rows = each.run(reader, SOURCE)
    assert each.scalars(rows) == {"passkey/600": 1.0, "passkey/2000": 0.0}
    head, first, second = each.table(rows).splitlines()
    assert head.split() == ["length", "(tokens)", *"at 0 % at 50 % at 100 % all".split()]
    assert first.split() == ["600", *["1.000"] * 4] and second.split()[0] == "2,000"
    each.plot(rows, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png", format="png").shape[0] > 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ()}, "PasskeyRetrieval.lengths = ()"),
        ({"lengths": (0,)}, "PasskeyRetrieval.lengths = 0"),
        (
            {"lengths": (100,)},
            "PasskeyRetrieval.lengths has 100: Passkey.document_tok",
        ),
        ({"depths": 1}, "PasskeyRetrieval.depths = 1"),
        ({"keys": 0}, "PasskeyRetrieval.keys = 0"),
        ({"storage": "fp16"}, "PasskeyRetrieval.storage: MemoryConfig.storage = 'fp16': choose"),
        ({"rows": 2, "lookup": IndexedTopK()}, "IndexedTopK(k=128, visited=4096): documents that"),
        ({"seed": -1}, "PasskeyRetrieval.seed = -1"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(UserError) as raised:
        evaluation(**changes).check(None, SOURCE)
    assert message in str(raised.value)


def test_documents_are_the_same_prompts():
    """That training reads."""
    source = Passkey(document_tokens=700)
    document = next(source.documents("test"))
    key = int(Bytes().decode(document.tokens[document.weights > 0].tolist()))
    fillers = source.draw_fillers(np.random.default_rng(), key)
    cuts = [(fillers[:n], fillers[n:]) for n in range(len(fillers) + 1)]
    prompts = [source.prompt_and_answer(key, *cut)[0] for cut in cuts]
    prompt = document.tokens[: len(prompts[0])].tolist()
    assert prompt in [each.tolist() for each in prompts]
