"""Rows arrive whole, wherever they go; time adds up."""

import errno
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from vdit_jax import checkpoint
from vdit_jax.training import journal


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_appended_and_keep_every_float32(tmp_path):
  value = float(np.float32(1) / np.float32(3))
  for step in (1, 2):
    writer = journal.MetricWriter(tmp_path, step - 1)
    writer.write(step, {"loss": value, "rate": 1e-8})
    writer.write(step, {})
    writer.close()
  rows = _rows(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2]
  assert np.float32(rows[1]["loss"]) == np.float32(value)
  assert rows[0]["rate"] == 1e-8
  assert len(list((tmp_path / "tensorboard").iterdir())) >= 1


def test_a_step_has_one_row_whoever_writes_to_it(tmp_path):
  writer = journal.MetricWriter(tmp_path)
  for step in (1, 2, 3):
    writer.write(step, {"loss": step})
    if step == 2:
      writer.write(step, {"psnr": 30.0})
  writer.close()
  rows = _rows(tmp_path / "metrics.jsonl")
  assert rows == [
    {"step": 1, "loss": 1.0},
    {"step": 2, "loss": 2.0, "psnr": 30.0},
    {"step": 3, "loss": 3.0},
  ]


def test_rows_after_the_step_that_is_resumed_go(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(
    "".join(f'{{"step": {n}, "loss": NaN}}\n' for n in (1, 2, 2, 3, 4))
    + '[1]\n{"loss": 3}\n'
  )
  writer = journal.MetricWriter(tmp_path, 2)
  assert writer.named_before() == {"step", "loss"}
  writer.write(2, {"psnr": 1.0})
  writer.write(3, {"loss": 7.0})
  writer.close()
  assert _rows(path) == [
    {"step": 1, "loss": None},
    {"step": 2, "loss": None, "psnr": 1.0},
    {"step": 3, "loss": 7.0},
  ]
  assert "NaN" not in path.read_text()
  writer = journal.MetricWriter(tmp_path)  # a run that begins anew
  assert not writer.named_before() and path.read_text() == ""


def test_tensorboard_is_told_to_forget_the_same_steps(tmp_path, monkeypatch):
  asked, make = [], journal.tensorboardX.SummaryWriter

  def made(folder, purge_step):
    asked.append(purge_step)
    return make(folder, purge_step=purge_step)

  monkeypatch.setattr(journal.tensorboardX, "SummaryWriter", made)
  for step in (0, 2, 0):
    journal.MetricWriter(tmp_path, step).close()
  assert asked == [None, 3, 1]


def test_a_full_disk_does_not_end_the_run_nor_leave_half_a_row(
  tmp_path, monkeypatch
):
  writer = journal.MetricWriter(tmp_path)
  writer.write(1, {"loss": 1.0})
  path = tmp_path / "metrics.jsonl"

  class Full:
    def __init__(self, file):
      self._file = file

    def __getattr__(self, name):
      return getattr(self._file, name)

    def __enter__(self):
      return self

    def __exit__(self, *_):
      self._file.close()

    def write(self, data):
      self._file.write(data[:5])
      self._file.flush()
      raise OSError(errno.ENOSPC, "No space left on device")

  opened = type(writer._rows._path).open
  with monkeypatch.context() as full:
    full.setattr(
      type(writer._rows._path),
      "open",
      lambda self, mode="r", **k: Full(opened(self, mode, **k)),
    )
    writer.write(2, {"loss": 2.0})
  writer.write(3, {"loss": 3.0})
  assert [row["step"] for row in _rows(path)] == [1, 3]


def test_half_a_row_of_a_killed_process_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2, "lo')
  writer = journal.MetricWriter(tmp_path, 1)
  writer.write(2, {"loss": 1.0})
  writer.close()
  assert [row["step"] for row in _rows(path)] == [1, 2]


def test_each_start_has_objects_of_its_own(bucket, monkeypatch):
  for second, step in ((1, 1), (2, 2)):
    now = f"metrics-20260101T00000{second}.jsonl"
    monkeypatch.setattr(journal.time, "strftime", lambda *_, n=now: n)
    writer = journal.MetricWriter(bucket, step - 1)
    writer.write(step, {"loss": 1.0})
    writer.flush()
    writer.write(step + 1, {"loss": 2.0})
    writer.close()
  found = sorted(p.name for p in bucket.iterdir())
  assert found == [
    "metrics-20260101T000001.jsonl",
    "metrics-20260101T000002.jsonl",
    "tensorboard",
  ]
  # The row that is gone on from moves, what was after it is gone.
  assert [r["step"] for r in _rows(bucket / found[0])] == []
  assert [r["step"] for r in _rows(bucket / found[1])] == [1, 2, 3]


def test_a_store_that_fails_does_not_end_the_run(bucket, store, monkeypatch):
  writer = journal.MetricWriter(bucket)
  writer.write(1, {"loss": 1.0})

  def fail(*_, **__):
    raise OSError("503")

  with monkeypatch.context() as broken:
    broken.setattr(store, "_open", fail)
    writer.flush()
  writer.close()
  (path,) = bucket.glob("metrics-*.jsonl")
  assert [r["step"] for r in _rows(path)] == [1]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  writer = journal.MetricWriter(tmp_path)
  writer.write(1, {"loss": 1.0})
  writer.close()
  checkpoint.write_files(tmp_path, {"a": b"1"})
  assert list(tmp_path.iterdir()) == []


def test_a_workdir_on_a_store_is_made_and_taken_up_again(bucket):
  config = ConfigDict({"seed": 0, "size": (1, 2)})
  workdir = checkpoint.prepare_workdir(bucket, config)
  checkpoint.write_files(workdir, {"tokenizer.model": b"123"})
  checkpoint.prepare_workdir(bucket, config)
  assert checkpoint.read_config("gs://bucket/run") == config
  assert (bucket / "tokenizer.model").read_bytes() == b"123"
  checkpoint.save_release(bucket / "model.safetensors", {"a": np.ones(3)}, {})
  found, _ = checkpoint.load_release(bucket / "model.safetensors")
  np.testing.assert_array_equal(found["a"], 1.0)


class _Clock:
  """A clock that goes as far as it is told to."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    monkeypatch.setattr(journal.time, "perf_counter", lambda: self.now)


def test_shares_and_rates_of_a_known_course_of_time(monkeypatch):
  clock = _Clock(monkeypatch)
  meter = journal.Meter(peak_flops=60.0)
  clock.now = 10.0  # the first step compiles
  meter.landed(journal.Work(4, 100, 6.0))
  assert meter.read()["goodput"] == 0
  for _ in range(5):  # 1 s of waiting, 1 s in the step
    with meter.waiting():
      clock.now += 1
    clock.now += 1
    meter.landed(journal.Work(4, 100, 6.0))
  with meter.paused():
    clock.now += 20
  rates = meter.read()
  assert rates["steps_per_second"] == pytest.approx(0.5)
  assert rates["clips_per_second"] == pytest.approx(2.0)
  assert rates["tokens_per_second"] == pytest.approx(50)
  assert rates["data_wait_share"] == pytest.approx(0.5)
  assert rates["goodput"] == pytest.approx(5 / 40)
  assert rates["mfu"] == pytest.approx(0.05)


def test_rates_are_of_the_work_that_each_step_did(monkeypatch):
  clock = _Clock(monkeypatch)
  meter = journal.Meter(peak_flops=100.0)
  for clips, tokens, flops in ((4, 100, 40.0), (1, 120, 80.0), (20, 80, 30.0)):
    clock.now += 1
    meter.landed(journal.Work(clips, tokens, flops))
  rates = meter.read()
  assert rates["clips_per_second"] == pytest.approx(25 / 3)
  assert rates["tokens_per_second"] == pytest.approx(100)
  assert rates["mfu"] == pytest.approx(0.5)
  clock.now += 2
  meter.landed(journal.Work(8))  # the earlier ones count no more
  rates = meter.read()
  assert rates["clips_per_second"] == pytest.approx(4)
  assert "tokens_per_second" not in rates and "mfu" not in rates


def test_without_both_figures_there_is_no_utilisation(monkeypatch):
  clock = _Clock(monkeypatch)
  meter = journal.Meter()
  clock.now = 1.0
  meter.landed(journal.Work(1, 1, 6.0))
  assert "mfu" not in meter.read()
