"""Norms look at the last axis alone and compute in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.nn import norms

EPS = 1e-6


def _random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _rms(x, scale):
  return norms.RMSNorm(EPS).apply({"params": {"scale": scale}}, x)


def test_rms_norm_is_its_formula():
  x, scale = _random(2, 3, 8), _random(8, seed=1)
  power = np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
  want = x / np.sqrt(power + EPS) * scale
  np.testing.assert_allclose(_rms(x, scale), want, rtol=1e-5, atol=1e-6)


def test_layer_norm_is_its_formula():
  x = _random(2, 3, 8)
  x64 = x.astype(np.float64)
  mean, var = x64.mean(-1, keepdims=True), x64.var(-1, keepdims=True)
  want = (x64 - mean) / np.sqrt(var + EPS)
  np.testing.assert_allclose(norms.layer_norm(x, EPS), want, atol=1e-5)


def test_layer_norm_keeps_digits_beside_a_large_mean():
  """E[x^2] - E[x]^2 would lose them all."""
  x = _random(4, 64)
  far = norms.layer_norm(x + np.float32(4096), EPS)
  np.testing.assert_allclose(far, norms.layer_norm(x, EPS), atol=3e-3)


@pytest.mark.parametrize(
  "norm",
  [
    lambda x: _rms(x, np.ones(8, np.float32)),
    lambda x: norms.layer_norm(x, EPS),
  ],
)
def test_every_place_stands_alone(norm):
  x = _random(2, 3, 8)
  other = x.copy()
  other[0, 1] += 5
  changed = np.abs(np.asarray(norm(x)) - np.asarray(norm(other))).max(-1) > 0
  assert changed.tolist() == [[False, True, False], [False] * 3]


def test_bfloat16_is_normalised_in_float32():
  x = jnp.asarray(_random(4, 256), jnp.bfloat16)
  scale = _random(256, seed=1)
  y = _rms(x, scale)
  assert y.dtype == jnp.bfloat16
  exact = _rms(x.astype(jnp.float32), scale).astype(jnp.bfloat16)
  np.testing.assert_array_equal(y, exact)
  y = norms.layer_norm(x, EPS)
  assert y.dtype == jnp.float32
  exact = norms.layer_norm(x.astype(jnp.float32), EPS)
  np.testing.assert_array_equal(y, exact)
