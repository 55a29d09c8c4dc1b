"""Times things in turns, so that what else the machine does hits all alike.

Knows neither jax nor torch: what a run gives is waited for by the caller's
function.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Turns:
  """How often all are timed.

  Attributes:
    least, most: turns.
    seconds: of all turns together; once they are over and there were `least`,
      no other begins.
    warm: calls of each before the first turn.
  """

  least: int = 3
  most: int = 7
  seconds: float = 60.0
  warm: int = 1


def run(
  runs: Mapping[str, Callable[[], Any]],
  turns: Turns,
  wait: Callable[[Any], Any],
) -> dict[str, dict[str, Any]]:
  """Time all runs, one behind another, turn by turn.

  Each turn begins with the next run, so that none is always behind the same.

  Args:
    runs: by name.
    turns: how often.
    wait: waits for what a run gives.

  Returns:
    By name: the median, the least and the most seconds, and the times.
  """
  names, times = list(runs), {name: [] for name in runs}
  for name in names * turns.warm:
    wait(runs[name]())
  began = time.perf_counter()
  for turn in range(turns.most):
    if turn >= turns.least and time.perf_counter() - began > turns.seconds:
      break
    first = turn % len(names)
    for name in names[first:] + names[:first]:
      times[name].append(timed(runs[name], wait)[0])
  return {name: summary(found) for name, found in times.items()}


def timed(
  run: Callable[[], Any], wait: Callable[[Any], Any]
) -> tuple[float, Any]:
  """Time one call: its seconds, and what it gives."""
  began = time.perf_counter()
  found = run()
  wait(found)
  return time.perf_counter() - began, found


def summary(times: list[float]) -> dict[str, Any]:
  """Median, least and most of some times, and how many they are."""
  return {
    "median": statistics.median(times),
    "least": min(times),
    "most": max(times),
    "times": len(times),
  }
