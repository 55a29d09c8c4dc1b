"""Tiles: what a step does to each place alone, tiles do not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.nn import tiles

HEIGHT = tiles.Axis(size=4, hop=3, blend=1, keep=3)
WIDTH = tiles.Axis(size=5, hop=2, blend=3, keep=2)  # blends reach over a tile


# Most of the time is LLVM's, which need not try hard on arrays this small.
_run = functools.partial(
  jax.jit,
  static_argnums=(0, 3, 4),
  compiler_options={"xla_backend_optimization_level": 0},
)(tiles.run)


def _random(*shape):
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape), "f4")


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (4, 5), (5, 6), (9, 7)])
def test_joined_tiles_are_the_whole(size):
  x = _random(2, 3, *size, 4)
  step = lambda past, x: (past, 2 * x)
  _, y = _run(step, {}, x, HEIGHT, WIDTH)
  np.testing.assert_allclose(y, 2 * x, atol=1e-6)


@pytest.mark.parametrize("size", [(4, 5), (7, 6)])
def test_a_step_may_enlarge(size):
  x = _random(1, 2, *size, 3)
  larger = lambda x: jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
  height, width = (
    tiles.Axis(a.size, a.hop, 2 * a.blend, 2 * a.keep) for a in (HEIGHT, WIDTH)
  )
  step = lambda past, x: (past, larger(x))
  _, y = _run(step, {}, x, height, width)
  np.testing.assert_allclose(y, larger(x), atol=1e-6)


def test_tiles_fade_into_each_other():
  """Each tile is constant: its number."""
  count = iter(range(1, 4))

  def step(past, x):
    return past, jnp.full_like(x, next(count))

  one = tiles.Axis(size=1, hop=1, blend=0, keep=1)
  wide = tiles.Axis(size=4, hop=3, blend=2, keep=3)
  with jax.disable_jit():  # so that each tile is a call
    _, y = tiles.run(step, {}, jnp.zeros((1, 1, 1, 7, 1)), one, wide)
  # The third has one place: of a blend of one, which is all the second's.
  np.testing.assert_allclose(y.ravel(), [1, 1, 1, 1, 1.5, 2, 2])


def test_each_tile_has_a_past_of_its_own():
  """A step that adds what it saw before sums a stream's chunks."""

  def step(past, x):
    total = past.get("sum", 0) + x
    return {"sum": total}, total

  chunks, past, total = _random(3, 1, 2, 5, 7, 2), {}, 0
  for x in chunks:
    past, y = _run(step, past, x, HEIGHT, WIDTH)
    total = total + x
    np.testing.assert_allclose(y, total, atol=1e-5)


def test_tiles_of_one_size_are_one_program():
  calls = []

  def step(past, x):
    calls.append(x.shape)
    return past, x

  jax.eval_shape(
    lambda x: tiles.run(step, {}, x, HEIGHT, WIDTH)[1],
    jnp.zeros((1, 1, 12, 20, 1)),
  )
  assert len(set(calls)) == len({(s[2], s[3]) for s in calls})
  assert len(calls) <= 2 * len(set(calls))  # a map may trace its body twice
