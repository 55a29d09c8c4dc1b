"""The text encoder: padding, position buckets, the forms of T5."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding, trees
from vdit_jax.models.t5 import encoder as t5

CFG = t5.Config(
  vocab_size=11,
  width=16,
  depth=2,
  heads=2,
  head_dim=8,
  mlp_width=24,
  buckets=8,
  max_distance=16,
  dtype="float32",
)
M = 20
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, M)))
MASK = jnp.arange(M) < jnp.array([[M], [7], [0]])

# Most of the time is LLVM's, which need not try hard on arrays this small.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _with(**changes):
  return dataclasses.replace(CFG, **changes)


def _boxed(cfg):
  init = functools.partial(t5.TextEncoder(cfg).init, jax.random.key(0))
  tokens, mask = jnp.zeros((1, 1), int), jnp.ones((1, 1), bool)
  return jax.eval_shape(init, tokens, mask)["params"]


def _shapes(cfg):
  return nn.meta.unbox(_boxed(cfg))


@functools.partial(_jit, static_argnums=0)
def _apply(cfg, params, tokens, mask):
  return t5.TextEncoder(cfg).apply({"params": params}, tokens, mask)


@pytest.fixture(scope="module")
def params(randomise):
  return randomise(_shapes(CFG))


def test_padding_does_not_change_a_token(params):
  y = _apply(CFG, params, TOKENS, MASK)
  other = jnp.where(MASK, TOKENS, (TOKENS + 1) % CFG.vocab_size)
  z = _apply(CFG, params, other, MASK)
  np.testing.assert_array_equal(y[MASK], z[MASK])
  assert np.abs(y[1] - z[1]).max() > 0.1  # what stands on padding differs
  short = _apply(CFG, params, TOKENS[:, :7], MASK[:, :7])
  np.testing.assert_allclose(short[1], y[1, :7], atol=1e-5)
  assert np.abs(short[0] - y[0, :7]).max() > 1e-2


def test_no_mask_is_one_that_hides_nothing(params):
  y = _apply(CFG, params, TOKENS, None)
  z = _apply(CFG, params, TOKENS, jnp.ones(TOKENS.shape, bool))
  np.testing.assert_array_equal(y, z)
  assert np.abs(y - _apply(CFG, params, TOKENS, MASK))[1].max() > 0.1


def test_every_token_reaches_every_token(params):
  tokens = jnp.tile(TOKENS[:1], (M + 1, 1))
  k = jnp.arange(M)
  tokens = tokens.at[k + 1, k].set((tokens[0] + 1) % CFG.vocab_size)
  y = _apply(CFG, params, tokens, jnp.ones(tokens.shape, bool))
  assert np.abs(y[1:] - y[:1]).max(-1).min() > 1e-5


def test_order_matters(params):
  y = _apply(CFG, params, TOKENS, MASK)
  z = _apply(CFG, params, TOKENS[:, ::-1], MASK)[:, ::-1]
  assert np.abs(y[0] - z[0]).max() > 1e-2


def test_caption_without_a_token_is_finite(params):
  assert np.isfinite(_apply(CFG, params, TOKENS, MASK)).all()


def _bucket(distance, buckets, max_distance):
  """arXiv:1910.10683, section 2.1, in integers.

  The logarithmic bucket is exact + floor((half - exact) log(d / exact) /
  log(max_distance / exact)), so it is passed where a power of d is.
  """
  half = buckets // 2
  exact = half // 2
  ahead = half if distance > 0 else 0
  d = abs(distance)
  if d < exact:
    return ahead + d
  steps = half - exact
  passed = [
    d**steps * exact**n >= max_distance**n * exact**steps
    for n in range(1, steps)
  ]
  return ahead + exact + sum(passed)


@pytest.mark.parametrize(
  "buckets, far", [(32, 128), (8, 16), (64, 256), (10, 13), (4, 5)]
)
def test_buckets_are_those_of_the_paper(buckets, far):
  distance = np.arange(-300, 301)
  want = [_bucket(int(d), buckets, far) for d in distance]
  bucket = functools.partial(
    t5.relative_bucket, buckets=buckets, max_distance=far
  )
  np.testing.assert_array_equal(bucket(jnp.asarray(distance)), want)
  np.testing.assert_array_equal(jax.jit(bucket)(distance), want)
  assert set(want) == set(range(buckets)) - {buckets // 2}


def test_known_buckets_of_t5():
  known = {0: 0, -1: 1, 1: 17, -7: 7, 7: 23, -8: 8, -11: 8, -12: 9, 15: 25}
  known |= {-16: 10, -32: 12, 64: 30, -90: 14, -91: 15, 128: 31, -10_000: 15}
  found = t5.relative_bucket(jnp.array(list(known)), 32, 128)
  assert found.tolist() == list(known.values())


def test_bias_is_of_key_minus_query():
  table = jnp.arange(CFG.buckets * 2.0).reshape(CFG.buckets, 2)
  layer = t5.PositionBias(CFG)
  bias = layer.apply({"params": {"embedding": table}}, 6)
  for query, key in np.ndindex(6, 6):
    want = table[_bucket(key - query, CFG.buckets, CFG.max_distance)]
    np.testing.assert_array_equal(bias[:, query, key], want)


@pytest.mark.parametrize("layer_bias", [False, True])
def test_layers_share_one_bias_or_have_their_own(layer_bias):
  names = _shapes(_with(depth=3, layer_bias=layer_bias))
  found = {name for name in names if name.startswith("position_bias")}
  assert found == {f"position_bias_{i}" for i in range(3 if layer_bias else 1)}


def test_shared_bias_is_each_layers_own(randomise):
  own = _with(layer_bias=True)
  params = randomise(_shapes(own))
  params["position_bias_1"] = params["position_bias_0"]
  y = _apply(own, params, TOKENS, MASK)
  shared = {k: v for k, v in params.items() if k != "position_bias_1"}
  np.testing.assert_allclose(_apply(CFG, shared, TOKENS, MASK), y, atol=1e-5)


@pytest.mark.parametrize(
  "gated, names", [(True, {"wi_0", "wi_1", "wo"}), (False, {"wi_0", "wo"})]
)
def test_gate_is_a_matrix_more(gated, names):
  shapes = _shapes(_with(gated=gated))
  assert set(shapes["block_0"]["mlp"]) == names
  assert not [n for n in trees.flatten(shapes) if n.endswith("bias")]


@pytest.mark.parametrize("gated", [True, False])
def test_every_parameter_gets_a_gradient(gated, randomise):
  cfg = _with(gated=gated, layer_bias=True)
  target = jax.random.normal(jax.random.key(0), (3, M, CFG.width))

  @_jit
  @jax.grad
  def gradient(params):
    y = functools.partial(t5.TextEncoder(cfg).apply, {"params": params})
    return jnp.mean((y(TOKENS, MASK) - target) ** 2 * MASK[..., None])

  grads = gradient(randomise(_shapes(cfg)))
  for name, g in trees.flatten(grads).items():
    assert np.isfinite(g).all() and np.abs(g).max() > 1e-7, name


def test_bfloat16_computes_and_float32_keeps(params):
  cfg = _with(dtype="bfloat16")
  assert trees.compare(_shapes(CFG), _shapes(cfg)) == []
  y, want = (_apply(c, params, TOKENS, MASK) for c in (cfg, CFG))
  assert y.dtype == jnp.float32
  error = np.linalg.norm((y - want)[MASK]) / np.linalg.norm(want[MASK])
  assert 1e-4 < error < 3e-2


@pytest.mark.parametrize(
  "variant, billions",
  [
    ("v1_1_xl", 1.22),
    ("v1_1_xxl", 4.76),
    ("mt5_xxl", 5.66),
    ("umt5_xxl", 5.68),
  ],
)
def test_count_is_that_of_the_release(variant, billions):
  count = trees.count(_shapes(t5.VARIANTS[variant]))
  assert math.isclose(count / 1e9, billions, abs_tol=5e-3)


@pytest.mark.parametrize("variant", t5.VARIANTS)
def test_variants_can_be_placed(variant):
  mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=4, tensor=2))
  boxed = _boxed(t5.VARIANTS[variant])
  placed = trees.flatten(sharding.shardings(mesh, boxed))
  for name, leaf in trees.flatten(nn.meta.unbox(boxed)).items():
    if name.endswith("/kernel"):
      local = math.prod(placed[name].shard_shape(leaf.shape))
      assert local == math.prod(leaf.shape) // 8, name
