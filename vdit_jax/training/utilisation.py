"""What a step costs and what the devices can do: for measured utilisation."""

from collections.abc import Callable
from typing import Any

import jax

from vdit_jax import types
from vdit_jax.cost import chips, flops
from vdit_jax.training import journal
from vdit_jax.training import state as states


def peak_flops(mesh: jax.sharding.Mesh) -> float | None:
  """Peak FLOPs a second of all devices; None where it is not known."""
  device = mesh.devices.flat[0]
  cores = getattr(device, "num_cores", None)
  peak = chips.peak_flops(device.device_kind, cores)
  return None if peak is None else peak * mesh.size


def counter(
  loss: states.Loss,
  params: Any,
  frozen: Any,
  tokens: Callable[[types.Batch], int],
  with_flops: bool = True,
) -> Callable[[types.Batch], journal.Work]:
  """Make `work(batch)`: what a step of a global batch does, under the mesh.

  Counted once for each shape of a batch.

  Args:
    loss: the task's.
    params: that are trained.
    frozen: weights that the loss uses and does not train.
    tokens: of the videos of a batch.
    with_flops: whether model FLOPs are counted.
  """
  params, frozen = jax.tree.map(_described, (params, frozen))
  known: dict[Any, journal.Work] = {}

  def work(batch: types.Batch) -> journal.Work:
    batch = jax.tree.map(_described, batch)
    shapes = tuple(x.shape for x in jax.tree.leaves(batch))
    if shapes not in known:
      count = None
      if with_flops:
        count = model_flops(loss, params, frozen, batch)
      clips = batch.weight.shape[0]
      known[shapes] = journal.Work(clips, tokens(batch), count)
    return known[shapes]

  return work


def model_flops(
  loss: states.Loss, params: Any, frozen: Any, batch: types.Batch
) -> float:
  """Count the model FLOPs of a training step, under the mesh.

  Args:
    loss: the task's.
    params: that are trained.
    frozen: weights that the loss uses and does not train.
    batch: global, may be described.
  """
  return flops.model_flops(
    lambda *args: loss(*args)[0],
    params,
    frozen,
    batch,
    jax.random.key(0),
  )


def _described(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)
