"""The `fot` command: flags, gin, one call into a verb. The only importer of gin."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import logging
import os
import re
import sys
from pathlib import Path

from fot_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0; 2 for bad input; 143 after SIGTERM."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"fot: error: {error}", file=sys.stderr)
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

    with _gin_errors():
        gin.get_configurable("evaluate")(checkpoint=args.checkpoint, output=args.output)
    return 0


def _bench(args) -> int:
    _keep_freed_memory()
    from fot_jax import bench

    bench.train(as_json=args.json)
    return 0


def _keep_freed_memory() -> None:
    """Stops glibc from giving freed blocks back to the kernel between steps.

    A training step on the CPU frees and takes back hundreds of megabytes; having the kernel zero
    them again took a sixth of its time. Must come before other libraries start threads.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_arena_max, 1)
        mallopt(m_mmap_threshold, 2**31 - 1)
        mallopt(m_trim_threshold, 2**31 - 1)


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
    paths = [os.path.abspath(file) for file in files]
    logging.disable(logging.ERROR)  # gin logs every place where it looks for an include in vain
    try:
        with _gin_errors():
            gin.parse_config_files_and_bindings(paths, bindings, finalize_config=False)
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
            gin.external_configurable(name, name.__name__, module="fot_jax")


@contextlib.contextmanager
def _gin_errors():
    """Turns gin's errors about an experiment file into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # gin and what it calls add their own lines ("In call to configurable ...") to a message.
        if isinstance(error.__context__, UserError):
            raise error.__context__ from None
        line = _gin_message(error)
        if line is None:
            raise
        raise UserError(line) from None


def _gin_message(error: Exception) -> str | None:
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    where = re.search(r'In file "([^"]+)", line (\d+)', text)
    place = f" ({os.path.relpath(where[1])}:{where[2]})" if where else ""
    unknown = re.search(r"No configurable matching '([^']+)'", text)
    if unknown:
        return f"unknown name {unknown[1]!r}{place}{_nearest(unknown[1], _known_names())}"
    parameter = re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", text)
    if parameter:
        near = _nearest(parameter[2], _parameters_of(parameter[1]))
        return f"{parameter[1]} has no parameter {parameter[2]!r}{place}{near}"
    required = re.search(r"Required bindings for `([^`]+)` not provided in config: (.+)", text)
    if required:
        missing = required[2].replace("'", "").strip("[]. ")
        return f"{required[1]} needs {missing}: set {required[1]}.{missing.split(',')[0]} = ..."
    if isinstance(error, SyntaxError):
        return f"{error.filename and os.path.relpath(error.filename)}:{error.lineno}: {error.msg}"
    if isinstance(error, OSError) and "Unable to open file" in text:
        return f"{first}: an include is relative to the experiment file or the current directory"
    if isinstance(error, TypeError) and "missing" in text and "argument" in text:
        return f"{first}{place}: set it in the experiment file"
    return None


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ": see the files in experiments/"


def _known_names() -> list[str]:
    import gin

    return [selector.split(".")[-1] for selector in gin.config._REGISTRY]


def _parameters_of(name: str) -> list[str]:
    import inspect

    import gin

    wrapped = gin.config._REGISTRY.get_match(name).wrapped
    return list(inspect.signature(wrapped).parameters)
