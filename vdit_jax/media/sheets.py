"""Contact sheets: the frames of videos side by side in one image.

Looking at samples during training, and in files of `media`. A video is
[F, H, W, 3], float in [-1, 1] or uint8.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Video = np.ndarray | jax.Array

_GAP = 2  # pixels between the frames
_FONT_SIZE = 12
_CAPTION_WIDTH = 256  # narrower sheets are widened for their captions


def draw(
  videos: Video | Sequence[Video],
  captions: Sequence[str] | None = None,
  *,
  columns: int | None = None,
  factor: int = 1,
) -> np.ndarray:
  """Draw a row a video, its frames in order, its caption above.

  Args:
    videos: clips [N, F, H, W, 3], float in [-1, 1] or uint8.
    captions: a text for each row, or None.
    columns: the most frames of a row; from longer videos, evenly spaced ones
      with the first and the last. None draws all.
    factor: integer factor of nearest-neighbour enlargement.

  Returns:
    image uint8 [rows of pixels, columns of pixels, 3].
  """
  frames = to_uint8(videos)
  if frames.ndim != 5:
    raise ValueError(
      f"videos must be [N, F, H, W, 3], got shape {frames.shape}; add an axis"
      " to a single clip"
    )
  if captions is not None and len(captions) != len(frames):
    raise ValueError(
      f"captions must be one a video, got {len(captions)} for {len(frames)}"
      " videos; give as many"
    )
  frames = enlarge(frames[:, spaced(frames.shape[1], columns)], factor)
  rows = [_row(clip) for clip in frames]
  if captions is not None:
    rows = [
      part
      for row, text in zip(rows, captions, strict=True)
      for part in (_text(text, max(row.shape[1], _CAPTION_WIDTH)), row)
    ]
  return _stack(rows)


def to_uint8(video: Video) -> np.ndarray:
  """Convert float in [-1, 1] to uint8; pass uint8; refuse the rest.

  Args:
    video: [..., H, W, 3]; values outside [-1, 1] are clipped, those that are
      not finite are refused.
  """
  video = np.asarray(video)
  if video.ndim < 3 or video.shape[-1] != 3 or 0 in video.shape:
    raise ValueError(
      f"video must be [..., H, W, 3] and not empty, got shape {video.shape};"
      " put the three colours last"
    )
  if video.dtype == np.uint8:
    return video
  if not jnp.issubdtype(video.dtype, jnp.floating):
    raise ValueError(
      f"video must be uint8 or float in [-1, 1], got {video.dtype}; convert it"
    )
  values = video.astype(np.float32)
  broken = int((~np.isfinite(values)).sum())
  if broken:
    raise ValueError(
      f"video must be finite, got {broken} of {values.size} values that are"
      " not; look for the step that diverged, nothing was written"
    )
  return np.clip(np.round((values + 1) * 127.5), 0, 255).astype(np.uint8)


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
  """Repeat each pixel of [..., H, W, 3] factor times along H and W."""
  if factor != int(factor) or factor < 1:
    raise ValueError(f"enlarge must be a whole number from 1, got {factor}")
  return frames.repeat(int(factor), axis=-3).repeat(int(factor), axis=-2)


def spaced(num_frames: int, columns: int | None) -> np.ndarray:
  """Choose at most so many frames, evenly, the first and the last too."""
  if columns is None or columns >= num_frames:
    return np.arange(num_frames)
  if columns < 1:
    raise ValueError(f"columns must be at least 1, got {columns}")
  return np.round(np.linspace(0, num_frames - 1, columns)).astype(int)


def _row(clip):
  """Join frames [F, H, W, 3] left to right, a white gap between."""
  padded = np.pad(
    clip, ((0, 0), (0, 0), (0, _GAP), (0, 0)), constant_values=255
  )
  row = padded.transpose(1, 0, 2, 3).reshape(clip.shape[1], -1, 3)
  return row[:, :-_GAP]


def _text(text, width):
  """Draw a text in black on white [rows of pixels, width, 3]."""
  font: Any = ImageFont.load_default(_FONT_SIZE)
  lines = _wrap(text, width - 2 * _GAP, font)
  height = sum(font.getmetrics())
  image = Image.new("RGB", (width, height * len(lines) + _GAP), "white")
  draw = ImageDraw.Draw(image)
  for index, line in enumerate(lines):
    draw.text((_GAP, index * height), line, fill="black", font=font)
  return np.asarray(image)


def _wrap(text, width, font):
  lines = [""]
  for word in text.split():
    longer = f"{lines[-1]} {word}".strip()
    if lines[-1] and font.getlength(longer) > width:
      lines.append(word)
    else:
      lines[-1] = longer
  return lines


def _stack(rows):
  """Join rows top to bottom, white to their right and between."""
  width = max(row.shape[1] for row in rows)
  padded = [
    np.pad(
      row,
      ((0, _GAP), (0, width - row.shape[1]), (0, 0)),
      constant_values=255,
    )
    for row in rows
  ]
  return np.concatenate(padded)[:-_GAP]
