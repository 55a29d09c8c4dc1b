"""The splash kernel equals `dot`, values and gradients, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from vdit_jax.kernels import splash
from vdit_jax.nn import attention

# Several blocks along both axes, other ones backward than forward.
_BLOCKS = dict(forward=(128,), backward=(256,), compute=128)
SMALL = {
  "library": splash.Sizes(**_BLOCKS),
  "pair": splash.Sizes(**_BLOCKS, own=(128,)),
  "fused": splash.Sizes(**_BLOCKS, own=(128,), vmem=2**27),
}
B, L, S, N = 2, 300, 200, 2


def _random(K, dtype, L=L, S=S):
  """Queries, keys, values, and weights of the output's sum."""
  rng = np.random.default_rng(0)
  shapes = (B, L, N, K), (B, S, N, K), (B, S, N, K), (B, L, N, K)
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def _mask(S=S):
  return jnp.arange(S) < np.array([[3], [S - 7]])


def _values_and_grads(attend, weights, *qkv):
  def total(*qkv):
    y = attend(*qkv)
    return jnp.sum(weights.astype(jnp.float32) * y), y

  run = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
  grads, y = run(*qkv)
  return y, *grads


def _error(found, want):
  found, want = (np.asarray(x, np.float64) for x in (found, want))
  return np.linalg.norm(found - want) / np.linalg.norm(want)


def _splash(sizes, **options):
  return functools.partial(
    splash.attend, sizes=sizes, saved="saved", interpret=True, **options
  )


@pytest.mark.parametrize("own", SMALL)
@pytest.mark.parametrize(
  "K, masked, length",
  [(64, True, S), (128, True, S), (128, False, S), (64, False, 256)],
)
def test_is_dot(own, K, masked, length):
  *qkv, weights = _random(K, jnp.float32, S=length)
  mask = _mask(length) if masked else None
  found = _values_and_grads(_splash(SMALL[own], mask=mask), weights, *qkv)
  dot = functools.partial(attention.dot, mask=mask)
  wanted = _values_and_grads(dot, weights, *qkv)
  for x, want in zip(found, wanted, strict=True):
    assert x.shape == want.shape
    assert _error(x, want) <= 1e-5


@pytest.mark.parametrize("own", SMALL)
def test_bfloat16_is_as_near_as_dot(own):
  *qkv, weights = _random(128, jnp.bfloat16)
  dot = functools.partial(attention.dot, mask=_mask())
  exact = _values_and_grads(dot, weights, *(x.astype(jnp.float32) for x in qkv))
  near = _values_and_grads(dot, weights, *qkv)
  attend = _splash(SMALL[own], mask=_mask())
  found = _values_and_grads(attend, weights, *qkv)
  for x, dots, want in zip(found, near, exact, strict=True):
    assert x.dtype == jnp.bfloat16
    # Scaled queries are rounded on their way into a kernel.
    assert _error(x, want) <= 2 * _error(dots, want)


@pytest.mark.parametrize("own", SMALL)
def test_row_without_a_key_is_finite(own):
  *qkv, weights = _random(64, jnp.float32)
  mask = _mask().at[0].set(False)
  attend = _splash(SMALL[own], mask=mask)
  found = _values_and_grads(attend, weights, *qkv)
  assert all(np.isfinite(x).all() for x in found)
  dot = functools.partial(attention.dot, mask=mask)
  for x, want in zip(found, _values_and_grads(dot, weights, *qkv), strict=True):
    assert _error(x[1], want[1]) <= 1e-5


def _kernel_calls(policy, own):
  """Pallas calls of a value and gradients, the block being computed again."""
  *qkv, weights = _random(64, jnp.float32)

  @functools.partial(jax.checkpoint, policy=policy)
  def block(q, k, v):
    return jnp.sin(_splash(SMALL[own])(jnp.sin(q), k, v))

  total = lambda *qkv: jnp.sum(weights * block(*qkv))
  run = jax.value_and_grad(total, argnums=(0, 1, 2))
  jaxpr = jax.make_jaxpr(run)(*qkv).jaxpr
  return _count(partial_eval.dce_jaxpr(jaxpr, [True] * 4)[0])


def _outside(jaxpr):
  """Equations of a jaxpr and all inside of it, but for Pallas calls."""
  for eqn in jaxpr.eqns:
    yield eqn
    if eqn.primitive.name != "pallas_call":
      for p in jax.tree.leaves(eqn.params):
        if hasattr(p, "eqns"):
          yield from _outside(p)


def _count(jaxpr):
  """Pallas calls in a jaxpr and all inside of it; XLA drops what none uses."""
  inner = (p for eqn in jaxpr.eqns for p in jax.tree.leaves(eqn.params))
  used = {v for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
  used |= {v for v in jaxpr.outvars if not hasattr(v, "val")}
  here = sum(
    eqn.primitive.name == "pallas_call" and not used.isdisjoint(eqn.outvars)
    for eqn in jaxpr.eqns
  )
  return here + sum(_count(p) for p in inner if hasattr(p, "eqns"))


@pytest.mark.parametrize("own", SMALL)
def test_policy_that_saves_the_name_runs_forward_once(own):
  save = jax.checkpoint_policies.save_only_these_names
  calls = {"library": 3, "pair": 4, "fused": 3}[own]
  assert _kernel_calls(save("saved"), own) == calls
  assert _kernel_calls(save("another"), own) == calls + 1


@pytest.mark.parametrize(
  "kind, heads, tokens, fused",
  [
    ("TPU v5", 24, 17_920, True),
    ("TPU v5", 3, 17_920, False),  # a core would have two, the other one
    ("TPU v5", 40, 75_776, True),
    ("TPU v5", 40, 131_072, False),
    ("TPU v5 lite", 3, 131_072, True),
    ("TPU v4", 24, 17_920, False),
  ],
)
def test_one_pass_is_taken_where_it_fits(kind, heads, tokens, fused):
  assert splash._fits(splash.sizes_of(kind), heads, tokens) == fused


@pytest.mark.parametrize("kind", splash.SIZES)
@pytest.mark.parametrize("length", [1, 13, 226, 1350, 2194, 17_550, 75_600])
def test_blocks_divide_and_padding_is_small(kind, length):
  fit = splash._fit(length, splash.sizes_of(kind))
  assert fit.padded % fit.forward == fit.padded % fit.backward == 0
  assert length <= fit.padded < 1.05 * length + 512


def test_blocks_are_those_that_were_compiled():
  sizes = splash.sizes_of("TPU v5 lite")
  assert splash._fit(17_550, sizes) == splash.Fit(17_920, 640, 640)
  assert splash._fit(75_600, sizes) == splash.Fit(75_776, 512, 1024)
  for tile in (1121, 2560):
    blocks = splash._best(17_550, 17_550, sizes, tile)
    assert (blocks.queries, blocks.keys, blocks.compute) == (768, 768, 768)
  blocks = splash._best(17_550, 226, sizes, 2560)
  assert (blocks.keys, blocks.compute) == (256, 256)


@pytest.mark.parametrize("K", [64, 128])
def test_own_kernels_lay_nothing_out_anew_at_128(K):
  """No pad or transpose stands between the arrays and the kernels."""
  *qkv, weights = _random(K, jnp.float32)
  total = lambda *qkv: jnp.sum(weights * _splash(SMALL["fused"])(*qkv))
  jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*qkv).jaxpr
  names = {eqn.primitive.name for eqn in _outside(jaxpr)}
  assert ("transpose" in names) == (K == 64)
  assert "pallas_call" in names and "dot_general" not in names


def test_unknown_device_is_refused():
  with pytest.raises(ValueError, match="'TPU v3'.*SIZES.*kernel='dot'"):
    splash.sizes_of("TPU v3")
