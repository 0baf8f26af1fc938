"""Tasks of EleutherAI's lm-evaluation-harness, on a model with memory (paper §5, short tasks).

Texts longer than the local context are read window by window into memory, and nothing is cut off;
of models without memory the last window sees no other.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from fot_jax.data.lanes import DocumentSource
from fot_jax.errors import UserError, check_range
from fot_jax.evals import plots
from fot_jax.generate import LanguageModel
from fot_jax.model.lookup import Dense, Lookup
from fot_jax.model.transformer import ModelConfig
from fot_jax.reading import MemoryConfig, all_of_a_text, last_context

DEFAULT_NEW_TOKENS = 256  # where a task does not say how many


@dataclasses.dataclass(frozen=True)
class LmEval:
    """Runs tasks of the harness and reports its metrics.

    Attributes:
      tasks: names, as `lm-eval ls tasks` prints them, or of those in `include_path`.
      include_path: a directory with tasks of one's own (YAML).
      num_fewshot: demonstrations; None: as a task says.
      limit: the first so many questions of each task; None: all.
      rows: so many texts are read side by side.
      lookup, storage: of memory, as MemoryConfig.
      seed: of the harness's draws, which demonstrations, say.
      name: of the plot, and in results.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    rows: int = 8
    lookup: Lookup = Dense()
    storage: str | None = None
    seed: int = 0
    name: str = "lm_eval"

    def __post_init__(self):
        check_range("LmEval", 1, rows=self.rows, limit=self.limit)
        check_range("LmEval", 0, num_fewshot=self.num_fewshot)
        check_range("LmEval", 0, 2**32 - 1, seed=self.seed)
        if not self.tasks:
            raise UserError("LmEval.tasks = (): give the name of one task or more")

    def check(self, model: ModelConfig) -> None:
        """Raises UserError, whatever the model, where there is no harness."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("LmEval needs the harness: pip install -e '.[lm_eval]'")
        if self.include_path is not None and not os.path.isdir(self.include_path):
            raise UserError(
                f"LmEval.include_path = {self.include_path!r}: no such directory: give one with "
                "the YAML files of tasks"
            )

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """One row a task and metric: value, standard error where there is one.

        Of the source only the vocabulary is used.

        Raises:
          UserError: the harness is not installed, or knows no such task.
        """
        self.check(lm.config)
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager, get_task_dict

        manager = TaskManager(include_path=self.include_path)
        if unknown := [task for task in self.tasks if task not in manager.all_tasks]:
            raise UserError(
                f"LmEval.tasks: the harness knows no {', '.join(unknown)}: see lm-eval ls tasks, "
                "or set LmEval.include_path to a directory with it"
            )
        try:
            get_task_dict([*self.tasks], manager)
        except Exception as error:  # of any kind, from its YAML, templates, functions and data
            what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise UserError(
                f"LmEval.tasks: the harness cannot load {', '.join(self.tasks)} ({what}): mend the "
                "task, or see to its data"
            ) from error
        memory = all_of_a_text(lm.config, self.storage, self.lookup)
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        found = simple_evaluate(
            model=_adapter(lm, source.vocabulary, memory, self.rows),
            tasks=list(self.tasks),
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            task_manager=manager,
            log_samples=False,
            **dict.fromkeys(seeds, self.seed),
        )
        rows = [
            {
                "task": task,
                "metric": name,
                "value": float(value),
                "stderr": _number(metrics.get(f"{metric}_stderr,{kind}")),
            }
            for task, metrics in found["results"].items()
            for name, value in metrics.items()
            for metric, _, kind in [name.partition(",")]
            if kind and not metric.endswith("_stderr")
        ]
        if not rows:
            raise UserError(
                f"LmEval.tasks: {', '.join(self.tasks)} measures nothing: mend the task"
            )
        return rows

    def scalars(self, rows) -> dict[str, float]:
        """Every metric of every task."""
        return {f"{self.name}/{row['task']}/{row['metric']}": row["value"] for row in rows}

    def table(self, rows) -> str:
        """The rows as text."""
        wide = max(len(row["task"]) for row in rows)
        lines = []
        for row in rows:
            error = "" if row["stderr"] is None else f" ±{row['stderr']:.3f}"
            lines.append(f"{row['task']:<{wide}}  {row['metric']:<24} {row['value']:8.3f}{error}")
        return "\n".join(lines)

    def plot(self, rows, path: epath.Path) -> None:
        """A bar for every metric that is a share, as a PNG."""
        shares = [row for row in rows if 0 <= row["value"] <= 1]
        if not shares:
            return
        figure, axes = plots.new()
        figure.set_figheight(max(2.5, 0.8 + 0.3 * len(shares)))
        names = [f"{row['task']}: {row['metric'].partition(',')[0]}" for row in shares]
        errors = [100 * (row["stderr"] or 0) for row in shares]
        axes.barh(names, [100 * row["value"] for row in shares], xerr=errors, capsize=3)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("%")
        plots.save(figure, path)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _adapter(lm: LanguageModel, vocabulary: Any, memory: MemoryConfig, rows: int):
    """The model as the harness wants it."""
    from lm_eval.api.model import TemplateLM

    start = vocabulary.eos if vocabulary.bos is None else vocabulary.bos

    class Adapter(TemplateLM):
        eot_token_id = vocabulary.eos
        prefix_token_id = start

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            tokens = list(vocabulary.encode(string))
            return tokens if add_special_tokens is False else [start, *tokens]

        def _loglikelihood_tokens(self, requests, **kwargs):
            texts = [[*context, *continuation] for _, context, continuation in requests]
            found = []
            for scores, (_, _, continuation) in zip(_scores(texts), requests, strict=True):
                nats, correct = (x[len(x) - len(continuation) :] for x in scores)
                found.append((-float(nats.sum()), bool(correct.all())))
            return found

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            texts = [self.tok_encode(request.args[0]) for request in requests]
            return [-float(nats.sum()) for nats, _ in _scores(texts)]

        def generate_until(self, requests, disable_tqdm=False):
            return [text for some in _batches(requests, rows) for text in self._write(some)]

        def _write(self, requests):
            prompts = [self.tok_encode(request.args[0]) for request in requests]
            wanted = [request.args[1] for request in requests]
            longest = [each.get("max_gen_toks", DEFAULT_NEW_TOKENS) for each in wanted]
            temperatures = {each.get("temperature", 0) or 0 for each in wanted}
            if len(temperatures) > 1:
                return [text for request in requests for text in self._write([request])]
            written = lm.generate(
                prompts,
                max(longest),
                temperature=temperatures.pop(),
                stop=vocabulary.ends,
                memory=memory,
                last_context_length=last_context(lm.config, max(longest)),
            )
            tokens = (new[:most] for new, most in zip(written, longest, strict=True))
            texts = map(vocabulary.decode, tokens)
            return [_until(text, each) for text, each in zip(texts, wanted, strict=True)]

    def _scores(texts: Sequence[list[int]]):
        """(nats, correct) of every token but the first of each text, in order."""
        found: list[Any] = [None] * len(texts)
        last = last_context(lm.config)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for _, alike in itertools.groupby(by_length, key=lambda i: len(texts[i])):
            for some in _batches(list(alike), rows):
                texts_now = [texts[i] for i in some]
                scores = lm.score(texts_now, memory=memory, last_context_length=last)
                for i, nats, correct in zip(some, *scores, strict=True):
                    found[i] = (nats, correct)
        return found

    return Adapter()


def _batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _until(text: str, wanted: dict[str, Any]) -> str:
    """Up to the first of the strings that a task ends answers with."""
    stops = wanted.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
