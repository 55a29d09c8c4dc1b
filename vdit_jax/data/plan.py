"""The plan of batches: which records make up a step's batch, in which shape.

A pure function of (seed, step), so the data's state is the step: resuming at
a step gives what an unbroken run would have read there, and every host finds
its own share of the one global batch, however many hosts there are.

Records that are read in several shapes are in buckets, and a batch is of one
bucket. Each epoch has as many batches of a bucket as its records fill, drawn
in an order of its own, so that all records are shown equally often.
"""

import dataclasses
import functools

import numpy as np

# First entries of numpy's spawn keys: streams that never meet.
_ORDER, _RECORD, _BUCKETS = 0, 1, 2


@dataclasses.dataclass(frozen=True, eq=False)
class Bucket:
  """Records that are read in one shape, and how many of them a batch has.

  Attributes:
    shape: (num_frames, height, width) that a clip is cut to.
    positions: of its records in the data set, int64 [n].
    batch_size: of the global batch.
  """

  shape: tuple[int, int, int]
  positions: np.ndarray
  batch_size: int

  def __post_init__(self):
    _check_positive("num_records", len(self.positions))
    _check_positive("batch_size", self.batch_size)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """What decides every step's batch; see `batch`.

  Attributes:
    seed: of all orders.
    buckets: one, or several whose batches take turns.
  """

  seed: int
  buckets: tuple[Bucket, ...]


def of_one_shape(
  seed: int, num_records: int, batch_size: int, shape: tuple[int, int, int]
) -> Plan:
  """Plan all records in one shape: the batches of `batch_indices`."""
  positions = np.arange(num_records)
  return Plan(seed, (Bucket(shape, positions, batch_size),))


def choose(planned: Plan, step: int) -> tuple[int, int]:
  """Tell which bucket a step's batch is of.

  After k epochs a bucket of n records has had k n / batch_size batches,
  rounded down; those of one epoch come in a random order.

  Args:
    planned: the run's plan.
    step: counted from 0.

  Returns:
    Number of the bucket, and how many earlier steps were of it.
  """
  _check_step(step)
  sizes = tuple((len(b.positions), b.batch_size) for b in planned.buckets)
  epoch = max(int(step / sum(n / size for n, size in sizes)) - 1, 0)
  while sum(_batches(sizes, epoch + 1)) <= step:
    epoch += 1
  before = _batches(sizes, epoch)
  order, ranks = _turns(planned.seed, epoch, sizes)
  at = step - sum(before)
  bucket = int(order[at])
  return bucket, before[bucket] + int(ranks[at])


def batch(planned: Plan, step: int) -> tuple[tuple[int, int, int], np.ndarray]:
  """Give the shape of a step's clips, and the positions of their records.

  Args:
    planned: the run's plan.
    step: counted from 0.

  Returns:
    (num_frames, height, width), and positions int64 [batch_size].
  """
  number, earlier = choose(planned, step)
  bucket = planned.buckets[number]
  stream = (number,) if len(planned.buckets) > 1 else ()
  indices = batch_indices(
    planned.seed, earlier, len(bucket.positions), bucket.batch_size, stream
  )
  return bucket.shape, bucket.positions[indices]


def batch_indices(
  seed: int,
  step: int,
  num_records: int,
  batch_size: int,
  stream: tuple[int, ...] = (),
) -> np.ndarray:
  """Give the positions of a step's records.

  Every epoch is a new permutation of all records and batches run on across
  the border of two epochs, so each epoch shows each record exactly once.

  Args:
    seed: of the permutations.
    step: counted from 0.
    num_records: records of the data set.
    batch_size: of the global batch.
    stream: tells apart permutations of one seed.

  Returns:
    Positions in 0..num_records - 1, int64 [batch_size].
  """
  _check_positive("num_records", num_records)
  _check_positive("batch_size", batch_size)
  _check_step(step)
  shown = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs, at = np.divmod(shown, num_records)
  indices = np.empty(batch_size, np.int64)
  order = _orders(seed, num_records, stream)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    indices[here] = order(int(epoch))[at[here]]
  return indices


def host_slice(indices: np.ndarray, host: int, num_hosts: int) -> np.ndarray:
  """Take a host's contiguous share of the global batch.

  Args:
    indices: positions of the global batch [batch_size].
    host: 0..num_hosts - 1, whose share it is.
    num_hosts: refused unless it divides the batch size.

  Returns:
    Positions [batch_size / num_hosts].
  """
  _check_positive("num_hosts", num_hosts)
  if not 0 <= host < num_hosts:
    raise ValueError(
      f"host must be 0..{num_hosts - 1} for num_hosts={num_hosts}, got "
      f"{host}; pass jax.process_index()"
    )
  if len(indices) % num_hosts:
    raise ValueError(
      f"batch_size={len(indices)} does not divide by num_hosts={num_hosts}; "
      f"try {-(-len(indices) // num_hosts) * num_hosts}"
    )
  share = len(indices) // num_hosts
  return indices[host * share : (host + 1) * share]


def record_seed(seed: int, step: int, position: int) -> np.random.SeedSequence:
  """Seed what is drawn for one record: a crop, a flip, one of its captions.

  Args:
    seed: of the run.
    step: whose batch the record is in.
    position: place in the global batch, so that hosts do not matter.

  Returns:
    Seed for `np.random.default_rng`.
  """
  key = (_RECORD, step, position)
  return np.random.SeedSequence(seed, spawn_key=key)


def _batches(sizes: tuple[tuple[int, int], ...], epochs: int) -> list[int]:
  """Batches of each bucket in some epochs, by its (records, batch size)."""
  return [epochs * n // size for n, size in sizes]


@functools.lru_cache(maxsize=4)
def _turns(
  seed: int, epoch: int, sizes: tuple[tuple[int, int], ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Buckets of an epoch's steps, and how many before are of the same."""
  ends, starts = _batches(sizes, epoch + 1), _batches(sizes, epoch)
  counts = np.subtract(ends, starts)
  order = np.repeat(np.arange(len(sizes)), counts)
  sequence = np.random.SeedSequence(seed, spawn_key=(_BUCKETS, epoch))
  np.random.default_rng(sequence).shuffle(order)
  ranks = np.empty_like(order)
  # A stable sort lists each bucket's steps in their order.
  ranks[np.argsort(order, kind="stable")] = np.concatenate(
    [np.arange(count) for count in counts]
  )
  return order, ranks


@functools.lru_cache(maxsize=64)
def _orders(seed: int, num_records: int, stream: tuple[int, ...]):
  """Make `_permutation` of an epoch; the last few are kept, for each bucket."""
  order = functools.partial(_permutation, seed, num_records, stream)
  return functools.lru_cache(maxsize=3)(order)


def _permutation(
  seed: int, num_records: int, stream: tuple[int, ...], epoch: int
) -> np.ndarray:
  key = (_ORDER, epoch, *stream)
  sequence = np.random.SeedSequence(seed, spawn_key=key)
  return np.random.default_rng(sequence).permutation(num_records)


def _check_step(step: int):
  if step < 0:
    raise ValueError(f"step must be at least 0, got {step}; count from 0")


def _check_positive(name: str, value: int):
  if value < 1:
    raise ValueError(f"{name} must be at least 1, got {value}; give a count")
