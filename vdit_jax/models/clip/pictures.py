"""Images as CLIP was trained on them: of its size, normalised.

frames [B, H, W, 3] in [-1, 1] -> prepare -> [B, side, side, 3]

The same as transformers' image processor does with Pillow: resized by a bicubic
filter that is as wide as the image is reduced, to bytes along each axis, and
cut to its centre.
"""

import jax
import jax.numpy as jnp
import numpy as np

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def prepare(frames: jax.Array, side: int) -> jax.Array:
  """Resize frames to a shorter side of so many pixels, cut out their centre.

  Args:
    frames: [B, H, W, 3] in [-1, 1].
    side: pixels of height and width.

  Returns:
    Float32 [B, side, side, 3], normalised.
  """
  H, W = frames.shape[1:3]
  short = min(H, W)
  height, width = int(side * H / short), int(side * W / short)
  x = (frames.astype(jnp.float32) + 1) * 127.5
  exact = jax.lax.Precision.HIGHEST
  columns, rows = _bicubic(W, width), _bicubic(H, height)
  x = _to_bytes(jnp.einsum("ow,bhwc->bhoc", columns, x, precision=exact))
  x = _to_bytes(jnp.einsum("oh,bhwc->bowc", rows, x, precision=exact))
  top, left = (height - side) // 2, (width - side) // 2
  x = x[:, top : top + side, left : left + side] / 255
  return (x - jnp.array(_MEAN)) / jnp.array(_STD)


def _to_bytes(x):
  return jnp.clip(jnp.floor(x + 0.5), 0, 255)


def _bicubic(size: int, new: int) -> np.ndarray:
  """Weights [new, size] of a bicubic filter (a = -1/2), as Pillow has them."""
  scale = size / new
  reduced = max(scale, 1.0)  # the filter is as wide as the image is reduced
  centres = (np.arange(new) + 0.5) * scale
  first = np.maximum(np.trunc(centres - 2 * reduced + 0.5), 0)
  last = np.minimum(np.trunc(centres + 2 * reduced + 0.5), size)
  places = np.arange(size)
  far = np.abs((places + 0.5 - centres[:, None]) / reduced)
  near = (1.5 * far - 2.5) * far**2 + 1
  beyond = ((far - 5) * far + 8) * far * -0.5 + 2
  weights = np.where(far < 1, near, np.where(far < 2, beyond, 0.0))
  inside = (places >= first[:, None]) & (places < last[:, None])
  weights = np.where(inside, weights, 0.0)
  weights /= weights.sum(1, keepdims=True)
  return weights.astype(np.float32)
