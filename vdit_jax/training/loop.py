"""The loop of a run: batches in, steps, logs, checkpoints, hooks.

Resuming needs no state of its own: the batches and random numbers of a step
follow from (seed, step), so the loop goes on from the checkpoint's step.
"""

import collections
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from absl import logging
from etils import epath

from vdit_jax import checkpoint, types
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
  """

  steps: int
  log_every: int
  checkpoint_every: int
  hooks: dict[str, tuple[int, Hook]]


def run(
  schedule: Schedule,
  state: states.TrainState,
  step_fn: Callable,
  frozen: Any,
  batches: Iterator[tuple[types.Batch, list[str]]],
  *,
  manager: Any,
  writer: "MetricWriter",
  sharding: jax.sharding.Sharding,
) -> states.TrainState:
  """Train from the state's step to the last.

  Args:
    schedule: when to do what.
    state: initial or restored state; donated.
    step_fn: jitted `step(state, frozen, batch) -> (state, metrics)`.
    frozen: weights that the step uses and does not train.
    batches: from the state's step on, with the records' keys.
    manager: of the checkpoints.
    writer: of the metrics.
    sharding: of the batch.

  Raises:
    FloatingPointError: if a logged metric is not finite; the last checkpoint
      stays as it was.
  """
  step = int(state.step)
  bar = tqdm.tqdm(
    total=schedule.steps, initial=step, unit="step", mininterval=1
  )
  meter = _Meter()
  in_flight = collections.deque()
  while step < schedule.steps:
    with meter.waiting():
      batch, keys = next(batches)
    state, metrics = step_fn(state, frozen, put(batch, sharding))
    in_flight.append(metrics)
    if len(in_flight) > _AHEAD:
      jax.block_until_ready(in_flight.popleft())
    step += 1
    meter.count(len(batch.weight))
    bar.update()
    if _due(step, schedule.log_every, schedule.steps):
      row = {name: float(value) for name, value in metrics.items()}
      _check_finite(row, step, keys)
      rates = meter.read()
      bar.set_postfix(
        loss=f"{row['loss']:.4f}", clips=f"{rates['clips_per_second']:.0f}/s"
      )
      writer.write(step, row | rates)
    for name, (every, hook) in schedule.hooks.items():
      if _due(step, every, schedule.steps):
        logging.info("step %d: %s", step, name)
        with meter.paused(metrics):
          writer.write(step, hook(state, step))
    if _due(step, schedule.checkpoint_every, schedule.steps):
      checkpoint.save(manager, step, state)
  bar.close()
  checkpoint.wait(manager)
  return state


def put(batch: types.Batch, sharding: jax.sharding.Sharding) -> types.Batch:
  """Place this process' share of a batch on the mesh."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    batch,
  )


class MetricWriter:
  """Writes metrics to `metrics.jsonl` and TensorBoard events.

  Each process start has a file of its own on an object store, where nothing
  can be appended to.
  """

  def __init__(self, workdir: epath.Path):
    self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))
    self._path = workdir / "metrics.jsonl"

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Write one row; nothing if there are no metrics."""
    if not metrics:
      return
    row = {"step": step} | {k: round(v, 6) for k, v in metrics.items()}
    with self._path.open("a") as file:
      file.write(json.dumps(row) + "\n")
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)


class _Meter:
  """Measures rates between two readings, pauses left out."""

  def __init__(self):
    self._reset()

  def _reset(self):
    self._start = time.perf_counter()
    self._steps = self._clips = 0
    self._waited = self._paused = 0.0

  def waiting(self) -> "_Stopwatch":
    return _Stopwatch(self, "_waited")

  def paused(self, until: Any) -> "_Stopwatch":
    jax.block_until_ready(until)  # what was dispatched is not the pause's
    return _Stopwatch(self, "_paused")

  def count(self, clips: int) -> None:
    self._steps += 1
    self._clips += clips * jax.process_count()

  def read(self) -> dict[str, float]:
    seconds = time.perf_counter() - self._start - self._paused
    rates = {
      "steps_per_second": self._steps / seconds,
      "clips_per_second": self._clips / seconds,
      "data_wait_share": self._waited / seconds,
    }
    self._reset()
    return rates


class _Stopwatch:
  """Adds the time inside a `with` to an attribute."""

  def __init__(self, owner: _Meter, attribute: str):
    self._owner, self._attribute = owner, attribute

  def __enter__(self):
    self._start = time.perf_counter()

  def __exit__(self, *_):
    passed = time.perf_counter() - self._start
    total = getattr(self._owner, self._attribute)
    setattr(self._owner, self._attribute, total + passed)


def _due(step: int, every: int, last: int) -> bool:
  return step == last or (every > 0 and step % every == 0)


def _check_finite(row: dict[str, float], step: int, keys: list[str]) -> None:
  bad = {name: value for name, value in row.items() if not math.isfinite(value)}
  if bad:
    raise FloatingPointError(
      f"step {step}: {bad} in the batch of records {keys}; resume with the "
      "same command after lowering config.optim.lr or mending the records"
    )
