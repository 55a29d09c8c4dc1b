"""The one way in for pictures and clips: what a file is, and its frames.

  file --open--> Footage --frames--> av.VideoFrame --display--> RGB

Building a dataset, reading its records and taking a given image all go through
here, so that one accepts what the other reads. A file's name says nothing:
`pictures` have signatures, and all else is a video if a demuxer of `DEMUXERS`
knows it. A video of one frame is a still, in whatever it comes.
"""

import builtins
import contextlib
import dataclasses
import enum
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, cast

import av
import av.container
import av.error
import av.stream
import numpy as np
from etils import epath

from vdit_jax import writing
from vdit_jax.media import display, pictures, truncation

# FFmpeg's demuxers of videos that open no other file and make none of text.
# It would take play lists (concat, hls, dash, sdp) for clips otherwise.
DEMUXERS = (
  "asf av1 avi avs2 avs3 cavsvideo cine dhav dirac dnxhd dpx_pipe dv evc flic "
  "flv gxf h261 h263 h264 hevc ivf jpegls_pipe jpegxl_pipe live_flv m4v "
  "matroska mjpeg mov mpeg mpegts mpegvideo mxf nsv nut nuv obu ogg rm roq "
  "smk swf vc1 vc1test vvc wtv yuv4mpegpipe"
).split()

_ALONE: dict[str, Any] = {
  "options": {
    "format_whitelist": ",".join(DEMUXERS),
    "protocol_whitelist": "",
  }
}
if int(av.__version__.partition(".")[0]) < 19:
  _ALONE["metadata_errors"] = "replace"  # tags may be in any encoding
_FARTHEST = 2**42  # bytes; a broken file may name any place
# Streams that are parts of a picture, or belong to another stream.
_BESIDE = av.stream.Disposition.attached_pic | av.stream.Disposition.dependent


class Fault(enum.StrEnum):
  """Why a file is no picture or clip."""

  MISSING = "missing file"
  FORMAT = "not a video or image"
  TRUNCATED = "truncated"
  DAMAGED = "damaged"
  AUDIO = "audio only"
  NO_VIDEO = "no video stream"
  SIZES = "changing size"


class FootageError(ValueError):
  """Says why a file is no picture or clip, `fault`, and what was seen."""

  def __init__(self, fault: Fault, detail: str):
    super().__init__(f"file is {fault}, {detail}; leave it out")
    self.fault, self.detail = fault, detail


@dataclasses.dataclass(frozen=True)
class Footage:
  """An opened file; `picture` or the others are None.

  Attributes:
    picture: a still or an animation.
    container: of a video.
    stream: of the container, the one to look at.
  """

  picture: pictures.Picture | None = None
  container: av.container.InputContainer | None = None
  stream: av.VideoStream | None = None

  @property
  def aspect(self) -> float:
    """Width of a pixel as it is stored, over its height."""
    return float(self.stream and self.stream.sample_aspect_ratio or 1)


class _Nameless:
  """A file for PyAV that hides its name, by which formats are guessed."""

  def __init__(self, file: BinaryIO):
    self.read, self.tell, self._file = file.read, file.tell, file
    self._size = file.seek(0, os.SEEK_END)
    file.seek(0)

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    """Seek, in bytes as in a file; -1 where that is not possible."""
    to = offset + (0, self._file.tell(), self._size)[whence]
    return self._file.seek(to) if 0 <= to <= _FARTHEST else -1


def regular(path: epath.PathLike) -> BinaryIO:
  """Open a file's bytes; raise FootageError where it is no regular file.

  A pipe would keep one waiting and a device has no end: neither is opened.
  """
  try:
    if writing.is_remote(path):
      return epath.Path(path).open("rb")
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
      return builtins.open(path, "rb")
  except FileNotFoundError as error:
    raise FootageError(Fault.MISSING, "named, but not there") from error
  except (OSError, ValueError) as error:  # a name that none can have
    said = getattr(error, "strerror", None) or str(error)
    raise FootageError(Fault.MISSING, said) from error
  kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, device or socket"
  raise FootageError(Fault.MISSING, f"it is {kind}")


@contextlib.contextmanager
def open(file: BinaryIO) -> Iterator[Footage]:
  """Open a picture or a clip.

  A video is decoded in this thread: it is fastest for short clips, and readers
  of many are threads already.

  Raises:
    FootageError: if it is neither; and for what FFmpeg raises while it is open.
  """
  try:
    picture = pictures.open(file)
  except pictures.ERRORS as error:
    raise _broken(error, Fault.FORMAT) from error
  if picture:
    with picture.image:
      yield Footage(picture)
    return
  fault = Fault.FORMAT
  try:
    with av.open(_Nameless(file), **_ALONE) as container:
      fault = Fault.DAMAGED
      yield Footage(None, container, _stream(container))
  except av.error.ArgumentError as error:  # also of a demuxer not listed
    said = error.strerror if fault == Fault.DAMAGED else "of no form to read"
    raise FootageError(fault, said) from error
  except av.error.FFmpegError as error:
    raise FootageError(fault, error.strerror) from error
  except IndexError as error:
    raise FootageError(fault, "a stream begins behind its header") from error


def frames(footage: Footage) -> Iterator[av.VideoFrame]:
  """Decode all frames, once, from the beginning.

  Raises:
    FootageError: if a frame is damaged, is of another size than the first, or
      there is none.
  """
  count, first = 0, None
  try:
    for frame in _decoded(footage):
      if frame.is_corrupt:
        raise FootageError(Fault.DAMAGED, f"at frame {count}")
      first = first or display.size(frame)
      if display.size(frame) != first:
        detail = f"{first} becomes {display.size(frame)} at frame {count}"
        raise FootageError(Fault.SIZES, detail)
      yield frame
      count += 1
  except av.error.FFmpegError as error:
    detail = f"after {count} decoded frames: {error.strerror}"
    raise FootageError(Fault.DAMAGED, detail) from error
  if not count:
    raise FootageError(Fault.DAMAGED, "it decodes to no frame")


def times(footage: Footage, frames: Sequence[float | None]) -> np.ndarray:
  """Give the seconds of all frames, rising, [n]; even if the file has none.

  Args:
    footage: that was decoded.
    frames: `time` of each.

  Raises:
    FootageError: if it doesn't say a rate either.
  """
  seconds = np.array(frames, float)  # None becomes NaN
  if len(seconds) == 1 or (np.diff(seconds) > 0).all():
    return seconds
  stream = footage.stream
  rate = stream and (stream.guessed_rate or stream.average_rate)
  if not rate:
    raise FootageError(Fault.DAMAGED, "its frames have no times and no rate")
  return np.arange(len(frames)) / float(rate)


def check(footage: Footage, file: BinaryIO, num_frames: int) -> None:
  """Look for damage that decoding all frames doesn't show.

  Args:
    footage: that was decoded.
    file: that it is of.
    num_frames: that it gave.

  Raises:
    FootageError: if a still's bits are wrong, or a video ends before its
      container does; but not if there are all frames that this counts.
  """
  if footage.picture:
    try:
      pictures.check(footage.picture)
    except av.error.FFmpegError as error:
      raise FootageError(Fault.DAMAGED, error.strerror) from error
  elif footage.stream and not 0 < footage.stream.frames <= num_frames:
    if truncation.is_cut(file):
      raise FootageError(Fault.TRUNCATED, f"after frame {num_frames}")


def still(file: BinaryIO, strict: bool = False) -> np.ndarray:
  """Read a still; raise FootageError for what is none.

  Args:
    file: of the still.
    strict: whether to `check` it, too.

  Returns:
    uint8 RGB [H, W, 3], as displayed.
  """
  with open(file) as footage:
    found = list(itertools.islice(frames(footage), 2))
    if len(found) > 1:
      raise FootageError(Fault.FORMAT, "it has several frames")
    if strict:
      check(footage, file, 1)
    return display.shower()(found[0])


def _stream(container: av.container.InputContainer) -> av.VideoStream:
  """Take the video stream that players take: the default, or the first."""
  streams = container.streams.video
  found = [s for s in streams if not s.disposition & _BESIDE]
  if found:
    default = av.stream.Disposition.default
    stream = max(found, key=lambda s: bool(s.disposition & default))
    stream.thread_type = "NONE"
    return stream
  if any(s.disposition & av.stream.Disposition.dependent for s in streams):
    detail = f"a picture in {len(streams)} tiles; save it as JPEG or PNG"
    raise FootageError(Fault.FORMAT, detail)
  kinds = sorted({stream.type for stream in container.streams})
  fault = Fault.AUDIO if "audio" in kinds else Fault.NO_VIDEO
  raise FootageError(fault, f"streams: {', '.join(kinds) or 'none'}")


def _decoded(footage: Footage) -> Iterator[av.VideoFrame]:
  """Yield frames as decoders give them.

  A recording may begin between two key frames. Until the first whole frame
  comes, what cannot be decoded is none of the clip's.
  """
  if footage.picture:
    yield from _pictures(footage.picture)
    return
  begun, container = None, cast(Any, footage.container)
  for packet in container.demux(footage.stream):
    begun = packet.is_keyframe if begun is None else begun
    try:
      decoded = packet.decode()
    except av.error.FFmpegError:
      if begun:
        raise
      continue
    for frame in decoded:
      if begun or not frame.is_corrupt:
        begun = True
        yield frame


def _pictures(picture: pictures.Picture) -> Iterator[av.VideoFrame]:
  """Yield a picture's frames; what Pillow raises becomes FootageError."""
  found = pictures.frames(picture)
  while True:
    try:
      frame = next(found, None)
    except pictures.ERRORS as error:
      raise _broken(error, Fault.DAMAGED) from error
    if frame is None:
      return
    yield frame


def _broken(error: Exception, fault: Fault) -> FootageError:
  """Say what is wrong with a picture; Pillow has but a text for what is cut."""
  cut = "truncated" in str(error).lower()
  return FootageError(Fault.TRUNCATED if cut else fault, str(error))
