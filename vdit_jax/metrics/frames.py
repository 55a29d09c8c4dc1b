"""Frame-by-frame likeness of two videos: PSNR and SSIM.

Measures a reconstruction against its original; `[B, F, H, W, C]` in [-1, 1]
goes in, a number a clip comes out. SSIM: Wang et al., "Image quality
assessment: from error visibility to structural similarity", IEEE TIP 2004.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

Video = jax.Array | np.ndarray

_WINDOW = 11
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


@jax.jit
def psnr(a: Video, b: Video) -> jax.Array:
  """Compute each frame's PSNR in dB and average over a clip's frames.

  A frame's squared error is the mean over its pixels and channels; the data
  range is 2. A clip with a frame that is equal in both is infinitely alike.

  Args:
    a, b: videos in [-1, 1], [B, F, H, W, C].

  Returns:
    decibels [B].
  """
  _check_pair(a, b)
  error = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))
  mse = error.mean(axis=(2, 3, 4))  # [B, F]
  return (10 * jnp.log10(4 / mse)).mean(axis=1)


@jax.jit
def ssim(a: Video, b: Video) -> jax.Array:
  """Compute each frame's SSIM and average over a clip's frames.

  Equation 13 of the paper with its settings: a Gaussian window of 11 x 11 and
  sigma 1.5, K1 0.01, K2 0.03, only windows wholly inside the frame, each
  channel alone and then their mean. The luminance term supposes values from 0
  up, so it is computed on (x + 1) / 2 with a range of 1.

  Args:
    a, b: videos in [-1, 1], [B, F, H, W, C], H and W at least 11.

  Returns:
    likeness [B], 1 for equal videos.
  """
  _check_pair(a, b)
  if min(a.shape[2:4]) < _WINDOW:
    raise ValueError(
      f"frames must be at least {_WINDOW} x {_WINDOW} for SSIM, got"
      f" {a.shape[2]} x {a.shape[3]}; use psnr"
    )
  a = (a.astype(jnp.float32) + 1) / 2
  b = (b.astype(jnp.float32) + 1) / 2
  mean_a, mean_b = _blur(a), _blur(b)
  var_a = _blur(a * a) - mean_a**2
  var_b = _blur(b * b) - mean_b**2
  covariance = _blur(a * b) - mean_a * mean_b
  luminance = (2 * mean_a * mean_b + _K1**2) / (mean_a**2 + mean_b**2 + _K1**2)
  structure = (2 * covariance + _K2**2) / (var_a + var_b + _K2**2)
  return (luminance * structure).mean(axis=(1, 2, 3, 4))


def _blur(video):
  """Filter with the window, [B, F, H, W, C] to [B, F, H-10, W-10, C]."""
  offsets = np.arange(_WINDOW) - _WINDOW // 2
  window = np.exp(-(offsets**2) / (2 * _SIGMA**2))
  window = (window / window.sum()).astype(np.float32)
  for axis in (2, 3):
    size = video.shape[axis] - _WINDOW + 1
    # A sum of shifted videos: float32 on every platform, which a convolution
    # is not on TPU.
    parts = (
      weight * jax.lax.slice_in_dim(video, start, start + size, axis=axis)
      for start, weight in enumerate(window)
    )
    video = functools.reduce(operator.add, parts)
  return video


def _check_pair(a, b):
  if a.ndim != 5 or a.shape != b.shape:
    raise ValueError(
      "a and b must be videos of one shape [B, F, H, W, C], got"
      f" {a.shape} and {b.shape}; cut or batch them alike"
    )
  for name, video in (("a", a), ("b", b)):
    if not jnp.issubdtype(video.dtype, jnp.floating):
      raise ValueError(
        f"{name} must be float in [-1, 1], got {video.dtype}; divide uint8 by"
        " 127.5 and subtract 1"
      )
