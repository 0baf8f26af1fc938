"""The `fot` command: flags, experiment files, one call into a verb."""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import errno
import importlib
import importlib.metadata
import itertools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from fot_jax import gin_files
from fot_jax.common.errors import UserError
from fot_jax.common.stopping import stopping
from fot_jax.training import cluster

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_GOOGLE = "0x1ae0"  # as a vendor of PCI devices
_CHECKPOINT = "a workdir, a step inside it, or a Hugging Face directory"


def main(argv: list[str] | None = None) -> int:
    """Runs one verb.

    Returns the exit code: 0; 1 where checkpoints differ or nothing fits; 2 for bad input; 130 after
    ^C; 143 after SIGTERM; 141 where nobody reads what it prints any more.
    """
    args = _parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model writes what it likes, and so do tables
    try:
        with _on(signal.SIGINT, _interrupted):
            return args.run(args)
    except UserError as error:
        line = str(error)
    except OSError as error:
        if not error.errno:
            raise
        if error.errno == errno.EPIPE:  # whoever read what is printed has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        line = f"{error.filename or 'writing'}: {error.strerror}"
        if not str(error.filename).startswith("gs://"):  # errors of buckets say what to do
            line += ": fix that, or choose another place"
    except Exception as error:
        if not _is_storage_error(error):
            raise
        what = str(error).split("\n  In call to")[0]  # gin says where it was called from
        line = f"{what}: log in (gcloud auth application-default login), or correct the path"
    print(f"fot: error: {' '.join(line.split())}", file=sys.stderr)
    return 2


def _is_storage_error(error: Exception) -> bool:
    """Whether a library that accesses buckets itself failed to read or write there."""
    module = type(error).__module__
    return module.startswith(("google.auth.", "google.api_core.")) or (
        module.startswith("tensorflow.") and "gs://" in str(error)
    )


def run() -> None:
    """The process of `fot`. A failure ends it at once.

    The interpreter would first wait for threads, and those of Orbax never end once a save has
    failed; JAX would wait for the other processes of the run, which are waiting for this one.
    """
    _use_huge_pages()
    _use_cpus_where_there_are_no_tpus()
    try:
        code = main()
    except Exception as error:
        # Gloo's error in the others when a process has ended, which has said why.
        if gone := re.search(r"Gloo [\w-]+ failed: .*?([^]:]*)$", str(error).partition("\n")[0]):
            line = f"fot: error: another process of this run is gone ({gone[1].strip()})"
            print(f"{line}: see what that one said", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 1
    if code in (1, 2):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _use_huge_pages() -> None:
    """Starts the process anew where the kernel waits to be asked for huge pages (2 MB).

    NumPy asks for them, XLA does not; malloc does for everybody, if glibc is told so before the
    process starts. A training step on the CPU maps gigabytes: in pages of 4 KB that took a fifth of
    the processor time of a large one.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    with contextlib.suppress(OSError):  # no Linux, or a kernel without
        if "[madvise]" in _HUGE_PAGES.read_text() and "glibc.malloc.hugetlb" not in tunables:
            both = filter(None, (tunables, "glibc.malloc.hugetlb=1"))
            environment = {**os.environ, "GLIBC_TUNABLES": ":".join(both)}
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _use_cpus_where_there_are_no_tpus() -> None:
    """Without this, JAX would try libtpu where it is installed for `fot compile` only, and warn."""
    vendors = (path.read_text().strip() for path in Path("/sys/bus/pci/devices").glob("*/vendor"))
    others = importlib.metadata.entry_points(group="jax_plugins")  # GPUs
    if not others and _GOOGLE not in vendors:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


@contextlib.contextmanager
def _on(signum: signal.Signals, handler: Callable) -> Iterator[None]:
    before = signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, before)


def _interrupted(signum, frame) -> None:
    """Ends the process: an exception would crash XLA where it is compiling."""
    os.write(2, b"fot: interrupted\n")
    os._exit(128 + signum)


def _interrupted_saving(signum, frame) -> None:
    """The same, after what is half-written has been removed."""
    from fot_jax.common.atomic import remove_half_written

    remove_half_written()
    _interrupted(signum, frame)


@contextlib.contextmanager
def _stopped_without_remains() -> Iterator[None]:
    """A signal, or a terminal that is closed, leaves nothing half-written."""
    with contextlib.ExitStack() as stack:
        for signum in stopping():
            stack.enter_context(_on(signum, _interrupted_saving))
        yield


def _exit(signum, frame) -> None:
    """Ends the process after what is half-written has been removed."""
    sys.exit(128 + signum)


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

    compile_ = verbs.add_parser(
        "compile", help="compile an experiment for a TPU slice: does it fit?"
    )
    _experiment_arguments(compile_)
    compile_.add_argument(
        "--topology", metavar="v4-128", help="default: the experiment's Compute.topology"
    )
    compile_.add_argument(
        "--suggest", action="store_true", help="try other meshes, remat policies and microbatches"
    )
    compile_.add_argument(
        "--json", action="store_true", help="print an object; with --suggest those that fit, a list"
    )
    compile_.set_defaults(run=_compile)

    evaluate = verbs.add_parser("evaluate", help="run an experiment's evaluations on a checkpoint")
    _experiment_arguments(evaluate)
    evaluate.add_argument(
        "--checkpoint",
        required=True,
        help=_CHECKPOINT,
    )
    evaluate.add_argument("--output", help="JSON file for the rows; plots go beside it")
    evaluate.set_defaults(run=_evaluate)

    generate = verbs.add_parser("generate", help="read a prompt of any length and write on")
    generate.add_argument(
        "--checkpoint",
        required=True,
        help=_CHECKPOINT,
    )
    generate.add_argument("--prompt", metavar="TEXT")
    generate.add_argument("--prompt_file", metavar="FILE", help="UTF-8 text")
    generate.add_argument("--max_new_tokens", type=int, default=128, metavar="N")
    generate.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0: the most likely token"
    )
    generate.add_argument("--top_p", type=float, default=1.0, metavar="P")
    generate.add_argument("--seed", type=int, default=0, metavar="N")
    generate.add_argument(
        "--last_context_length", type=int, metavar="N", help="tokens left in the local window"
    )
    generate.add_argument(
        "--memory_size", type=int, metavar="N", help="keep the last N tokens; default: all"
    )
    generate.add_argument(
        "--memory_dtype",
        help="float32, bfloat16, float16, int8 or int4; default: as the checkpoint, or --dtype",
    )
    generate.add_argument(
        "--k", type=int, metavar="K", help="attend to the K best keys of memory; default: all"
    )
    generate.add_argument(
        "--visited",
        type=int,
        metavar="N",
        help="with --k: score only the N keys that an index leads to; default: all",
    )
    generate.add_argument(
        "--memory_directory",
        metavar="DIR",
        help="keep memory in files of a new directory, or of one that a kill left; default: in RAM",
    )
    generate.add_argument("--memory", metavar="DIR", help="read on from a saved memory")
    generate.add_argument(
        "--save_memory", metavar="DIR", help="save the memory once the prompt is read"
    )
    generate.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    generate.add_argument("--devices", type=int, default=1, help="that memory is sharded over")
    generate.set_defaults(run=_generate)

    convert = verbs.add_parser("convert", help="checkpoints from and to PyTorch")
    kinds = convert.add_subparsers(required=True, metavar="DIRECTION")
    for name, help_, source in (
        ("from-hf", "a Hugging Face directory, or a .gguf file -> a workdir", "HF_DIR_OR_GGUF"),
        (
            "to-hf",
            "a checkpoint -> a directory for transformers",
            "CHECKPOINT",
        ),
        ("to-peft", "a checkpoint's adapters -> an adapter directory for peft", "WORKDIR"),
    ):
        direction = kinds.add_parser(name, help=help_)
        direction.add_argument("source", metavar=source)
        direction.add_argument("output", metavar="OUT_DIR", help="new, or an empty directory")
        direction.set_defaults(run=_convert, direction=name)
        if name != "to-peft":
            direction.add_argument(
                "--dtype", help="float32, float16 or bfloat16; default: as it is"
            )
        if name == "from-hf":
            direction.add_argument(
                "--memory_layers", type=_numbers, metavar="6,12,18", help="default: as config.json"
            )
            direction.add_argument(
                "--local_context",
                type=int,
                metavar="N",
                help="window of the model, in tokens; default: max_position_embeddings, or "
                "what it was before rope scaling of type llama3",
            )
    check = kinds.add_parser("check", help="compare two checkpoints, tensors and logits")
    check.add_argument("a", metavar="A")
    check.add_argument("b", metavar="B")
    check.set_defaults(run=_check)

    cache = verbs.add_parser(
        "cache", help="tokenize an experiment's corpora once, for Text.cache_dir"
    )
    _experiment_arguments(cache)
    cache.add_argument("--output", required=True, help="directory for SeqIO's offline caches")
    cache.set_defaults(run=_cache)

    bench = verbs.add_parser("bench", help="measure speed as a ratio to the machine's own rates")
    bench.add_argument(
        "name", choices=["train", "memory", "index", "pytorch", "gpu"], help="what to measure"
    )
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
    gin_files.load(args.experiment, args.gin)
    if not args.dry_run:
        cluster.join()
    import gin

    from fot_jax.training import partitioning, workdir_lock
    from fot_jax.training.experiment import Compute

    if args.workdir == "":
        raise UserError("--workdir is empty: give a directory")
    with gin_files.gin_errors():
        compute = copy.deepcopy(gin_files.value_of("train.compute"))  # evaluates @Compute()
    if isinstance(compute, Compute):
        partitioning.divide_cpu(compute.cpu_devices)
    name = Path(args.experiment[0]).stem
    if name == "config":  # fot train WORKDIR/config.gin
        name = Path(args.experiment[0]).resolve().parent.name
    workdir = args.workdir or str(Path("workdirs") / name)
    alone = contextlib.nullcontext() if args.dry_run else workdir_lock.held(workdir)
    with alone, gin_files.gin_errors():
        stopped = gin.get_configurable("train")(
            workdir=workdir,
            config_text=gin_files.settings_text,
            dry_run=args.dry_run,
        )
    if not args.dry_run:
        cluster.finish()
    return 128 + stopped if stopped else 0


def _compile(args) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")
    gin_files.load(args.experiment, args.gin)
    gin_files.without_documents()
    gin_files.copy_bindings("train", "compile_experiment")
    import gin

    with gin_files.gin_errors():
        fits = gin.get_configurable("compile_experiment")(
            topology=args.topology, suggest=args.suggest, as_json=args.json
        )
    return 0 if fits else 1


def _evaluate(args) -> int:
    _keep_freed_memory()
    gin_files.load(args.experiment, args.gin)
    cluster.join()
    import gin

    for ours, of_training in (("evaluation", "train.evaluation"), ("source", "Data.source")):
        value = gin_files.value_of(of_training)  # where experiments say it
        if value is not None and gin_files.value_of(f"evaluate.{ours}") is None:
            gin.bind_parameter(f"evaluate.{ours}", value)
    with gin_files.gin_errors(), _stopped_without_remains():
        gin.get_configurable("evaluate")(checkpoint=args.checkpoint, output=args.output)
    cluster.finish()
    return 0


def _generate(args) -> int:
    cluster.join()
    from fot_jax.inference.generate import generate
    from fot_jax.inference.state import MemoryConfig

    with _stopped_without_remains():
        generate(
            checkpoint=args.checkpoint,
            prompt=args.prompt,
            prompt_file=args.prompt_file,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            last_context_length=args.last_context_length,
            memory=args.memory,
            save_memory=args.save_memory,
            dtype=args.dtype,
            devices=args.devices,
            config=MemoryConfig(
                size=args.memory_size,
                storage=args.memory_dtype,
                lookup=_lookup(args.k, args.visited),
                directory=args.memory_directory,
            ),
        )
    cluster.finish()
    return 0


def _lookup(k: int | None, visited: int | None):
    from fot_jax.model.lookup import Dense, IndexedTopK, TopK

    if visited is None:
        return Dense() if k is None else TopK(k)
    if k is None:
        raise UserError("--visited is for the best keys alone: give their number, --k, too")
    return IndexedTopK(k, visited)


def _numbers(text: str) -> tuple[int, ...]:
    """Of layers: "6,12,18"."""
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of layers, 6,12,18") from error


def _convert(args) -> int:
    from fot_jax import convert

    with _stopped_without_remains():
        if args.direction == "from-hf":
            convert.from_hugging_face(
                args.source,
                args.output,
                memory_layers=args.memory_layers,
                local_context=args.local_context,
                dtype=args.dtype,
            )
        elif args.direction == "to-hf":
            convert.to_hugging_face(args.source, args.output, dtype=args.dtype)
        else:
            convert.to_peft(args.source, args.output)
    return 0


def _check(args) -> int:
    from fot_jax import compare

    return 0 if compare.check(args.a, args.b) else 1


def _cache(args) -> int:
    gin_files.load(args.experiment, args.gin)
    import gin

    from fot_jax.checkpoints import loading
    from fot_jax.data import tasks
    from fot_jax.data.mixture import Mixture
    from fot_jax.evals.evaluate import Evaluation

    with gin_files.gin_errors():
        source = gin.get_configurable("Data")().source
        start = copy.deepcopy(gin_files.value_of("train.initialize_from"))  # evaluates %NAME
        evaluation = copy.deepcopy(gin_files.value_of("train.evaluation"))
        if start not in (None, gin.REQUIRED) and (vocabulary := loading.vocabulary_of(start)):
            source = source.with_vocabulary(vocabulary)  # as training does
        sources = [source]
        if isinstance(evaluation, Evaluation):
            sources += evaluation.own_sources()
        parts = (each.sources if isinstance(each, Mixture) else [each] for each in sources)
        texts = [part for part in itertools.chain(*parts) if isinstance(part, tasks.Text)]
        if not texts:
            raise UserError(
                f"Data.source is a {type(source).__name__}, only @Text() has a cache: give that"
            )
        corpora: dict[str | None, dict] = {}  # by Text.data_dir; each once, in however many texts
        for text in texts:
            alike = (dataclasses.replace(corpus, weight=1.0) for corpus in text.corpora)
            corpora.setdefault(text.data_dir, {}).update(dict.fromkeys(alike))
        with contextlib.ExitStack() as stack:
            for signum in stopping():
                stack.enter_context(_on(signum, _exit))
            for data_dir, several in corpora.items():
                # All are tokenized as training texts are.
                text = tasks.Text(tuple(several), source.vocabulary, data_dir=data_dir)
                tasks.cache(text, args.output)
    return 0


def _bench(args) -> int:
    if args.name == "train":
        _keep_freed_memory()
    bench = importlib.import_module(f"fot_jax.bench.{args.name}")
    getattr(bench, args.name)(as_json=args.json)
    return 0


def _keep_freed_memory() -> None:
    """Stops glibc from giving freed blocks of up to 32 MB back to the kernel.

    A step frees and takes back many of them; having the kernel map and zero them again takes a
    part of its time. Must come before other libraries start threads. Training keeps larger ones,
    too, where they are few for the machine (training/needs.py).
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # of glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_arena_max, 1)  # one heap for all threads,
        mallopt(m_trim_threshold, -1)  # of which nothing is given back,
        mallopt(m_mmap_threshold, 2**25)  # and larger blocks apart from it (it takes no more)
