"""Adaptive layer norm by the kernel is the plain one, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from vdit_jax.kernels import norm
from vdit_jax.nn import norms

EPS = 1e-3
TWO_CORES = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)


def _inputs(B, L, D, dtype=jnp.float32):
  """Tokens, shift, scale, and weights of both results' sums."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
  vectors = [draw(B, 1, D).astype(jnp.float32) for _ in range(2)]
  x = (3 + 2 * draw(B, L, D)).astype(dtype)
  return x, *vectors, [draw(B, L, D), draw(B, L, D)]


def _plain(x, shift, scale):
  return norms.modulate(x, shift, scale, EPS, "dot")


def _fused(x, shift, scale, interpret=True):
  return norm.modulate(x, shift, scale, eps=EPS, interpret=interpret)


def _values_and_grads(modulate, x, shift, scale, weights):
  def total(*args):
    found = modulate(*args)
    return sum(map(jnp.vdot, weights, found)), found

  run = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
  return jax.tree.leaves(run(x, shift, scale))


def _distance(x, y):
  x, y = (np.asarray(a, np.float64) for a in (x, y))
  return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize(
  "B, L, D", [(2, 300, 256), (1, 64, 128), (1, 200, 3072)]
)
def test_is_plain(B, L, D, monkeypatch):
  # Several steps of the grid, the last of which ends in NaN.
  monkeypatch.setattr(norm, "_NUMBERS", 64 * D)
  x, shift, scale, weights = _inputs(B, L, D)
  fused = functools.partial(_fused, interpret=TWO_CORES)
  found = _values_and_grads(fused, x, shift, scale, weights)
  wanted = _values_and_grads(_plain, x, shift, scale, weights)
  for y, want in zip(found, wanted, strict=True):
    assert y.shape == want.shape and y.dtype == want.dtype
    assert _distance(y, want) < 2e-6
  assert not interpret_pallas_call.races.races_found


def test_bfloat16_is_as_near_to_float32_as_plain():
  x, shift, scale, weights = _inputs(1, 200, 256, jnp.bfloat16)
  x32 = x.astype(jnp.float32)
  exact = _values_and_grads(_plain, x32, shift, scale, weights)
  plain = _values_and_grads(_plain, x, shift, scale, weights)
  found = _values_and_grads(_fused, x, shift, scale, weights)
  for y, near, want in zip(found, plain, exact, strict=True):
    assert y.dtype == near.dtype
    assert _distance(y, want) <= 1.05 * _distance(near, want)


def test_width_that_is_no_whole_tile_is_refused():
  x, shift, scale, _ = _inputs(1, 8, 96)
  with pytest.raises(ValueError, match="128n, got 96; use nn.norms"):
    norm.modulate(x, shift, scale, eps=EPS, interpret=True)
