"""Positions are relative, rotary ones and tables; one set for all grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.nn import positions

K, THETA = 16, 100.0
GRID = (5, 6, 7)


def _angles(grid, head_dim=K):
  return positions.rotary_angles(grid, head_dim, THETA).reshape(*grid, -1)


def _random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "f4")


ROTATIONS = [positions.rotate, positions.rotate_pairs]


def _logits(q, k, angles, rotate=positions.rotate):
  """Logits [L, S] of one head whose tokens have `angles` [..., K / 2]."""
  angles = angles.reshape(-1, angles.shape[-1])
  q, k = (rotate(x[None, :, None], angles)[0, :, 0] for x in (q, k))
  return np.asarray(q @ k.T)


@pytest.mark.parametrize("head_dim", [6, 8, 10, 16, 32, 64, 80, 128, 256])
def test_parts_of_a_head_sum_to_it(head_dim):
  parts = positions.split_head_dim(head_dim)
  assert sum(parts) == head_dim
  assert all(p >= 2 and p % 2 == 0 for p in parts)
  make = lambda: positions.rotary_angles((2, 3, 2), head_dim, THETA)
  angles = jax.eval_shape(make)
  assert angles.shape == (12, head_dim // 2)
  assert angles.dtype == jnp.float32


def test_split_of_128_is_that_of_wan():
  assert positions.split_head_dim(128) == (44, 42, 42)


@pytest.mark.parametrize("head_dim", [4, 7, 33])
def test_head_dim_that_has_no_parts_is_refused(head_dim):
  with pytest.raises(ValueError, match=f"got {head_dim}"):
    positions.split_head_dim(head_dim)


@pytest.mark.parametrize("rotate", ROTATIONS)
@pytest.mark.parametrize("offset", [(2, 0, 0), (0, 3, 0), (0, 0, 4), (2, 3, 4)])
def test_logits_depend_on_offsets_alone(offset, rotate):
  angles, size = _angles(GRID), (3, 3, 3)
  window = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
  q, k = _random(27, K), _random(27, K, seed=1)
  here = _logits(q, k, angles[:3, :3, :3], rotate)
  there = _logits(q, k, angles[window], rotate)
  np.testing.assert_allclose(there, here, atol=1e-4)
  assert np.abs(_logits(q, k, 2 * angles[window], rotate) - here).max() > 0.1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_moves_the_logits(axis):
  q = _random(K)
  line = jnp.moveaxis(_angles(GRID), axis, 0)[:4, 0, 0]
  logits = _logits(jnp.tile(q, (4, 1)), jnp.tile(q, (4, 1)), line)
  assert np.abs(np.diff(logits[0])).min() > 1e-3


def test_one_set_of_angles_for_any_grid():
  small = _angles((2, 4, 3))
  np.testing.assert_array_equal(small, _angles(GRID)[:2, :4, :3])


def test_tokens_are_ordered_frames_height_width():
  angles = _angles(GRID)
  f, h, w = (p // 2 for p in positions.split_head_dim(K))
  assert f + h + w == K // 2
  np.testing.assert_allclose(angles[:, 1, 2, 0], np.arange(5))
  np.testing.assert_allclose(angles[1, :, 2, f], np.arange(6))
  np.testing.assert_allclose(angles[1, 2, :, f + h], np.arange(7))


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_rotation_keeps_norms(rotate):
  x = _random(2, 210, 3, K)
  y = rotate(x, _angles(GRID).reshape(-1, K // 2))
  norms = [np.linalg.norm(v, axis=-1) for v in (x, y)]
  np.testing.assert_allclose(*norms, rtol=1e-5)
  np.testing.assert_allclose(y[:, 0], x[:, 0], atol=1e-6)
  assert np.abs(y - x).max() > 1


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_rotation_is_computed_in_float32(rotate):
  x = _random(1, 210, 1, K).astype(jnp.bfloat16)
  angles = _angles(GRID).reshape(-1, K // 2)
  y = rotate(x, angles)
  assert y.dtype == jnp.bfloat16
  exact = rotate(x.astype(jnp.float32), angles)
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_rotation_turns_complex_numbers(rotate):
  """Of its two dimensions, those of the halves or those side by side."""
  x, angles = _random(2, 5, 3, K), _random(5, K // 2, seed=1)
  pairs = [x[..., : K // 2], x[..., K // 2 :]]
  if rotate is positions.rotate_pairs:
    pairs = [x[..., ::2], x[..., 1::2]]
  a, b = (np.asarray(p, np.float64) for p in pairs)
  turned = (a + 1j * b) * np.exp(1j * np.float64(angles))[:, None]
  want = np.concatenate([turned.real, turned.imag], axis=-1)
  if rotate is positions.rotate_pairs:
    want = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
  np.testing.assert_allclose(rotate(x, angles), want, atol=1e-6)


PLACES = (np.arange(3), np.array([0.5, -2.0]), np.arange(4) / 1.5)
DIMS = {1: 6, 0: 4, 2: 8}  # height before frames: the order is the table's


def _table(places=PLACES):
  table = positions.sincos(places, DIMS)
  assert table.dtype == jnp.float32
  return np.asarray(table).reshape(*map(len, places), sum(DIMS.values()))


def test_sincos_is_its_formula():
  table, begin = _table(), 0
  assert table.shape == (3, 2, 4, 18)
  for axis, width in DIMS.items():
    for i in range(width // 2):
      angle = PLACES[axis] / 10_000 ** (2 * i / width)
      for column, want in ((i, np.sin(angle)), (width // 2 + i, np.cos(angle))):
        shape = [-1 if a == axis else 1 for a in range(3)]
        want = np.broadcast_to(want.reshape(shape), table.shape[:3])
        found = table[..., begin + column]
        np.testing.assert_allclose(found, want, atol=1e-6)
    begin += width


def test_sincos_products_depend_on_offsets_alone():
  """And every token's row is of one length."""
  moved = [
    place + shift for place, shift in zip(PLACES, (5, 7, 3), strict=True)
  ]
  here, there = (_table(p).reshape(-1, 18) for p in (PLACES, moved))
  np.testing.assert_allclose(there @ there.T, here @ here.T, atol=1e-5)
  np.testing.assert_allclose(np.sum(here**2, -1), 18 / 2, rtol=1e-6)
  assert np.abs(there - here).max() > 0.1


def test_sincos_tells_all_tokens_apart():
  rows = _table().reshape(-1, 18)
  apart = np.linalg.norm(rows[:, None] - rows, axis=-1) + 9 * np.eye(len(rows))
  assert apart.min() > 0.1


def test_time_embedding_is_ddpms():
  t = np.linspace(0, 1, 7).reshape(1, 7)
  y = jax.jit(positions.time_embedding, static_argnums=1)(t, 16)
  angles = 1000 * t[..., None] * 10_000.0 ** (-np.arange(8) / 8)
  want = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
  assert y.shape == (1, 7, 16) and y.dtype == jnp.float32
  np.testing.assert_allclose(y, want, atol=5e-4)
