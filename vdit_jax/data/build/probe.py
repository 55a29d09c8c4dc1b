"""What a media file is, found by decoding all of it, or why it is no clip."""

import dataclasses
import enum
import os
from typing import BinaryIO

from vdit_jax.media import display, footage, truncation

# A record of mp4 bytes is one protobuf, which ends at 2 GiB.
MOST_BYTES = 2**30

# What a file that was cut off may look like.
_OF_CUT = (
  footage.Fault.FORMAT,
  footage.Fault.DAMAGED,
  footage.Fault.NO_VIDEO,
)


class Reason(enum.StrEnum):
  """Why a file is left out: a `footage.Fault`, or what a build asks for."""

  ROW = "bad row"
  DUPLICATE = "duplicate key"
  CAPTION = "no caption"
  UNMATCHED = "not in videos"
  NAME = "bad name"
  EMPTY = "empty file"
  SHORT = "too short"
  LARGE = "too large"
  CRASHED = "crashes the decoder"
  MISSING = footage.Fault.MISSING
  FORMAT = footage.Fault.FORMAT
  TRUNCATED = footage.Fault.TRUNCATED
  DAMAGED = footage.Fault.DAMAGED
  AUDIO = footage.Fault.AUDIO
  NO_VIDEO = footage.Fault.NO_VIDEO
  SIZES = footage.Fault.SIZES


@dataclasses.dataclass(frozen=True)
class Clip:
  """A file that decodes from begin to end.

  Attributes:
    num_frames: that its video stream decodes to.
    height, width: pixels as displayed.
    fps: mean rate; 0 of a still, which is what has one frame.
    seconds: from the first frame to the end of the last; 0 of a still.
    num_bytes: of the file.
  """

  num_frames: int
  height: int
  width: int
  fps: float
  seconds: float
  num_bytes: int


@dataclasses.dataclass(frozen=True)
class Reject:
  """Why a file is no clip: a reason to count by, and what was seen."""

  reason: Reason
  detail: str


def reject(error: footage.FootageError) -> Reject:
  """Say why a file that cannot be read is no clip."""
  return Reject(Reason(error.fault), error.detail)


def probe(path: str, min_frames: int, most_bytes: int) -> Clip | Reject:
  """Decode a file.

  Args:
    path: of the file.
    min_frames: that a video, not a still, must have.
    most_bytes: that a file may have.
  """
  try:
    with footage.regular(path) as file:
      num_bytes = os.fstat(file.fileno()).st_size
      if not num_bytes:
        return Reject(Reason.EMPTY, "0 bytes")
      if num_bytes > most_bytes:
        detail = f"{num_bytes} bytes, a record holds {most_bytes}; cut clips"
        return Reject(Reason.LARGE, detail)
      clip = _decode(file, num_bytes)
  except footage.FootageError as error:
    return reject(error)
  if clip.fps and clip.num_frames < min_frames:
    detail = f"frames {clip.num_frames}, at least {min_frames}"
    return Reject(Reason.SHORT, detail)
  return clip


def _decode(file: BinaryIO, num_bytes: int) -> Clip:
  """Decode an opened file; raise footage.FootageError if it is no clip."""
  try:
    with footage.open(file) as found:
      stamps, frame = [], None
      for frame in footage.frames(found):
        stamps.append(frame.time)
      count = len(stamps)
      footage.check(found, file, count)
      times = footage.times(found, stamps)
  except footage.FootageError as error:
    if error.fault in _OF_CUT and truncation.is_cut(file):
      fault = footage.Fault.TRUNCATED
      raise footage.FootageError(fault, error.detail) from error
    raise
  height, width = display.size(frame)
  fps = float((count - 1) / (times[-1] - times[0])) if count > 1 else 0.0
  return Clip(count, height, width, fps, count / fps if fps else 0.0, num_bytes)
