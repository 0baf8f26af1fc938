"""`python -m tpu`: flags, and one call into a verb."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import signal
import sys
from collections.abc import Callable

from fot_jax.common.errors import UserError
from tpu import manifest, recover, verbs


def main(argv: list[str] | None = None) -> int:
    """Runs one verb.

    Returns the exit code: 0; 1 where a run failed; 2 for bad input, or where gcloud failed; 130
    after ^C, 143 after SIGTERM; `local` and `worker` have more.
    """
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _stopped)
    try:
        args = _parser(argv).parse_args(argv)
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        print(f"tpu: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _stopped(signum, frame) -> None:
    """Ends this process and, on the way out, what it has started."""
    sys.exit(128 + signum)


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tpu", description="Train on Cloud TPU: tpu/README.md."
    )
    verbs_ = parser.add_subparsers(required=True, metavar="VERB")

    def add(name: str, run: Callable, help_: str, *flags: Callable) -> argparse.ArgumentParser:
        verb = verbs_.add_parser(name, help=help_)
        for add_flags in flags:
            add_flags(verb)
        verb.add_argument(
            "--dry_run", action="store_true", help="print the commands that would run, run none"
        )
        verb.set_defaults(run=run)
        return verb

    add("create", verbs.create, "ask for a pod", _experiment, _pod, _tier)
    add("setup", verbs.setup, "ship the code, make environments", _experiment, _pod)
    add("run", verbs.run, "start training, detached", _experiment, _pod, _training)

    logs = add("logs", verbs.logs, "print the workers' logs", _pod)
    logs.add_argument(
        "--worker", type=_positive(int, least=0), metavar="I", help="of each slice; default: all"
    )
    logs.add_argument("--follow", action="store_true", help="go on with what comes")
    logs.add_argument(
        "--lines", type=_positive(int), default=20, metavar="N", help="from the end of each"
    )

    add("status", verbs.status, "the pod, its nodes, its workers' runs", _pod)

    again = add(
        "recover",
        recover.recover,
        "create, set up, run, watch, recreate, until done",
        _experiment,
        _pod,
        _tier,
        _training,
    )
    again.add_argument(
        "--poll", type=_positive(float), default=60.0, metavar="SECONDS", help="between looks"
    )
    again.add_argument(
        "--max_failures",
        type=_positive(int),
        default=3,
        metavar="N",
        help="failures without a new checkpoint in the bucket after which to give up",
    )

    add("delete", verbs.delete, "delete the pod: ends what it costs", _pod)

    jobs = add("manifest", manifest.manifest, "print a JobSet for GKE", _experiment, _training)
    jobs.add_argument("--name", required=True, metavar="N")
    jobs.add_argument("--image", required=True, help="container image with the repository")
    jobs.add_argument("--spot", dest="tier", action="store_const", const="spot")

    # Imported only when they are called: `worker` runs on every host, and only `local` starts
    # processes of its own.
    for name, module_name, help_ in (
        ("local", "tpu.local", "a pod made of processes"),
        ("worker", "tpu.supervisor", "watch over one process"),
    ):
        verb = verbs_.add_parser(name, help=help_)
        if argv[:1] == [name]:
            module = importlib.import_module(module_name)
            module.add_arguments(verb)
            verb.set_defaults(run=module.run)
    return parser


def _positive(kind: Callable, least: float = 1e-9) -> Callable:
    """A type for argparse: numbers from `least` on."""

    def number(text: str):
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) < math.inf:
                return value
        wanted = "above 0" if least else "from 0 on"
        raise argparse.ArgumentTypeError(f"{text!r}: give a number {wanted}")

    return number


def _experiment(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("experiment", nargs="+", help="gin files; later ones override earlier ones")
    verb.add_argument(
        "--gin",
        action="append",
        default=[],
        metavar='"NAME = VALUE"',
        help="one binding; repeatable",
    )
    verb.add_argument("--topology", metavar="T", help="v4-128; default: Compute.topology")


def _pod(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--name", required=True, metavar="N", help="of the pod, and of its runs")
    verb.add_argument("--zone", required=True, metavar="Z")
    verb.add_argument("--project", metavar="P", help="default: gcloud's")


def _tier(verb: argparse.ArgumentParser) -> None:
    tier = verb.add_mutually_exclusive_group()
    for name in ("spot", "reserved"):
        tier.add_argument(f"--{name}", dest="tier", action="store_const", const=name)


def _training(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--workdir", required=True, help="gs://BUCKET/DIRECTORY")
    verb.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an environment variable of the run; repeatable",
    )


if __name__ == "__main__":
    sys.exit(main())
