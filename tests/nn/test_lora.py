"""Adapters add a product to kernels: applied and merged alike."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding, trees, types
from vdit_jax.models.cogvideox import denoiser as cogvideox
from vdit_jax.models.cogvideox import system
from vdit_jax.nn import lora

CFG = cogvideox.Config(
  latent_channels=3,
  depth=3,
  heads=2,
  head_dim=16,
  text_width=8,
  text_tokens=5,
  time_width=12,
  dtype="float32",
)
LORA = lora.Lora(rank=4, alpha=6.0, targets=system.SYSTEM.adapters.targets)
SIZE = 2, 4, 6


def _inputs():
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
  text = types.Text(embeds=draw(2, 5, 8), mask=jnp.ones((2, 5), bool))
  return draw(2, *SIZE, 3), jnp.array([0.2, 0.9]), text


@pytest.fixture(scope="module")
def boxed():
  """Shapes of the denoiser's params, in their boxes."""
  init = lambda: cogvideox.Denoiser(CFG).init(jax.random.key(0), *_inputs())
  return jax.eval_shape(init)["params"]


def _random(tree, seed):
  leaves, treedef = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  return treedef.unflatten(
    jnp.asarray(rng.standard_normal(x.shape) * 0.3, jnp.float32) for x in leaves
  )


@pytest.fixture(scope="module")
def weights(boxed):
  """Random params and random adapters."""
  adapters = nn.meta.unbox(lora.init(boxed, LORA, jax.random.key(1)))
  return _random(nn.meta.unbox(boxed), 0), _random(adapters, 1)


@pytest.fixture(scope="module")
def run():
  """Apply the denoiser, jitted, to variables."""

  @jax.jit
  def apply(variables):
    return cogvideox.Denoiser(CFG).apply(variables, *_inputs())

  return apply


def test_adapters_begin_by_changing_nothing(boxed, weights, run):
  params, _ = weights
  fresh = nn.meta.unbox(lora.init(boxed, LORA, jax.random.key(1)))
  flat = trees.flatten(fresh)
  assert set(flat) == {
    f"blocks/attention/{name}/{factor}"
    for name in ("q", "k", "v", "out")
    for factor in "ab"
  }
  a, b = (flat[f"blocks/attention/q/{name}"] for name in "ab")
  assert a.shape == (3, 32, 4) and b.shape == (3, 4, 32)
  bound = 32**-0.5
  assert 0.9 * bound < np.abs(a).max() <= bound and not b.any()
  assert not np.array_equal(a, flat["blocks/attention/k/a"])
  np.testing.assert_array_equal(
    run(lora.variables(params, fresh, LORA.scale)), run({"params": params})
  )


def test_merged_equals_adapters(weights, run):
  params, adapters = weights
  applied = run(lora.variables(params, adapters, LORA.scale))
  merged = lora.merge(params, adapters, LORA.scale)
  np.testing.assert_allclose(applied, run({"params": merged}), atol=2e-5)
  assert np.abs(applied - run({"params": params})).max() > 0.1
  kernels, found = trees.flatten(params), trees.flatten(merged)
  for path in kernels:
    touched = path.startswith("blocks/attention/") and path.endswith("kernel")
    same = np.array_equal(kernels[path], found[path])
    assert same != touched, path
  a, b = (adapters["blocks"]["attention"]["v"][n][2] for n in "ab")
  np.testing.assert_allclose(
    found["blocks/attention/v/kernel"][2],
    kernels["blocks/attention/v/kernel"][2] + 1.5 * a @ b,
    atol=1e-5,
  )


def test_merging_keeps_the_dtype(weights):
  params, adapters = weights
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  merged = lora.merge(half, adapters, LORA.scale)
  assert {str(x.dtype) for x in jax.tree.leaves(merged)} == {"bfloat16"}


def test_gradients_are_those_of_the_merged_kernels(weights):
  """And nothing of the size of a kernel is made on the way."""
  params, adapters = weights
  denoiser = cogvideox.Denoiser(CFG)

  def applied(adapters):
    variables = lora.variables(params, adapters, LORA.scale)
    return jnp.sum(jnp.square(denoiser.apply(variables, *_inputs())))

  def merged(adapters):
    variables = {"params": lora.merge(params, adapters, LORA.scale)}
    return jnp.sum(jnp.square(denoiser.apply(variables, *_inputs())))

  ours, theirs = (jax.jit(jax.grad(f))(adapters) for f in (applied, merged))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_adapters_are_sharded_as_their_kernels(boxed):
  adapters = jax.eval_shape(lambda: lora.init(boxed, LORA, jax.random.key(1)))
  mesh = sharding.make_mesh(sharding.MeshShape(fsdp=2, tensor=2, data=2))
  placed = sharding.shardings(mesh, adapters)["blocks"]["attention"]
  spec = jax.sharding.PartitionSpec
  assert placed["q"]["a"].spec == spec(None, "fsdp", None)
  assert placed["q"]["b"].spec == spec(None, None, "tensor")
  assert placed["out"]["a"].spec == spec(None, "tensor", None)
  assert placed["out"]["b"].spec == spec(None, None, "fsdp")


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(rank=-1), "rank must be at least 0, got -1"),
    (dict(alpha=0.0), "alpha must be positive, got 0.0; try 4"),
    (dict(targets=()), "targets must name at least one layer"),
  ],
)
def test_what_cannot_be_meant_is_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    dataclasses.replace(LORA, **changes)


def test_unknown_targets_and_misfits_are_listed(boxed, weights):
  params, adapters = weights
  wrong = dataclasses.replace(LORA, targets=("attention/q",))
  with pytest.raises(ValueError, match="'attention/q' is no layer.*mlp/in"):
    lora.init(boxed, wrong, jax.random.key(0))
  shorter = jax.tree.map(lambda x: x[:2], adapters)
  with pytest.raises(ValueError, match=r"mine do not fit.*4 of its layers"):
    lora.check(params, shorter, "mine")
  with pytest.raises(ValueError, match="no such layer: blocks/mlp/on"):
    lora.check(params, {"blocks": {"mlp": {"on": _pair()}}}, "mine")
  with pytest.raises(ValueError, match="not in pairs"):
    lora.paths({"q": {"a": np.zeros((2, 2))}})


def _pair():
  return {"a": np.zeros((3, 32, 4)), "b": np.zeros((3, 4, 128))}
