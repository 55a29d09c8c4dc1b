"""How much a video moves, and how smoothly, by matching blocks.

Every frame but the first and the last is explained by its two neighbours: the
displacement at which the frame before, it itself and the frame after agree best
around a pixel is its velocity there, and the mean of the two neighbours at that
place the guess. How near the guess comes is the smoothness, which VBench
(arXiv:2311.17982) takes from a network for interpolation, AMT; how large the
velocities are is the amount of motion, for which it has another, RAFT. These
are plain and need no weights, so their values are not VBench's. A still video
is perfectly smooth: never read one number without the other.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax.metrics import features

SIDE = 96  # pixels of the shorter side while matching
REACH = 8  # pixels a frame: the largest displacement, a twelfth of the side

_BLOCK = 7  # pixels a side of what is compared
_MARGIN = REACH + _BLOCK // 2  # pixels whose match may lie outside the frame
_COST = 1e-3  # of a pixel's displacement: flat places stand still
_FASTEST = 0.05  # share of the pixels that tell the amount of motion


@jax.jit
def measure(video: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Measure smoothness and amount of motion.

  Args:
    video: [B, F, H, W, 3] in [-1, 1], F at least 3.

  Returns:
    smoothness [B], 1 less the mean absolute error of the guesses in units of
    the pixels' range: at most 1; and amount [B], the mean speed of the fastest
    twentieth of the pixels, in shorter sides of the frame a frame: from 0 to
    `REACH` / `SIDE`, where it saturates. Both leave a margin out, an eighth of
    the side, where what leaves or enters the frame has no match.
  """
  if video.ndim != 5 or video.shape[1] < 3:
    raise ValueError(
      "video must be [B, F, H, W, 3] of at least 3 frames to tell motion, got "
      f"{video.shape}; measure longer clips"
    )
  small = (features.resize(video, SIDE) + 1) / 2
  guess, speed = _match(small[:, :-2], small[:, 1:-1], small[:, 2:])
  inside = (..., slice(_MARGIN, -_MARGIN), slice(_MARGIN, -_MARGIN))
  error = jnp.abs(guess - small[:, 1:-1]).mean(-1)[inside].mean(axis=(2, 3))
  speed = speed[inside]
  pixels = speed.reshape(*speed.shape[:2], -1)
  count = max(round(_FASTEST * pixels.shape[-1]), 1)
  fastest, _ = jax.lax.top_k(pixels, count)
  return 1 - error.mean(axis=1), fastest.mean(axis=(1, 2)) / SIDE


def _match(
  before: jax.Array, middle: jax.Array, after: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Match frames [B, F, H, W, 3]: a guess of the middle, each pixel's speed.

  The middle must agree too: of neighbours alone, the ground on both sides of a
  thin object would agree best.
  """
  places = _displacements()
  pad = ((0, 0), (0, 0), (REACH, REACH), (REACH, REACH), (0, 0))
  before, after = (jnp.pad(x, pad, mode="edge") for x in (before, after))

  def shifted(x, offset):
    start = (0, 0, REACH + offset[0], REACH + offset[1], 0)
    B, F, H, W, C = x.shape
    size = B, F, H - 2 * REACH, W - 2 * REACH, C
    return jax.lax.dynamic_slice(x, start, size)

  def step(best, place):
    least, guess, speed = best
    a, b = shifted(before, -place), shifted(after, place)
    length = jnp.sqrt(jnp.square(place).sum().astype(jnp.float32))
    apart = (jnp.abs(a - middle) + jnp.abs(b - middle)).mean(-1) / 2
    cost = _blocks(apart) + _COST * length
    better = cost < least
    mixed = jnp.where(better[..., None], (a + b) / 2, guess)
    return (
      jnp.where(better, cost, least),
      mixed,
      jnp.where(better, length, speed),
    ), None

  none = jnp.zeros_like(shifted(before, jnp.zeros(2, jnp.int32)))
  start = jnp.full(none.shape[:-1], jnp.inf), none, none[..., 0]
  (_, guess, speed), _ = jax.lax.scan(step, start, jnp.asarray(places))
  return guess, speed


def _blocks(error: jax.Array) -> jax.Array:
  """Average [B, F, H, W] over the block around each pixel."""
  half = _BLOCK // 2
  for axis in (-2, -1):
    pad = [(0, 0)] * error.ndim
    pad[axis] = (half, half)
    size = error.shape[axis]
    padded = jnp.pad(error, pad, mode="edge")
    parts = (
      jax.lax.slice_in_dim(padded, i, i + size, axis=axis % error.ndim)
      for i in range(_BLOCK)
    )
    error = functools.reduce(operator.add, parts)
  return error / _BLOCK**2


def _displacements() -> np.ndarray:
  """Displacements (rows, columns) within reach, int32 [n, 2]."""
  line = np.arange(-REACH, REACH + 1, dtype=np.int32)
  grid = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
  return grid[np.square(grid).sum(-1) <= REACH**2]
