"""Few-shot: answers to questions after as many demonstrations as fit into a context (paper §4)."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from etils import epath

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import LARGEST_SEED, NotHere, UserError, check_range
from fot_jax.common.paths import path_of
from fot_jax.common.progress import bar
from fot_jax.data import corpus
from fot_jax.data.documents import DocumentSource
from fot_jax.data.vocabulary import Vocabulary
from fot_jax.evals import plots
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import MemoryConfig, State, all_of_a_text, check_texts, last_context
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Dense, IndexedTopK, Lookup, TopK

# Fields of a row: the question, and its answer or list of answers; how a demonstration is written.
FORMS = {
    "trec": ("text", "fine_label", "Question: {question}\nType: {answer}\n\n"),
    "webqs": ("question", "answers", "Question: {question}\nAnswer: {answer}\n\n"),
}


class Example(NamedTuple):
    """A question, and what is right to answer."""

    question: str
    answers: tuple[str, ...]


@configurable
@dataclasses.dataclass(frozen=True)
class FewShot:
    """Accuracy by length of the context, over draws of the demonstrations.

    Demonstrations come from the train split, in an order drawn anew each time, as many as fit with
    the longest question and answer. The model writes on after a question, most likely token by most
    likely token; right is what, up to the end of the line, is one of the answers but for case,
    punctuation and articles.

    Attributes:
      path: a directory with train and test as .jsonl or .jsonl.gz.
      form: of the rows: "trec" {"text", "fine_label"}, or "webqs" {"question", "answers"}.
      lengths: tokens of demonstrations, question and answer.
      draws: of demonstrations.
      questions: the first so many of the split; None: all.
      rows: so many questions are asked side by side.
      answer_tokens: longest answer that is waited for.
      lookup, storage: of memory, as MemoryConfig.
      split: of the questions.
      seed: of the draws.
      name: of the plot, and in results.
    """

    path: str
    form: str
    lengths: tuple[int, ...] = (2_048, 4_096, 6_144, 8_192)
    draws: int = 20
    questions: int | None = None
    rows: int = 8
    answer_tokens: int = 16
    lookup: Lookup = Dense()
    storage: str | None = None
    split: str = "test"
    seed: int = 0
    name: str = "few_shot"

    def __post_init__(self):
        counts = {"draws": self.draws, "rows": self.rows, "answer_tokens": self.answer_tokens}
        check_range("FewShot", 1, **counts, questions=self.questions)
        check_range("FewShot", 0, LARGEST_SEED, seed=self.seed)
        if self.form not in FORMS:
            raise UserError(f"FewShot.form = {self.form!r}: choose one of {', '.join(FORMS)}")
        if not self.lengths:
            raise UserError("FewShot.lengths = (): give one length or more")
        for length in self.lengths:
            check_range("FewShot", 1, 2**30, lengths=length)
        check_texts("FewShot", 1, self.storage, self.lookup)

    def check(self, model: ModelConfig, source: DocumentSource) -> None:
        """Raises UserError where there are no questions or demonstrations, or lengths too short."""
        self._check_path()
        self._check_lengths(source.vocabulary, self._longest(source.vocabulary))

    def _check_path(self) -> None:
        if not self.path or not path_of(self.path).is_dir():
            raise NotHere(
                f"FewShot.path = {self.path!r}: no such directory: give one with train.jsonl and "
                f"{self.split}.jsonl, or the same as .jsonl.gz"
            )
        for split in ("train", self.split):
            self._examples(split)

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """One row a length: demonstrations, accuracy, half a 95 % interval of its mean, questions.

        The source is not used.

        Raises:
          UserError: no rows, or rows of another form; a length without room for a question.
        """
        self._check_path()
        demonstrations = self._examples("train")
        questions = self._questions()
        memory, rows = all_of_a_text(lm.config, self.storage, self.lookup), []
        lm = lm.for_memory(memory)
        lm.encode("")  # or it says that there is no tokenizer
        longest = self._longest(lm.vocabulary)
        self._check_lengths(lm.vocabulary, longest)
        last = last_context(lm.config, longest + self.answer_tokens)  # these have room beside it
        total = len(self.lengths) * self.draws * len(questions)
        with bar(total, "question", name=self.name) as progress:
            for length in self.lengths:
                found, shown = [], []
                for draw in range(self.draws):
                    rng = np.random.default_rng((self.seed, length, draw))
                    order = [demonstrations[i] for i in rng.permutation(len(demonstrations))]
                    tokens, count = self._context(lm, order, longest, length)
                    state = None
                    if tokens:
                        state = lm.read(tokens, memory=memory, last_context_length=last)
                    right = 0
                    for start in range(0, len(questions), self.rows):
                        batch = questions[start : start + self.rows]
                        right += self._right(lm, state, memory, batch)
                        progress(len(batch))
                    found.append(right / len(questions))
                    shown.append(count)
                rows.append(
                    {
                        "length": length,
                        "demonstrations": statistics.mean(shown),
                        "accuracy": statistics.mean(found),
                        "interval": _interval(found),
                        "questions": len(questions),
                        "draws": self.draws,
                    }
                )
        return rows

    def _questions(self) -> list[Example]:
        return self._examples(self.split)[: self.questions]

    def _longest(self, vocabulary: Vocabulary) -> int:
        """Tokens of the longest question."""
        return max(len(vocabulary.encode(self._written(each))) for each in self._questions())

    def _check_lengths(self, vocabulary: Vocabulary, longest: int) -> None:
        least = len(vocabulary.before) + longest + self.answer_tokens
        if min(self.lengths) < least:
            raise UserError(
                f"FewShot.lengths has {min(self.lengths)}, too short for a question of {longest} "
                f"tokens and an answer of {self.answer_tokens}: leave it out"
            )

    def _examples(self, split: str) -> list[Example]:
        question, answer, _ = FORMS[self.form]
        found = []
        for place, row in corpus.rows_of(self.path, split):
            answers = row.get(answer)
            if isinstance(answers, list) and answers:
                each = [dict(row, **{answer: text}) for text in answers]
            else:
                each = [row]
            texts = tuple(corpus.field(place, one, answer, str) for one in each)
            found.append(Example(corpus.field(place, row, question, str), texts))
        if not found:
            raise UserError(f"{self.path}: no rows in the {split} split: FewShot.path needs some")
        return found

    def _written(self, example: Example, answer: str | None = None) -> str:
        """A demonstration; of a question alone, what comes before its answer."""
        form = FORMS[self.form][2]
        if answer is None:
            form = form[: form.index(" {answer}")]
        return form.format(question=example.question, answer=answer)

    def _context(
        self, lm: LanguageModel, order: Sequence[Example], longest: int, length: int
    ) -> tuple[list[int], int]:
        """Tokens of as many demonstrations as fit with any question, and how many these are."""
        tokens, count = list(lm.vocabulary.before), 0  # a text begins, and does not end
        room = length - longest - self.answer_tokens
        for example in order:
            more = lm.encode(self._written(example, example.answers[0]), continues=True)
            if len(tokens) + len(more) > room:
                break
            tokens, count = [*tokens, *more], count + 1
        return tokens, count

    def _right(
        self,
        lm: LanguageModel,
        state: State | None,
        memory: MemoryConfig,
        batch: Sequence[Example],
    ) -> int:
        """How many of the questions are answered rightly."""
        if state is not None:
            before = {"state": state.repeated(len(batch))}
        else:
            if isinstance(memory.lookup, IndexedTopK):
                # An index is of one row; with a question alone it finds what TopK finds.
                memory = dataclasses.replace(memory, lookup=TopK(memory.lookup.k))
            before = {"memory": memory}
        written = lm.generate(
            [lm.encode(self._written(example), continues=True) for example in batch],
            self.answer_tokens,
            temperature=0,
            stop=lm.vocabulary.ends,
            **before,
        )
        lines = [lm.decode(new).lstrip().partition("\n")[0] for new in written]
        return sum(
            _plain(line) in map(_plain, example.answers)
            for line, example in zip(lines, batch, strict=True)
        )

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Accuracy of each length."""
        return {f"{self.name}/{row['length']}": row["accuracy"] for row in rows}

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The rows as text."""
        lines = [f"{'length (tokens)':>16} {'demonstrations':>15} {'accuracy':>9} {'95 %':>8}"]
        for row in rows:
            interval = "" if math.isnan(row["interval"]) else f" ±{row['interval']:7.3f}"
            numbers = f"{row['demonstrations']:15.1f} {row['accuracy']:9.3f}{interval}"
            lines.append(f"{row['length']:16,d} {numbers}")
        return "\n".join(lines)

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """Accuracy against length, with intervals, as a PNG."""
        figure, axes = plots.new()
        lengths = [row["length"] for row in rows]
        accuracies, intervals = ([100 * row[x] for row in rows] for x in ("accuracy", "interval"))
        axes.errorbar(lengths, accuracies, yerr=intervals, fmt="o-", capsize=4)
        plots.sizes_along(axes, lengths)
        axes.set_xlabel("demonstrations and question (tokens)")
        axes.set_ylabel("answers right (%)")
        plots.save(figure, path)


def _interval(found: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's distribution; NaN of one number."""
    if len(found) == 1:
        return math.nan
    quantile = scipy.special.stdtrit(len(found) - 1, 0.975)
    return float(quantile * statistics.stdev(found) / len(found) ** 0.5)


def _plain(text: str) -> str:
    """Without case, punctuation, articles and more than one blank in a row."""
    text = "".join(" " if each in string.punctuation else each for each in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
