"""A dense layer is one dot, however its leading axes are laid out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding
from vdit_jax.nn import linear

D, E = 6, 8


def _layer(**kwargs):
  options = dict(name="layer", dtype=jnp.float32) | kwargs
  return linear.dense(E, ("embed", "mlp"), **options)


def _random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "f4")


def _params():
  return {"kernel": _random(D, E, seed=1), "bias": _random(E, seed=2)}


def _free_axes(x):
  """Free axes of the left side of the layer's only dot."""
  run = lambda p, x: _layer().apply({"params": p}, x)
  jaxpr = jax.make_jaxpr(run)(_params(), x)
  (dot,) = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
  return dot.invars[0].aval.ndim - 1


@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (2, 3, 5), (2, 3, 5, 4)])
def test_dense_is_a_plain_dot(lead):
  x, params = _random(*lead, D), _params()

  def plain(params, x):
    return jnp.einsum("...d,de->...e", x, params["kernel"]) + params["bias"]

  y, pull = jax.vjp(lambda p, x: _layer().apply({"params": p}, x), params, x)
  want, pull_plain = jax.vjp(plain, params, x)
  np.testing.assert_allclose(y, want, atol=1e-5)
  g = _random(*lead, E, seed=3)
  for a, b in zip(
    jax.tree.leaves(pull(g)), jax.tree.leaves(pull_plain(g)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_leading_axes_are_merged_unless_the_sequence_is_sharded():
  x = _random(2, 4, D)
  assert _free_axes(x) == 1
  mesh = sharding.make_mesh(sharding.MeshShape(fsdp=2))
  with jax.set_mesh(mesh):
    assert _free_axes(x) == 1
  mesh = sharding.make_mesh(sharding.MeshShape(context=2))
  with jax.set_mesh(mesh):
    assert _free_axes(x) == 2


def test_parameters_are_float32_with_their_axes():
  layer = _layer(dtype=jnp.bfloat16)
  x = _random(2, 4, D)
  y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
  params = variables["params"]
  assert y.dtype == jnp.bfloat16
  assert params["kernel"].names == ("embed", "mlp")
  assert params["bias"].names == ("mlp",)
  plain = nn.meta.unbox(params)
  assert {p.dtype for p in plain.values()} == {jnp.dtype("float32")}


def test_bias_is_optional():
  layer = _layer(bias=False)
  variables = jax.eval_shape(layer.init, jax.random.key(0), _random(2, D))
  assert set(variables["params"]) == {"kernel"}
