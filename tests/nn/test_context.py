"""Attention over split sequences is attention on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding
from vdit_jax.kernels import blocks, splash
from vdit_jax.nn import attention

B, N, K, M = 4, 8, 16, 5
MESHES = [
  dict(data=2, fsdp=2, context=2),
  dict(data=1, fsdp=2, tensor=2, context=2),
  dict(data=1, fsdp=2, context=4),
  dict(data=1, context=8),
]


def _inputs(L, batch=B):
  """Video's q, k, v, text's k, v, and weights of the output's sum."""
  rng = np.random.default_rng(0)
  lengths = L, L, L, M, M, L
  draw = lambda n: rng.standard_normal((batch, n, N, K))
  return [jnp.asarray(draw(n), jnp.float32) for n in lengths]


def _run(kernel, context, q, k, v, text_k, text_v, weights):
  """Self-attention, then attention to a masked text; values and gradients."""
  mask = jnp.arange(M) < (1 + jnp.arange(q.shape[0]) % M)[:, None]
  attend = functools.partial(attention.attend, kernel=kernel)

  def total(q, k, v, text_k, text_v):
    y = attend(q, k, v, context=context)
    y = y + attend(y, text_k, text_v, mask=mask, context=None)
    return jnp.sum(weights * y), y

  run = jax.grad(total, argnums=range(5), has_aux=True)
  grads, y = run(q, k, v, text_k, text_v)
  return y, *grads


_jit = functools.partial(jax.jit, static_argnums=(0, 1))


def _sharded(mesh, kernel, context, inputs):
  mesh = sharding.make_mesh(sharding.MeshShape(**mesh))
  with jax.set_mesh(mesh):
    return _jit(_run)(kernel, context, *inputs)


def _assert_same(found, wanted):
  for x, want in zip(found, wanted, strict=True):
    assert x.shape == want.shape
    x, want = np.asarray(x), np.asarray(want)
    assert np.linalg.norm(x - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("context", attention.CONTEXTS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("L", [16, 19])
def test_is_dot(mesh, context, L):
  inputs = _inputs(L)
  wanted = _jit(_run)("dot", context, *inputs)
  _assert_same(_sharded(mesh, "auto", context, inputs), wanted)


@pytest.mark.parametrize("context", attention.CONTEXTS)
def test_blocks_are_dot(context, monkeypatch):
  monkeypatch.setattr(blocks, "LOGITS", 100)
  inputs = _inputs(19)
  wanted = _jit(_run)("dot", context, *inputs)
  for mesh in (MESHES[1], dict(data=2, fsdp=2, tensor=2)):
    _assert_same(_sharded(mesh, "blocks", context, inputs), wanted)


@pytest.mark.parametrize("context", attention.CONTEXTS)
def test_batch_that_does_not_divide_is_padded(context):
  inputs = _inputs(19, batch=3)
  wanted = _jit(_run)("dot", context, *inputs)
  _assert_same(_sharded(MESHES[0], "auto", context, inputs), wanted)


@pytest.mark.parametrize(
  "mesh, context",
  [(MESHES[1], "ulysses"), (MESHES[0], "gather"), (dict(data=8), "ulysses")],
  ids=str,
)
def test_kernel_is_dot(mesh, context, monkeypatch):
  small = splash.Sizes((128,), (128,), 128)
  monkeypatch.setattr(splash, "sizes_of", lambda kind: small)
  inputs = _inputs(150)
  wanted = _jit(_run)("dot", context, *inputs)
  _assert_same(_sharded(mesh, "splash", context, inputs), wanted)


@pytest.mark.parametrize(
  "context, wanted, other",
  [
    ("ulysses", "all_to_all", "all_gather"),
    ("gather", "all_gather", "all_to_all"),
  ],
)
def test_collectives_are_the_methods(context, wanted, other):
  mesh = sharding.make_mesh(sharding.MeshShape(**MESHES[0]))
  with jax.set_mesh(mesh):
    text = _jit(_run).lower("dot", context, *_inputs(16)).as_text()
  assert wanted in text and other not in text


def test_one_device_needs_no_collective():
  text = _jit(_run).lower("dot", "ulysses", *_inputs(16)).as_text()
  assert "all_" not in text


def test_heads_that_do_not_divide_are_refused():
  inputs = [x[:, :, :6] for x in _inputs(16)]
  match = "6 heads over mesh.tensor=1.*context=4; use context='gather'.*=3"
  with pytest.raises(ValueError, match=match):
    _sharded(MESHES[2], "dot", "ulysses", inputs)
  wanted = _jit(_run)("dot", "gather", *inputs)
  _assert_same(_sharded(MESHES[2], "dot", "gather", inputs), wanted)
  inputs = [x[:, :, :3] for x in inputs]
  with pytest.raises(ValueError, match="3 heads do not.*tensor=2; one .* 1"):
    _sharded(MESHES[1], "dot", "gather", inputs)
