"""`fot train`: one function, from an experiment to a trained model, read from top to bottom."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict

import jax
import optax

from fot_jax.checkpoints.manager import Checkpointer
from fot_jax.common.agreement import Agreement
from fot_jax.common.configurable import configurable
from fot_jax.common.paths import check_for_orbax, path_of
from fot_jax.common.progress import said_if_slow
from fot_jax.data.lanes import Lanes
from fot_jax.data.prefetch import Prefetch
from fot_jax.evals.evaluate import Evaluation
from fot_jax.model import schemes
from fot_jax.model.config import ModelConfig
from fot_jax.model.lora import Lora
from fot_jax.training import needs, partitioning, start
from fot_jax.training.checks import (
    check_first_step,
    check_numbers,
    check_positive_mass,
    check_profile,
    check_same_documents,
    check_vocabulary,
)
from fot_jax.training.evaluations import Evaluations
from fot_jax.training.experiment import Checkpoints, Compute, Data
from fot_jax.training.metrics import Metrics, device_rate, when_ready
from fot_jax.training.profile import Profile
from fot_jax.training.program import make_program
from fot_jax.training.reports import Report, Reports
from fot_jax.training.saving import SaveRetries
from fot_jax.training.schedules import ScheduleOfD
from fot_jax.training.signals import stop_signals


@configurable(flags=("workdir", "config_text", "dry_run"))
def train(
    workdir: str,
    model: ModelConfig,
    data: Data,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    learning_rate: optax.Schedule,
    steps: int,
    scheme: schemes.Scheme = schemes.NoCrossbatch(),  # noqa: B008 (frozen)
    d: ScheduleOfD | None = None,
    compute: Compute = Compute(),  # noqa: B008
    checkpoints: Checkpoints = Checkpoints(),  # noqa: B008
    evaluation: Evaluation = Evaluation(),  # noqa: B008
    initialize_from: str | None = None,
    trainable: Sequence[str] | None = None,
    lora: Lora | None = None,
    z_loss: float = 0.0,
    seed: int = 0,
    log_every: int = 10,
    positive_mass_every: int | None = None,
    profile_steps: tuple[int, int] | None = None,
    max_skipped: int = 10,
    config_text: Callable[[], str] = str,
    dry_run: bool = False,
) -> signal.Signals | None:
    """Trains, or resumes what is in `workdir`, and evaluates at the end.

    Args:
      workdir: directory for everything a run writes (docs/training.md).
      model: shapes and function; rows are windows of model.local_context tokens.
      data: documents and lanes.
      optimizer: called with the schedule, e.g. the function `adamw`.
      learning_rate: step -> learning rate.
      steps: updates in all.
      scheme: which contexts memory layers see.
      d: schedule of what the scheme's `with_d` sets: d of PreviousContext, range of Packed; None:
        the scheme's own.
      compute, checkpoints, evaluation: see there.
      initialize_from: checkpoint, ours or Hugging Face, whose parameters a fresh run starts from.
      trainable: patterns of names of the parameters that train, all others stay as they are:
        "layers/*/attention/*", "memory_layers/*" (those of memory layers), "embedding"; None: all,
        or with `lora` none but the adapters.
      lora: adapters that train in place of the kernels they belong to.
      z_loss: weight of the squared log normaliser in the loss.
      seed: of the initial parameters.
      log_every: steps between metrics.
      positive_mass_every: steps between measurements of r_d; None: never.
      profile_steps: (first, last) step of a JAX profiler trace.
      max_skipped: updates in a row that may be skipped for not being finite.
      config_text: gives the text saved as workdir/config.gin.
      dry_run: trace one step, print what would run, write nothing.

    Returns:
      None when done; the signal that stopped it, with the last step saved.

    Raises:
      UserError: parts of the experiment that do not fit each other, bad data, or a loss or gradient
        that was not finite more than max_skipped steps in a row.
    """
    # --- Program ---------------------------------------------------------------------------------
    check_numbers(
        steps=steps, z_loss=z_loss, seed=seed, log_every=log_every, max_skipped=max_skipped
    )
    check_profile(profile_steps, steps)
    check_positive_mass(positive_mass_every, log_every, model, scheme)
    program = make_program(
        mesh=compute.mesh.make_abstract() if dry_run else compute.mesh.make(),
        model=model,
        data=data,
        optimizer=optimizer,
        learning_rate=learning_rate,
        scheme=scheme,
        d=d,
        compute=compute,
        z_loss=z_loss,
        trainable=trainable,
        lora=lora,
    )
    workdir = path_of(workdir)
    if dry_run:
        source = start.documents_if_here(data.source, workdir, initialize_from)
        check_vocabulary(source, model)
        evaluation.check(model, source, elsewhere=True)
        print(f"{program.trace()}, {steps:,} steps: nothing written")
        return None

    # --- State: the workdir's newest whole checkpoint, else initialize_from, else fresh ----------
    check_for_orbax(workdir)
    start.check_workdir(workdir)
    start.cache_compiled_programs(workdir)
    checkpointer = Checkpointer(
        workdir / "checkpoints", keep_last=checkpoints.keep_last, keep_every=checkpoints.keep_every
    )
    source = start.documents(data.source, workdir, initialize_from)
    with said_if_slow("reading the tokenizer, or documents to train one"):
        check_vocabulary(source, model)
    evaluation.check(model, source)
    rows_here = partitioning.owned_rows(program.mesh, program.rows)
    owned, mine = partitioning.groups_of(rows_here, program.rows // data.lane_groups)
    state, history, lanes_state = start.resume(
        program, checkpointer, workdir, owned
    ) or start.begin(program, model, initialize_from, seed)
    resumed = lanes_state is not None
    if not resumed:
        start.check_kept_files(workdir, initialize_from)
    first_step = int(state.step)
    check_first_step(first_step, steps, workdir)

    # --- Data ------------------------------------------------------------------------------------
    lanes = Lanes(
        source,
        lanes=data.lanes,
        window=model.local_context,
        windows=scheme.windows,
        advance=scheme.advance,
        groups=data.lane_groups,
        owned=owned,
        seed=data.seed,
        documents_apart=data.documents_apart,
        negatives=program.crosses,
        vocab_size=model.vocab_size,
    )
    check_same_documents(source, lanes.settings)
    if resumed:
        lanes.restore(lanes_state)
    by_rows = partitioning.rows(program.mesh)
    snapshot = lanes.snapshot()

    def place(batch):
        return {k: jax.make_array_from_process_local_data(by_rows, batch[k][mine]) for k in batch}

    def d_of(step, before, history):
        return None if d is None else d.at(step - 1, before, history.accuracy(step - 2))

    rate = device_rate(compute.dtype)  # while nothing else computes
    compiled_of = functools.cache(program.compiling)
    if first_step < steps:
        compiled_of(d_of(first_step + 1, history.d, history))  # begins to
    # Read before anything is written, so that bad data leaves no trace in the workdir.
    with said_if_slow("reading documents, up to those of the first step"):
        ready = [(place(next(lanes)), lanes.snapshot())] if first_step < steps else []
    checkpointer.open((state.params, state.beside))
    start.write_settings(
        workdir, config_text(), source=source, initialize_from=initialize_from, resumed=resumed
    )

    # --- Loop ------------------------------------------------------------------------------------
    metrics = Metrics(
        workdir,
        first_step=first_step,
        steps=steps,
        evaluates=first_step == steps or evaluation.due(first_step),
        tokens_per_step=program.tokens_per_step,
        peak_flops=rate * program.mesh.size,
    )
    if resumed:
        metrics.say(f"resuming {workdir} after step {first_step}")
        if first_step == steps:
            metrics.say("all steps are done: nothing is trained; another --workdir trains anew")
    batches = Prefetch(lanes, place, count=steps - first_step - len(ready))
    reports = Reports(
        history,
        metrics=metrics,
        program=program,
        batches=batches,
        checkpointer=checkpointer,
        learning_rate=learning_rate,
        log_every=log_every,
        steps=steps,
        max_skipped=max_skipped,
    )
    agreement = Agreement()
    retries = SaveRetries(checkpointer, agreement)
    profile = Profile(workdir, profile_steps, first_step + 1)
    evaluations = Evaluations(evaluation, source, program.transformer, metrics, workdir)

    with (
        stop_signals() as signals,
        contextlib.closing(batches),
        contextlib.closing(metrics),
        checkpointer.finishing(),
    ):
        pending, now_d, compiled, owed, stopped = None, history.d, set(), False, None
        if resumed and evaluation.due(first_step) and first_step < steps:
            # In case it was cut off.
            evaluations.run(evaluation.during, state.params, first_step, goes_on=True)
        for step in range(first_step + 1, steps + 1):
            profile.start(step)
            now_d = d_of(step, now_d, reports.history)
            if compiles := now_d not in compiled:
                metrics.say(
                    f"compiling the training step{'' if d is None else f' for d = {now_d}'}"
                )
                if not compiled and jax.default_backend() == "cpu":
                    metrics.say(needs.prepare(compiled_of(now_d)()))
                compiled.add(now_d)
            batch, snapshot = ready.pop() if ready else next(batches)
            began = metrics.clock()
            state, info = compiled_of(now_d)()(state, batch)  # training/step.py
            ended = when_ready(info, metrics.clock)
            if compiles:
                ended()  # what is timed from here on must not begin before
            if pending is not None:
                reports.finish(pending)
            more = {}
            if positive_mass_every and step % positive_mass_every == 0:
                ended()
                with metrics.untimed():
                    more = program.positive_mass(now_d, state.params, batch)
            pending = Report(step, now_d, info, began, ended, compiles, more)
            profile.stop(step, state)
            stopped = signals.agreed(agreement, step)
            ends = stopped or step == steps
            evaluates = evaluation.due(step) and step < steps
            # Before an evaluation too: it may be longer than what is left after a SIGTERM.
            owed = retries.due(step) or owed or step % checkpoints.every == 0 or evaluates
            if owed or ends:
                reports.finish(pending)
                pending = None
                sound = not reports.history.skipped
                if ends or owed and sound:
                    owed = False
                    meta = {
                        "model": asdict(model),
                        "history": asdict(reports.history),
                        "trains": dict(program.part.parameters),
                    }
                    place_in_data = lanes.state_of(snapshot)
                    of_step = (step, state.params, state.beside, place_in_data, meta)
                    save = functools.partial(checkpointer.save, *of_step, removes_older=sound)
                    with metrics.untimed():
                        metrics.send()
                        save()
                    if ends:
                        retries.until_saved(save)
                if evaluates and not stopped:
                    evaluations.run(evaluation.during, state.params, step, goes_on=True)
            if stopped:
                break
        checkpointer.close()
        if stopped := stopped or signals.at_end():
            metrics.say(f"stopped by {stopped.name} after step {int(state.step)}, which is saved")
            return stopped
        signals.exit_at_once = True  # nothing is left to be saved

        # --- Evaluation --------------------------------------------------------------------------
        evaluations.run(evaluation.evals, state.params, steps)
    return None
