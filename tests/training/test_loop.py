"""The loop guards every step, saves when asked to leave, and shares batches."""

import dataclasses
import itertools
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vdit_jax import checkpoint, types
from vdit_jax.training import (
  calls,
  guards,
  journal,
  lock,
  loop,
  preemption,
  tracing,
)
from vdit_jax.training import state as states


@jax.jit
def _step(state, frozen, batch):
  """Add up the tokens; the loss is their mean."""
  del frozen
  loss = jnp.mean(batch.captions["text_encoder"].tokens.astype(jnp.float32))
  loss = jnp.where(loss < 0, jnp.nan, loss)
  fine = jnp.isfinite(loss)
  params = {"sum": state.params["sum"] + jnp.where(fine, loss, 0)}
  state = state.replace(step=state.step + 1, params=params)
  return state, {"loss": loss, "skipped": 1.0 - fine}


@jax.jit
def _stopping_step(state, frozen, batch):
  state, metrics = _step(state, frozen, batch)
  return state, {"loss": metrics["loss"]}


def _state():
  return states.TrainState(jnp.int32(0), {"sum": jnp.zeros(())}, {}, {})


def _batches(bad=(), start=0):
  """Batches whose loss is the step; nan at bad ones."""
  for step in itertools.count(start + 1):
    tokens = np.full((8, 1), -1 if step in bad else step, np.int32)
    captions = types.Captions(mask=tokens > 0, tokens=tokens)
    batch = types.Batch(
      video=None,
      weight=np.ones(8, np.float32),
      captions={"text_encoder": captions},
    )
    yield batch, [f"record of {step}"]


def _schedule(steps, log_every=100, checkpoint_every=100, hooks=None, **guard):
  return loop.Schedule(
    steps, log_every, checkpoint_every, hooks or {}, guards.Guard(**guard)
  )


def _run(folder, schedule, batches, step=_stopping_step, state=None, **more):
  mesh = jax.make_mesh((8,), ("x",))
  placed = NamedSharding(mesh, PartitionSpec("x"))
  manager = checkpoint.manager(folder)
  state = _state() if state is None else state
  writer = journal.MetricWriter(folder, int(state.step))
  state = loop.run(
    schedule,
    loop.Program(step, {}, calls.sharding(placed, schedule.steps_a_call)),
    state,
    batches,
    loop.Outputs(manager, writer, **more),
  )
  return state, manager


def _rows(folder):
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_every_row_is_of_its_step(tmp_path):
  state, manager = _run(tmp_path, _schedule(7, log_every=2), _batches())
  assert [(r["step"], r["loss"]) for r in _rows(tmp_path)] == [
    (n, float(n)) for n in (2, 4, 6, 7)
  ]
  assert float(state.params["sum"]) == 28
  assert manager.latest_step() == 7


def test_a_nan_between_two_rows_stops_before_the_next_checkpoint(tmp_path):
  message = r"step 5: loss is nan .*\['record of 5'\]"
  with pytest.raises(FloatingPointError, match=message):
    _run(tmp_path, _schedule(20, checkpoint_every=3), _batches(bad=[5]))
  assert checkpoint.latest_step(checkpoint.manager(tmp_path)) == 3


def test_a_nan_right_at_a_checkpoint_is_not_saved(tmp_path):
  with pytest.raises(FloatingPointError, match="step 6"):
    _run(tmp_path, _schedule(20, checkpoint_every=3), _batches(bad=[6]))
  assert checkpoint.latest_step(checkpoint.manager(tmp_path)) == 3


def test_skipped_steps_change_nothing_and_are_counted(tmp_path):
  schedule = _schedule(6, log_every=2, nonfinite="skip", max_skipped=2)
  state, _ = _run(tmp_path, schedule, _batches(bad=[2, 3]), _step)
  assert float(state.params["sum"]) == 1 + 4 + 5 + 6
  rows = _rows(tmp_path)
  assert [row["skipped"] for row in rows] == [1, 2, 2]
  assert rows[0]["loss"] is None  # JSON has no nan
  with pytest.raises(FloatingPointError, match="step 4: .*3 steps in a row"):
    _run(tmp_path / "more", schedule, _batches(bad=[2, 3, 4]), _step)


def test_a_nan_inside_of_a_call_names_its_step_and_is_not_saved(tmp_path):
  schedule = _schedule(20, log_every=2, checkpoint_every=2)
  schedule = dataclasses.replace(schedule, steps_a_call=2)
  step = jax.jit(calls.repeat(_stopping_step, 2))
  stacked = calls.stack(_batches(bad=[5]), 2)
  message = r"step 5: loss is nan .*\['record of 5'\]"
  with pytest.raises(FloatingPointError, match=message):
    _run(tmp_path, schedule, stacked, step)
  assert checkpoint.latest_step(checkpoint.manager(tmp_path)) == 4
  assert [(r["step"], r["loss"]) for r in _rows(tmp_path)] == [(2, 2), (4, 4)]


def test_hooks_see_the_state_of_their_step(tmp_path):
  seen = []

  def hook(state, step):
    seen.append((step, float(state.params["sum"])))
    return {"seen": 1.0}

  _run(tmp_path, _schedule(5, hooks={"a": (2, hook)}), _batches())
  assert seen == [(2, 3.0), (4, 10.0), (5, 15.0)]


def _restored(folder):
  manager = checkpoint.manager(folder)
  state = checkpoint.restore(manager, states.abstract(_state()))
  return jax.device_get(state)


@pytest.mark.parametrize("every", [2, 3, 100])
def test_a_hook_that_fails_loses_no_step_and_is_made_up_for(tmp_path, every):
  def fail(state, step):
    raise ValueError(f"no sample at {step}")

  schedule = _schedule(6, checkpoint_every=every, hooks={"a": (4, fail)})
  with pytest.raises(ValueError, match="no sample at 4"):
    _run(tmp_path, schedule, _batches())
  assert checkpoint.steps(tmp_path)[-1] == 4
  seen = []

  def note(state, step):
    seen.append((step, float(state.params["sum"])))
    return {"seen": 1.0}

  schedule = _schedule(6, checkpoint_every=every, hooks={"a": (4, note)})
  _run(tmp_path, schedule, _batches(start=4), state=_restored(tmp_path))
  assert seen == [(4, 10.0), (6, 21.0)]
  rows = {row["step"]: row for row in _rows(tmp_path)}
  assert rows[4]["seen"] == 1 and rows[4]["a_seconds"] >= 0
  # What was called is not called again.
  seen.clear()
  _run(tmp_path, schedule, _batches(start=6), state=_restored(tmp_path))
  assert not seen


def test_the_checkpoint_is_whole_before_hooks_are_called(tmp_path):
  found = []
  hooks = {"a": (2, lambda *_: found.append(checkpoint.steps(tmp_path)) or {})}
  _run(tmp_path, _schedule(4, checkpoint_every=2, hooks=hooks), _batches())
  assert found == [[2], [2, 4]]


def test_a_run_whose_workdir_was_taken_ends_before_it_saves(tmp_path):
  class Taken(lock.Lock):
    def check(self):
      raise ValueError("taken over")

  with pytest.raises(ValueError, match="taken over"):
    _run(tmp_path, _schedule(4, checkpoint_every=2), _batches(), held=Taken())
  assert checkpoint.steps(tmp_path) == []


def test_asked_to_leave_it_saves_the_step_and_goes_on_from_there(tmp_path):
  def asking(state, frozen, batch):
    if np.asarray(batch.captions["text_encoder"].tokens)[0, 0] == 4:
      os.kill(os.getpid(), signal.SIGTERM)
    return _stopping_step(state, frozen, batch)

  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(preemption.Preempted) as left:
    _run(tmp_path, _schedule(9), _batches(), asking)
  assert left.value.step == 4
  assert signal.getsignal(signal.SIGTERM) == before
  state = _restored(tmp_path)
  assert (int(state.step), float(state.params["sum"])) == (4, 10.0)
  state, _ = _run(tmp_path, _schedule(9), _batches(start=4), state=state)
  assert float(state.params["sum"]) == 45


def test_chosen_steps_are_traced_and_no_others(tmp_path):
  folder = tmp_path / "profile"
  counts = []
  hooks = {
    "a": (1, lambda *_: counts.append(len(list(folder.rglob("*.pb")))) or {})
  }
  tracer = tracing.Tracer(tracing.parse("3:5"), folder)
  _run(tmp_path, _schedule(6, hooks=hooks), _batches(), tracer=tracer)
  # The trace is written before step 5 begins.
  assert counts[:4] == [0, 0, 0, 0] and counts[4:] == [1, 1]


def test_a_trace_to_the_last_step_is_written(tmp_path):
  tracer = tracing.Tracer(tracing.parse("3:9"), tmp_path / "profile")
  _run(tmp_path, _schedule(4), _batches(), tracer=tracer)
  assert len(list((tmp_path / "profile").rglob("*.pb"))) == 1


@pytest.mark.parametrize("text", ["10", "13:10", "10:10", "a:b", "0:3", "-1:3"])
def test_what_names_no_steps_is_refused(text):
  with pytest.raises(ValueError, match="profile.steps .* try 10:13"):
    tracing.parse(text)


def test_no_steps_and_some_steps():
  assert not tracing.parse("")
  assert list(tracing.parse("10:13")) == [10, 11, 12]


class _Device:
  """Says of which process a device is."""

  def __init__(self, device, process_index):
    self.device, self.process_index = device, process_index


class _Sharding:
  """A real sharding whose devices are spread over processes."""

  def __init__(self, sharding, per_process):
    self._sharding, self._per_process = sharding, per_process
    self.num_devices = sharding.num_devices
    self.shard_shape = sharding.shard_shape

  def devices_indices_map(self, shape):
    found = self._sharding.devices_indices_map(shape)
    return {
      _Device(d, d.id // self._per_process): rows for d, rows in found.items()
    }


@pytest.mark.parametrize(
  ("mesh", "per_process", "shares"),
  [
    ((8, 1), 4, [(0, 2), (1, 2)]),
    ((2, 4), 4, [(0, 2), (1, 2)]),
    # A clip's tokens are split over both processes: both feed it.
    ((1, 8), 4, [(0, 1), (0, 1)]),
    ((2, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
  ],
)
def test_processes_feed_the_clips_that_they_hold(
  monkeypatch, mesh, per_process, shares
):
  mesh = jax.make_mesh(mesh, ("data", "context"))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  for process, wanted in enumerate(shares):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    assert loop.share(_Sharding(sharding, per_process), 16) == wanted


def test_a_batch_that_does_not_divide_is_refused():
  mesh = jax.make_mesh((8,), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  assert loop.share(sharding, 16) == (0, 1)
  with pytest.raises(ValueError, match="batch_size=12 .*, 8; try 16"):
    loop.share(sharding, 12)


def test_a_trace_goes_to_a_store_too(tmp_path, bucket):
  tracer = tracing.Tracer(tracing.parse("1:2"), bucket / "profile")
  _run(tmp_path, _schedule(3), _batches(), tracer=tracer)
  assert list((bucket / "profile" / "plugins" / "profile").glob("*/*.pb"))


class _Late:
  """A metric that is there at a time."""

  def __init__(self, value, when):
    self.value, self.when = value, when

  def copy_to_host_async(self):
    pass

  def block_until_ready(self):
    time.sleep(max(0.0, self.when - time.monotonic()))

  def __float__(self):
    return self.value


@pytest.mark.parametrize(
  ("seconds", "least", "most"), [(0.005, 0.0, 0.1), (0.1, 0.4, 0.7)]
)
def test_only_idle_devices_wait_for_data(tmp_path, seconds, least, most):
  """Steps of 40 ms hide as much of the reading."""
  done = 0.0

  def step(state, frozen, batch):
    nonlocal done
    done = max(done, time.monotonic()) + 0.04
    return state.replace(step=state.step + 1), {"loss": _Late(1.0, done)}

  def slow():
    for batch in _batches():
      time.sleep(seconds)
      yield batch

  _run(tmp_path, _schedule(16, log_every=8), slow(), step)
  assert least <= _rows(tmp_path)[-1]["data_wait_share"] <= most
