"""Sizes in pixels and in latents, and what is said of those that do not fit."""

from typing import Any

import numpy as np


def whole(name: str, size: int, step: int) -> int:
  """Divide a size in pixels by a step; refuse one that does not divide."""
  if size < 1 or size % step:
    near = max(round(size / step), 1) * step
    raise ValueError(
      f"{name} must be a multiple of {step}, got {size}; try {near}"
    )
  return size // step


def latent_space(step: int, height: int, width: int) -> tuple[int, int]:
  """Divide height and width by a step; refuse what does not divide."""
  return whole("height", height, step), whole("width", width, step)


def latent_frames(num_frames: int, stride: int) -> int:
  """Count the latent frames of a video; refuse a length that is not whole."""
  if num_frames < 1 or (num_frames - 1) % stride:
    near = max(round((num_frames - 1) / stride), 0) * stride + 1
    raise ValueError(
      f"num_frames must be {stride}n+1, got {num_frames}; try {near}"
    )
  return (num_frames - 1) // stride + 1


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


class CausalLatents:
  """Lengths of an autoencoder whose first frame has a latent frame alone.

  A mixin of modules: `cfg` has time_stride, space_stride and latent_channels.
  """

  cfg: Any

  def latent_frames(self, num_frames: int) -> int:
    """Count the latent frames of a video; refuse a length that is not whole."""
    return latent_frames(num_frames, self.cfg.time_stride)

  def video_frames(self, latents: int) -> int:
    """Count the frames that f latent frames decode to."""
    return self.cfg.time_stride * (latents - 1) + 1

  def latent_shape(
    self, num_frames: int, height: int, width: int
  ) -> tuple[int, int, int, int]:
    """Latents (f, h, w, c) of a video; refuse a size that does not fit."""
    f = self.latent_frames(num_frames)
    space = latent_space(self.cfg.space_stride, height, width)
    return f, *space, self.cfg.latent_channels

  def latent_mask(self, mask: np.ndarray) -> np.ndarray:
    """Latent frames [B, f] that given frames, bool [B, F], give whole."""
    return latent_mask(mask, self.cfg.time_stride)
