"""Times things in turns, so that what else the machine does hits all alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def seconds(
  runs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
  """Least seconds of each run, timed in turns after one call of each.

  The least is kept since other work on the machine only adds.

  Args:
    runs: by name; what one returns, if arrays of jax, is waited for.
    repeats: times each is timed.
  """
  least = dict.fromkeys(runs, float("inf"))
  for turn in range(repeats + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      if turn:
        least[name] = min(least[name], time.perf_counter() - start)
  return least
