"""Pairs rotated by the kernel are pairs rotated plainly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from vdit_jax.kernels import pairs
from vdit_jax.nn import positions

TWO_CORES = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)


def _plain(x, angles):
  B, L, width = x.shape
  cut = x.reshape(B, L, -1, 2 * angles.shape[1])
  return positions.rotate_pairs(cut, angles).reshape(B, L, width)


def _fused(x, angles, interpret):
  return pairs.rotate(x, *pairs.tables(angles), interpret=interpret)


# The last window is not full; a row of lanes is of one head, of two, of parts.
@pytest.mark.parametrize("heads, K", [(2, 128), (4, 64), (8, 96)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_is_plain(heads, K, dtype):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
  x, weights = (draw(2, 600, heads * K).astype(dtype) for _ in range(2))
  angles = 3 * draw(600, K // 2).astype(jnp.float32)

  def run(rotate):
    y, pull = jax.vjp(lambda x: rotate(x, angles), x)
    return y, *pull(weights)

  found = run(functools.partial(_fused, interpret=TWO_CORES))
  most = {jnp.float32: 1e-6, jnp.bfloat16: 1e-2}[dtype]
  for y, want in zip(found, run(_plain), strict=True):
    assert y.shape == want.shape and y.dtype == want.dtype
    y, want = (np.asarray(a, np.float32) for a in (y, want))
    assert np.linalg.norm(y - want) <= most * np.linalg.norm(want)


def test_a_width_of_broken_lanes_is_refused():
  angles = jnp.zeros((8, 32))
  with pytest.raises(ValueError, match="multiple of 128, got 192"):
    _fused(jnp.zeros((1, 8, 192)), angles, interpret=True)
