"""Guards of a run: numbers that are not finite, steps that do not end."""

import collections
import contextlib
import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Iterator

from absl import logging

from vdit_jax.schema import Field

_ACTIONS = ("stop", "skip")

FIELDS = {
  "nonfinite": Field(str, choices=_ACTIONS),
  "max_skipped": Field(int, 1, 2 * 10**9),
}


@dataclasses.dataclass(frozen=True)
class Guard:
  """What is done about a loss or a gradient that is not finite.

  Attributes:
    nonfinite: "stop" ends the run, its last checkpoint from before; "skip"
      leaves weights, average and optimiser as they were for that step.
    max_skipped: steps in a row that may be skipped; one more ends the run.
  """

  nonfinite: str = "stop"
  max_skipped: int = 10

  def __post_init__(self):
    if self.nonfinite not in _ACTIONS:
      raise ValueError(
        f"guard.nonfinite must be one of {_ACTIONS}, got {self.nonfinite!r}"
      )
    if self.max_skipped < 1:
      raise ValueError(
        f"guard.max_skipped must be at least 1, got {self.max_skipped}; "
        "guard.nonfinite='stop' skips none"
      )


class Sentry:
  """Looks at the metrics of every step, in order.

  Attributes:
    skipped: steps skipped in all.
  """

  def __init__(self, guard: Guard):
    self.skipped = 0
    self._guard, self._in_a_row = guard, 0

  def check(self, step: int, row: dict[str, float], keys: list[str]) -> None:
    """Check a step's metrics.

    Args:
      step: counted from 1 after an update.
      row: its metrics; "skipped" is 1 where the step left all as it was.
      keys: of this process' records of the batch.

    Raises:
      FloatingPointError: if the run must not go on; names step, metrics, keys.
    """
    bad = {name: x for name, x in row.items() if not math.isfinite(x)}
    skipped = bool(row.get("skipped"))
    self._in_a_row = self._in_a_row + 1 if skipped else 0
    self.skipped += skipped
    if not bad and not skipped:
      return
    text = ", ".join(f"{name} is {x}" for name, x in bad.items())
    what = f"step {step}: {text} in the batch of records {keys}"
    if not skipped:
      raise FloatingPointError(
        f"{what}; resume with the same command after lowering config.optim.lr "
        "or mending the records, or with config.guard.nonfinite=skip"
      )
    if self._in_a_row > self._guard.max_skipped:
      raise FloatingPointError(
        f"{what}: {self._in_a_row} steps in a row were skipped, "
        f"config.guard.max_skipped is {self._guard.max_skipped}; resume with a "
        "lower config.optim.lr"
      )
    logging.warning("skipped %s", what)


class Watchdog:
  """Reports a step that takes many times the median, even one without end.

  A thread looks at the clock from `__enter__` to `__exit__`.

  Args:
    times: of the median of the last steps that count as long.
    least: seconds below which no step counts as long.
    poll: seconds between two looks.
  """

  _ENOUGH = 5  # steps before the median is trusted; the first one compiles
  _KEPT = 101  # steps whose median is taken

  def __init__(
    self, *, times: float = 10.0, least: float = 10.0, poll: float = 1.0
  ):
    self._times, self._least, self._poll = times, least, poll
    self._durations = collections.deque(maxlen=self._KEPT)
    self._lock, self._ended = threading.Lock(), threading.Event()
    self._paused, self._doing = False, "the devices"
    self._step = 0  # the last that is complete
    self._restart()

  def __enter__(self) -> "Watchdog":
    threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_):
    self._ended.set()

  def landed(self, step: int) -> None:
    """Note that a step is complete."""
    with self._lock:
      seconds, limit = time.monotonic() - self._since, self._limit()
      self._durations.append(seconds)
      self._step = step
      self._restart()
    if seconds > limit:
      logging.warning(
        "step %d took %.1f s, long is %.1f s", step, seconds, limit
      )

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Don't watch what is not a step."""
    with self._lock:
      self._paused = True
    yield
    with self._lock:
      self._paused = False
      self._restart()

  @contextlib.contextmanager
  def waiting_for(self, what: str) -> Iterator[None]:
    """Say in a report what is waited for."""
    before, self._doing = self._doing, what
    yield
    self._doing = before

  def _restart(self) -> None:
    self._since, self._reports = time.monotonic(), 0

  def _limit(self) -> float:
    """Seconds from which on a step is long."""
    if len(self._durations) < self._ENOUGH:
      return math.inf
    median = statistics.median(self._durations)
    return max(self._least, self._times * median)

  def _watch(self) -> None:
    while not self._ended.wait(self._poll):
      with self._lock:
        seconds, limit = time.monotonic() - self._since, self._limit()
        # Doubled after each report: a step without end is no flood of them.
        late = not self._paused and seconds > limit * 2**self._reports
        self._reports += late
        step = self._step + 1
      if late:
        logging.warning(
          "step %d has taken %.1f s so far, waiting for %s; long is %.1f s",
          step,
          seconds,
          self._doing,
          limit,
        )
