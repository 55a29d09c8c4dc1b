"""The forward kernel gives `dot`'s values and their log-sum-exp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from vdit_jax.kernels import forward, windows
from vdit_jax.nn import attention

BLOCKS = windows.Blocks(queries=128, keys=256, compute=128)
TWO_CORES = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)


def _inputs(B, N, L, S, K, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = (B, L, N, K), (B, S, N, K), (B, S, N, K)
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def _run(q, k, v, mask=None, scale=None, interpret=True):
  """Output [B, L, N, K] and log-sum-exp [B, N, L], to the base of e."""
  B, L, N, K = q.shape
  if K == 128:
    heads, laid = N, [x.reshape(B, -1, N * K) for x in (q, k, v)]
  else:
    heads, laid = 1, [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    laid = [x.reshape(B * N, -1, K) for x in laid]
  seen = None if mask is None else mask.astype(jnp.int32)[:, None]
  out, logsumexp = jax.jit(
    functools.partial(
      forward.attend,
      heads=heads,
      blocks=BLOCKS,
      scale=scale,
      interpret=interpret,
    )
  )(*laid, seen)
  if heads == 1:
    out = jnp.swapaxes(out.reshape(B, N, L, K), 1, 2)
  return out.reshape(q.shape), logsumexp.reshape(B, N, L) * np.log(2)


def _logsumexp(q, k, mask=None, scale=None):
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  logits = scale * jnp.einsum("blnk,bsnk->bnls", q, k)
  if mask is not None:
    logits = jnp.where(mask[:, None, None, :], logits, -jnp.inf)
  return jax.nn.logsumexp(logits, axis=-1)


def _distance(x, y):
  x, y = (np.asarray(a, np.float64) for a in (x, y))
  return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize(
  "B, N, L, S, K, visible",
  [
    pytest.param(1, 3, 256, 512, 128, None, marks=pytest.mark.slow),
    (1, 3, 300, 460, 128, None),  # windows end in NaN
    (2, 1, 130, 226, 64, None),
    (2, 3, 130, 226, 128, [226, 3]),
    (2, 1, 128, 600, 64, [600, 1]),
  ],
)
def test_is_dot(B, N, L, S, K, visible):
  qkv = _inputs(B, N, L, S, K)
  mask = visible and jnp.arange(S) >= S - np.array(visible)[:, None]
  out, logsumexp = _run(*qkv, mask, interpret=TWO_CORES)
  assert _distance(out, attention.dot(*qkv, mask=mask)) < 1e-6
  assert _distance(logsumexp, _logsumexp(*qkv[:2], mask)) < 1e-6
  assert not interpret_pallas_call.races.races_found


def test_scale_is_that_given():
  qkv = _inputs(1, 1, 128, 256, 128)
  out, logsumexp = _run(*qkv, scale=0.1)
  assert _distance(out, attention.dot(*qkv, scale=0.1)) < 1e-6
  assert _distance(logsumexp, _logsumexp(*qkv[:2], scale=0.1)) < 1e-6


def test_large_logits_do_not_overflow():
  q, k, v = _inputs(1, 1, 128, 512, 128)
  out, _ = _run(q * 1e3, k, v)
  assert _distance(out, attention.dot(q * 1e3, k, v)) < 1e-4


def test_bfloat16_is_as_near_to_float32_as_dot_is():
  qkv = _inputs(1, 2, 256, 512, 128, jnp.bfloat16)
  exact = attention.dot(*(x.astype(jnp.float32) for x in qkv))
  out, _ = _run(*qkv)
  assert out.dtype == jnp.bfloat16
  assert _distance(out, exact) < 1.5 * _distance(attention.dot(*qkv), exact)


def test_query_without_keys_is_finite_and_spoils_no_other():
  qkv = _inputs(2, 1, 128, 300, 128)
  mask = jnp.zeros((2, 300), bool).at[1, :7].set(True)
  out, logsumexp = _run(*qkv, mask)
  assert np.isfinite(out).all() and np.isfinite(logsumexp).all()
  assert _distance(out[1], attention.dot(*qkv, mask=mask)[1]) < 1e-6
