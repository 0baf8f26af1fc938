"""Tasks of EleutherAI's lm-evaluation-harness, on a model with memory (paper §5, short tasks)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from fot_jax.common.configurable import configurable
from fot_jax.common.errors import NotHere, UserError, check_range
from fot_jax.data.documents import DocumentSource
from fot_jax.evals import plots, ruler
from fot_jax.evals.harness_adapter import adapter
from fot_jax.hugging_face import tokenizers
from fot_jax.inference.language_model import LanguageModel
from fot_jax.inference.state import all_of_a_text, check_texts
from fot_jax.model.config import ModelConfig
from fot_jax.model.lookup import Dense, Lookup

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


@configurable
@dataclasses.dataclass(frozen=True)
class LmEval:
    """Runs tasks of the harness and reports its metrics.

    Attributes:
      tasks: names, as `lm-eval ls tasks` prints them, or of those in `include_path`.
      include_path: a directory with tasks of one's own (YAML).
      num_fewshot: demonstrations; None: as a task says.
      limit: the first so many questions of each task, and length; None: all.
      lengths: tokens of question and answer, of tasks that make questions of any length: RULER's.
        None: of tasks that do not.
      apply_chat_template, fewshot_as_multiturn, system_instruction: questions as turns of a chat,
        written as the checkpoint's own template says; demonstrations as turns of their own; a first
        turn of the system. As the harness's options.
      rows: so many texts are read side by side.
      lookup, storage: of memory, as MemoryConfig.
      seed: of draws, the harness's (which demonstrations, say) and the model's.
      name: of the plot, and in results.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    lengths: tuple[int, ...] | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
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
        if self.lengths == ():
            raise UserError("LmEval.lengths = (): give one length or more, or None")
        for length in self.lengths or ():
            check_range("LmEval", 1, 2**30, whole=True, lengths=length)
        check_texts("LmEval", self.rows, self.storage, self.lookup)

    def check(self, model: ModelConfig, source: DocumentSource) -> None:
        """Raises UserError, whatever the model, where there is no harness, or it knows no task."""
        self._check_installed()
        # As text, in a second: the harness reads them as YAML in half a minute, and `run` asks it.
        names = "|".join(map(re.escape, self.tasks))
        pattern, left = re.compile(rf"(?<![\w.-])(?:{names})(?![\w.-])".encode()), {*self.tasks}
        places = [] if self.include_path is None else [self.include_path]
        places += importlib.util.find_spec("lm_eval").submodule_search_locations
        for file in itertools.chain(*(Path(place).glob("**/*.yaml") for place in places)):
            if not left:
                return
            left -= {name.decode() for name in pattern.findall(file.read_bytes())}
        self._check_known(left)

    def _check_installed(self) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise NotHere("LmEval needs the harness: pip install -e '.[lm_eval]'")
        if self.lengths and importlib.util.find_spec("wonderwords") is None:
            raise NotHere("LmEval.lengths needs wonderwords: pip install -e '.[lm_eval]'")
        if self.include_path is not None and not os.path.isdir(self.include_path):
            raise NotHere(
                f"LmEval.include_path = {self.include_path!r}: no such directory: give one with "
                "the YAML files of tasks"
            )

    def run(self, lm: LanguageModel, source: DocumentSource) -> list[dict[str, Any]]:
        """One row a task, length and metric: value, standard error where there is one.

        The source is not used.

        Raises:
          UserError: the harness is not installed, or knows no such task; or a task asks for what
            cannot be had of this model, or here.
        """
        self._check_installed()
        with self._templates(lm) as templates, tempfile.TemporaryDirectory() as directory:
            metadata: dict[str, Any] = {}
            if self.lengths:
                tokenizers.write(lm.vocabulary, epath.Path(directory))
                metadata["tokenizer"] = directory
            manager = self._manager(metadata)
            for length in self.lengths or ():
                encode = functools.partial(lm.encode, continues=True)
                ruler.check(_tasks_in(self.tasks, manager.task_index), length, encode)
            memory = all_of_a_text(lm.config, self.storage, self.lookup)
            model = adapter(
                lm.for_memory(memory),
                memory,
                rows=self.rows,
                seed=self.seed,
                generation_config=_generation_config(lm),
                templates=templates,
            )
            rows = []
            for length in self.lengths or (None,):
                if length is not None:
                    metadata["max_seq_lengths"] = [length]  # which the manager gives to tasks
                rows += self._rows(model, manager, length)
        return rows

    def _manager(self, metadata: dict[str, Any]) -> Any:
        """What loads tasks, and says what is wrong with them.

        Raises:
          UserError: there is no such task.
        """
        from lm_eval.api.metrics import mean
        from lm_eval.tasks import TaskManager

        evaluation = self

        class Manager(TaskManager):
            def load(self, task_list):
                try:
                    loaded = super().load(task_list)
                except Exception as error:  # from its YAML, templates, functions and data
                    raise evaluation._cannot_load(error) from error
                evaluation._check_tasks(loaded["tasks"])
                for task in loaded["tasks"].values() if evaluation.lengths else ():
                    # The same number as by RULER's own way, of which the harness has no error.
                    task.aggregation().update({str(n): mean for n in evaluation.lengths})
                return loaded

        manager = Manager(include_path=self.include_path, metadata=metadata)
        self._check_known({*self.tasks}.difference(manager.all_tasks))
        return manager

    def _check_known(self, unknown: Set[str]) -> None:
        """Raises UserError where there are tasks that the harness does not know."""
        if unknown:
            raise UserError(
                f"LmEval.tasks: the harness knows no {', '.join(sorted(unknown))}: see lm-eval ls "
                "tasks, or set LmEval.include_path to a directory with it"
            )

    def _rows(self, model: Any, manager: Any, length: int | None) -> list[dict[str, Any]]:
        """The rows of one length, of question and answer."""
        from lm_eval import simple_evaluate

        _begin_draws_anew()
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        found = simple_evaluate(
            model=model,
            tasks=list(self.tasks),
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.fewshot_as_multiturn,
            system_instruction=self.system_instruction,
            task_manager=manager,
            log_samples=False,
            **dict.fromkeys(seeds, self.seed),
        )
        rows = []
        for task, metrics in found["results"].items():
            for name, value in metrics.items():
                metric, _, kind = name.partition(",")
                if not kind or metric.endswith("_stderr"):
                    continue
                row = {"task": task}
                if length is not None:
                    if metric.isdecimal() and int(metric) != length:
                        continue  # RULER's tasks have a metric for every length
                    row["length"] = length
                    name = f"{ruler.METRIC},{kind}" if metric.isdecimal() else name
                error = _number(metrics.get(f"{metric}_stderr,{kind}"))
                rows.append({**row, "metric": name, "value": float(value), "stderr": error})
        if not rows:
            raise UserError(
                f"LmEval.tasks: {', '.join(self.tasks)} measures nothing: correct the task"
            )
        return rows

    def _cannot_load(self, error: Exception) -> UserError:
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        advice = "correct the task, or see to its data"
        if self.lengths is None and "tokenizer" in what:  # what RULER's tasks are missing
            advice = "set LmEval.lengths"
        return UserError(
            f"LmEval.tasks: the harness cannot load {', '.join(self.tasks)} ({what}): {advice}"
        )

    def _check_tasks(self, tasks: dict[str, Any]) -> None:
        """Raises UserError for those that cannot be asked."""
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(
                    f"LmEval.tasks: {name} runs code that the model writes: leave it out"
                )
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"LmEval.tasks: {name} asks about images or sounds: leave it out")
            if self.lengths and task.get_config("custom_dataset") is None:
                raise UserError(
                    f"LmEval.lengths: {name} has questions of its own length: leave lengths out, "
                    "in an LmEval of its own"
                )

    @contextlib.contextmanager
    def _templates(self, lm: LanguageModel) -> Iterator[Any]:
        """The tokenizer that has the chat template, if one is wanted.

        Raises:
          UserError: the checkpoint has none.
        """
        if not self.apply_chat_template:
            yield None
            return
        import transformers

        with tempfile.TemporaryDirectory() as directory:
            if lm.files is not None:
                tokenizers.copy_files(lm.files, directory)
            tokenizer = None
            if os.listdir(directory):
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    directory, local_files_only=True, trust_remote_code=False
                )
            if tokenizer is None or not tokenizer.chat_template:
                raise UserError(
                    "LmEval.apply_chat_template: the checkpoint has no chat template: put "
                    "chat_template.jinja beside its tokenizer, or leave this out"
                )
            yield tokenizer

    def scalars(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Every metric of every task, and length."""
        return {
            "/".join(map(str, (self.name, row["task"], row["metric"], *_length(row)))): row["value"]
            for row in rows
        }

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The rows as text."""
        wide = max(len(row["task"]) for row in rows)
        lines = []
        for row in rows:
            length = "".join(f" {length:>9,d}" for length in _length(row))
            error = "" if row["stderr"] is None else f" ±{row['stderr']:.3f}"
            value = f"{row['metric']:<24} {row['value']:8.3f}{error}"
            lines.append(f"{row['task']:<{wide}}{length}  {value}")
        return "\n".join(lines)

    def plot(self, rows: list[dict[str, Any]], path: epath.Path) -> None:
        """A bar for every metric that is a share, or a curve by length, as a PNG."""
        shares = [r for r in rows if 0 <= r["value"] <= 1 and _metric(r) != "bits_per_byte"]
        if not shares:
            return
        figure, axes = plots.new()
        if self.lengths:
            metrics = {_metric(row) for row in shares}
            alone = len(metrics) == 1
            of_curve: dict[str, list[dict[str, Any]]] = {}
            for row in sorted(shares, key=lambda row: row["length"]):
                of_curve.setdefault(row["task"] if alone else _curve(row), []).append(row)
            for name, points in of_curve.items():
                lengths = [row["length"] for row in points]
                values, errors = _percent(points)
                axes.errorbar(lengths, values, yerr=errors, fmt="o-", capsize=4, label=name)
            plots.sizes_along(axes, sorted(set(self.lengths)))
            axes.set_ylim(-3, 103)
            axes.set_xlabel("question and answer (tokens)")
            axes.set_ylabel(f"{metrics.pop()} (%)" if alone else "%")
            axes.legend()
        else:
            figure.set_figheight(max(2.5, 0.8 + 0.3 * len(shares)))
            values, errors = _percent(shares)
            axes.barh([_curve(row) for row in shares], values, xerr=errors, capsize=3)
            axes.invert_yaxis()
            axes.set_xlim(0, 100)
            axes.set_xlabel("%")
        plots.save(figure, path)


def _begin_draws_anew() -> None:
    """Has the harness load code of tasks anew that draws from a generator of its own.

    It keeps what it loads, and ruler_cwe, say, would go on drawing where it was left: its questions
    would depend on what the process asked before.
    """
    for name, module in list(sys.modules.items()):
        content = getattr(module, "__dict__", {})
        of_a_task = "__mtime__" in content  # the mark of the harness's loader
        if of_a_task and any(isinstance(x, _GENERATORS) for x in content.values()):
            del sys.modules[name]


def _length(row: dict[str, Any]) -> tuple[int, ...]:
    return (row["length"],) if "length" in row else ()


def _curve(row: dict[str, Any]) -> str:
    return f"{row['task']}: {_metric(row)}"


def _metric(row: dict[str, Any]) -> str:
    """With how answers were found in what was written, where a task has several ways."""
    name, _, way = row["metric"].partition(",")
    return name if way in ("", "none") else f"{name}, {way}"


def _tasks_in(names: Iterable[str], index: Mapping[str, Any]) -> set[str]:
    """The tasks themselves, of names that may be of tags and groups in the harness's index."""
    found = set()
    for name in names:
        entry = index.get(name)
        within = (entry.cfg or {}).get("task") if entry and entry.kind.name == "GROUP" else None
        if entry and entry.kind.name == "TAG":
            found |= _tasks_in(entry.tags, index)
        elif isinstance(within, list):
            each = (x if isinstance(x, str) else x.get("task") or x.get("group") for x in within)
            found |= _tasks_in((x for x in each if isinstance(x, str)), index)
        else:
            found.add(name)
    return found


def _percent(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Values, and their standard errors."""
    errors = (math.nan if row["stderr"] is None else row["stderr"] for row in rows)
    return [100 * row["value"] for row in rows], [100 * error for error in errors]


def _generation_config(lm: LanguageModel) -> dict[str, Any]:
    """The settings that came with a model, if it has some.

    Raises:
      UserError: they cannot be read.
    """
    path = None if lm.files is None else lm.files / "generation_config.json"
    if path is None or not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text())
        if isinstance(settings, dict):
            return settings
    except ValueError:
        pass
    raise UserError(f"{path}: damaged, no JSON object: restore it from a copy")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
