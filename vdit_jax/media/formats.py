"""Videos as files: the way from arrays to mp4, gif, png and npy, and back.

Stands at the end of sampling and beside evaluation; knows no model. A video is
[F, H, W, 3], float in [-1, 1] or uint8. A file is encoded in memory, then
written whole. Paths may be remote, such as `gs://`.
"""

import fractions
import io

import av
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from vdit_jax import writing
from vdit_jax.media import display, footage, sheets

SUFFIXES = (".gif", ".mp4", ".npy", ".png")

_CRF = 12  # x264's constant rate factor; 0 is lossless, 18 looks lossless
_BT709 = 1  # code of BT.709 in ITU-T H.273, for each of the three tags


def write(
  path: epath.PathLike, video: sheets.Video, fps: float, *, enlarge: int = 1
) -> None:
  """Write a video in the format that the path's suffix names.

  An mp4 of odd height or width gains a row or column, a copy of its last, for
  its colours are kept at half resolution. A png is one row of all frames. An
  npy keeps the values as they are and neither `fps` nor `enlarge`.

  Args:
    path: file to write, one of `SUFFIXES`; an older one is replaced.
    video: frames [F, H, W, 3], float in [-1, 1] or uint8.
    fps: frames a second.
    enlarge: integer factor of nearest-neighbour enlargement.
  """
  path = _known(path)
  frames = _frames(video, fps, enlarge)
  if path.suffix == ".mp4":
    data = _mp4(frames, fps)
  elif path.suffix == ".gif":
    data = _gif(frames, fps)
  elif path.suffix == ".png":
    data = _png(sheets.draw(frames[None]))
  else:
    data = _npy(video)
  writing.write(path, data)


def mp4(video: sheets.Video, fps: float, *, enlarge: int = 1) -> bytes:
  """Encode a video as `write` does, to the bytes of an mp4."""
  return _mp4(_frames(video, fps, enlarge), fps)


def write_image(path: epath.PathLike, image: np.ndarray) -> None:
  """Write an image [H, W, 3], such as a contact sheet, as a png."""
  writing.write(_known(path), _png(sheets.to_uint8(image)))


def read(path: epath.PathLike) -> tuple[np.ndarray, float | None]:
  """Read a video or an image, which is a video of one frame.

  Returns:
    frames uint8 [F, H, W, 3], and frames a second, which is None where the
    file has none (npy, png).
  """
  path = _known(path)
  data = io.BytesIO(path.read_bytes())
  if path.suffix == ".mp4":
    return _read_mp4(data)
  if path.suffix == ".gif":
    return _read_gif(data)
  if path.suffix == ".png":
    return footage.still(data)[None], None
  return sheets.to_uint8(np.load(data)), None


def read_still(path: epath.PathLike) -> np.ndarray:
  """Read an image, uint8 [H, W, 3]; refuse what is none.

  It is turned as its camera says, and loses what transparency it has. A file
  that a dataset is built of as a still is one here, and the other way round.
  """
  try:
    with footage.regular(path) as file:
      return footage.still(file, strict=True)
  except footage.FootageError as error:
    if error.fault == footage.Fault.MISSING:
      raise ValueError(
        f"image {path} is not a file ({error.detail}); give one"
      ) from error
    raise ValueError(
      f"image {path} cannot be read as an image ({error.fault}, "
      f"{error.detail}); give a PNG or JPEG"
    ) from error


def read_image(path: epath.PathLike, height: int, width: int) -> np.ndarray:
  """Read an image, resized to a video's height and width by Lanczos' filter.

  Args:
    path: see `read_still`.
    height, width: of the video, in the image's proportion to a pixel.

  Returns:
    uint8 [height, width, 3].
  """
  image = Image.fromarray(read_still(path))
  W, H = image.size
  if abs(W * height / H - width) > 1 and abs(H * width / W - height) > 1:
    raise ValueError(
      f"image {path} is {W} wide and {H} high, another proportion than the "
      f"video's {width} and {height}; crop it, or give another height or width"
    )
  return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def check_writable(path: epath.PathLike, name: str = "path") -> None:
  """Refuse a path that `write` would fail at, before anything is computed."""
  writing.check_file(_known(path, name), name)


def _known(path, name="path"):
  path = epath.Path(path)
  if path.suffix not in SUFFIXES:
    raise ValueError(
      f"{name} must end in one of {', '.join(SUFFIXES)}, got {str(path)!r};"
      " rename it"
    )
  return path


def _frames(video, fps, enlarge):
  """Check one clip and its fps; return its frames, uint8 and enlarged."""
  _check_fps(fps)
  frames = sheets.enlarge(sheets.to_uint8(video), enlarge)
  if frames.ndim != 4:
    raise ValueError(
      f"video must be one clip [F, H, W, 3], got shape {frames.shape}; write"
      " the clips of a batch one by one"
    )
  return frames


def _check_fps(fps):
  if not (np.isfinite(fps) and fps > 0):
    raise ValueError(f"fps must be positive, got {fps}; try 8")


def _mp4(frames, fps):
  H, W = frames.shape[1:3]
  frames = np.pad(frames, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
  buffer = io.BytesIO()
  with av.open(buffer, "w", format="mp4") as container:
    # 30000/1001 is the usual spelling of 29.97 and has the largest
    # denominator in use.
    rate = fractions.Fraction(fps).limit_denominator(1001)
    stream = container.add_stream("libx264", rate, options={"crf": str(_CRF)})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.colorspace = context.color_trc = context.color_primaries = _BT709
    for frame in frames:
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p", dst_colorspace="ITU709"
      )
      container.mux(stream.encode(picture))
    container.mux(stream.encode())
  return buffer.getvalue()


def _read_mp4(data):
  with footage.open(data) as found:
    frames = np.stack(list(map(display.shower(), footage.frames(found))))
    return frames, float(found.stream.average_rate)  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]


def _gif(frames, fps):
  # A gif counts in hundredths of a second: the times are rounded, not the
  # durations, so that rounding does not add up. Equal neighbours become one
  # longer frame; the comment with the fps tells `_read_gif` how many.
  if fps > 50:
    raise ValueError(f"fps of a gif must be at most 50, got {fps}; use mp4")
  ends = np.round(100 * np.arange(len(frames) + 1) / fps).astype(int)
  durations = (10 * np.diff(ends)).tolist()
  images = [
    Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)
    for frame in frames
  ]
  buffer = io.BytesIO()
  images[0].save(
    buffer,
    "GIF",
    save_all=True,
    append_images=images[1:],
    duration=durations if len(images) > 1 else durations[0],
    loop=0,
    comment=f"fps={float(fps)!r}".encode(),
  )
  return buffer.getvalue()


def _read_gif(data):
  image = Image.open(data)
  comment = image.info.get("comment", b"")
  images, ends = [], [0.0]
  for index in range(getattr(image, "n_frames", 1)):
    image.seek(index)
    images.append(np.asarray(image.convert("RGB")))
    ends.append(ends[-1] + image.info.get("duration", 0) / 1000)
  if comment.startswith(b"fps="):
    fps = float(comment[4:])
    counts = np.diff(np.round(np.array(ends) * fps).astype(int))
  else:
    fps = len(images) / ends[-1] if ends[-1] else None
    counts = np.ones(len(images), int)
  return np.repeat(np.stack(images), counts, axis=0), fps


def _png(image):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG")
  return buffer.getvalue()


def _npy(video):
  video = np.asarray(video)
  if video.dtype == jnp.bfloat16:  # numpy's format has no name for it
    video = video.astype(np.float32)
  buffer = io.BytesIO()
  np.save(buffer, video)
  return buffer.getvalue()
