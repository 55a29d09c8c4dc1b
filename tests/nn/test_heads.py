"""Heads are cut alike with and without the kernel, on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding
from vdit_jax.nn import heads, norms, positions

B, L, N, K = 4, 19, 4, 128
MESHES = [
  None,
  dict(data=8),
  dict(data=2, fsdp=2, context=2),
  dict(data=1, fsdp=2, tensor=2, context=2),
]


def _inputs():
  """A projection of three parts, scales, angles, vectors and weights."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  arrays = draw(B, L, N * 3 * K), draw(K), draw(K)
  vectors = draw(B, 1, N * K), draw(B, 1, N * K)
  return *arrays, *vectors, draw(L, K // 2), draw(4, B, L, N * K)


def _run(kernel, x, scale_q, scale_k, shift, scale, angles, weights):
  """A norm behind a cut: values and gradients of all but angles."""

  def total(x, scale_q, scale_k, shift, scale):
    q, k, v = heads.cut(
      *(x, [scale_q, scale_k], angles),
      heads=N,
      parts=3,
      eps=1e-3,
      kernel=kernel,
    )
    assert q.shape == k.shape == v.shape == (B, L, N, K)
    v = v.reshape(B, L, -1)
    found = norms.modulate(v, shift, scale, 1e-3, kernel)
    found = *found, q.reshape(v.shape), k.reshape(v.shape)
    return jnp.vdot(weights, jnp.stack(found)), found

  run = jax.grad(total, argnums=range(5), has_aux=True)
  return jax.tree.leaves(run(x, scale_q, scale_k, shift, scale))


_jit = functools.partial(jax.jit, static_argnums=0)


@pytest.fixture(scope="module")
def plain():
  return _jit(_run)("dot", *_inputs())


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_kernels_are_plain(mesh, plain):
  inputs = _inputs()
  if mesh is None:
    found = _jit(_run)("splash", *inputs)
  else:
    mesh = sharding.make_mesh(sharding.MeshShape(**mesh))
    with jax.set_mesh(mesh):
      text = str(jax.make_jaxpr(functools.partial(_run, "splash"))(*inputs))
      assert text.count("pallas_call[") == 4
      found = _jit(_run)("splash", *inputs)
  for x, want in zip(found, plain, strict=True):
    assert x.shape == want.shape
    x, want = np.asarray(x), np.asarray(want)
    assert np.linalg.norm(x - want) <= 1e-5 * np.linalg.norm(want)


def test_plain_is_its_parts():
  x, scale_q, scale_k, _, _, angles, _ = _inputs()
  q, k, v = heads.cut(
    *(x, [scale_q, scale_k], angles), heads=N, parts=3, eps=1e-3, kernel="dot"
  )
  parts = x.reshape(B, L, N, 3, K)
  np.testing.assert_array_equal(v, parts[..., 2, :])
  for y, i, scale in ((q, 0, scale_q), (k, 1, scale_k)):
    want = norms.RMSNorm(1e-3).apply(
      {"params": {"scale": scale}}, parts[..., i, :]
    )
    np.testing.assert_array_equal(y, positions.rotate(want, angles))


def test_heads_that_are_no_whole_tiles_have_no_kernel():
  run = functools.partial(
    heads.cut, heads=4, parts=1, eps=1e-3, kernel="splash"
  )
  text = str(jax.make_jaxpr(run)(jnp.ones((1, 8, 4 * 64)), [jnp.ones(64)]))
  assert "pallas_call" not in text


def test_heads_that_do_not_divide_are_refused():
  mesh = sharding.make_mesh(sharding.MeshShape(data=4, tensor=2))
  run = functools.partial(
    heads.cut, heads=3, parts=1, eps=1e-3, kernel="splash"
  )
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="3 heads do not"):
    jax.jit(run)(jnp.ones((1, 8, 3 * K)), [jnp.ones(K)])
