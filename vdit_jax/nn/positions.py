"""Where a token stands: rotary angles in three axes, time embeddings.

Rotary positions (RoFormer, arXiv:2104.09864) are relative, so one set of
weights takes any number of frames, any height and any width.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
  """Share a head's dimensions among frames, height and width.

  Height and width get 2 * (head_dim // 6) each and frames the rest, which is
  44, 42, 42 of 128 (arXiv:2503.20314).
  """
  if head_dim % 2 or head_dim < 6:
    raise ValueError(f"head_dim must be even and at least 6, got {head_dim}")
  side = 2 * (head_dim // 6)
  return head_dim - 2 * side, side, side


def rotary_angles(
  grid: tuple[int, int, int], head_dim: int, theta: float
) -> jax.Array:
  """Angles of every token of a grid (f, h, w), flattened in that order.

  Args:
    grid: tokens along frames, height and width.
    head_dim: dimensions of a head, shared out by `split_head_dim`.
    theta: the longest wavelength is 2 pi theta tokens.

  Returns:
    float32 [f * h * w, head_dim / 2].
  """
  places = [jnp.arange(n, dtype=jnp.float32) for n in grid]
  return place_angles(places, split_head_dim(head_dim), theta)


def place_angles(
  places: Sequence[jax.Array], head_dims: Sequence[int], theta: float
) -> jax.Array:
  """Angles of every token of a grid whose lines stand at any places.

  Args:
    places: of the lines along frames [f], height [h] and width [w].
    head_dims: dimensions of a head for each axis.
    theta: as in `rotary_angles`.

  Returns:
    float32 [f * h * w, sum(head_dims) / 2].
  """
  grid = tuple(len(place) for place in places)
  parts = []
  for axis, dims in enumerate(head_dims):
    frequencies = theta ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    place = jnp.asarray(places[axis], jnp.float32)
    shape = [1, 1, 1, dims // 2]
    shape[axis] = grid[axis]
    angles = (place[:, None] * frequencies).reshape(shape)
    parts.append(jnp.broadcast_to(angles, (*grid, dims // 2)))
  return jnp.concatenate(parts, axis=-1).reshape(-1, sum(head_dims) // 2)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotate the halves of each head by the angles of its token, in float32.

  Args:
    x: queries or keys [B, L, N, K].
    angles: [L, K / 2]. Dimension i turns with dimension i + K / 2: halves
      keep the lanes of a TPU register contiguous where interleaved pairs
      would shuffle them.
  """
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return turned.astype(x.dtype)


def rotate_pairs(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotate as `rotate`, but dimension 2i turns with dimension 2i + 1."""
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  a, b = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)


def sincos(places: Sequence[np.ndarray], dims: Mapping[int, int]) -> jax.Array:
  """Fixed table of a grid: the Transformer's (arXiv:1706.03762) in each axis.

  Args:
    places: of the lines along frames [f], height [h] and width [w].
    dims: axis to how many dimensions tell of it, sines first; in the order in
      which they are joined.

  Returns:
    float32 [f * h * w, sum of dims].
  """
  grid = tuple(len(place) for place in places)
  parts = []
  for axis, width in dims.items():
    half = width // 2
    frequencies = 10_000.0 ** (-np.arange(half, dtype=np.float64) / half)
    angles = np.asarray(places[axis], np.float64)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    shape = [1, 1, 1, width]
    shape[axis] = grid[axis]
    # Lines are small constants of the program; the whole table is not.
    line = jnp.asarray(line.reshape(shape), jnp.float32)
    parts.append(jnp.broadcast_to(line, (*grid, width)))
  return jnp.concatenate(parts, axis=-1).reshape(-1, sum(dims.values()))


def crop(
  size: tuple[int, int], trained: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Places of a grid's rows and columns on the grid trained at.

  The grid is scaled as a whole, to touch the bounds of the other from inside,
  and centred (arXiv:2405.08748, 2408.06072).

  Args:
    size: rows and columns of the grid.
    trained: those of the grid trained at, whose places are 0, 1, 2, ...

  Returns:
    Places of the rows and of the columns, in lines of the grid trained at.
  """
  h, w = size
  if h / w > trained[0] / trained[1]:
    height, width = trained[0], round(trained[0] / h * w)
  else:
    height, width = round(trained[1] / w * h), trained[1]
  top = round((trained[0] - height) / 2)
  left = round((trained[1] - width) / 2)
  # As released: the last place is a share of the far edge, which is not one
  # step before it unless the grid begins at 0.
  rows = np.linspace(top, (top + height) * (h - 1) / h, h)
  columns = np.linspace(left, (left + width) * (w - 1) / w, w)
  return rows, columns


def time_embedding(
  t: jax.Array, width: int, scale: float = 1000.0
) -> jax.Array:
  """Sinusoidal embedding of diffusion time, t [...] -> float32 [..., width].

  The frequencies are those of DDPM (arXiv:2006.11239) over t * scale, so that
  t in [0, 1] spans what 1,000 discrete steps spanned.
  """
  half = width // 2
  # The exponent in float32 as everywhere, but its exponential to the last bit:
  # at t = 1 an error of one bit is one of 6e-5 in the angle.
  steps = np.arange(half, dtype=np.float32)
  exponent = np.float32(-np.log(10_000.0)) * steps / np.float32(half)
  frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
  angles = scale * t.astype(jnp.float32)[..., None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
