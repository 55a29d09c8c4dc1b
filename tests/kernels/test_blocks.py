"""Attention in blocks equals `dot`, values and gradients, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from vdit_jax.kernels import blocks
from vdit_jax.nn import attention

B, L, S, N, K = 2, 150, 70, 3, 8
# All heads at once, two, one, and some queries of one: of 151 the last block is
# partly empty.
LOGITS = [10**6, 2 * L * S, L * S, 64 * S]


def _random(dtype=jnp.float32, L=L):
  """Queries, keys, values, and weights of the output's sum."""
  rng = np.random.default_rng(0)
  shapes = (B, L, N, K), (B, S, N, K), (B, S, N, K), (B, L, N, K)
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def _mask():
  return jnp.arange(S) < np.array([[3], [S - 7]])


def _blocks(logits, mask=None):
  return functools.partial(
    blocks.attend, mask=mask, logits=logits, saved="saved"
  )


def _gradients(attend, weights):
  """The function of q, k, v that gives values and gradients."""

  def total(*qkv):
    y = attend(*qkv)
    return jnp.sum(weights.astype(jnp.float32) * y), y

  def run(*qkv):
    grads, y = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)
    return y, *grads

  return run


def _error(found, want):
  found, want = (np.asarray(x, np.float64) for x in (found, want))
  return np.linalg.norm(found - want) / np.linalg.norm(want)


@pytest.mark.parametrize("length", [L, L + 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("logits", LOGITS)
def test_is_dot(logits, masked, length):
  *qkv, weights = _random(L=length)
  mask = _mask() if masked else None
  found = jax.jit(_gradients(_blocks(logits, mask), weights))(*qkv)
  dot = functools.partial(attention.dot, mask=mask)
  for x, want in zip(found, _gradients(dot, weights)(*qkv), strict=True):
    assert x.shape == want.shape
    assert _error(x, want) <= 1e-6


def test_large_logits_do_not_overflow():
  q, k, v, weights = _random()
  qkv = 1e3 * q, k, v
  found = _gradients(_blocks(64 * S), weights)(*qkv)
  wanted = _gradients(attention.dot, weights)(*qkv)
  for x, want in zip(found, wanted, strict=True):
    assert _error(x, want) <= 1e-4


def test_bfloat16_is_as_near_as_dot():
  *qkv, weights = _random(jnp.bfloat16)
  dot = functools.partial(attention.dot, mask=_mask())
  exact = _gradients(dot, weights)(*(x.astype(jnp.float32) for x in qkv))
  near = _gradients(dot, weights)(*qkv)
  found = _gradients(_blocks(64 * S, _mask()), weights)(*qkv)
  for x, dots, want in zip(found, near, exact, strict=True):
    assert x.dtype == jnp.bfloat16
    assert _error(x, want) <= 1.2 * _error(dots, want)


def test_row_without_a_key_gives_the_mean_of_the_values():
  *qkv, weights = _random()
  mask = _mask().at[0].set(False)
  found = _gradients(_blocks(64 * S, mask), weights)(*qkv)
  assert all(np.isfinite(x).all() for x in found)
  mean = np.broadcast_to(qkv[2][0].mean(0), (L, N, K))
  np.testing.assert_allclose(found[0][0], mean, atol=1e-6)
  dot = functools.partial(attention.dot, mask=mask)
  wanted = _gradients(dot, weights)(*qkv)
  for x, want in zip(found, wanted, strict=True):
    assert _error(x[1], want[1]) <= 1e-6


def _equations(jaxpr):
  """Equations of a jaxpr and of all inside of it."""
  for eqn in jaxpr.eqns:
    yield eqn
    for p in jax.tree.leaves(eqn.params):
      if hasattr(p, "eqns"):
        yield from _equations(p)


@pytest.mark.parametrize("logits", LOGITS[1:])
def test_no_array_is_larger_than_a_block(logits):
  *qkv, weights = _random()
  run = _gradients(_blocks(logits), weights)
  sizes = [
    v.aval.size
    for eqn in _equations(jax.make_jaxpr(run)(*qkv).jaxpr)
    for v in eqn.outvars
  ]
  assert max(sizes) <= max(logits, weights.size)
  assert B * N * L * S > 2 * logits  # of `dot`


def test_policy_that_saves_the_name_runs_forward_once():
  *qkv, weights = _random()

  def exponentials(name):
    policy = jax.checkpoint_policies.save_only_these_names(name)
    block = jax.checkpoint(
      lambda q, k, v: jnp.sin(_blocks(64 * S)(jnp.sin(q), k, v)), policy=policy
    )
    jaxpr = jax.make_jaxpr(_gradients(block, weights))(*qkv).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * 4)
    return sum(e.primitive.name == "exp" for e in _equations(jaxpr))

  assert exponentials("saved") == 2
  assert exponentials("another") == 3


def test_blocks_have_about_as_many_logits_as_asked():
  for heads, L, S in [(32, 500, 500), (8, 2000, 2000), (24, 17_550, 17_776)]:
    plan = blocks._plan(heads, L, S, blocks.LOGITS, None)
    assert heads % plan.heads == 0
    found = plan.heads * plan.queries * S
    assert 0.5 * blocks.LOGITS <= found <= 1.1 * blocks.LOGITS
