"""`python experiments/reproduce FIGURE`: from nothing to a figure of the paper.

Trains what the figure needs (`fot train`, which goes on where it was stopped), evaluates
(`fot evaluate`), draws, prints ours beside the paper's. What is done already is not done again.
figures.py says what there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from figure import Figure, Run
from figures import FIGURES
from record import Record, read_object

from fot_jax.common.atomic import write_json
from fot_jax.evals.provenance import command_and_code

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Makes one figure; the exit code is that of the first command that fails."""
    args = _parser().parse_args(argv)
    made = command_and_code()  # now: the commit may be another one when all is done
    figure = FIGURES[args.figure]
    runs = [
        dataclasses.replace(run, bindings=(*run.bindings, *args.gin))
        for seed in args.seeds
        for run in _chosen(figure.runs(seed), args.only)
    ]
    workdirs = Path(args.workdirs) / figure.family
    commands = [command for run in runs for command in _commands(run, workdirs)]
    if args.dry_run:
        print("\n".join(map(shlex.join, commands)))
        return 0
    if not any(run.model for run in runs):
        sys.exit(f"--only {','.join(args.only)}: others start from it, there is nothing to draw")
    results = Path(args.results)
    partial = results / f"{args.figure}.json.partial"
    try:
        results.mkdir(parents=True, exist_ok=True)
        partial.write_text("")
        partial.unlink()
    except OSError as error:
        sys.exit(f"--results {results}: cannot be written ({error.strerror}): choose another")
    records = {run.name: Record.of(run, workdirs / run.name) for run in runs}
    for run in runs:
        if code := _carry_out(run, records[run.name], workdirs):
            return code
    _report(args.figure, figure, runs, records, workdirs, results, made)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python experiments/reproduce", description=__doc__)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument(
        "--seeds", type=_numbers, default=(0,), metavar="0,1,2", help="default: 0 alone"
    )
    parser.add_argument(
        "--gin",
        action="append",
        default=[],
        metavar="'NAME = VALUE'",
        help="for every run: what its experiment file leaves to you, say",
    )
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        metavar="fot,d1",
        help="of the figure's runs, by their names in --dry_run, and what they start from",
    )
    parser.add_argument(
        "--workdirs",
        type=_local,
        default="workdirs/reproduce",
        metavar="DIR",
        help="of this machine",
    )
    parser.add_argument(
        "--results",
        type=_local,
        default=str(HERE / "results"),
        metavar="DIR",
        help="for the JSON and the PNG",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run none")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give seeds, 0,1,2") from error


def _local(path: str) -> str:
    if "://" in path:
        raise argparse.ArgumentTypeError(
            f"{path!r}: give a directory of this machine; for a pod, --dry_run prints the commands"
        )
    return path


def _chosen(runs: list[Run], only: list[str] | None) -> list[Run]:
    """Those of some names, which stand before the seed, and those that they start from."""
    if only is None:
        return runs
    by_name = {run.name.rsplit("_", 1)[0]: run for run in runs}
    if unknown := [name for name in only if name not in by_name]:
        sys.exit(f"--only {','.join(only)}: no run {unknown[0]}: there is {', '.join(by_name)}")
    wanted = [by_name[name] for name in only]
    for run in reversed(runs):  # each comes before those that start from it
        if any(run.name == other.start for other in wanted):
            wanted.append(run)
    return [run for run in runs if run in wanted]


# --- Commands ------------------------------------------------------------------------------------


def _commands(run: Run, workdirs: Path) -> list[list[str]]:
    """Of `fot`: training, and evaluation where there is one."""
    files = [os.path.relpath(HERE / file) for file in run.files]
    bindings = list(run.bindings)
    if run.start is not None:
        bindings.append(f"train.initialize_from = {json.dumps(str(workdirs / run.start))}")
    gin = [word for binding in bindings for word in ("--gin", binding)]
    workdir = str(workdirs / run.name)
    no_evals = ["--gin", "Evaluation.evals = ()"]
    train = ["fot", "train", *files, "--workdir", workdir, *gin, *no_evals]
    output = str(_result(run, workdirs))
    evaluate = ["fot", "evaluate", *files, "--checkpoint", workdir, "--output", output, *gin]
    return [train, evaluate] if run.model else [train]


def _result(run: Run, workdirs: Path) -> Path:
    return workdirs / run.name / "results.json"


def _carry_out(run: Run, record: Record, workdirs: Path) -> int:
    """Runs what has not been done; the exit code."""
    if not _result(run, workdirs).exists() and "evaluate" in record.done:
        record.done.remove("evaluate")
    for command in _commands(run, workdirs):
        _, verb, *_ = command
        if verb not in record.done:
            print(f"\n{run.name}: {shlex.join(command)}", flush=True)
            if code := record.carry_out(verb, command[1:]):
                return code
    return 0


# --- Report --------------------------------------------------------------------------------------


def _report(
    name: str,
    figure: Figure,
    runs: list[Run],
    records: dict[str, Record],
    workdirs: Path,
    results: Path,
    made: dict[str, str],
) -> None:
    """Prints the table, and writes it with all numbers to NAME.json, and NAME.png."""
    found: dict[str, list] = {}
    for run in runs:
        if run.model:
            fields = {figure.evaluation: list, "made": dict}
            file = _result(run, workdirs)
            result = read_object(file, "to evaluate again, remove it", **fields)
            found.setdefault(run.model, []).append(result)
    of_runs = [each for of_model in found.values() for each in of_model]
    rows = figure.rows(found)
    table = figure.table(rows)
    print(f"\n{figure.title}\n\n{table}\n\nThe paper: {figure.paper}")
    seconds = {run.name: round(records[run.name].seconds) for run in runs}
    content = {
        "figure": figure.title,
        "paper": figure.paper,
        "made": made,
        "evaluations": _different(
            {name: each["made"][name] for name in ("commit", "jax", "device")} for each in of_runs
        ),
        "commands": [shlex.join(each) for run in runs for each in _commands(run, workdirs)],
        "seconds": seconds,
        "seconds in all": sum(seconds.values()),
        "rows": rows,
    }
    figure.draw(rows, results / f"{name}.png")
    write_json(results / f"{name}.json", content)


def _different(values: Iterable) -> list:
    """Each value once, in order."""
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


if __name__ == "__main__":
    sys.exit(main())
