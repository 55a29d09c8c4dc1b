"""Cuts a long video into clips of one length, each an mp4 of its own.

A clip of a part of the file's packets would begin at a key frame before it, so
it is encoded anew: H.264 at `crf`, with a key frame every second at most, so
that a reader decodes only little that it doesn't need. At crf=0 the frames
stay as they are, at about ten times the bytes of crf=16. Times are kept,
rotation is applied, sound is dropped.
"""

import dataclasses
import fractions
import io
import itertools
from collections.abc import Iterator

import av
import av.filter
import av.video.frame

from vdit_jax.data.build import probe

_PRESET = "veryfast"
# Pixel formats that libx264 takes as they are.
_FORMATS = frozenset(
  "yuv420p yuv422p yuv444p yuvj420p yuvj422p yuvj444p yuv420p10le gray".split()
)
_ROUNDED = 1e-3  # seconds: WebM's times are whole milliseconds
_LARGEST_RATE = 1001  # denominator of 24000/1001, 30000/1001, 60000/1001
# Degrees that a frame is to be turned, counter-clockwise, by which filters.
_TURNS = {
  90: [("transpose", "cclock")],
  180: [("hflip",), ("vflip",)],
  270: [("transpose", "clock")],
}
_HALVED = ("yuv420p", "yuv422p", "yuvj420p", "yuvj422p", "yuv420p10le")


@dataclasses.dataclass(frozen=True)
class Length:
  """How long a clip is: in frames or in seconds, the other is 0.

  Attributes:
    frames: of every clip.
    seconds: of every clip, by the frames' times.
    crf: quality of libx264: 0 keeps every frame as it is, 18 looks like it.
  """

  frames: int = 0
  seconds: float = 0.0
  crf: int = 16

  def __post_init__(self):
    if (self.frames > 0) == (self.seconds > 0):
      raise ValueError(
        f"one of clip_frames and clip_seconds must be above 0, got "
        f"{self.frames} and {self.seconds}; leave the other out"
      )
    if not 0 <= self.crf <= 51:
      raise ValueError(f"crf must be 0..51, got {self.crf}; try 16")


@dataclasses.dataclass(frozen=True)
class Cut:
  """A clip: its mp4's bytes, and what a `probe.Clip` says of it."""

  mp4: bytes
  num_frames: int
  height: int
  width: int
  fps: float


def count(clip: probe.Clip, length: Length) -> int:
  """Say how many clips a video of even rate gives; what is over is dropped."""
  if length.frames:
    return clip.num_frames // length.frames
  return int((clip.seconds + 0.5 / clip.fps) / length.seconds)


def cut(path: str, clip: probe.Clip, length: Length) -> Iterator[Cut]:
  """Yield a video's clips in order; raises `probe.ClipError` as probing does.

  Args:
    path: of the video.
    clip: what probing it gave.
    length: of the clips; a shorter rest is dropped.
  """
  whole = count(clip, length)
  with open(path, "rb") as file, probe.open_video(file) as (container, stream):
    frames = probe.frames(container, stream)
    groups = itertools.groupby(_numbered(frames, clip, length), lambda x: x[0])
    for number, group in groups:
      if number >= whole:
        return
      yield _encode((frame for _, frame in group), stream, clip, length.crf)


def _numbered(
  frames: Iterator[av.VideoFrame], clip: probe.Clip, length: Length
) -> Iterator[tuple[int, av.VideoFrame]]:
  """Give each frame the number of its clip."""
  begin = None
  for position, frame in enumerate(frames):
    if length.frames:
      yield position // length.frames, frame
      continue
    if frame.pts is None:
      seconds = position / clip.fps
    else:
      begin = frame.pts if begin is None else begin
      seconds = float((frame.pts - begin) * frame.time_base)
    yield int((seconds + _ROUNDED) / length.seconds), frame


def _encode(
  frames: Iterator[av.VideoFrame], stream, clip: probe.Clip, crf: int
) -> Cut:
  """Encode frames as an mp4 whose times begin at 0."""
  file, number, times = io.BytesIO(), 0, []
  with av.open(file, "w", format="mp4") as container:
    for frame in _upright(frames):
      frame = _encodable(frame)
      if not number:
        output = _output(container, frame, stream, clip, crf)
      pts = number if frame.pts is None else frame.pts
      times.append(pts)
      frame.pts, frame.time_base = pts - times[0], stream.time_base
      container.mux(output.encode(frame))
      number += 1
    container.mux(output.encode())
  fps = clip.fps
  if number > 1 and times[-1] > times[0]:
    fps = float((number - 1) / ((times[-1] - times[0]) * stream.time_base))
  return Cut(file.getvalue(), number, frame.height, frame.width, fps)


def _output(container, frame: av.VideoFrame, stream, clip: probe.Clip, crf):
  """Add the stream of a clip whose frames are like this one."""
  rate = fractions.Fraction(clip.fps).limit_denominator(_LARGEST_RATE)
  output = container.add_stream("libx264", rate=rate)
  output.width, output.height = frame.width, frame.height
  output.pix_fmt = frame.format.name
  codec, source = output.codec_context, stream.codec_context
  codec.time_base = stream.time_base
  # Else a reader would turn the same numbers into other colours.
  for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
    setattr(codec, name, getattr(source, name))
  codec.gop_size = max(round(clip.fps), 1)
  codec.options = {"crf": f"{crf}", "preset": _PRESET}
  return output


def _upright(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
  """Turn frames as they are displayed."""
  graph = None
  for frame in frames:
    if not frame.rotation % 360:
      yield frame
      continue
    graph = graph or _turn(frame)
    graph.push(frame)
    yield graph.pull()  # pyright: ignore[reportReturnType]


def _turn(frame: av.VideoFrame) -> av.filter.Graph:
  graph = av.filter.Graph()
  nodes = [
    graph.add_buffer(
      width=frame.width,
      height=frame.height,
      format=frame.format,
      time_base=frame.time_base,
    ),
    *(graph.add(*step) for step in _TURNS[frame.rotation % 360]),
    graph.add("buffersink"),
  ]
  graph.link_nodes(*nodes).configure()
  return graph


def _encodable(frame: av.VideoFrame) -> av.VideoFrame:
  """Give a frame in a format that libx264 takes, of any size."""
  name, wanted = frame.format.name, frame.format.name
  if name not in _FORMATS:
    wanted = "yuv420p"
  if (frame.width % 2 or frame.height % 2) and wanted in _HALVED:
    wanted = "yuv444p"
  if wanted != name:
    frame = frame.reformat(format=wanted)
  frame.pict_type = av.video.frame.PictureType.NONE  # x264's choice, not given
  return frame
