"""Frames that a caller gives: image-to-video, key frames, a clip to edit.

  image -> frames, mask -> `pipeline.generate`

A mask says which frames of a clip are given and stay. What a denoiser is shown
of them is its family's to say.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

_MOST = 1.001  # of a frame's values, for those who round


def first(image: np.ndarray, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
  """Let an image be the given first frame of a clip.

  Args:
    image: uint8 or float in [-1, 1], [..., H, W, 3].
    num_frames: of the clip, F.

  Returns:
    Frames [..., F, H, W, 3], all of them the image, and the mask [..., F].
  """
  if image.dtype == np.uint8:
    image = image.astype(np.float32) / 127.5 - 1
  shape = *image.shape[:-3], num_frames
  frames = np.broadcast_to(image[..., None, :, :, :], shape + image.shape[-3:])
  return frames, np.broadcast_to(np.arange(num_frames) == 0, shape)


def check(frames: Any, mask: Any, wanted: tuple[int, ...]) -> None:
  """Refuse frames of another size, type or range, and a mask of another size.

  Args:
    frames: float in [-1, 1], [B, F, H, W, 3]; None is none.
    mask: bool [B, F]; None is none.
    wanted: shape that frames must have.
  """
  if frames is not None:
    _check_frames(frames, wanted)
  if mask is None:
    return
  if np.shape(mask) != wanted[:2]:
    raise ValueError(
      f"frame_mask must be {wanted[:2]}, one for each frame, got "
      f"{np.shape(mask)}"
    )


def latent_mask(mask: np.ndarray, stride: int) -> np.ndarray:
  """Given latent frames [B, f] of given frames, bool [B, F = stride n + 1]."""
  rest = mask[:, 1:].reshape(mask.shape[0], -1, stride)
  whole = rest.all(-1)
  if (rest.any(-1) != whole).any():
    raise ValueError(
      f"frame_mask must give all {stride} frames of a latent frame or none: "
      f"frame 0 alone, then 1..{stride}, {stride + 1}..{2 * stride} and so on"
    )
  return np.concatenate([mask[:, :1], whole], axis=1)


def _check_frames(frames: Any, wanted: tuple[int, ...]) -> None:
  dtype = np.dtype(frames.dtype)
  if frames.shape != wanted:
    raise ValueError(
      f"frames must be {wanted} as num_frames, height and width say, got "
      f"{frames.shape}; resize them, or give their size"
    )
  low, high = np.min(frames), np.max(frames)
  inside = -_MOST <= low and high <= _MOST  # NaN is not
  if not (jnp.issubdtype(dtype, jnp.floating) and inside):
    raise ValueError(
      f"frames must be floats in [-1, 1], got {dtype} in [{low}, {high}]; "
      "pipeline.to_float makes them of uint8"
    )
