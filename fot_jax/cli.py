"""The `fot` command: flags, gin, one call into a verb. The only importer of gin."""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import ctypes
import difflib
import functools
import inspect
import logging
import os
import re
import sys
import tokenize
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fot_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0; 2 for bad input; 143 after SIGTERM."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"fot: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fot", description="Train and use Focused Transformers: language models with memory."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train from experiment files, or resume a workdir")
    _experiment_arguments(train)
    train.add_argument("--workdir", help="default: workdirs/NAME of the first experiment file")
    train.add_argument(
        "--dry_run", action="store_true", help="trace one step, print what would run, write nothing"
    )
    train.set_defaults(run=_train)

    evaluate = verbs.add_parser("evaluate", help="run an experiment's evaluations on a checkpoint")
    _experiment_arguments(evaluate)
    evaluate.add_argument("--checkpoint", required=True, help="a workdir, or a step inside it")
    evaluate.add_argument("--output", help="JSON file for the rows; plots go beside it")
    evaluate.set_defaults(run=_evaluate)

    cache = verbs.add_parser(
        "cache", help="tokenize an experiment's corpora once, for Text.cache_dir"
    )
    _experiment_arguments(cache)
    cache.add_argument("--output", required=True, help="directory for SeqIO's offline caches")
    cache.set_defaults(run=_cache)

    bench = verbs.add_parser("bench", help="measure speed as a ratio to the machine's own rates")
    bench.add_argument("name", choices=["train"], help="what to measure")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    bench.set_defaults(run=_bench)
    return parser


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", nargs="+", help="gin files; later ones override earlier ones")
    parser.add_argument(
        "--gin",
        action="append",
        default=[],
        metavar='"NAME = VALUE"',
        help="one binding; repeatable",
    )


# --- Verbs ---------------------------------------------------------------------------------------


def _train(args) -> int:
    _keep_freed_memory()
    load_experiment(args.experiment, args.gin)
    import gin

    name = Path(args.experiment[0]).stem
    if name == "config":  # fot train WORKDIR/config.gin
        name = Path(args.experiment[0]).resolve().parent.name
    with _gin_errors():
        done = gin.get_configurable("train")(
            workdir=args.workdir or str(Path("workdirs") / name),
            config_text=gin.operative_config_str,
            dry_run=args.dry_run,
        )
    return 0 if done else 143


def _evaluate(args) -> int:
    _keep_freed_memory()
    load_experiment(args.experiment, args.gin)
    import gin

    _evaluates_what_training_would(gin)
    with _gin_errors():
        gin.get_configurable("evaluate")(checkpoint=args.checkpoint, output=args.output)
    return 0


def _evaluates_what_training_would(gin) -> None:
    """Experiments say what is evaluated in train.evaluation and Data.source."""
    for ours, of_training in (("evaluation", "train.evaluation"), ("source", "Data.source")):
        with contextlib.suppress(ValueError):  # not bound: then it must be for evaluate
            value = gin.query_parameter(of_training)
            try:
                gin.query_parameter(f"evaluate.{ours}")
            except ValueError:
                gin.bind_parameter(f"evaluate.{ours}", value)


def _cache(args) -> int:
    load_experiment(args.experiment, args.gin)
    import gin

    from fot_jax.data import tasks

    with _gin_errors():
        tasks.cache(gin.get_configurable("Text")(), args.output)
    return 0


def _bench(args) -> int:
    _keep_freed_memory()
    from fot_jax import bench

    bench.train(as_json=args.json)
    return 0


def _keep_freed_memory() -> None:
    """Stops glibc from giving freed blocks back to the kernel between steps.

    A training step on the CPU frees and takes back hundreds of megabytes; having the kernel map and
    zero them again took a third of its time. Must come before other libraries start threads.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_arena_max, 1)  # one heap for all threads,
        mallopt(m_mmap_max, 0)  # also for large blocks,
        mallopt(m_trim_threshold, -1)  # of which nothing is given back


# --- gin -----------------------------------------------------------------------------------------


def load_experiment(files: list[str], bindings: list[str]) -> None:
    """Registers what experiment files may name, then parses files and bindings, in order.

    Raises:
      UserError: a file that is not there, gin that does not parse, a name nobody knows.
    """
    import gin

    gin.clear_config()
    _register(gin)
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"no experiment file {file}: give the path of a .gin file")
        gin.add_config_file_search_path(os.path.dirname(os.path.abspath(file)))
    logging.disable(logging.ERROR)  # gin logs every place where it looks for an include in vain
    try:
        for file in files:
            with _gin_errors(place=file):
                gin.parse_config_file(os.path.abspath(file))
        for binding in bindings:
            with _gin_errors(place=f"--gin {binding!r}"):
                gin.parse_config(binding)
    finally:
        logging.disable(logging.NOTSET)


def _register(gin) -> None:
    from fot_jax import evaluate, train
    from fot_jax.data import synthetic, tasks
    from fot_jax.evals import perplexity, sample
    from fot_jax.model import crossbatch, sizes, transformer
    from fot_jax.training import optim, partitioning, step

    names = [
        *(train.train, train.Data, train.Compute, train.Checkpoints),
        *(evaluate.evaluate, evaluate.Evaluation),
        *(perplexity.PerplexityByContext, sample.Sample),
        *(crossbatch.NoCrossbatch, crossbatch.PreviousContext),
        *(crossbatch.Packed, crossbatch.PackedTable),
        *(step.SwitchAtStep, step.SwitchAtAccuracy, step.DrawnEachStep),
        *(optim.adamw, optim.adafactor),
        *(optim.constant_rate, optim.inverse_square_root, optim.cosine),
        partitioning.MeshShape,
        *(transformer.ModelConfig, transformer.RopeScaling),
        *sizes.NAMED,
        *tasks.CONFIGURABLE,
        *synthetic.CONFIGURABLE,
    ]
    for name in names:
        if f"fot_jax.{name.__name__}" not in gin.config._REGISTRY:
            gin.external_configurable(_checked(name), name.__name__, module="fot_jax")


@contextlib.contextmanager
def _gin_errors(place: str | None = None):
    """Turns gin's errors about an experiment file, or what else `place` names, into one line."""
    try:
        yield
    except Exception as error:
        # gin raises a copy of an error, with lines of its own ("In call to configurable ...").
        while type(error) is not UserError and isinstance(error.__context__, UserError):
            error = error.__context__
        if isinstance(error, UserError):
            raise error from None
        line = _gin_message(error, place)
        if line is None:
            raise
        raise UserError(line) from None


def _gin_message(error: Exception, file: str | None) -> str | None:
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    where = re.search(r'In file "([^"]+)", line (\d+)', text)
    place = f" ({os.path.relpath(where[1])}:{where[2]})" if where else f" ({file})" if file else ""
    unknown = re.search(r"No configurable matching (?:reference )?'@?(?:.*/)?([^'()]+)", text)
    if unknown:
        return f"unknown name {unknown[1]!r}{place}{_nearest(unknown[1], _known_names())}"
    parameter = re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", text)
    if parameter:
        near = _nearest(parameter[2], _parameters_of(parameter[1]))
        return f"{parameter[1]} has no parameter {parameter[2]!r}{place}{near}"
    macro = re.search(r"In call to configurable 'macro' .* in scope '([^']+)'", text)
    if macro:
        return f"%{macro[1]} has no value: set {macro[1]} = ... in the experiment file"
    missing = re.search(r"(\w+)(?:\.__init__)?\(\) missing .* arguments?: '(\w+)'", first)
    if missing:
        return f"{missing[1]} needs {missing[2]}: set {missing[1]}.{missing[2]} = ..."
    if isinstance(error, SyntaxError):
        at = f"{os.path.relpath(error.filename)}:{error.lineno}" if error.filename else file
        return f"{at}: {error.msg.rstrip('.')}: a line is NAME = VALUE, or include 'FILE.gin'"
    if isinstance(error, tokenize.TokenError):
        return f"{file}: a bracket or quote is not closed up to the end ({error.args[0]})"
    if isinstance(error, OSError) and "Unable to open file" in text:
        name = re.search(r"Unable to open file: (.*)\. Searched", text)[1]
        return f"no file {name} to include{place}: paths are relative to the experiment file"
    return None


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ": see the files in experiments/"


def _known_names() -> list[str]:
    import gin

    return [selector.split(".")[-1] for selector, _ in gin.config._REGISTRY.items()]


def _parameters_of(name: str) -> list[str]:
    import gin

    wrapped = gin.config._REGISTRY.get_match(name).wrapped
    return list(inspect.signature(wrapped).parameters)


# --- Values --------------------------------------------------------------------------------------


def _checked(thing: Callable) -> Callable:
    """The same, but arguments that do not fit the annotations are a UserError that names them."""
    signature = inspect.signature(thing)
    hints = typing.get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)

    @functools.wraps(thing)
    def call(*args, **kwargs):
        import gin

        for parameter, value in signature.bind_partial(*args, **kwargs).arguments.items():
            name = f"{thing.__name__}.{parameter}"
            if value is gin.REQUIRED:
                raise UserError(f"{name} is not set: add --gin '{name} = ...', or set it in a file")
            if parameter in hints and not _fits(value, hints[parameter]):
                shown = f"@{value.__name__}" if inspect.isfunction(value) else repr(value)
                raise UserError(f"{name} = {shown}: give {_wanted(hints[parameter])}")
        return thing(*args, **kwargs)

    call.__signature__ = signature
    return call


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value (number, text, tuple) may be meant by a type; others always may."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if hint in (int, float):
        number = int if hint is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    if hint in (str, bool, type(None)):
        return isinstance(value, hint)
    if kind in (tuple, collections.abc.Sequence):
        if not isinstance(value, (tuple, list)):
            return False
        if kind is tuple and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return all(_fits(each, inner[0]) for each in value)
    if kind is collections.abc.Callable:
        return callable(value)
    plain = (int, float, str, tuple, list, dict, type(None), types.FunctionType)  # @Name is one
    return hint is Any or not isinstance(value, plain)


def _wanted(hint: Any) -> str:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_wanted, inner)))
    if kind is tuple and inner[-1] is not Ellipsis:
        return f"({', '.join(map(_wanted, inner))})"
    if kind in (tuple, collections.abc.Sequence):
        return f"a tuple, each of it {_wanted(inner[0])}"
    names = {int: "a whole number", float: "a number", str: 'a text in "quotes"'}
    names |= {bool: "True or False", type(None): "None"}
    if hint in names:
        return names[hint]
    return "a function" if kind is collections.abc.Callable else f"a {hint.__name__} as @Name()"
