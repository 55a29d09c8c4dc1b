"""Adapters add a product to kernels: applied and merged alike."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding, trees, types
from vdit_jax.models.cogvideox import denoiser as cogvideox
from vdit_jax.models.cogvideox import system
from vdit_jax.nn import linear, lora

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
    run({"params": lora.attach(params, fresh, LORA.scale)}),
    run({"params": params}),
  )


def test_merged_equals_adapters(weights, run):
  params, adapters = weights
  applied = run({"params": lora.attach(params, adapters, LORA.scale)})
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
  merged = lora.merge(half, adapters, LORA.scale, jax.random.key(0))
  assert {str(x.dtype) for x in jax.tree.leaves(merged)} == {"bfloat16"}
  with pytest.raises(
    ValueError, match="key must be given to merge with blocks"
  ):
    lora.merge(half, adapters, LORA.scale)


def _layer(change, width=256, rank=8):
  """A layer of bfloat16 weights near 0.02, and adapters that change it so."""
  rng = np.random.default_rng(0)
  draw = lambda *s: rng.standard_normal(s).astype(np.float32)
  kernel = jnp.asarray(0.02 * draw(width, width), jnp.bfloat16)
  a, b = draw(width, rank), draw(rank, width)
  b *= change / np.std(a @ b)
  return {"kernel": kernel}, {"a": a, "b": b}, draw(64, width)


CHANGES = pytest.mark.parametrize("change", [3e-5, 1e-4, 1e-3])


@CHANGES
def test_small_changes_of_bfloat16_weights_are_computed_whole(change):
  """Beside the weights: exact in float32, in bfloat16 to its own rounding."""
  params, adapters, x = _layer(change)
  exact = x @ np.asarray(params["kernel"], np.float32)
  exact = exact + x @ adapters["a"] @ adapters["b"]
  for dtype, near in (("float32", 2e-6), ("bfloat16", 2.0**-8)):
    layer = linear.dense(256, (None, None), name="q", dtype=dtype, bias=False)
    attached = lora.attach({"q": params}, {"q": adapters})["q"]
    found = np.asarray(layer.apply({"params": attached}, x), np.float32)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < near, dtype


@CHANGES
def test_bfloat16_merged_is_right_on_the_average(change):
  """Where rounding to the nearest loses a part of each small change."""
  params, adapters, _ = _layer(change)
  product = adapters["a"] @ adapters["b"]
  before = np.asarray(params["kernel"], np.float32)

  def kept(after):
    moved = np.asarray(after, np.float32) - before
    return np.vdot(moved, product) / np.vdot(product, product)

  merge = lambda key: lora.merge({"q": params}, {"q": adapters}, 1.0, key)
  one, two = (merge(jax.random.key(i))["q"]["kernel"] for i in range(2))
  assert abs(kept(one) - 1) < 0.02 and not np.array_equal(one, two)
  nearest = kept((before + product).astype(jnp.bfloat16))
  assert nearest < 0.75 if change < 5e-5 else nearest > 0.9
  whole = lora.merge({"q": {"kernel": before}}, {"q": adapters}, 1.0)
  assert abs(kept(whole["q"]["kernel"]) - 1) < 1e-3


def test_adapters_add_up_whatever_their_ranks(weights, run):
  params, one = weights
  other = {"blocks": {"attention": {"q": one["blocks"]["attention"]["k"]}}}
  with pytest.raises(ValueError, match="no adapters yet, but have blocks/att"):
    lora.attach(lora.attach(params, one), other)
  less = jax.tree.map(lambda x: x, other)
  less["blocks"]["attention"]["q"] = {
    "a": other["blocks"]["attention"]["q"]["a"][..., :2],
    "b": other["blocks"]["attention"]["q"]["b"][..., :2, :],
  }
  both = lora.add(one, less)
  assert both["blocks"]["attention"]["q"]["a"].shape[-1] == 6
  merged = lora.merge(lora.merge(params, one, 1.0), less, 1.0)
  np.testing.assert_allclose(
    run({"params": lora.attach(params, both)}),
    run({"params": merged}),
    atol=2e-5,
  )


def test_new_adapters_begin_from_others(boxed, weights, run):
  """They compute the same, and what is not there yet can be trained."""
  params, found = weights
  cut = lambda x, k: x[..., :2] if k.endswith("a") else x[..., :2, :]
  flat = {k: np.array(cut(x, k)) for k, x in trees.flatten(found).items()}
  flat["blocks/attention/q/a"][1, :, 1] = 0  # of a block that has rank 1
  flat["blocks/attention/q/b"][1, 1] = 0
  flat = {k: x for k, x in flat.items() if "/v/" not in k}
  found = trees.unflatten(flat)
  fresh = nn.meta.unbox(lora.init(boxed, LORA, jax.random.key(1)))
  begun = lora.begin(fresh, found, LORA)
  np.testing.assert_allclose(
    run({"params": lora.attach(params, begun, LORA.scale)}),
    run({"params": lora.attach(params, found)}),
    atol=2e-5,
  )
  assert all(np.any(x, axis=-2).all() for x in _of(begun, "a"))
  np.testing.assert_array_equal(
    begun["blocks"]["attention"]["v"]["a"],
    fresh["blocks"]["attention"]["v"]["a"],
  )
  for changes, match in (
    (dict(rank=1, alpha=1.0), "lora.rank must be at least 2.*got 1"),
    (dict(targets=("blocks/attention/q",)), "but blocks/attention/k, blocks"),
  ):
    with pytest.raises(ValueError, match=match):
      lora.begin(fresh, found, dataclasses.replace(LORA, **changes))


def _of(adapters, factor):
  flat = trees.flatten(adapters)
  return [x for k, x in flat.items() if k.endswith(f"/{factor}")]


def test_the_scale_stays_when_the_rank_changes():
  for rank in (4, 16, 128):
    cfg = dataclasses.replace(LORA, rank=rank, alpha=None)
    assert cfg.scale == 1.0
  assert dataclasses.replace(LORA, rank=12).scale == 0.5


def test_gradients_are_those_of_the_merged_kernels(weights):
  """And nothing of the size of a kernel is made on the way."""
  params, adapters = weights
  denoiser = cogvideox.Denoiser(CFG)

  def applied(adapters):
    variables = {"params": lora.attach(params, adapters, LORA.scale)}
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
    (dict(rank=-1), "rank must be a whole number from 0 to 8192, got -1"),
    (dict(rank=10**12), "rank must be a whole number"),
    (dict(rank=True), "rank must be a whole number"),
    (dict(alpha=0.0), "alpha must be a finite number"),
    (dict(alpha=math.nan), "alpha must be a finite number"),
    (dict(alpha="x"), "alpha must be a finite number.*got 'x'"),
    (dict(targets=()), "targets must name at least one layer"),
    (dict(base_dtype="int8"), "base_dtype must be one of"),
    (dict(rank=0, init_from="x"), "init_from='x' needs adapters"),
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
  wrong = dataclasses.replace(LORA, targets=("(",))
  with pytest.raises(ValueError, match="targets must be regexes, got '\\('"):
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
