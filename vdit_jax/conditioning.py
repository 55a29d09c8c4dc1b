"""Frames that a caller gives: image-to-video, key frames, a clip to edit.

  images -> frames, mask -> `pipeline.generate`

A mask says which frames of a clip are given and stay. What a denoiser is shown
of them is its system's to say, in sampling and in training alike.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from vdit_jax import types
from vdit_jax.models import frame_positions
from vdit_jax.models.system import Apply, Draw, Modules

_MOST = 1.001  # of a frame's values, for those who round


def first(image: np.ndarray, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
  """Let an image be the given first frame of a clip.

  Args:
    image: uint8 or float in [-1, 1], [..., H, W, 3].
    num_frames: of the clip, F.

  Returns:
    Frames [..., F, H, W, 3], all of them the image, and the mask [..., F].
  """
  return place(image[..., None, :, :, :], (0,), num_frames)


def place(
  images: np.ndarray, positions: tuple[int, ...], num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
  """Let images be given frames of a clip.

  Args:
    images: uint8 or float in [-1, 1], [..., n, H, W, 3].
    positions: n frames that they are, as of `System.needs`, in their order.
    num_frames: of the clip, F.

  Returns:
    Frames [..., F, H, W, 3], each of which is the last image before it, or
    the first image, and the mask [..., F] of those that are given.
  """
  if images.dtype == np.uint8:
    images = images.astype(np.float32) / 127.5 - 1
  given = frame_positions.resolve(positions, num_frames)
  latest = np.searchsorted(given, np.arange(num_frames), side="right") - 1
  frames = np.take(images, np.maximum(latest, 0), axis=-4)
  mask = frame_positions.mask(positions, num_frames)
  return frames, np.broadcast_to(mask, frames.shape[:-3])


@dataclasses.dataclass(frozen=True)
class Frames:
  """What a caller gives.

  Attributes:
    frames: given frames, or a clip to edit, [B, F, H, W, 3] in [-1, 1].
    mask: frames that are given and stay, bool [B, F], or pixels of them
      [B, F, H, W], where the system takes any (`System.takes`). Of others
      every latent frame must be given whole or not at all, and some take the
      first frame alone, or none.
    strength: of an edit; 1 is none.
  """

  frames: np.ndarray | None = None
  mask: np.ndarray | None = None
  strength: float = 1.0


def give(
  modules: Modules,
  apply: Apply,
  given: Frames,
  size: tuple[int, int, int],
  shape: tuple[int, ...],
  draw: Draw,
) -> types.Given:
  """Encode what a caller gives as the denoiser takes it.

  Args:
    modules: the networks, of whose system it is asked.
    apply: runs a method of the autoencoder.
    given: frames.
    size: frames, height and width of the videos.
    shape: of their latents, [B, f, h, w, c].
    draw: noise of the posterior's sample where the system shows one.

  Raises:
    ValueError: for frames that the system does not take, or of another size.
  """
  frames, system = given.frames, modules.system
  edits = given.strength < 1
  if frames is None and (edits or given.mask is not None):
    raise ValueError("strength < 1 and frame_mask need frames; pass frames")
  wanted = shape[0], *size, 3
  check(frames, given.mask, wanted, regions=modules.takes > 0)
  found = types.Given()
  if given.mask is not None or modules.needs:
    mask = np.zeros(wanted[:2], bool) if given.mask is None else given.mask
    empty = np.broadcast_to(np.float32(0), wanted)
    shown = empty if frames is None else frames
    found = system.condition(modules, apply, shown, mask, draw)
  if edits and found.latents is None:
    found = found.replace(latents=apply(frames, method="encode"))
  if found.latents is not None and found.latents.shape != shape:
    raise ValueError(
      f"frames give latents {found.latents.shape}, wanted {shape}"
    )
  return found


def restore(given: Frames, video: np.ndarray) -> np.ndarray:
  """Put given pixels in the place of those that were made, [B, F, H, W, 3]."""
  if given.frames is None or given.mask is None:
    return video
  mask = np.asarray(given.mask, bool)
  mask = mask.reshape(*mask.shape, *[1] * (video.ndim - mask.ndim))
  return np.where(mask, given.frames, video)


def check_number(frames: Any, mask: Any, wanted: tuple[int, ...]) -> None:
  """Refuse frames and a mask that are not of so many clips; see `check`."""
  given = [len(x) for x in (frames, mask) if x is not None]
  if any(number != wanted[0] for number in given):
    check(frames, mask, wanted)


def check(
  frames: Any, mask: Any, wanted: tuple[int, ...], regions: bool = False
) -> None:
  """Refuse frames of another size, type or range, and a mask of another size.

  Args:
    frames: float in [-1, 1], [B, F, H, W, 3]; None is none.
    mask: bool [B, F] or [B, F, H, W]; None is none.
    wanted: shape that frames must have.
    regions: whether parts of frames may be given.
  """
  if frames is not None:
    _check_frames(frames, wanted)
  if mask is None:
    return
  shapes = [wanted[:2], *[wanted[:4]] * regions]
  if np.shape(mask) not in shapes:
    also = "or for each pixel" if regions else "as this model takes no regions"
    raise ValueError(
      f"frame_mask must be {wanted[:2]}, one for each frame, {also}, got "
      f"{np.shape(mask)}"
    )


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
      "encoding.to_float makes them of uint8"
    )
