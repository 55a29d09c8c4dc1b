"""Model FLOPs of a step and the peak of its devices."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding, types
from vdit_jax.cost import chips
from vdit_jax.training import state as states
from vdit_jax.training import utilisation

B, D = 4, 8


def _batch(rows):
  return types.Batch(
    video=None,
    captions={
      "text_encoder": types.Captions(
        mask=np.ones((rows, 1), bool), tokens=np.ones((rows, D), np.float32)
      )
    },
    weight=np.ones(rows, np.float32),
  )


def _terms(params, frozen, batch, drawn):
  return {
    "loss": jnp.sum(
      batch.captions["text_encoder"].tokens @ params @ frozen, axis=-1
    )
  }


LOSS = states.Loss(lambda batch, key: (), _terms)


def test_work_is_of_the_shape_of_each_batch():
  params, frozen = np.ones((D, D), np.float32), np.ones((D, D), np.float32)
  asked = []

  def tokens(batch):
    asked.append(batch.captions["text_encoder"].tokens.shape)
    return batch.captions["text_encoder"].tokens.size

  work = utilisation.counter(LOSS, params, frozen, tokens)
  for rows in (B, 3 * B, B):
    found = work(_batch(rows))
    assert (found.clips, found.tokens) == (rows, rows * D)
    # Two matmuls, each forward and backward once: of the first only the
    # params want a gradient, of the second only what comes from them.
    assert found.flops == pytest.approx(2 * 2 * 2 * rows * D * D)
  assert asked == [(B, D), (3 * B, D)]
  few = utilisation.counter(LOSS, params, frozen, tokens, with_flops=False)
  assert few(_batch(B)).flops is None


def test_peak_is_of_all_devices_and_known_kinds(monkeypatch):
  mesh = sharding.make_mesh(sharding.MeshShape())
  kind = mesh.devices.flat[0].device_kind
  assert kind not in chips.CHIPS
  assert utilisation.peak_flops(mesh) is None
  chip = dataclasses.replace(chips.CHIPS["TPU v5 lite"], name=kind)
  monkeypatch.setitem(chips.CHIPS, kind, chip)
  assert utilisation.peak_flops(mesh) == 8 * 197e12
