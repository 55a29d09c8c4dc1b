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
from typing import Any

import jax
import tensorboardX
from absl import logging
from etils import epath

from vdit_jax import strict_json, writing

_UPLOAD_SECONDS = 60  # between two uploads to an object store
_FILES = "metrics*.jsonl"
_BOARD = "tensorboard"

Row = dict[str, Any]


class MetricWriter:
  """Writes metrics to `metrics.jsonl` and TensorBoard events; process 0 alone.

  Each step has one row, also in a run that was taken up again: what an earlier
  start wrote after the step that it is taken up from goes.

  On an object store, where nothing can be appended to, each start of a process
  has files of its own, `metrics-<time>.jsonl`, replaced once a minute and with
  each `flush`.

  Args:
    workdir: of the run.
    step: that it goes on from.
  """

  def __init__(self, workdir: epath.PathLike, step: int = 0):
    self._is_writer = jax.process_index() == 0
    self._before: Row = {}
    if not self._is_writer:
      return
    self._workdir, name = epath.Path(workdir), "metrics.jsonl"
    remote = writing.is_remote(workdir)
    self._before = _go_back(self._workdir, step, move=remote)
    again = (self._workdir / _BOARD).exists()
    self._temporary = None
    local = self._workdir
    if remote:
      self._temporary = tempfile.TemporaryDirectory()
      local = epath.Path(self._temporary.name)
      name = time.strftime("metrics-%Y%m%dT%H%M%S.jsonl", time.gmtime())
    self._local, self._sent = local, {}
    self._rows = _Rows(local / name, self._before)
    self._last_upload = time.monotonic()
    self._board = tensorboardX.SummaryWriter(
      str(local / _BOARD), purge_step=step + 1 if again else None
    )

  def named_before(self) -> set[str]:
    """Names of the metrics of the step that the run goes on from."""
    return set(self._before)

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Write metrics of a step, beside those that it has; nothing for none.

    With nine digits, which tell every float32 from the next. What is not
    finite is null.
    """
    if not metrics or not self._is_writer:
      return
    row = {"step": step} | {k: float(f"{v:.9g}") for k, v in metrics.items()}
    try:
      self._rows.add(row)
      for name, value in metrics.items():
        if math.isfinite(value):
          self._board.add_scalar(name, value, step)
    except OSError as error:  # metrics are not worth a run
      logging.warning("%s: metrics of step %d: %s", self._workdir, step, error)
    if time.monotonic() - self._last_upload > _UPLOAD_SECONDS:
      self.flush()

  def flush(self) -> None:
    """See to it that what was written is where it belongs."""
    if not self._is_writer:
      return
    self._last_upload = time.monotonic()
    try:
      self._board.flush()
      if self._temporary:
        self._upload()
    except OSError as error:
      logging.warning("%s: %s; trying again", self._workdir, error)

  def close(self) -> None:
    """Write all; no more rows can follow."""
    if self._is_writer:
      self.flush()
      self._board.close()
      if self._temporary:
        self._temporary.cleanup()

  def _upload(self) -> None:
    """Replace the objects whose files have changed."""
    for path in pathlib.Path(self._local).rglob("*"):
      if path.is_dir():
        continue
      status = path.stat()
      now = status.st_size, status.st_mtime_ns
      if self._sent.get(path) == now:
        continue
      target = self._workdir / path.relative_to(self._local)
      writing.write(target, path.read_bytes())
      self._sent[path] = now


class _Rows:
  """A local file of JSON rows, one a step, that is appended to.

  Args:
    path: of the file.
    last: row at its end, or to begin it with; empty for none.
  """

  def __init__(self, path: epath.Path, last: Row):
    self._path, self._last = path, {}
    self._begin = 0  # of the last row in the file
    if last and path.exists():
      self._last = last
      self._begin = path.stat().length - len(_line(last))
    elif last:
      self.add(last)

  def add(self, row: Row) -> None:
    """Append a row; to the last one, if that is of the same step."""
    if self._last and self._last["step"] == row["step"]:
      row = self._last | row
      with self._path.open("rb") as file:
        before = file.read(self._begin)
      writing.write(self._path, before + _line(row))
    else:
      self._append(_line(row))
    self._last = row

  def _append(self, line: bytes) -> None:
    with self._path.open("ab") as file:
      begin = file.tell()
      try:
        file.write(line)
        file.flush()
      except OSError:  # half a row would take the next one with it
        os.truncate(file.fileno(), begin)
        raise
    self._begin = begin


def _go_back(workdir: epath.Path, step: int, move: bool) -> Row:
  """Let the files of metrics end with a step, and have each step once.

  Half a row of a process that was killed while it wrote goes too.

  Args:
    workdir: of the run.
    step: whose row is the last.
    move: whether that row is to be in another file.

  Returns:
    The row of that step; empty if there is none.
  """
  last: Row = {}
  for path in sorted(workdir.glob(_FILES)) if workdir.exists() else ():
    data = path.read_bytes()
    rows: dict[int, Row] = {}
    for row in filter(None, map(_row, data.splitlines())):
      if row["step"] <= step:
        rows[row["step"]] = rows.get(row["step"], {}) | row
    last |= rows.get(step, {})
    if move:
      rows.pop(step, None)
    kept = b"".join(map(_line, rows.values()))
    if kept != data:
      writing.write(path, kept)
  return last


def _row(line: bytes) -> Row | None:
  """Read a row; None for what is none."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
  return row if is_row else None


def _line(row: Row) -> bytes:
  return strict_json.dumps(row).encode() + b"\n"


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


def _sum(done: list[Work], name: str) -> float | None:
  """Add up what all steps were counted for; None if one was not."""
  values = [getattr(work, name) for work in done]
  return None if None in values or not values else sum(values)
