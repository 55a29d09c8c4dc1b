"""Attention is softmax(q k^T) v, written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding
from vdit_jax.kernels import blocks
from vdit_jax.nn import attention

B, L, S, N, K = 2, 5, 7, 3, 8


def _random(*shapes):
  rng = np.random.default_rng(0)
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def _reference(q, k, v, mask=None, bias=0.0, scale=None):
  q, k, v = (x.astype(np.float64) for x in (q, k, v))
  scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
  logits = scale * np.einsum("blnk,bsnk->bnls", q, k) + bias
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  if mask is not None:
    weights = weights * mask[:, None, None, :]
  weights = weights / weights.sum(-1, keepdims=True)
  return np.einsum("bnls,bsnk->blnk", weights, v)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_dot_is_softmax_attention(scale, masked, biased):
  shapes = (B, L, N, K), (B, S, N, K), (B, S, N, K), (N, L, S)
  q, k, v, bias = _random(*shapes)
  extra = {"scale": scale}
  if masked:
    extra["mask"] = np.arange(S) < np.array([[3], [S]])
  if biased:
    extra["bias"] = bias
  np.testing.assert_allclose(
    attention.dot(*map(jnp.asarray, (q, k, v)), **extra),
    _reference(q, k, v, **extra),
    atol=1e-5,
  )


def test_row_without_a_key_gives_the_mean_of_the_values():
  q, k, v = _random((B, L, N, K), (B, S, N, K), (B, S, N, K))
  mask = jnp.array([[False] * S, [True] * S])
  y = attention.dot(*map(jnp.asarray, (q, k, v)), mask=mask)
  mean = np.broadcast_to(v[0].mean(0), (L, N, K))
  np.testing.assert_allclose(y[0], mean, atol=1e-5)
  np.testing.assert_allclose(y[1], _reference(q, k, v)[1], atol=1e-5)


def test_softmax_is_float32_under_bfloat16():
  q, k, v = (
    jnp.asarray(x, jnp.bfloat16)
    for x in _random((B, L, N, K), (B, S, N, K), (B, S, N, K))
  )
  jaxpr = jax.make_jaxpr(attention.dot)(q, k, v)
  exps = [e for e in jaxpr.eqns if e.primitive.name == "exp"]
  assert [e.outvars[0].aval.dtype for e in exps] == [jnp.float32]
  y = attention.dot(q, k, v)
  assert y.dtype == jnp.bfloat16
  want = _reference(*(np.asarray(x, np.float32) for x in (q, k, v)))
  np.testing.assert_allclose(y.astype(jnp.float32), want, atol=3e-2)


def test_attend_is_dot_without_a_mesh():
  q, k, v = map(jnp.asarray, _random((B, L, N, K), (B, S, N, K), (B, S, N, K)))
  mask = jnp.arange(S) < jnp.array([[3], [S]])
  want = attention.dot(q, k, v, mask=mask)
  for kernel in ("auto", "dot", "blocks"):  # the logits are few
    y = attention.attend(q, k, v, mask=mask, kernel=kernel)
    np.testing.assert_array_equal(y, want)
  y = attention.attend(q, k, v, mask=mask, kernel="splash")
  np.testing.assert_allclose(y, want, atol=1e-5)


def test_kernel_is_chosen_by_the_platform_of_the_mesh(monkeypatch):
  def has_kernel(kernel):
    run = functools.partial(attention.attend, kernel=kernel)
    x = jnp.ones((B, L, N, K))
    return "pallas_call" in str(jax.make_jaxpr(run)(x, x, x))

  assert not has_kernel("auto")
  assert has_kernel("splash")
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  monkeypatch.setattr(sharding, "device_kind", lambda: "TPU v5 lite")
  assert has_kernel("auto")
  assert not has_kernel("dot")


def test_many_logits_are_cut_into_blocks_on_a_cpu(monkeypatch):
  def is_cut(kernel):
    run = functools.partial(attention.attend, kernel=kernel)
    x = jnp.ones((B, L, N, K))
    return "scan" in str(jax.make_jaxpr(run)(x, x, x))

  monkeypatch.setattr(blocks, "LOGITS", B * L * N * L)
  assert not is_cut("auto")
  monkeypatch.setattr(blocks, "LOGITS", B * L * N * L - 1)
  assert is_cut("auto")
  assert not is_cut("dot")
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  assert not is_cut("auto")
