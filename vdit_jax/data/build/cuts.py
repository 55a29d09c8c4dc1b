"""Cuts a long video into clips of one length, each an mp4 of its own.

A clip of a part of the file's packets would begin at a key frame before it, so
it is encoded anew: H.264 at `crf`, with a key frame every second at most, so
that a reader decodes only little that it doesn't need. At crf=0 the frames
stay as they are, at about ten times the bytes of crf=16. Times and the shape
of pixels are kept, frames are turned upright, sound is dropped.
"""

import dataclasses
import fractions
import io
import itertools
from collections.abc import Callable, Iterator

import av
import av.filter
import av.video.frame

from vdit_jax.data.build import probe
from vdit_jax.media import display, footage

_PRESET = "veryfast"
# Pixel formats that libx264 takes as they are.
_FORMATS = frozenset(
  "yuv420p yuv422p yuv444p yuvj420p yuvj422p yuvj444p yuv420p10le yuv422p10le "
  "yuv444p10le gray".split()
)
_ROUNDED = 1e-3  # seconds: WebM's times are whole milliseconds
_LARGEST_RATE = 1001  # denominator of 24000/1001, 30000/1001, 60000/1001
_FASTEST = 2**16  # frames a second that are said; their times stay
_RGB = 0  # code in ITU-T H.273 of the matrix of what is no YUV
_UNSAID = 2


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
  """Yield a video's clips in order; raise FootageError as probing does.

  Args:
    path: of the video.
    clip: what probing it gave.
    length: of the clips; a shorter rest is dropped.
  """
  whole = count(clip, length)
  with footage.regular(path) as file, footage.open(file) as found:
    frames = _numbered(_timed(footage.frames(found), clip.fps), length)
    for number, group in itertools.groupby(frames, lambda x: x[0]):
      if number >= whole:
        return
      kept = (frame for _, frame in group)
      yield _encode(kept, found.aspect, clip.fps, length.crf)


def _timed(
  frames: Iterator[av.VideoFrame], fps: float
) -> Iterator[av.VideoFrame]:
  """Give times to frames that have none, or none that rises (AVI)."""
  last = None
  for frame in frames:
    if last is None:
      frame.pts = frame.pts or 0
    elif frame.pts is None or frame.pts <= last:
      frame.pts = last + max(round(1 / (fps * frame.time_base)), 1)
    last = frame.pts
    yield frame


def _numbered(
  frames: Iterator[av.VideoFrame], length: Length
) -> Iterator[tuple[int, av.VideoFrame]]:
  """Give each frame the number of its clip."""
  begin = None
  for position, frame in enumerate(frames):
    if length.frames:
      yield position // length.frames, frame
      continue
    begin = frame.pts if begin is None else begin
    seconds = float((frame.pts - begin) * frame.time_base)
    yield int((seconds + _ROUNDED) / length.seconds), frame


def _encode(
  frames: Iterator[av.VideoFrame], aspect: float, fps: float, crf: int
) -> Cut:
  """Encode frames as an mp4 whose times begin at 0."""
  file, number, times = io.BytesIO(), 0, []
  with av.open(file, "w", format="mp4") as container:
    for frame in frames:
      turn, clock = display.turn(frame), frame.time_base
      if not number:
        upright = _turner(frame, turn)
      frame = _encodable(upright(frame))
      if not number:
        shape = 1 / aspect if turn.transposed else aspect
        output = _output(container, frame, clock, shape, fps, crf)
      times.append(frame.pts)
      frame.pts, frame.time_base = frame.pts - times[0], clock
      container.mux(output.encode(frame))
      number += 1
    container.mux(output.encode())
  if number > 1 and times[-1] > times[0]:
    fps = float((number - 1) / ((times[-1] - times[0]) * clock))
  return Cut(file.getvalue(), number, frame.height, frame.width, fps)


def _output(container, frame: av.VideoFrame, clock, shape, fps: float, crf):
  """Add the stream of a clip whose frames are like this one."""
  fps = min(fps, _FASTEST)
  rate = fractions.Fraction(fps).limit_denominator(_LARGEST_RATE)
  output = container.add_stream("libx264", rate=rate)
  output.width, output.height = frame.width, frame.height
  output.pix_fmt = frame.format.name
  codec = output.codec_context
  codec.time_base = clock
  codec.sample_aspect_ratio = fractions.Fraction(shape).limit_denominator(1000)
  # Else a reader would turn the same numbers into other colours.
  codec.color_range, codec.color_trc = frame.color_range, frame.color_trc
  codec.color_primaries = frame.color_primaries
  codec.colorspace = _UNSAID if frame.colorspace == _RGB else frame.colorspace
  codec.gop_size = max(round(fps), 1)
  # Of more than eight bits crf=0 loses some.
  quality = {"crf": f"{crf}"} if crf else {"qp": "0"}
  codec.options = quality | {"preset": _PRESET}
  return output


def _turner(
  frame: av.VideoFrame, turn: display.Turn
) -> Callable[[av.VideoFrame], av.VideoFrame]:
  """Give a function that turns frames like this one upright."""
  steps = [("transpose", "cclock_flip")] * turn.transposed
  steps += [("vflip",)] * turn.flipped + [("hflip",)] * turn.mirrored
  if not steps:
    return lambda frame: frame
  graph = av.filter.Graph()
  nodes = [
    graph.add_buffer(
      width=frame.width,
      height=frame.height,
      format=frame.format,
      time_base=frame.time_base,
    ),
    *(graph.add(*step) for step in steps),
    graph.add("buffersink"),
  ]
  graph.link_nodes(*nodes).configure()

  def upright(frame: av.VideoFrame) -> av.VideoFrame:
    graph.push(frame)
    return graph.pull()  # pyright: ignore[reportReturnType]

  return upright


def _encodable(frame: av.VideoFrame) -> av.VideoFrame:
  """Give a frame in a format that libx264 takes, of any size."""
  name, wanted = frame.format.name, frame.format.name
  deep = "10le" if max(c.bits for c in frame.format.components) > 8 else ""
  if name not in _FORMATS:
    chroma = 444 if frame.format.chroma_width(2) == 2 else 420
    wanted = f"yuv{chroma}p{deep}"
  if (frame.width % 2 or frame.height % 2) and "444" not in wanted:
    wanted = f"yuv444p{deep}"
  if wanted != name:
    frame = frame.reformat(format=wanted)
  frame.pict_type = av.video.frame.PictureType.NONE  # x264's choice, not given
  return frame
