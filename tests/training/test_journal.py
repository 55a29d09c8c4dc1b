"""Rows arrive whole, wherever they go; time adds up."""

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
    writer = journal.MetricWriter(tmp_path)
    writer.write(step, {"loss": value, "rate": 1e-8})
    writer.write(step, {})
    writer.close()
  rows = _rows(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2]
  assert np.float32(rows[1]["loss"]) == np.float32(value)
  assert rows[0]["rate"] == 1e-8
  assert len(list((tmp_path / "tensorboard").iterdir())) >= 1


def test_half_a_row_of_a_killed_process_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2, "lo')
  writer = journal.MetricWriter(tmp_path)
  writer.write(2, {"loss": 1.0})
  writer.close()
  assert [row["step"] for row in _rows(path)] == [1, 2]


def test_each_start_has_objects_of_its_own(bucket, monkeypatch):
  for second, step in ((1, 1), (2, 5)):
    now = f"metrics-20260101T00000{second}.jsonl"
    monkeypatch.setattr(journal.time, "strftime", lambda *_, n=now: n)
    writer = journal.MetricWriter(bucket)
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
  assert [r["step"] for r in _rows(bucket / found[0])] == [1, 2]
  assert [r["step"] for r in _rows(bucket / found[1])] == [5, 6]


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
  config.seed = 1
  with pytest.raises(ValueError, match="seed: 0 there, 1 given"):
    checkpoint.prepare_workdir(bucket, config)
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
