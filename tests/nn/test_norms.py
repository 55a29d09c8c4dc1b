"""Norms look at the last axis, or at groups, and compute in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.nn import norms

EPS = 1e-6


def _random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _rms(x, scale):
  return norms.RMSNorm(EPS).apply({"params": {"scale": scale}}, x)


def _layer_norm(x, scale, bias):
  params = {"scale": scale, "bias": bias}
  return norms.LayerNorm(EPS).apply({"params": params}, x)


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


def test_layer_norm_module_scales_and_shifts():
  x, scale, bias = _random(2, 3, 8), _random(8, seed=1), _random(8, seed=2)
  want = np.asarray(norms.layer_norm(x, EPS), np.float64) * scale + bias
  np.testing.assert_allclose(_layer_norm(x, scale, bias), want, atol=1e-6)


def test_group_norm_is_flax_s_and_keeps_digits_beside_a_large_mean():
  x = _random(2, 3, 4, 5, 8)
  params = {"scale": _random(8, seed=1), "bias": _random(8, seed=2)}
  ours = norms.GroupNorm(2, EPS).apply({"params": params}, x)
  theirs = nn.GroupNorm(2, epsilon=EPS).apply({"params": params}, x)
  np.testing.assert_allclose(ours, theirs, atol=2e-6)
  far = norms.group_norm(x + 1024, 2, EPS)
  np.testing.assert_allclose(far, norms.group_norm(x, 2, EPS), atol=1e-3)
  assert norms.group_norm(x.astype(jnp.bfloat16), 2, EPS).dtype == jnp.float32


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_layer_norm_module_begins_as_the_plain_norm(eps):
  """With its own eps, and with its axis on both of its parameters."""
  x, module = _random(2, 3, 8), norms.LayerNorm(eps, axis="mlp")
  y, boxed = module.init_with_output(jax.random.key(0), x)
  np.testing.assert_array_equal(y, norms.layer_norm(x, eps))
  assert {k: b.names for k, b in boxed["params"].items()} == {
    "scale": ("mlp",),
    "bias": ("mlp",),
  }
  dtypes = {b.value.dtype.name for b in boxed["params"].values()}
  assert dtypes == {"float32"}


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
    lambda x: _layer_norm(x, _random(8, seed=1), _random(8, seed=2)),
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
  bias = _random(256, seed=2)
  y = _layer_norm(x, scale, bias)
  assert y.dtype == jnp.bfloat16
  exact = _layer_norm(x.astype(jnp.float32), scale, bias)
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
