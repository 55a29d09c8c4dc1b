"""Convolutions: a CPU's forms are plain, causal, streamed is whole."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding
from vdit_jax.cost import flops
from vdit_jax.nn import conv3d

KERNELS = [(3, 3, 3), (1, 3, 3), (3, 1, 1)]
F, H, W, C_IN, C_OUT = 7, 5, 3, 2, 4


def _random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "f4")


def _params(kernel):
  weights = _random(*kernel, C_IN, C_OUT) / np.sqrt(np.prod(kernel) * C_IN)
  return {"params": {"kernel": weights, "bias": _random(C_OUT, seed=2)}}


def _init(layer, x):
  run = nn.init_with_output(lambda layer, x: layer(x), layer)
  return jax.eval_shape(run, jax.random.key(0), x)


def _close(a, b):
  np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("frames", [2, 7])
@pytest.mark.parametrize(
  "form, kernel",
  [
    *((conv3d._folded, kernel) for kernel in KERNELS),
    *((conv3d._paired, kernel) for kernel in KERNELS if kernel[0] == 3),
  ],
)
def test_forms_for_a_cpu_are_the_plain_one(form, kernel, frames):
  x = _random(2, frames + kernel[0] - 1, H, W, C_IN)
  weights = _params(kernel)["params"]["kernel"]
  y, pull = jax.vjp(conv3d._plain, x, weights)
  y_form, pull_form = jax.vjp(form, x, weights)
  assert y.shape == (2, frames, H, W, C_OUT)
  _close(y_form, y)
  for a, b in zip(pull_form(y), pull(y), strict=True):
    _close(a, b)


def test_pairs_need_two_thirds_of_the_flops():
  work = lambda dtype, frames: flops.flops(
    conv3d._on_cpu,
    jnp.zeros((1, frames + 2, H, W, C_IN), dtype),
    jnp.zeros((3, 3, 3, C_IN, C_OUT), dtype),
  )
  assert 3 * work("float32", 8) == 2 * work("bfloat16", 8)
  assert work("float32", 1) == work("bfloat16", 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_platform_does_not_matter(kernel, monkeypatch):
  layer, params = conv3d.CausalConv3d(C_OUT, kernel), _params(kernel)
  x = _random(2, F, H, W, C_IN)
  here = layer.apply(params, x)
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  monkeypatch.setattr(conv3d, "_on_cpu", None)
  _close(layer.apply(params, x), here)


@pytest.mark.parametrize("kernel", KERNELS)
def test_convolution_is_the_sum_of_its_taps(kernel):
  kt, kh, kw = kernel
  x, params = np.asarray(_random(1, F, H, W, C_IN)), _params(kernel)
  weights = np.asarray(params["params"]["kernel"], np.float64)
  pads = [(0, 0), (kt - 1, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)]
  padded = np.pad(x, pads)
  want = np.zeros((1, F, H, W, C_OUT)) + params["params"]["bias"]
  for i, j, k in np.ndindex(kernel):
    tap = padded[:, i : i + F, j : j + H, k : k + W]
    want += tap @ weights[i, j, k]
  _close(conv3d.CausalConv3d(C_OUT, kernel).apply(params, x), want)


def test_no_frame_sees_a_later_one():
  layer, params = conv3d.CausalConv3d(C_OUT, (3, 3, 3)), _params((3, 3, 3))
  x = _random(1, F, H, W, C_IN)
  y = layer.apply(params, x)
  for k in range(F):
    changed = np.abs(layer.apply(params, x.at[:, k].add(1.0)) - y)
    reached = changed.max(axis=(0, 2, 3, 4)) > 1e-4
    assert list(np.flatnonzero(reached)) == list(range(k, min(k + 3, F)))
    assert changed[:, :k].max(initial=0.0) == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chunks", [(1, 1, 5), (3, 4), (2, 1, 3, 1), (1,) * 7])
def test_streamed_is_whole(kernel, chunks):
  layer, params = conv3d.CausalConv3d(C_OUT, kernel), _params(kernel)
  x = _random(2, F, H, W, C_IN)
  parts, stream, sizes = [], {}, set()
  for i, chunk in enumerate(np.split(x, np.cumsum(chunks)[:-1], axis=1)):
    y, stream = layer.apply(
      params | stream, chunk, first=i == 0, mutable=[conv3d.STREAM]
    )
    parts.append(y)
    sizes |= {leaf.shape for leaf in jax.tree.leaves(stream)}
  assert sizes == ({(2, 2, H, W, C_IN)} if kernel[0] == 3 else set())
  _close(np.concatenate(parts, axis=1), layer.apply(params, x))


def test_initialising_keeps_no_stream():
  layer = conv3d.CausalConv3d(C_OUT, (3, 3, 3))
  x = _random(1, F, H, W, C_IN)
  assert set(_init(layer, x)[1]) == {"params"}


def test_bfloat16_computes_and_float32_keeps():
  layer = conv3d.CausalConv3d(C_OUT, (3, 3, 3), dtype=jnp.bfloat16)
  x = _random(1, F, H, W, C_IN)
  y, variables = _init(layer, x)
  assert y.dtype == jnp.bfloat16
  assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("f4")}
