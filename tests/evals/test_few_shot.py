"""Few-shot: which demonstrations are shown, which questions asked, what counts as right."""

import gzip
import json
import math
import re
import types

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from readers import OfBytes

from fot_jax.common.errors import UserError
from fot_jax.data.vocabulary import Bytes
from fot_jax.evals.few_shot import FewShot
from fot_jax.inference.state import EVERYTHING, MemoryConfig
from fot_jax.model.lookup import IndexedTopK, TopK

DEMONSTRATION = re.compile(r"Question: (.*)\nType: (.*)\n\n")
QUESTIONS = [(f"What is number {i} ?", f"KIND{i % 3}:sub{i}") for i in range(40)]


class Copier(OfBytes):
    """Answers a question that was among the demonstrations, and goes on; else "no"."""

    def __init__(self, memory_layers=(1,), how="{}\n\nQuestion: ", context=1500):
        self.config = types.SimpleNamespace(
            memory_layers=memory_layers, local_context=context, last_context_length=None
        )
        self.how, self.contexts, self.asked, self.memories, self.last = how, [], [], [], []

    def read(self, tokens, *, memory, last_context_length):
        self.last.append(last_context_length)
        text = Bytes().decode(tokens)
        assert tokens[0] == Bytes.bos and len(tokens) == 1 + len(text)
        shown = dict(DEMONSTRATION.findall(text))
        assert DEMONSTRATION.sub("", text) == ""
        self.contexts.append((len(tokens), shown))
        self.memories.append(memory)
        return types.SimpleNamespace(repeated=lambda rows: (shown, rows))

    def generate(self, prompts, max_new_tokens, *, temperature, state, stop):
        shown, rows = state
        assert rows == len(prompts) <= 3 and temperature == 0 and stop == (Bytes.eos,)
        written = []
        for prompt in prompts:
            question = re.fullmatch(r"Question: (.*)\nType:", Bytes().decode(prompt))[1]
            self.asked.append((question, len(prompt)))
            answer = f" {self.how.format(shown.get(question, 'no'))}"
            written.append(Bytes().encode(answer)[:max_new_tokens])
        return written


@pytest.fixture
def directory(tmp_path):
    """Questions that are among the demonstrations, and ten that are not."""
    rows = [json.dumps({"text": q, "label": "X", "fine_label": a}) for q, a in QUESTIONS]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:30]))
    with gzip.open(tmp_path / "test.jsonl.gz", "wt") as file:
        file.write("\n".join(rows))
    return tmp_path


def evaluation(directory, **changes):
    given = {"lengths": (200, 600), "draws": 4, "rows": 3, "form": "trec"}
    return FewShot(**{"path": str(directory), **given, **changes})


def test_a_model_that_copies_scores_what_it_was_shown(directory):
    copier = Copier()
    rows = evaluation(directory).run(copier, None)
    assert [row["length"] for row in rows] == [200, 600]
    for row, contexts in zip(rows, (copier.contexts[:4], copier.contexts[4:]), strict=True):
        shares = [len(shown) / 40 for _, shown in contexts]
        assert row["accuracy"] == pytest.approx(np.mean(shares)) and row["accuracy"] > 0
        student = scipy.stats.t.ppf(0.975, 3)
        assert row["interval"] == pytest.approx(student * np.std(shares, ddof=1) / 2)
        assert row["demonstrations"] == pytest.approx(40 * np.mean(shares))
        assert (row["questions"], row["draws"]) == (40, 4)
    assert rows[1]["accuracy"] > 2 * rows[0]["accuracy"]


def test_as_many_demonstrations_as_fit_in_another_order_each_time(directory):
    copier = Copier()
    evaluation(directory).run(copier, None)
    longest = max(n for _, n in copier.asked)
    demonstration = max(len(f"Question: {q}\nType: {a}\n\n") for q, a in QUESTIONS)
    for i, (tokens, shown) in enumerate(copier.contexts):
        room = (200, 600)[i // 4] - longest - 16
        assert room - demonstration < tokens <= room
        assert set(shown.items()) < set(QUESTIONS[:30])
    assert len({tuple(shown) for _, shown in copier.contexts}) == 8
    again = Copier()
    evaluation(directory).run(again, None)
    assert again.contexts == copier.contexts
    other = Copier()
    evaluation(directory, seed=1).run(other, None)
    assert other.contexts != copier.contexts


def test_the_first_questions_alone(directory):
    copier = Copier()
    rows = evaluation(directory, questions=7, draws=1).run(copier, None)
    assert [q for q, _ in copier.asked] == [q for q, _ in QUESTIONS[:7]] * 2
    assert rows[0]["questions"] == 7 and math.isnan(rows[0]["interval"])  # of one number: unknown
    assert "±" not in evaluation(directory).table(rows)


def test_a_vocabulary_without_a_mark_at_the_beginning(directory):
    """Where no demonstration fits there is nothing to read before questions, nor an index of it."""

    class Plain(Bytes):
        before, ends = (), (10, 257)

    class Reader(Copier):
        vocabulary = Plain()

        def read(self, tokens, *, memory, last_context_length):
            return super().read([Bytes.bos, *tokens], memory=memory, last_context_length=0)

        def generate(self, prompts, max_new_tokens, *, temperature, stop, state=None, memory=None):
            self.alone = state is None
            alone = MemoryConfig(lookup=TopK(7)) if self.alone else None
            assert memory == alone and stop == (10, 257)
            state = state or ({}, len(prompts))
            how = {"temperature": temperature, "state": state, "stop": (Bytes.eos,)}
            return super().generate(prompts, max_new_tokens, **how)

    for length, alone in ((600, False), (55, True)):
        reader = Reader()
        each = evaluation(directory, lengths=(length,), draws=1, lookup=IndexedTopK(7))
        (row,) = each.run(reader, None)
        assert reader.alone == alone == (row["demonstrations"] == 0)


@pytest.mark.parametrize(
    ("how", "right"),
    [
        ("{}", True),
        ("The {}.\nType: other", True),
        ("{}", True),
        ("kind {}", False),
        ("{} or so", False),
        ("\n{}", True),
    ],
)
def test_what_counts_as_right(directory, how, right):
    rows = evaluation(directory, answer_tokens=24).run(Copier(how=how), None)
    assert (rows[0]["accuracy"] > 0) == right


def test_any_of_several_answers(tmp_path):
    rows = [
        {"question": "who?", "answers": ["The Queen", "Elizabeth II."]},
        {"question": "where?", "answers": ["a town", "Rome"]},
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = {"who?": " elizabeth  ii\n", "where?": " Rome, Italy\n"}

    class Speaker(Copier):
        def read(self, tokens, **_):
            text = Bytes().decode(tokens)
            assert "Question: who?\nAnswer: The Queen\n\n" in text
            return types.SimpleNamespace(repeated=lambda rows: None)

        def generate(self, prompts, *args, **options):
            asked = [re.findall(r"Question: (.*)\nAnswer:$", Bytes().decode(p))[0] for p in prompts]
            return [Bytes().encode(said[question]) for question in asked]

    (row,) = evaluation(tmp_path, form="webqs", lengths=(400,)).run(Speaker(), None)
    assert row["accuracy"] == 0.5


def test_the_question_has_room_in_the_window(directory):
    """Of a model without memory, all of it: it does not see what was in another."""
    for memory_layers, context, last in (((1,), 1500, 1024), ((1,), 500, None), ((), 1500, None)):
        copier = Copier(memory_layers, context=context)
        evaluation(directory).run(copier, None)
        longest = max(n for _, n in copier.asked)
        assert set(copier.last) == {last or context - longest - 16}


def test_memory_is_as_asked_for(directory):
    copier = Copier()
    evaluation(directory, lookup=TopK(7), storage="int8").run(copier, None)
    assert set(copier.memories) == {MemoryConfig(storage="int8", lookup=TopK(7))}
    copier = Copier(memory_layers=())
    evaluation(directory).run(copier, None)
    assert set(copier.memories) == {EVERYTHING}


def test_what_the_rows_become(directory, tmp_path):
    each = evaluation(directory)
    rows = each.run(Copier(), None)
    assert each.scalars(rows) == {
        "few_shot/200": rows[0]["accuracy"],
        "few_shot/600": rows[1]["accuracy"],
    }
    assert f"{rows[1]['accuracy']:.3f} ±" in each.table(rows).splitlines()[2]
    each.plot(rows, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png", format="png").shape[0] > 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "boolq"}, "FewShot.form = 'boolq': choose one of trec, webqs"),
        ({"form": "webqs"}, "train.jsonl:1: no field 'answers' in the row"),
        ({"lengths": ()}, "FewShot.lengths = ()"),
        ({"lengths": (600, 40)}, "FewShot.lengths has 40, too short for a question of"),
        ({"split": "valid"}, "no rows in the valid split"),
        ({"draws": 0}, "FewShot.draws = 0"),
        (
            {"path": "nowhere"},
            "FewShot.path = 'nowhere': no such directory: give one with train.js",
        ),
    ],
)
def test_what_does_not_fit_is_named(directory, changes, message):
    for ask in ("run", "check"):
        with pytest.raises(UserError) as raised:
            getattr(evaluation(directory, **changes), ask)(Copier(), Copier())
        assert message in str(raised.value)
