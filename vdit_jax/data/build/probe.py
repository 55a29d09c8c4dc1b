"""What a media file is, found by decoding all of it, or why it is no clip.

Files are opened as a reader of records opens their bytes: without a name, so
that what ends in .mp4 is no mp4 by that. Decoding stops at the first error,
where a player would show a grey or an older frame.
"""

import contextlib
import dataclasses
import enum
import os
from collections.abc import Iterator
from typing import BinaryIO

import av
import av.container
import av.error
import av.stream

# A record of mp4 bytes is one protobuf, which ends at 2 GiB.
MOST_BYTES = 2**30

# Boxes that a file of ISO's family (mp4, mov) has outside of others.
_BOXES = frozenset(
  b"ftyp moov mdat free skip wide styp moof mfra sidx uuid meta udta".split()
)
_JPEG, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_TAIL = 4096  # bytes: after a JPEG's end other things may stand
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067  # elements of Matroska and WebM


class Reason(enum.StrEnum):
  """Why a file is left out."""

  ROW = "bad row"
  DUPLICATE = "duplicate key"
  CAPTION = "no caption"
  MISSING = "missing file"
  UNMATCHED = "not in videos"
  NAME = "bad name"
  EMPTY = "empty file"
  FORMAT = "not a video or image"
  TRUNCATED = "truncated"
  DAMAGED = "damaged"
  AUDIO = "audio only"
  NO_VIDEO = "no video stream"
  SIZES = "changing size"
  SHORT = "too short"
  LARGE = "too large"
  CRASHED = "crashes the decoder"


@dataclasses.dataclass(frozen=True)
class Clip:
  """A file that decodes from begin to end.

  Attributes:
    num_frames: that its video stream decodes to.
    height, width: pixels as displayed.
    fps: mean rate; 0 of an image.
    seconds: from the first frame to the end of the last; 0 of an image.
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


class ClipError(ValueError):
  """Says why a file is no clip: `reject`."""

  def __init__(self, reason: Reason, detail: str):
    super().__init__(f"file is {reason}, {detail}; leave it out")
    self.reject = Reject(reason, detail)


class _Nameless:
  """A file for PyAV that hides its name, by which formats are guessed."""

  def __init__(self, file):
    self.read, self.seek, self.tell = file.read, file.seek, file.tell


def probe(path: str, min_frames: int, most_bytes: int) -> Clip | Reject:
  """Decode a file.

  Args:
    path: of the file.
    min_frames: that a video, not an image, must have.
    most_bytes: that a file may have.
  """
  try:
    num_bytes = os.path.getsize(path)
    if not num_bytes:
      return Reject(Reason.EMPTY, "0 bytes")
    if num_bytes > most_bytes:
      detail = f"{num_bytes} bytes, a record holds {most_bytes}; cut clips"
      return Reject(Reason.LARGE, detail)
    with open(path, "rb") as file:
      _check_whole(file, num_bytes)
      with open_video(file) as (container, stream):
        clip = _decode(container, stream, num_bytes)
  except FileNotFoundError:
    return Reject(Reason.MISSING, "named by the captions, but not there")
  except ClipError as error:
    return error.reject
  except OSError as error:  # a folder, or what may not be read
    return Reject(Reason.MISSING, f"{error.strerror}: {path}")
  if clip.fps and clip.num_frames < min_frames:
    detail = f"frames {clip.num_frames}, at least {min_frames}"
    return Reject(Reason.SHORT, detail)
  return clip


@contextlib.contextmanager
def open_video(
  file: BinaryIO,
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
  """Open a file: its container, and the stream that is its clip.

  That is the first video stream that is no cover picture. It is decoded in
  this thread, which is fastest for short clips, and stops at errors. Raises
  ClipError where there is none.
  """
  try:
    container = av.open(_Nameless(file))
  except av.error.FFmpegError as error:
    raise ClipError(Reason.FORMAT, error.strerror) from error
  with container:
    moving = [s for s in container.streams.video if not _is_cover(s)]
    if not moving:
      kinds = sorted({stream.type for stream in container.streams})
      audio = Reason.AUDIO if "audio" in kinds else Reason.NO_VIDEO
      raise ClipError(audio, f"streams: {', '.join(kinds) or 'none'}")
    moving[0].thread_type = "NONE"
    moving[0].codec_context.options = {"err_detect": "explode"}
    yield container, moving[0]  # pyright: ignore[reportReturnType]


def frames(
  container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.VideoFrame]:
  """Decode a stream; raise ClipError where it is damaged or changes size."""
  count, first = 0, None
  try:
    for frame in container.decode(stream):
      first = first or size(frame)
      if frame.is_corrupt:
        raise ClipError(Reason.DAMAGED, f"at frame {count}")
      if size(frame) != first:
        detail = f"{first} becomes {size(frame)} at frame {count}"
        raise ClipError(Reason.SIZES, detail)
      yield frame
      count += 1
  except av.error.FFmpegError as error:
    detail = f"after {count} decoded frames: {error.strerror}"
    raise ClipError(Reason.DAMAGED, detail) from error
  if not count:
    raise ClipError(Reason.DAMAGED, "it decodes to no frame")


def size(frame: av.VideoFrame) -> tuple[int, int]:
  """Give a frame's height and width as displayed."""
  turned = frame.rotation % 180 != 0
  height, width = frame.height, frame.width
  return (width, height) if turned else (height, width)


def _is_cover(stream: av.VideoStream) -> bool:
  return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _decode(container, stream, num_bytes: int) -> Clip:
  count, begin, end = 0, None, None
  for frame in frames(container, stream):
    count += 1
    begin, end = frame.pts if count == 1 else begin, frame.pts
    height, width = size(frame)
  image = count == 1 and container.format.name.endswith("_pipe")
  fps = 0.0 if image else _rate(stream, count, begin, end)
  seconds = count / fps if fps else 0.0
  return Clip(count, height, width, fps, seconds, num_bytes)


def _rate(stream, count: int, begin: int | None, end: int | None) -> float:
  """Give the mean rate by the frames' times, or that which is declared."""
  if count > 1 and begin is not None and end is not None and end > begin:
    return float((count - 1) / ((end - begin) * stream.time_base))
  declared = stream.average_rate or stream.guessed_rate
  if not declared:
    raise ClipError(Reason.DAMAGED, "its frames have no times and no rate")
  return float(declared)


def _check_whole(file: BinaryIO, num_bytes: int) -> None:
  """Raise ClipError if a file ends before what its containers declare."""
  head = file.read(12)
  if head[4:8] in _BOXES:
    kinds, end = _boxes(file, num_bytes)
    if end <= num_bytes and b"moov" not in kinds and b"moof" not in kinds:
      raise ClipError(Reason.TRUNCATED, f"{num_bytes} bytes without a moov box")
  elif head[:2] == _JPEG:
    file.seek(max(num_bytes - _TAIL, 0))
    end = num_bytes if _JPEG_END in file.read() else num_bytes + 2
  elif head[:4] == b"RIFF":
    end = 8 + int.from_bytes(head[4:8], "little")
  else:
    end = _matroska_end(file)
  file.seek(0)
  if end > num_bytes:
    raise ClipError(Reason.TRUNCATED, f"{num_bytes} of at least {end} bytes")


def _boxes(file: BinaryIO, num_bytes: int) -> tuple[set[bytes], int]:
  """List the kinds of a file's boxes, and where the last one ends."""
  kinds, begin = set(), 0
  while begin + 8 <= num_bytes:
    file.seek(begin)
    head = file.read(16)
    length, kind = int.from_bytes(head[:4], "big"), head[4:8]
    if kind not in _BOXES:
      break  # what else stands at a file's end is none of the clip's
    kinds.add(kind)
    if length == 1:
      length = int.from_bytes(head[8:16], "big")
    begin = begin + length if length else num_bytes
  return kinds, begin


def _matroska_end(file: BinaryIO) -> int:
  """Give where a Matroska file's segment ends; 0 if unknown or none."""
  begin = 0
  for wanted in (_EBML, _SEGMENT):
    file.seek(begin)
    head = file.read(12)
    if int.from_bytes(head[:4], "big") != wanted or len(head) < 12:
      return 0
    width = 9 - head[4].bit_length()  # of the length, told by its first bit
    length = int.from_bytes(head[4 : 4 + width], "big") - (1 << 7 * width)
    if length == (1 << 7 * width) - 1:
      return 0
    begin += 4 + width + length
  return begin
