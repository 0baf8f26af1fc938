"""`fot train`: one function, from an experiment to a trained model, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import optax
from absl import logging

from fot_jax.checkpoints import loading
from fot_jax.checkpoints.manager import Checkpointer
from fot_jax.common.agreement import Agreement
from fot_jax.common.bucket_files import staged_directory
from fot_jax.common.configurable import configurable
from fot_jax.common.errors import LARGEST_SEED, UserError, check_range
from fot_jax.common.paths import path_of
from fot_jax.common.trees import leaves_by_path
from fot_jax.data.documents import DocumentSource
from fot_jax.data.lanes import Lanes
from fot_jax.data.prefetch import Prefetch
from fot_jax.data.saved_vocabulary import load_vocabulary
from fot_jax.evals.evaluate import Evaluation, run_evals
from fot_jax.inference.language_model import LanguageModel
from fot_jax.model import schemes
from fot_jax.model.transformer import ModelConfig
from fot_jax.training import partitioning
from fot_jax.training.experiment import Checkpoints, Compute, Data
from fot_jax.training.metrics import Counts, Metrics, matmul_rate, when_ready
from fot_jax.training.program import make_program
from fot_jax.training.schedules import ScheduleOfD
from fot_jax.training.step import StepInfo, make_positive_mass

RETRY_SECONDS = 10  # from a save that failed to the next; then twice that, and so on


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
      workdir: directory for everything a run writes (README: what a workdir holds).
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
      z_loss: weight of the squared log normaliser in the loss.
      seed: of the initial parameters.
      log_every: steps between metrics.
      positive_mass_every: steps between measurements of r_d; None: never.
      profile_steps: (first, last) step of a JAX profiler trace.
      max_skipped: updates in a row that may be skipped for not being finite.
      config_text: gives the text saved as workdir/config.gin.
      dry_run: trace one step, print what would run, write nothing.

    Returns:
      None when done; the signal, SIGTERM or SIGINT, that stopped it, with the last step saved.

    Raises:
      UserError: parts of the experiment that do not fit each other, bad data, or a loss or gradient
        that was not finite more than max_skipped steps in a row.
    """
    # --- Program ---------------------------------------------------------------------------------
    check_range("train", 1, steps=steps, log_every=log_every)
    check_range("train", 1, positive_mass_every=positive_mass_every)
    check_range("train", 0, z_loss=z_loss, max_skipped=max_skipped)
    check_range("train", 0, LARGEST_SEED, seed=seed)
    if profile_steps and not 1 <= profile_steps[0] <= profile_steps[1] <= steps:
        raise UserError(
            f"train.profile_steps = {profile_steps}: give (first, last), two of the steps 1 … "
            f"{steps}, in order"
        )
    if positive_mass_every and positive_mass_every % log_every:
        raise UserError(
            f"train.positive_mass_every = {positive_mass_every} is not a multiple of "
            f"train.log_every = {log_every}: change one of them"
        )
    if positive_mass_every and not (model.memory_layers and scheme.has_contexts):
        raise UserError(
            f"train.positive_mass_every = {positive_mass_every}: r_d is of memory layers in "
            "crossbatch, and there are none: set it to None"
        )
    mesh = compute.mesh.make_abstract() if dry_run else compute.mesh.make()
    program = make_program(
        *(mesh, model, data, optimizer, learning_rate, scheme, d, compute, z_loss)
    )
    evaluation.check(model)
    if dry_run:
        _check_vocabulary(data.source, model)
        jax.eval_shape(program.step_of(program.ds[0]), program.state, program.batch)
        print(
            f"{program.parameters:,} parameters, mesh {dict(mesh.shape)}, {program.rows} rows of "
            f"{model.local_context} tokens ({program.tokens_per_step:,} new tokens a step), "
            f"{program.flops_of(program.ds[0]):.3g} FLOPs a step, {steps:,} steps: nothing written"
        )
        return None

    # --- State: the workdir's newest whole checkpoint, else initialize_from, else fresh ----------
    workdir = path_of(workdir)
    if jax.default_backend() != "cpu" and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compilation_cache"))
    checkpointer = Checkpointer(
        workdir / "checkpoints", keep_last=checkpoints.keep_last, keep_every=checkpoints.keep_every
    )
    rows_here = partitioning.owned_rows(mesh, program.rows)
    owned, mine = partitioning.groups_of(rows_here, program.rows // data.lane_groups)
    restored = checkpointer.restore_latest(program.state.params, program.state.beside, owned)
    history = History()
    source = data.source
    if restored is not None:
        step = jax.device_put(np.int32(restored.step), program.state.step.sharding)
        state = program.state.restored(step, restored.params, restored.opt_state)
        history = History(**restored.meta["history"])
        source = source.with_vocabulary(load_vocabulary(workdir / "vocabulary"))
    else:
        shardings = jax.tree.map(lambda x: x.sharding, program.state)
        state = jax.jit(program.init, out_shardings=shardings)(jax.random.key(seed))
        if initialize_from is not None:
            there, params = loading.load_params(initialize_from, program.state.params)
            state = state._replace(params=params)
            if (vocabulary := loading.vocabulary_of(initialize_from)) is not None:
                source = source.with_vocabulary(vocabulary)
            _compare_functions(initialize_from, there, model)
    _check_vocabulary(source, model)
    evaluated = source
    if evaluation.source is not None:
        evaluated = evaluation.source.with_vocabulary(source.vocabulary)
    first_step = int(state.step)
    if first_step > steps:
        raise UserError(
            f"{workdir} has a checkpoint of step {first_step}, beyond train.steps = {steps}: "
            "raise train.steps, or choose another workdir"
        )

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
    )
    if restored is not None:
        lanes.restore(restored.data)
    by_rows = partitioning.rows(mesh)
    snapshot = lanes.snapshot()

    def place(batch):
        return {k: jax.make_array_from_process_local_data(by_rows, batch[k][mine]) for k in batch}

    # What is wrong with the data shows now, too.
    ready = [(place(next(lanes)), lanes.snapshot())] if first_step < steps else []
    checkpointer.open()
    if jax.process_index() == 0:
        (workdir / "config.gin").write_text(config_text())
        if restored is None:
            if initialize_from is not None:
                loading.keep_files(initialize_from, workdir)
            source.vocabulary.save(workdir / "vocabulary")

    # --- Loop ------------------------------------------------------------------------------------
    metrics = Metrics(
        *(
            workdir,
            first_step,
            steps,
            program.tokens_per_step,
            matmul_rate(compute.dtype) * mesh.size,
        )
    )
    if restored is not None:
        metrics.say(f"resuming {workdir} after step {first_step}")
    gradients = list(leaves_by_path(program.state.params))
    positive_mass = functools.cache(
        lambda d: make_positive_mass(program.transformer, program.plan_of(d), compute.accumulation)
    )
    batches, waited = Prefetch(lanes, place), 0.0

    def finish(
        step: int, d: int | None, info: StepInfo, ended: Callable[[], float], more: dict
    ) -> None:
        """Takes in the report of a step, fetched while the next one runs."""
        nonlocal history, waited
        info = jax.device_get(info)
        history = history.after(step, d, Counts.of(info.sums), bool(info.applied))
        if not info.applied:
            finite = np.isfinite(info.grad_squares)
            what = "the loss" if finite.all() else f"the gradient of {gradients[finite.argmin()]}"
            metrics.say(f"step {step}: {what} is not finite: update skipped")
            if history.skipped > max_skipped:
                kept = checkpointer.steps()
                raise UserError(
                    f"step {step}: {what} is not finite, for more than {max_skipped} steps in a "
                    f"row: stopped; the last good checkpoint is "
                    f"{f'that of step {kept[-1]}' if kept else 'none'}: lower the learning rate "
                    "or look at the data"
                )
        if step % log_every and step != steps:
            return
        values = {
            **Counts(*history.counts).means(),
            "learning_rate": float(learning_rate(step - 1)),
            "grad_norm": float(info.grad_norm),
            "skipped": history.skipped,
            "goodput": history.goodput(),
            "data_wait_seconds": batches.waited - waited,
            **({} if d is None else {"d": d}),
            **more,
        }
        waited = batches.waited
        history = dataclasses.replace(history, counts=(0.0, 0.0, 0.0))
        metrics.training(step, ended(), values, program.flops_of(d))

    def save(step: int) -> None:
        meta = {"model": dataclasses.asdict(model), "history": dataclasses.asdict(history)}
        place = lanes.state_of(snapshot)
        with metrics.untimed():
            metrics.send()
            checkpointer.save(step, state.params, state.beside, place, meta)

    def run(evals, step: int) -> None:
        with metrics.untimed():
            files = workdir / loading.KEPT if (workdir / loading.KEPT).exists() else None
            lm = LanguageModel.of(program.transformer, state.params, source.vocabulary, files)
            results = run_evals(lm, evals, evaluated, workdir / "plots")
        values = {k: x for e in evals for k, x in e.scalars(results[e.name]).items()}
        if values:
            metrics.write(step, values)

    def stop(step: int) -> int | None:
        """The signal that stops all processes after this step."""
        if asked.to_stop:
            agreement.request("stop", step, asked.to_stop)
        return agreement.due("stop", step)

    def evaluates(step: int) -> bool:
        return bool(evaluation.every) and step % evaluation.every == 0 and step < steps

    with _stop_signals() as asked, contextlib.closing(batches), contextlib.closing(metrics):
        pending, now_d, compiled = None, history.d, set()
        stopped, again, retry_at, agreement = None, 0, None, Agreement()
        if restored is not None and evaluates(first_step):  # it may have been stopped before that
            run(evaluation.during, first_step)
        for step in range(first_step + 1, steps + 1):
            if profile_steps and step == max(profile_steps[0], first_step + 1) <= profile_steps[1]:
                profile = contextlib.ExitStack()
                jax.profiler.start_trace(
                    profile.enter_context(staged_directory(workdir / "profile"))
                )
            now_d = None if d is None else d(step - 1, now_d, history.accuracy(step - 2))
            began, compiles = time.perf_counter(), now_d not in compiled
            compiled.add(now_d)
            batch, snapshot = ready.pop() if ready else next(batches)
            state, info = program.step_of(now_d)(state, batch)
            ended = when_ready(info)
            if pending is not None:
                finish(*pending)
            if not compiles:
                history = history.after_seconds(time.perf_counter() - began)
            more = {}
            if positive_mass_every and step % positive_mass_every == 0:
                mass = np.asarray(positive_mass(now_d)(state.params, batch))
                layers = zip(model.memory_layers, mass, strict=True)
                more = {f"positive_mass/layer_{layer}": float(x) for layer, x in layers}
            pending = (step, now_d, info, ended, more)
            if profile_steps and step == profile_steps[1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                profile.close()
            stopped = stop(step)
            if checkpointer.failed():
                retry_at = time.monotonic() + RETRY_SECONDS * 2 ** (checkpointer.failures - 1)
            if retry_at is not None and time.monotonic() >= retry_at:
                agreement.request(f"save again, {again}", step)
                retry_at = None
            saves_again = agreement.due(f"save again, {again}", step) is not None
            again += saves_again
            ends = stopped or step == steps
            saves = step % checkpoints.every == 0 or saves_again
            if evaluates(step) or ends or saves:
                finish(*pending)
                pending = None
                if ends or saves and not history.skipped:  # or it might push out the last good one
                    save(step)
                if evaluates(step) and not stopped:
                    run(evaluation.during, step)
            if stopped:
                break
        checkpointer.close()
        if stopped := stopped or stop(steps):
            by = signal.Signals(stopped)
            metrics.say(f"stopped by {by.name} after step {int(state.step)}, which is saved")
            return by
        asked.at_once = True  # nothing is left to be saved

        # --- Evaluation --------------------------------------------------------------------------
        run(evaluation.evals, steps)
    return None


@dataclasses.dataclass(frozen=True)
class History:
    """What the loop remembers of the steps so far; checkpoints keep it.

    Attributes:
      d: of the last step.
      accuracies: (step, accuracy) of the last two steps.
      counts: loss, correct, weights since metrics were last written.
      skipped: updates skipped in a row up to now.
      started: when the run was started for the first time, in seconds since 1970.
      productive: seconds of the steps that led here, compiling not among them.
    """

    d: int | None = None
    accuracies: tuple[tuple[int, float], ...] = ()
    counts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    skipped: int = 0
    started: float = dataclasses.field(default_factory=time.time)
    productive: float = 0.0

    def goodput(self) -> float:
        """Share of the time since the run was first started that is in its steps.

        Not in them are setting up, compiling, evaluating, standing still after a preemption, and
        steps that were done and lost.
        """
        return self.productive / max(time.time() - self.started, 1e-9)

    def after_seconds(self, seconds: float) -> History:
        """The history with more productive seconds in it."""
        return dataclasses.replace(self, productive=self.productive + seconds)

    def accuracy(self, step: int) -> float:
        """Of a step; 0 before the first."""
        return dict(map(tuple, self.accuracies)).get(step, 0.0)

    def after(self, step: int, d: int | None, counts: Counts, applied: bool) -> History:
        """The history with one more step in it."""
        accuracy = counts.correct / counts.weights if counts.weights else 0.0
        accuracies = (*self.accuracies, (step, accuracy))[-2:]
        total = dataclasses.astuple(Counts(*self.counts) + counts)
        skipped = 0 if applied else self.skipped + 1
        return dataclasses.replace(self, d=d, accuracies=accuracies, counts=total, skipped=skipped)


def _compare_functions(initialize_from: str, there: ModelConfig, model: ModelConfig) -> None:
    """Warns where a checkpoint's parameters were those of another function than they will be."""
    differences = there.differences(model)
    names = ("norm_epsilon", "qk_norm", "rope_theta", "rope_scaling", "norm", "mlp")
    compared = [(name, *differences[name]) for name in names if name in differences]
    rotated = [
        tuple(i for i in range(c.num_layers) if c.memory_positions or i not in c.memory_layers)
        for c in (there, model)
    ]
    compared.append(("positions in the window in layers", *rotated))
    for name, before, now in compared:
        if before != now and jax.process_index() == 0:
            logging.warning(
                "%s was trained with %s = %s, this run has %s", initialize_from, name, before, now
            )


def _check_vocabulary(source: DocumentSource, model: ModelConfig) -> None:
    if source.vocabulary.size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {source.vocabulary.size} tokens, the model a vocabulary of "
            f"{model.vocab_size}: raise the model's vocab_size or use a smaller tokenizer"
        )


@dataclasses.dataclass
class _Asked:
    """What signals have asked of a run."""

    to_stop: signal.Signals | None = None
    at_once: bool = False  # the next signal ends the process


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Asked]:
    """SIGTERM and SIGINT ask to stop after the step; a second one ends the process."""
    asked = _Asked()

    def handler(signum, frame):
        if asked.at_once:
            os._exit(128 + signum)
        asked.to_stop, asked.at_once = signal.Signals(signum), True

    before = {each: signal.signal(each, handler) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for each, of_each in before.items():
            signal.signal(each, of_each)
