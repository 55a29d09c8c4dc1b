"""The loop of a run: batches in, steps, logs, checkpoints, hooks.

Resuming needs no state of its own: the batches and random numbers of a step
follow from (seed, step), so the loop goes on from the checkpoint's step.

A step is dispatched before the one ahead of it is complete. When it lands,
its metrics are looked at: so every step is guarded, and none is waited for.
Its batch is read and placed on the devices in a thread, ahead of it.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from jax.experimental import multihost_utils

from vdit_jax import checkpoint, types
from vdit_jax.training import (
  calls,
  feed,
  guards,
  journal,
  lock,
  preemption,
  tracing,
)
from vdit_jax.training import state as states

_AHEAD = 2  # steps dispatched beyond the one that runs: the bar tells the truth

Hook = Callable[[states.TrainState, int], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When the loop does what; steps are counted from 1 after an update.

  Attributes:
    steps: updates of the whole run.
    log_every: steps between rows of metrics.
    checkpoint_every: steps between checkpoints; the last step has one.
    hooks: by name, (steps between calls, function of state and step to
      metrics); the last step calls each.
    guard: against what is not finite.
    steps_a_call: that one call of the step's function makes; they divide the
      steps between all of the above, see `calls.check`.
  """

  steps: int
  log_every: int
  checkpoint_every: int
  hooks: dict[str, tuple[int, Hook]]
  guard: guards.Guard = guards.Guard()
  steps_a_call: int = 1


@dataclasses.dataclass(frozen=True)
class Program:
  """What a step computes, and on what.

  Attributes:
    step: jitted `step(state, frozen, batch) -> (state, metrics)`; of several
      steps a call, see `calls.repeat`.
    frozen: weights that the step uses and does not train.
    sharding: of a batch, or of a call's.
    work: counts what the step of a batch does; clips alone, if not given.
  """

  step: Callable
  frozen: Any
  sharding: jax.sharding.Sharding
  work: Callable[[types.Batch], journal.Work] = lambda batch: journal.Work(
    batch.weight.shape[-1]
  )


@dataclasses.dataclass(frozen=True)
class Outputs:
  """Where a run leaves what it makes.

  Attributes:
    manager: of the checkpoints.
    writer: of the metrics.
    meter: of the rates.
    tracer: of some steps.
    held: the workdir, looked at before each checkpoint.
  """

  manager: Any
  writer: journal.MetricWriter
  meter: journal.Meter = dataclasses.field(default_factory=journal.Meter)
  tracer: tracing.Tracer = tracing.Tracer(range(0))
  held: lock.Lock = lock.Lock()


def run(
  schedule: Schedule,
  program: Program,
  state: states.TrainState,
  batches: Iterator[tuple[types.Batch, list[str]]],
  outputs: Outputs,
) -> states.TrainState:
  """Train from the state's step to the last.

  Args:
    schedule: when to do what.
    program: of a step.
    state: initial or restored state; donated.
    batches: from the state's step on, with the records' keys; see
      `calls.stack`.
    outputs: of the run.

  Raises:
    FloatingPointError: if the guard says so; the last checkpoint is of before.
    preemption.Preempted: if the run was asked to leave; its state is saved.
  """
  step, n = int(state.step), schedule.steps_a_call
  flight = _Flight(schedule, outputs.writer, outputs.meter, step)
  tracer = outputs.tracer
  fed = feed.Feed(batches, lambda batch: put(batch, program.sharding))
  with _saving(outputs.manager):
    _make_up(schedule, state, step, outputs)
    with fed, flight, tracer, preemption.notice() as asked:
      while step < schedule.steps:
        batch, keys = flight.read(fed)
        tracer.at(step + 1, flight.land_all)
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
          state, metrics = program.step(state, program.frozen, batch)
        step += n
        flight.add(step, metrics, keys, program.work(batch))
        leave = any([asked(done) for done in range(step - n + 1, step + 1)])
        if leave or _is_pause(schedule, step):
          with flight.paused():
            _pause(schedule, state, step, outputs, leave)
        if leave:
          raise preemption.Preempted(step)
  return state


def put(batch: types.Batch, sharding: jax.sharding.Sharding) -> types.Batch:
  """Place this process' share of a batch on the mesh."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    batch,
  )


def number_of_parts(sharding: jax.sharding.NamedSharding) -> int:
  """Tell into how many parts the mesh splits a batch: data x fsdp."""
  devices = sharding.num_devices
  return devices // sharding.shard_shape((devices,))[0]


def share(
  sharding: jax.sharding.NamedSharding, batch_size: int
) -> tuple[int, int]:
  """Tell which share of the global batch this process feeds, of how many.

  Processes that the mesh splits a clip over, by `context` or `tensor`, feed
  the same share.

  Args:
    sharding: of a batch's leading axis.
    batch_size: of the global batch.

  Raises:
    ValueError: if the batch does not divide over the mesh.
  """
  parts = number_of_parts(sharding)
  if batch_size % parts:
    raise ValueError(
      f"batch_size={batch_size} does not divide over mesh.data x mesh.fsdp, "
      f"{parts}; try {-(-batch_size // parts) * parts}"
    )
  rows = collections.defaultdict(set)
  for device, (index,) in sharding.devices_indices_map((batch_size,)).items():
    rows[device.process_index].add(index.indices(batch_size)[0])
  shares = sorted({tuple(sorted(starts)) for starts in rows.values()})
  if sum(map(len, shares)) != parts or len(set(map(len, shares))) > 1:
    raise ValueError(
      f"mesh splits a batch over {len(rows)} processes in shares that overlap "
      f"or differ, {shares}; give data x fsdp a multiple of the processes, or "
      "the devices of each process to context x tensor"
    )
  mine = tuple(sorted(rows[jax.process_index()]))
  return shares.index(mine), len(shares)


class _Flight:
  """The steps that were dispatched and are not known to be complete.

  When one lands, its metrics are guarded, counted and written.
  """

  def __init__(self, schedule, writer, meter, step: int):
    self._schedule, self._writer, self._meter = schedule, writer, meter
    self._sentry = guards.Sentry(schedule.guard)
    self._watchdog = guards.Watchdog()
    self._steps = collections.deque()
    self._bar = tqdm.tqdm(
      total=schedule.steps,
      initial=step,
      unit="step",
      mininterval=1,
      disable=jax.process_index() > 0,
    )

  def __enter__(self) -> "_Flight":
    self._watchdog.__enter__()
    return self

  def __exit__(self, *error):
    self._watchdog.__exit__(*error)
    self._bar.close()

  def read(self, fed: feed.Feed) -> feed.Keyed:
    """Take the next step's batch.

    While it is not ready, steps are let land: only when none is in flight do
    the devices wait for data.
    """
    while self._steps and not fed.ready():
      self._land()
    if fed.ready():
      return next(fed)
    with self._meter.waiting(), self._watchdog.waiting_for("its batch"):
      return next(fed)

  def add(
    self, step: int, metrics: Any, keys: list[str], work: journal.Work
  ) -> None:
    """Add a step that was dispatched; let land those too far behind."""
    for value in metrics.values():
      value.copy_to_host_async()
    self._steps.append((step, metrics, keys, work))
    while len(self._steps) > _AHEAD:
      self._land()

  def land_all(self) -> None:
    """Wait until all steps are complete."""
    while self._steps:
      self._land()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Do inside what is not a step, after all steps so far."""
    self.land_all()
    with self._meter.paused(), self._watchdog.paused():
      yield

  def _land(self) -> None:
    """Wait for the oldest step and look at what it says."""
    last, metrics, keys, work = self._steps.popleft()
    jax.block_until_ready(metrics)
    n = self._schedule.steps_a_call
    found = calls.rows(metrics, keys, n)
    for step, (row, of) in enumerate(found, last - n + 1):  # noqa: B007
      self._sentry.check(step, row, of)
      self._meter.landed(work)
    self._watchdog.landed(step)
    self._bar.update(n)
    if _due(step, self._schedule.log_every, self._schedule.steps):
      if "skipped" in row:
        row["skipped"] = float(self._sentry.skipped)
      rates = self._meter.read()
      self._bar.set_postfix(
        loss=f"{row['loss']:.4f}", clips=f"{rates['clips_per_second']:.0f}/s"
      )
      self._writer.write(step, row | rates)


@contextlib.contextmanager
def _saving(manager: Any) -> Iterator[None]:
  """Wait for checkpoints in the making, unless another process may be lost."""
  try:
    yield
  except Exception as error:
    known = FloatingPointError, preemption.Preempted
    if isinstance(error, known) or jax.process_count() == 1:
      checkpoint.wait(manager)
    raise
  checkpoint.wait(manager)


def _pause(schedule, state, step, outputs: Outputs, leave: bool) -> None:
  """Save; then call the hooks that are due, unless time is short.

  A hook that fails, at this start and at every other, loses no step.
  """
  hooks = {} if leave else _due_hooks(schedule, step)
  if leave or _due(step, schedule.checkpoint_every, schedule.steps):
    outputs.held.check()
    checkpoint.save(outputs.manager, step, state)
    outputs.writer.flush()
    if hooks:
      checkpoint.wait(outputs.manager)
  try:
    _call(hooks, state, step, outputs.writer)
  except Exception:
    if jax.process_count() == 1:  # others may be past it, and not save
      checkpoint.save(outputs.manager, step, state)
    raise


def _make_up(schedule, state, step: int, outputs: Outputs) -> None:
  """Call the hooks that an earlier start saved the step for, and not called."""
  hooks = _due_hooks(schedule, step) if step else {}
  if not hooks:
    return
  known = outputs.writer.named_before()
  missing = np.array([_seconds(name) not in known for name in hooks], np.int32)
  if jax.process_count() > 1:  # the first one alone has read the metrics
    missing = multihost_utils.broadcast_one_to_all(missing)
  names = [
    name for name, is_missing in zip(hooks, missing, strict=True) if is_missing
  ]
  _call({name: hooks[name] for name in names}, state, step, outputs.writer)


def _call(hooks: dict[str, Hook], state, step: int, writer) -> None:
  """Call hooks, and write down what they measure and how long they take."""
  for name, hook in hooks.items():
    logging.info("step %d: %s", step, name)
    began = time.perf_counter()
    metrics = hook(state, step)
    seconds = time.perf_counter() - began
    writer.write(step, metrics | {_seconds(name): seconds})


def _seconds(hook: str) -> str:
  """Name of the metric that says a hook was called."""
  return f"{hook}_seconds"


def _due_hooks(schedule: Schedule, step: int) -> dict[str, Hook]:
  return {
    name: hook
    for name, (every, hook) in schedule.hooks.items()
    if _due(step, every, schedule.steps)
  }


def _is_pause(schedule: Schedule, step: int) -> bool:
  """Tell whether a hook or a checkpoint is due after a step."""
  every = [every for every, _ in schedule.hooks.values()]
  every.append(schedule.checkpoint_every)
  return any(_due(step, n, schedule.steps) for n in every)


def _due(step: int, every: int, last: int) -> bool:
  return step == last or (every > 0 and step % every == 0)
