"""Several steps in one call of a program: small networks wait for calls else.

  batches of n steps --stack--> one, [n, ...] --repeat--> state, metrics [n]

Each step is that of a call of its own: what a call has several of is only
looked at, and saved, at its end. On a CPU the denoiser's are so bit for bit;
the autoencoder's convolutions lie otherwise in memory inside of a loop, and its
weights then differ in the last digit.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vdit_jax import types
from vdit_jax.training import journal


def check(n: int, intervals: dict[str, int], traced: range = range(0)) -> None:
  """Refuse steps a call that do not divide what happens between calls.

  Args:
    n: steps a call.
    intervals: steps, by the name of the config's field; those of 0 are never.
    traced: steps of a trace, counted from 1.

  Raises:
    ValueError: names all fields that do not go with n.
  """
  if n < 1:
    raise ValueError(f"steps_a_call must be at least 1, got {n}; try 1")
  if traced:
    ends = {"first": traced.start - 1, "end": traced.stop - 1}
    intervals = intervals | {f"profile.steps' {k}": x for k, x in ends.items()}
  bad = {name: x for name, x in intervals.items() if x % n}
  if bad:
    text = ", ".join(f"{name} {x}" for name, x in bad.items())
    raise ValueError(
      f"steps_a_call={n} must divide what happens between calls: {text}; try "
      f"steps_a_call={math.gcd(n, *intervals.values())}"
    )


def check_step(n: int, step: int) -> None:
  """Refuse to go on from a step inside of a call."""
  if step % n:
    raise ValueError(
      f"the run goes on from step {step}, of which steps_a_call={n} is no "
      f"divisor; try steps_a_call={math.gcd(n, step)}"
    )


def check_shapes(n: int, shapes: int) -> None:
  """Refuse batches of several shapes in one call."""
  if n > 1 and shapes > 1:
    raise ValueError(
      f"steps_a_call={n} needs batches of one shape, but there are {shapes} "
      "buckets; set steps_a_call=1"
    )


def repeat(step: Callable, n: int) -> Callable:
  """Make `call(state, frozen, batches)` of a step, not yet jitted.

  Args:
    step: `step(state, frozen, batch) -> (state, metrics)`.
    n: steps a call; 1 is the step itself.

  Returns:
    The call, its batches stacked [n, ...], its metrics [n].
  """
  if n == 1:
    return step

  def call(state: Any, frozen: Any, batches: types.Batch):
    def one(state, batch):
      # Fused with its neighbours or with the loop, a step would round
      # otherwise than alone.
      state, batch = jax.lax.optimization_barrier((state, batch))
      return jax.lax.optimization_barrier(step(state, frozen, batch))

    return jax.lax.scan(one, state, batches)

  return call


def stack(
  batches: Iterable[tuple[types.Batch, list[str]]], n: int
) -> Iterator[tuple[types.Batch, list]]:
  """Join batches n by n, [n, ...], with a list of the keys of each."""
  if n == 1:
    yield from batches
    return
  batches = iter(batches)
  while some := list(itertools.islice(batches, n)):
    each, keys = zip(*some, strict=True)
    yield jax.tree.map(lambda *x: np.stack(x), *each), list(keys)


def sharding(placed: NamedSharding, n: int) -> NamedSharding:
  """Sharding of stacked batches, by that of a batch."""
  if n == 1:
    return placed
  return NamedSharding(placed.mesh, PartitionSpec(None, *placed.spec))


def work(
  one: Callable[[types.Batch], journal.Work], n: int
) -> Callable[[types.Batch], journal.Work]:
  """Count the work of one of a call's steps, given its stacked batches."""
  if n == 1:
    return one

  def count(batches: types.Batch) -> journal.Work:
    like = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return one(jax.tree.map(like, batches))

  return count


def rows(
  metrics: dict[str, Any], keys: list, n: int
) -> Iterator[tuple[dict[str, float], list[str]]]:
  """Take a call's metrics and keys apart: those of each step."""
  if n == 1:
    yield {name: float(value) for name, value in metrics.items()}, keys
    return
  metrics = {name: np.asarray(value) for name, value in metrics.items()}
  for i in range(n):
    yield {name: float(value[i]) for name, value in metrics.items()}, keys[i]
