"""What a step costs and what the devices can do: for measured utilisation."""

from typing import Any

import jax

from vdit_jax import chips, flops, types
from vdit_jax.training import state as states


def peak_flops(mesh: jax.sharding.Mesh) -> float | None:
  """Peak FLOPs a second of all devices; None where it is not known."""
  device = mesh.devices.flat[0]
  if device.device_kind not in chips.CHIPS:
    return None
  cores = getattr(device, "num_cores", None)
  return chips.of(device.device_kind, cores).peak_flops * mesh.size


def model_flops(
  loss: states.Loss,
  params: Any,
  frozen: Any,
  batch: types.Batch,
  batch_size: int,
) -> float:
  """Count the model FLOPs of a training step, under the mesh.

  Args:
    loss: the task's.
    params: that are trained.
    frozen: weights that the loss uses and does not train.
    batch: this process' share of a batch.
    batch_size: of the global batch.
  """
  # Attention is counted as a CPU's, without padding; an autoencoder, whose
  # convolutions are other ones there, as a TPU's.
  platform = "cpu" if batch.video is None else "tpu"
  count = flops.model_flops(
    lambda *args: loss(*args)[0],
    params,
    frozen,
    batch,
    jax.random.key(0),
    platform=platform,
  )
  return count * batch_size / len(batch.weight)
