"""How a decoded frame is shown: upright, its colours as a screen has them.

av.VideoFrame --show--> uint8 RGB [H, W, 3]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import av
import numpy as np
from av.sidedata import sidedata
from av.video import reformatter

from vdit_jax.media import tones


class Turn(NamedTuple):
  """One of the eight ways in which a picture can lie in its file.

  What is stored is shown after these, in this order.

  Attributes:
    transposed: rows and columns change places.
    flipped: top and bottom do.
    mirrored: left and right do.
  """

  transposed: bool = False
  flipped: bool = False
  mirrored: bool = False

  def apply(self, image: np.ndarray) -> np.ndarray:
    """Turn an image [h, w, ...]."""
    image = image.swapaxes(0, 1) if self.transposed else image
    return image[:: -1 if self.flipped else 1, :: -1 if self.mirrored else 1]


# By the number that EXIF has for each (CIPA DC-008, tag 274).
EXIF = {
  1: Turn(),
  2: Turn(mirrored=True),
  3: Turn(flipped=True, mirrored=True),
  4: Turn(flipped=True),
  5: Turn(transposed=True),
  6: Turn(transposed=True, mirrored=True),
  7: Turn(transposed=True, flipped=True, mirrored=True),
  8: Turn(transposed=True, flipped=True),
}

_QUARTERS = (EXIF[1], EXIF[8], EXIF[3], EXIF[6])  # counter-clockwise


def turn(frame: av.VideoFrame) -> Turn:
  """Tell how a frame is to be turned, by the matrix that its file has.

  The matrix, of ISO/IEC 14496-12, takes (x, y) to (ax + cy, bx + dy). One that
  is no quarter turn, as of 45 degrees, counts as the nearest that is.
  """
  try:
    held: Any = frame.side_data
    matrix = held.get(sidedata.Type.DISPLAYMATRIX)
  except ValueError:  # PyAV 18 fails at what a newer FFmpeg has beside it
    return _QUARTERS[round(frame.rotation / 90) % 4]
  if matrix is None:
    return Turn()
  a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
  if abs(b) + abs(c) > abs(a) + abs(d):
    return Turn(True, b < 0, c < 0)
  return Turn(False, d < 0, a < 0)


def size(frame: av.VideoFrame) -> tuple[int, int]:
  """Give the height and width of a frame as displayed."""
  height, width = frame.height, frame.width
  return (width, height) if turn(frame).transposed else (height, width)


def shower() -> Callable[[av.VideoFrame], np.ndarray]:
  """Give a function that shows frames of one video, in one thread.

  It makes each uint8 [H, W, 3], upright, in sRGB. High dynamic range is mapped
  to a screen's, see `tones`.
  """
  # One for all frames, and one thread: to make either takes longer than to
  # convert a small frame.
  reformat = reformatter.VideoReformatter().reformat

  def show(frame: av.VideoFrame) -> np.ndarray:
    image = reformat(frame, format="rgb24", threads=1).to_ndarray()
    image = tones.to_screen(image, frame.color_trc, frame.color_primaries)
    return turn(frame).apply(image)

  return show
