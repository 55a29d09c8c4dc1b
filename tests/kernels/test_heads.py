"""A projection cut by the kernel is one cut, normalised and rotated plainly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from vdit_jax.kernels import heads as kernels
from vdit_jax.nn import norms, positions

N, K, EPS = 2, 128, 1e-3
TWO_CORES = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)


def _inputs(B, L, parts, normed, dtype=jnp.float32):
  """A projection, scales, angles, and weights of the parts' sums."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
  x = draw(B, L, N * parts * K).astype(dtype)
  scales = tuple(1 + draw(K).astype(jnp.float32) / 2 for _ in range(normed))
  weights = [draw(B, L, N * K) for _ in range(parts)]
  return x, scales, 3 * draw(L, K // 2).astype(jnp.float32), weights


def _plain(x, scales, angles, parts):
  B, L, _ = x.shape
  found = list(jnp.moveaxis(x.reshape(B, L, N, parts, K), 3, 0))
  for i, scale in enumerate(scales):
    found[i] = norms.rms_norm(found[i], scale, EPS)
    if angles is not None:
      found[i] = positions.rotate(found[i], angles)
  return [part.reshape(B, L, -1) for part in found]


def _fused(x, scales, angles, parts, interpret=True):
  tables = () if angles is None else kernels.tables(angles)
  return kernels.cut(
    *(x, scales, tables),
    heads=N,
    parts=parts,
    eps=EPS,
    interpret=interpret,
  )


def _values_and_grads(cut, x, scales, angles, weights):
  def total(x, scales):
    found = cut(x, scales, angles, len(weights))
    return sum(map(jnp.vdot, weights, found)), found

  run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
  return jax.tree.leaves(run(x, scales))


def _distance(x, y):
  x, y = (np.asarray(a, np.float64) for a in (x, y))
  return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize(
  "B, L, parts, normed, rotated",
  [
    (2, 600, 3, 2, True),  # the last window ends in NaN
    (1, 512, 3, 2, True),
    (2, 226, 2, 1, False),
    (1, 530, 1, 1, False),
  ],
)
def test_is_plain(B, L, parts, normed, rotated):
  x, scales, angles, weights = _inputs(B, L, parts, normed)
  angles = angles if rotated else None
  cut = functools.partial(_fused, interpret=TWO_CORES)
  found = _values_and_grads(cut, x, scales, angles, weights)
  wanted = _values_and_grads(_plain, x, scales, angles, weights)
  for y, want in zip(found, wanted, strict=True):
    assert y.shape == want.shape and y.dtype == want.dtype
    assert _distance(y, want) < 2e-6
  assert not interpret_pallas_call.races.races_found


def test_bfloat16_is_nearer_to_float32_than_plain():
  """One rounding, where the plain one rounds between norm and rotation."""
  x, scales, angles, weights = _inputs(1, 200, 3, 2, jnp.bfloat16)
  exact = _values_and_grads(
    _plain, x.astype(jnp.float32), scales, angles, weights
  )
  plain = _values_and_grads(_plain, x, scales, angles, weights)
  found = _values_and_grads(_fused, x, scales, angles, weights)
  for y, near, want in zip(found, plain, exact, strict=True):
    assert y.dtype == near.dtype
    assert _distance(y, want) <= _distance(near, want)


def test_head_that_is_no_whole_tile_is_refused():
  with pytest.raises(ValueError, match="128n, got 64; use nn.heads"):
    kernels.cut(
      jnp.zeros((1, 8, 128)), (), (), heads=2, parts=1, eps=EPS, interpret=True
    )
