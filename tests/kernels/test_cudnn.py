"""cuDNN's attention equals `dot`; which kernel a GPU gets, by lowering.

Where no card is, what a program calls is read from its text, and masks and
lengths are tried on primitives that stand in for cuDNN's.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding
from vdit_jax.kernels import blocks, cudnn
from vdit_jax.nn import attention, layers

B, N = 2, 3
LENGTHS = [(10, 6), (9, 6), (10, 7), (9, 7)]
_CALL = re.compile(r"__cudnn\$fmha\w+")
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


def _random(L, S, K=16, dtype=jnp.bfloat16):
  """Queries, keys, values, and weights of the output's sum."""
  rng = np.random.default_rng(0)
  shapes = (B, L, N, K), (B, S, N, K), (B, S, N, K), (B, L, N, K)
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def _mask(kind, S):
  rows = {
    "prefix": [np.arange(S) < 3, np.arange(S) < S],
    "holes": [np.arange(S) % 2 == 1, np.arange(S) > 2],
    "none seen": [np.arange(S) < 0, np.arange(S) < 4],
  }
  return None if kind == "no" else jnp.asarray(np.stack(rows[kind]))


def _gradients(attend, weights):
  def total(*qkv):
    y = attend(*qkv).astype(jnp.float32)
    return jnp.sum(weights.astype(jnp.float32) * y), y

  def run(*qkv):
    grads, y = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)
    return y, *grads

  return run


def _lower(fn, *args):
  """Text of the program that a CUDA device would get."""
  traced = jax.jit(fn).trace(*args)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def _calls(text):
  return sorted(_CALL.findall(text))


def _written_out(q, k, v, lengths):
  seen = jnp.arange(k.shape[1]) < lengths[:, None]
  return attention.dot(q, k, v, mask=seen)


class _Forward:
  """Stands in for cuDNN's primitive; garbage where cuDNN promises nothing."""

  @staticmethod
  def bind(
    q, k, v, _, of_queries, of_keys, *rest, is_training, mask_type, **how
  ):
    if mask_type == cudnn.fused.MaskType.NO_MASK:
      assert q.shape[1] % 2 == k.shape[1] % 2 == 0
      of_keys = jnp.full(len(q), k.shape[1])
    else:
      assert of_queries.dtype == of_keys.dtype == jnp.int32
    y = _written_out(q, k, v, of_keys)
    return (y, jnp.zeros(())) if is_training else (y,)


class _Backward:
  @staticmethod
  def bind(q, k, v, *args, mask_type, **how):
    of_keys, do = args[2], args[-1]
    if mask_type == cudnn.fused.MaskType.NO_MASK:
      of_keys = jnp.full(len(q), k.shape[1])
    run = functools.partial(_written_out, lengths=of_keys)
    dq, dk, dv = jax.vjp(run, q, k, v)[1](do)
    unseen = (jnp.arange(k.shape[1]) >= of_keys[:, None])[..., None, None]
    return dq, jnp.where(unseen, jnp.nan, dk), jnp.where(unseen, jnp.nan, dv)


@pytest.fixture
def stand_in(monkeypatch):
  fused = cudnn.fused
  monkeypatch.setattr(fused, "_dot_product_attention_fwd_p", _Forward)
  monkeypatch.setattr(fused, "_dot_product_attention_bwd_p", _Backward)


@pytest.mark.parametrize("L, S", LENGTHS)
@pytest.mark.parametrize("kind", ["no", "prefix", "holes", "none seen"])
def test_masks_and_lengths_are_those_of_dot(stand_in, kind, L, S):
  *qkv, weights = _random(L, S, dtype=jnp.float16)
  mask = _mask(kind, S)
  run = functools.partial(cudnn.attend, mask=mask, saved=None)
  found = _gradients(run, weights)(*qkv)
  dot = functools.partial(attention.dot, mask=mask)
  wanted = _gradients(dot, weights)(*qkv)
  np.testing.assert_allclose(run(*qkv), found[0], atol=1e-6)
  np.testing.assert_allclose(found[0], wanted[0], atol=2e-3)
  used = jnp.ones(B, bool) if mask is None else jnp.any(mask, axis=1)
  for x, want in zip(found[1:], wanted[1:], strict=True):
    np.testing.assert_allclose(x[used], want[used], atol=1e-2)
    assert np.isfinite(x).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("L, S", LENGTHS)
@pytest.mark.parametrize("kind", ["no", "prefix"])
def test_a_gpu_gets_cudnn(monkeypatch, kind, L, S, K, dtype):
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  *qkv, weights = _random(L, S, K, jnp.dtype(dtype))
  run = functools.partial(attention.attend, mask=_mask(kind, S))
  assert _calls(_lower(run, *qkv)) == [FORWARD]
  text = _lower(_gradients(run, weights), *qkv)
  assert _calls(text) == [FORWARD, BACKWARD]
  even = kind == "no" and L % 2 == S % 2 == 0
  assert ("NO_MASK" in text) == even
  assert ("PADDING" in text) != even


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
  "K, dtype", [(64, "float32"), (132, "bfloat16"), (20, "bfloat16")]
)
def test_what_cudnn_has_no_kernel_for_is_written_out(
  monkeypatch, K, dtype, masked
):
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  *qkv, weights = _random(10, 6, K, jnp.dtype(dtype))
  mask = _mask("holes", 6) if masked else None
  run = functools.partial(attention.attend, mask=mask)
  jaxpr = jax.make_jaxpr(run)(*qkv)
  assert "scan" not in str(jaxpr)
  assert not _calls(_lower(_gradients(run, weights), *qkv))
  monkeypatch.setattr(blocks, "GPU_LOGITS", 100)
  again = functools.partial(run, kernel="auto")  # or the trace is kept
  assert "scan" in str(jax.make_jaxpr(again)(*qkv))
  with pytest.raises(ValueError, match=f"{dtype}.*kernel='auto'"):
    attention.attend(*qkv, mask=mask, kernel="cudnn")


@pytest.mark.parametrize("context, forwards", [("ulysses", 1), (None, 2)])
def test_remat_of_all_but_attention_runs_it_once(
  monkeypatch, context, forwards
):
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  *qkv, weights = _random(10, 10, 64)
  save = jax.checkpoint_policies.save_only_these_names(layers.ATTENDED)

  @functools.partial(jax.checkpoint, policy=save)
  def block(q, k, v):
    # The sine's gradient asks for attention's output.
    return jnp.sin(attention.attend(q, k, v, context=context))

  text = _lower(_gradients(block, weights), *qkv)
  assert _calls(text) == [FORWARD] * forwards + [BACKWARD]


def test_devices_of_a_mesh_each_call_it(monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  mesh = sharding.make_mesh(
    sharding.MeshShape(data=2, context=3), jax.devices()[:6]
  )
  *qkv, weights = _random(11, 11, 64)
  with jax.set_mesh(mesh):
    text = _lower(_gradients(attention.attend, weights), *qkv)
  assert _calls(text) == [FORWARD, BACKWARD]
  assert "PADDING" in text  # 11 do not divide over 3 devices
