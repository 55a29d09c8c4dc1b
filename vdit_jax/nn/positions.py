"""Where a token stands: rotary angles in three axes, time embeddings.

Rotary positions (RoFormer, arXiv:2104.09864) are relative, so one set of
weights takes any number of frames, any height and any width.
"""

import jax
import jax.numpy as jnp


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
  """Share a head's dimensions among frames, height and width.

  Height and width get 2 * (head_dim // 6) each and frames the rest, which is
  44, 42, 42 of 128 as in Wan 2.1.
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
  parts = []
  for axis, dims in enumerate(split_head_dim(head_dim)):
    frequencies = theta ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    angles = jnp.arange(grid[axis], dtype=jnp.float32)[:, None] * frequencies
    shape = [1, 1, 1, dims // 2]
    shape[axis] = grid[axis]
    parts.append(jnp.broadcast_to(angles.reshape(shape), (*grid, dims // 2)))
  return jnp.concatenate(parts, axis=-1).reshape(-1, head_dim // 2)


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


def time_embedding(
  t: jax.Array, width: int, scale: float = 1000.0
) -> jax.Array:
  """Sinusoidal embedding of diffusion time, t [...] -> float32 [..., width].

  The frequencies are those of DDPM (arXiv:2006.11239) over t * scale, so that
  t in [0, 1] spans what 1,000 discrete steps spanned.
  """
  half = width // 2
  frequencies = jnp.exp(
    -jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half
  )
  angles = scale * t.astype(jnp.float32)[..., None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
