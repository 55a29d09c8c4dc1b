"""Model FLOPs of a step and the peak of its devices."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import chips, sharding, types
from vdit_jax.training import state as states
from vdit_jax.training import utilisation

B, D = 4, 8


def _batch(rows):
  return types.Batch(
    video=None,
    tokens=np.ones((rows, D), np.float32),
    mask=np.ones((rows, 1), bool),
    weight=np.ones(rows, np.float32),
  )


def _terms(params, frozen, batch, drawn):
  return {"loss": jnp.sum(batch.tokens @ params @ frozen, axis=-1)}


LOSS = states.Loss(lambda batch, key: (), _terms)


def test_a_share_of_a_batch_counts_for_the_whole():
  params, frozen = np.ones((D, D), np.float32), np.ones((D, D), np.float32)
  whole, share = (
    utilisation.model_flops(LOSS, params, frozen, _batch(rows), B)
    for rows in (B, B // 2)
  )
  # Both matmuls depend on the params: forward, and twice in the backward pass.
  assert whole == share == pytest.approx(3 * 2 * 2 * B * D * D)


def test_peak_is_of_all_devices_and_known_kinds(monkeypatch):
  mesh = sharding.make_mesh(sharding.MeshShape())
  kind = mesh.devices.flat[0].device_kind
  assert kind not in chips.CHIPS
  assert utilisation.peak_flops(mesh) is None
  chip = dataclasses.replace(chips.CHIPS["TPU v5 lite"], name=kind)
  monkeypatch.setitem(chips.CHIPS, kind, chip)
  assert utilisation.peak_flops(mesh) == 8 * 197e12
