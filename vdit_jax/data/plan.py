"""The plan of batches: which records make up a step's batch.

A pure function of (seed, step), so the data's state is the step: resuming at
a step gives what an unbroken run would have read there, and every host finds
its own share of the one global batch, however many hosts there are.
"""

import functools

import numpy as np

# First entries of numpy's spawn keys: streams that never meet.
_ORDER, _RECORD = 0, 1


def batch_indices(
  seed: int, step: int, num_records: int, batch_size: int
) -> np.ndarray:
  """Give the positions of a step's records.

  Every epoch is a new permutation of all records and batches run on across
  the border of two epochs, so each epoch shows each record exactly once.

  Args:
    seed: of the permutations.
    step: counted from 0.
    num_records: records of the data set.
    batch_size: of the global batch.

  Returns:
    Positions in 0..num_records - 1, int64 [batch_size].
  """
  _check_positive("num_records", num_records)
  _check_positive("batch_size", batch_size)
  if step < 0:
    raise ValueError(f"step must be at least 0, got {step}; count from 0")
  shown = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs, at = np.divmod(shown, num_records)
  indices = np.empty(batch_size, np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    indices[here] = _permutation(seed, int(epoch), num_records)[at[here]]
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


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_records: int) -> np.ndarray:
  sequence = np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))
  order = np.random.default_rng(sequence).permutation(num_records)
  order.setflags(write=False)
  return order


def _check_positive(name: str, value: int):
  if value < 1:
    raise ValueError(f"{name} must be at least 1, got {value}; give a count")
