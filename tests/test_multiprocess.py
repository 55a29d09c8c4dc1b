"""Real processes that train together: killed, asked to leave, lost.

Each start takes half a minute, so these tests are slow; `make test-slow`.
"""

import json
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from benchmarks import processes
from vdit_jax import checkpoint, launch
from vdit_jax.data import moving_digits

pytestmark = pytest.mark.slow

_STEPS = 16
_LONGEST = 300  # seconds of one start, on a busy machine


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  moving_digits.MovingDigits(
    config="tiny", data_dir=folder, file_format="array_record"
  ).download_and_prepare()
  return folder


@pytest.fixture(scope="module")
def unbroken(data_dir, tmp_path_factory):
  """The run of two processes that nothing happens to."""
  folder = tmp_path_factory.mktemp("unbroken")
  assert processes.wait(_start(folder, data_dir), _LONGEST) == [0, 0], _log(
    folder
  )
  return folder


def _start(folder, data_dir, number=2, seconds=0.0):
  return processes.start(
    folder, data_dir, processes=number, steps=_STEPS, seconds=seconds
  )


def _log(folder):
  return "\n".join(p.read_text()[-3000:] for p in folder.glob("log*"))


def _leaves(folder):
  states = (
    checkpoint.restore_params(folder / "work", w) for w in ("params", "ema")
  )
  return [leaf for state in states for leaf in jax.tree.leaves(state)]


def test_two_processes_killed_resume_to_the_same_bits(
  unbroken, data_dir, tmp_path
):
  started = _start(tmp_path, data_dir, seconds=0.1)
  step = random.randint(5, _STEPS - 2)
  processes.wait_for_step(started, tmp_path, step)
  for process in started:
    process.kill()
  assert processes.wait(started, _LONGEST) == [-signal.SIGKILL] * 2
  assert max(processes.curve(tmp_path)) < _STEPS
  assert processes.checkpoints(tmp_path)
  assert processes.wait(_start(tmp_path, data_dir), _LONGEST) == [0, 0]
  assert processes.curve(tmp_path) == processes.curve(unbroken)
  for a, b in zip(_leaves(tmp_path), _leaves(unbroken), strict=True):
    np.testing.assert_array_equal(a, b)


def test_one_is_asked_to_leave_both_save_and_one_alone_resumes(
  unbroken, data_dir, tmp_path
):
  started = _start(tmp_path, data_dir, seconds=0.5)
  processes.wait_for_step(started, tmp_path, 2)
  started[1].send_signal(signal.SIGTERM)
  assert processes.wait(started, _LONGEST) == [launch.PREEMPTED] * 2
  saved = processes.checkpoints(tmp_path)[-1]
  assert saved == max(processes.curve(tmp_path)) < _STEPS
  assert processes.wait(_start(tmp_path, data_dir, 1), _LONGEST) == [0]
  found, wanted = (processes.curve(f) for f in (tmp_path, unbroken))
  assert found.keys() == wanted.keys()
  np.testing.assert_allclose(found[saved + 1], wanted[saved + 1], rtol=1e-6)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_with_a_message(data_dir, tmp_path, lost):
  started = _start(tmp_path, data_dir, seconds=0.3)
  processes.wait_for_step(started, tmp_path, 2)
  started[lost].kill()
  begun = time.monotonic()
  status = processes.wait(started, _LONGEST)[1 - lost]
  assert time.monotonic() - begun < launch.HEARTBEAT_SECONDS + 30
  assert status not in (0, launch.PREEMPTED)
  log = (tmp_path / f"log{1 - lost}").read_text()
  assert "maybe because another one did" in log or "another task died" in log


def _with_fewer_records(data_dir, folder):
  """Copy the dataset, its training split in the place of its test split."""
  shutil.copytree(data_dir / "moving_digits", folder / "moving_digits")
  (info,) = folder.rglob("dataset_info.json")
  said = json.loads(info.read_text())
  splits = {split["name"]: split for split in said["splits"]}
  splits["train"] |= {k: v for k, v in splits["test"].items() if k != "name"}
  info.write_text(json.dumps(said))
  (test,) = info.parent.glob("*-test.*")
  shutil.copy(test, str(test).replace("-test.", "-train."))
  return folder


@pytest.mark.parametrize("what", ["records", "config.optim.lr"])
def test_processes_that_hold_different_things_do_not_train(
  data_dir, tmp_path, what
):
  other = {"optim.lr": 0.5}
  if what == "records":
    folder = _with_fewer_records(data_dir, tmp_path / "other")
    other = {"data.data_dir": folder}
  started = processes.start(
    tmp_path, data_dir, processes=2, steps=_STEPS, own=({}, other)
  )
  statuses = processes.wait(started, _LONGEST)
  assert not {0, launch.PREEMPTED} & set(statuses)
  assert "must hold the same" in _log(tmp_path)
  assert f"{what}: '" in _log(tmp_path)
  assert not (tmp_path / "work").exists()


def test_one_process_alone_is_asked_to_leave_and_resumes(data_dir, tmp_path):
  started = _start(tmp_path, data_dir, 1, seconds=0.3)
  processes.wait_for_step(started, tmp_path, 2)
  started[0].send_signal(signal.SIGTERM)
  assert processes.wait(started, _LONGEST) == [launch.PREEMPTED]
  saved = processes.checkpoints(tmp_path)[-1]
  assert saved == max(processes.curve(tmp_path)) < _STEPS
  assert processes.wait(_start(tmp_path, data_dir, 1), _LONGEST) == [0]
  assert "restored" in _log(tmp_path)


tfds.disable_progress_bar()
