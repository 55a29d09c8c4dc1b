"""What a run writes down as it goes: metrics, and how its time is spent."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import tensorboardX
from absl import logging
from etils import epath

from vdit_jax import writing

_UPLOAD_SECONDS = 60  # between two uploads to an object store


class MetricWriter:
  """Writes metrics to `metrics.jsonl` and TensorBoard events; process 0 alone.

  On an object store, where nothing can be appended to, each start of a process
  has files of its own, `metrics-<time>.jsonl`, replaced once a minute and with
  each `flush`.
  """

  def __init__(self, workdir: epath.PathLike):
    self._is_writer = jax.process_index() == 0
    if not self._is_writer:
      return
    self._workdir, name = epath.Path(workdir), "metrics.jsonl"
    self._temporary = None
    local = self._workdir
    if writing.is_remote(workdir):
      self._temporary = tempfile.TemporaryDirectory()
      local = epath.Path(self._temporary.name)
      name = time.strftime("metrics-%Y%m%dT%H%M%S.jsonl", time.gmtime())
    self._local, self._path, self._sent = local, local / name, {}
    self._last_upload = time.monotonic()
    self._board = tensorboardX.SummaryWriter(str(local / "tensorboard"))
    _drop_half_a_row(self._path)

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Write one row; nothing if there are no metrics.

    With nine digits, which tell every float32 from the next.
    """
    if not metrics or not self._is_writer:
      return
    row = {"step": step} | {k: float(f"{v:.9g}") for k, v in metrics.items()}
    with self._path.open("a") as file:
      file.write(json.dumps(row) + "\n")
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)
    if time.monotonic() - self._last_upload > _UPLOAD_SECONDS:
      self.flush()

  def flush(self) -> None:
    """See to it that what was written is where it belongs."""
    if not self._is_writer:
      return
    self._board.flush()
    self._last_upload = time.monotonic()
    if self._temporary:
      try:
        self._upload()
      except OSError as error:  # metrics are not worth a run
        logging.warning("%s: %s; trying again", self._workdir, error)

  def close(self) -> None:
    """Write all; no more rows can follow."""
    if self._is_writer:
      self.flush()
      self._board.close()
      if self._temporary:
        self._temporary.cleanup()

  def _upload(self) -> None:
    """Replace the objects whose files have grown."""
    for path in pathlib.Path(self._local).rglob("*"):
      if path.is_dir() or self._sent.get(path) == path.stat().st_size:
        continue
      target = self._workdir / path.relative_to(self._local)
      data = path.read_bytes()
      writing.write(target, data)
      self._sent[path] = len(data)


@dataclasses.dataclass(frozen=True)
class Work:
  """What a step of a global batch does.

  Attributes:
    clips: of the batch.
    tokens: of its videos; None if they are not counted.
    flops: model FLOPs; None if they are not counted.
  """

  clips: int
  tokens: int | None = None
  flops: float | None = None


class Meter:
  """Measures rates between two readings, pauses left out.

  Steps may do different work; what was not counted of one has no rate.

  Args:
    started: `time.perf_counter()` of when the run began; None is now.
    peak_flops: a second, of all devices together; None if unknown.
    counts: of the data, read beside the rates; None has none.
  """

  def __init__(
    self,
    started: float | None = None,
    peak_flops: float | None = None,
    counts: Callable[[], dict[str, float]] | None = None,
  ):
    self._counts = counts or dict
    now = time.perf_counter()
    self._started = now if started is None else started
    self._peak_flops = peak_flops
    self._in_steps = 0.0  # since the run began
    self._last, self._idle_at_last = None, 0.0
    self._idle = 0.0  # waited or paused, since the run began
    self._reset(now)

  def _reset(self, now: float) -> None:
    self._begin, self._done = now, []
    self._waited = self._paused = 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Count the time inside as waited for data; no step may be in flight."""
    start = time.perf_counter()
    yield
    passed = time.perf_counter() - start
    self._waited += passed
    self._idle += passed

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leave the time inside out of the rates; no step may be in flight."""
    start = time.perf_counter()
    yield
    passed = time.perf_counter() - start
    self._paused += passed
    self._idle += passed

  def landed(self, work: Work) -> None:
    """Count a step that is complete."""
    now = time.perf_counter()
    if self._last is not None:  # else it compiled
      idle = self._idle - self._idle_at_last
      self._in_steps += max(0.0, now - self._last - idle)
    self._last, self._idle_at_last = now, self._idle
    self._done.append(work)

  def read(self) -> dict[str, float]:
    """Return rates since the last reading; goodput and counts of all."""
    now = time.perf_counter()
    seconds = now - self._begin - self._paused
    rates = {
      "steps_per_second": len(self._done) / seconds,
      "clips_per_second": sum(work.clips for work in self._done) / seconds,
      "data_wait_share": self._waited / seconds,
      "goodput": self._in_steps / (now - self._started),
    }
    tokens, flops = (_sum(self._done, name) for name in ("tokens", "flops"))
    if tokens is not None:
      rates["tokens_per_second"] = tokens / seconds
    if flops is not None and self._peak_flops:
      rates["mfu"] = flops / seconds / self._peak_flops
    self._reset(now)
    return rates | self._counts()


def finite(row: dict[str, float]) -> dict[str, float]:
  """Leave out what JSON has no word for."""
  return {name: value for name, value in row.items() if math.isfinite(value)}


def _sum(done: list[Work], name: str) -> float | None:
  """Add up what all steps were counted for; None if one was not."""
  values = [getattr(work, name) for work in done]
  return None if None in values or not values else sum(values)


def _drop_half_a_row(path: epath.Path) -> None:
  """Drop what a process that was killed while it wrote left at the end."""
  if not path.exists():
    return
  data = path.read_bytes()
  whole = data.rfind(b"\n") + 1
  if whole < len(data):
    os.truncate(path, whole)
