"""Encoded clips to frames of one shape: sampled in time, cropped, resized.

  mp4 bytes --times--> which frames --seek, decode, crop--> [F, H, W, 3]

Times are those that the file gives its frames, so a varying rate comes out
even. Only what lies between the key frame before the first wanted frame and
the last wanted one is decoded. Pixels are never stretched: a part of the
target's shape is scaled to its size, with antialiasing.
"""

import dataclasses
import io
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from PIL import Image

from vdit_jax.media import display, footage

CROPS = ("centre", "random")

_TIMELESS = ("avi",)  # has decoding times only; ffmpeg guesses the others


@dataclasses.dataclass(frozen=True)
class View:
  """What of a clip is shown.

  Attributes:
    shape: (F, H, W) of the result.
    fps: frames a second; 0 takes the clip's own frames, one by one.
    start: place of the first frame among those it may be, in [0, 1).
    top, left: place of the crop among those it may have, in [0, 1].
    mirrored: whether left and right change places.
  """

  shape: tuple[int, int, int]
  fps: float = 0.0
  start: float = 0.0
  top: float = 0.5
  left: float = 0.5
  mirrored: bool = False


class _Found(NamedTuple):
  """The frames of a view.

  Attributes:
    times: seconds of all the clip's frames, [n].
    aspect: width of a pixel as stored, over its height.
    chosen: F keys of `frames`.
    frames: those of them that there are.
  """

  times: np.ndarray
  aspect: float
  chosen: list[int]
  frames: dict[int, av.VideoFrame]


def draw_view(
  shape: tuple[int, int, int],
  fps: float,
  rng: np.random.Generator | None,
  crop: str = "centre",
  flip: bool = False,
) -> View:
  """Draw a view; without `rng` it is the centre of the first frames.

  Args:
    shape: (F, H, W).
    fps: see `View`.
    rng: of the record; four numbers are drawn of it, whatever is asked.
    crop: "centre", or "random" along the side that is cut.
    flip: whether every second clip is mirrored.
  """
  if rng is None:
    return View(shape, fps)
  start, top, left, mirrored = rng.random(4).tolist()
  if crop == "centre":
    top = left = 0.5
  return View(shape, fps, start, top, left, flip and mirrored < 0.5)


def available(
  num_frames: np.ndarray | int, fps: np.ndarray | float, target_fps: float
) -> np.ndarray:
  """Tell how many frames clips have at a frame rate, int64 as `num_frames`.

  A clip ends half a frame past its last one's time. An image has one frame at
  any rate, a clip of unknown rate those that it has.

  Args:
    num_frames: stored.
    fps: stored; 0 is not known.
    target_fps: wanted; 0 is the stored one.
  """
  stored, fps = np.asarray(num_frames, np.int64), np.asarray(fps, np.float64)
  if not target_fps:
    return stored
  rate = np.divide(target_fps, fps, out=np.ones_like(fps), where=fps > 0)
  # Rounding of a float32 fps may not cost a frame.
  resampled = np.floor((stored - 0.5) * rate + 1e-3).astype(np.int64) + 1
  return np.where(stored > 1, resampled, stored)


def pick(
  times: np.ndarray, num_frames: int, fps: float, start: float
) -> np.ndarray:
  """Choose the frames nearest to even times.

  Args:
    times: seconds of the clip's frames, rising, [n].
    num_frames: wanted, F.
    fps: wanted; 0 takes frames one by one.
    start: place of the first one among those it may be, in [0, 1).

  Returns:
    Indices [F]; a clip slower than `fps` has some of them twice.

  Raises:
    ValueError: if the clip is too short. The mean rate of a clip whose rate
      varies, which `available` knows, may promise up to half a frame more
      than its times hold: that much is lent.
  """
  count = len(times)
  spacing = (times[-1] - times[0]) / max(count - 1, 1)
  if num_frames == 1 or not (fps and spacing):
    starts = count - num_frames + 1
    wanted = None
  else:
    wanted = np.arange(num_frames) / fps
    ends = times + wanted[-1]
    starts = int(np.searchsorted(ends, times[-1] + 0.5 * spacing, "right"))
    starts = starts or int(ends[0] <= times[-1] + spacing)
  if starts < 1:
    rate = f" at fps={fps:g}" if fps else ""
    raise ValueError(
      f"num_frames={num_frames}{rate} is more than its {count} frames in "
      f"{times[-1] - times[0] + spacing:.3f} seconds hold; ask for fewer"
    )
  first = int(start * starts)
  if wanted is None:
    return np.arange(first, first + num_frames)
  middles = (times[1:] + times[:-1]) / 2
  return np.searchsorted(middles, times[first] + wanted)


def read(data: bytes, view: View) -> tuple[np.ndarray, float]:
  """Decode a view of a clip, or of a still, which is a clip of one frame.

  It is shown as a player shows it: upright, pixels that are not square too.

  Args:
    data: of a file that `footage` opens.
    view: what is shown.

  Returns:
    Video uint8 [F, H, W, 3], and its frames a second; 0 of a single frame.

  Raises:
    ValueError: for a clip that is too short, damaged or none.
  """
  times, aspect, chosen, frames = _sought(data, view) or _counted(data, view)
  show = display.shower()
  shown = {
    number: _show(show(frame), *_pixel(frame, aspect), view)
    for number, frame in frames.items()
  }
  return np.stack([shown[frame] for frame in chosen]), _rate(times, view)


def arrange(
  frames: np.ndarray | Sequence[bytes], fps: float, view: View
) -> tuple[np.ndarray, float]:
  """Show a view of a clip whose frames lie apart, evenly in time.

  Args:
    frames: uint8 [n, h, w, 1 or 3], or n encoded images.
    fps: of the frames; 0 is not known.
    view: what is shown.

  Returns:
    As `read`; 0 frames a second where they are not known.
  """
  times = np.arange(len(frames)) / (fps or 1.0)
  wanted = view.fps if fps else 0.0
  indices = pick(times, view.shape[0], wanted, view.start).tolist()
  shown = {i: _show(_pixels(frames[i]), 1.0, 1.0, view) for i in set(indices)}
  video = np.stack([shown[i] for i in indices])
  return video, _rate(times, view) if fps else 0.0


def _sought(data: bytes, view: View) -> _Found | None:
  """Decode the frames of a view and few others; None where that is not sure.

  So it is of files that have packets without a time (AVI), or without a frame
  (the hidden ones of VP8, those before a recording's first key frame), of those
  that can't be entered at a key frame, and of pictures.
  """
  with footage.open(io.BytesIO(data)) as found:
    if found.picture:
      return None
    stamps, keys = _stamps(found)
    if not len(stamps):
      return None
    times = stamps * float(found.stream.time_base)
    chosen = stamps[pick(times, view.shape[0], view.fps, view.start)].tolist()
    frames = _decode(found, keys, set(chosen))
    return _Found(times, found.aspect, chosen, frames) if frames else None


def _stamps(found: footage.Footage) -> tuple[np.ndarray, list[int]]:
  """Find the times of the frames without decoding one.

  Returns:
    Times in the stream's unit, rising, [n], or [0] where the file does not
    give every frame's; and those of the key frames.
  """
  container: Any = found.container
  packets = [p for p in container.demux(found.stream) if p.size]
  packets = [p for p in packets if not p.is_discard]
  stamps = [packet.pts for packet in packets]
  if None in stamps or container.format.name in _TIMELESS:
    return np.zeros(0, np.int64), []
  keys = [packet.pts for packet in packets if packet.is_keyframe]
  return np.sort(np.array(stamps, np.int64)), keys


def _decode(
  found: footage.Footage, keys: list[int], wanted: set[int]
) -> dict[int, av.VideoFrame] | None:
  """Decode the frames of some times; None if they do not all come out whole.

  From the key frame before the first of them.
  """
  container: Any = found.container
  first, last = min(wanted), max(wanted)
  before = [key for key in keys if key <= first]
  if not before:
    return None
  frames = {}
  try:
    container.seek(max(before), stream=found.stream)
    for frame in container.decode(found.stream):
      if frame.pts in wanted and not frame.is_corrupt:
        frames[frame.pts] = frame
      if frame.pts is not None and frame.pts >= last:
        break
  except av.error.FFmpegError:
    return None
  return frames if len(frames) == len(wanted) else None


def _counted(data: bytes, view: View) -> _Found:
  """Find the frames of a view by decoding all, from the beginning."""
  stamps, frame = [], None
  with footage.open(io.BytesIO(data)) as found:
    for frame in footage.frames(found):
      stamps.append(frame.time)
    times, aspect = footage.times(found, stamps), found.aspect
  chosen = pick(times, view.shape[0], view.fps, view.start).tolist()
  if len(stamps) == 1:
    return _Found(times, aspect, chosen, {0: frame})
  with footage.open(io.BytesIO(data)) as found:
    frames = enumerate(itertools.islice(footage.frames(found), chosen[-1] + 1))
    wanted = set(chosen)
    kept = {number: frame for number, frame in frames if number in wanted}
  return _Found(times, aspect, chosen, kept)


def _pixel(frame: av.VideoFrame, aspect: float) -> tuple[float, float]:
  """Give the height and width of a pixel as displayed."""
  return (aspect, 1.0) if display.turn(frame).transposed else (1.0, aspect)


def _pixels(frame: np.ndarray | bytes) -> np.ndarray:
  """Give a frame as [h, w, 3]."""
  if isinstance(frame, bytes):
    return footage.still(io.BytesIO(frame))
  return np.broadcast_to(frame, (*frame.shape[:2], 3))


def _show(
  image: np.ndarray, tall: float, wide: float, view: View
) -> np.ndarray:
  """Crop and scale an image whose pixels are `tall` by `wide`: [H, W, 3]."""
  (h, w), (_, H, W) = image.shape[:2], view.shape
  scale = max(H / (h * tall), W / (w * wide))
  # As the side that is not cut must be whole to the last bit.
  height = min(H / (scale * tall), h)
  width = min(W / (scale * wide), w)
  y, x = (h - height) * view.top, (w - width) * view.left
  if (height, width) == (H, W):  # nothing to scale: keep the pixels
    image = image[round(y) : round(y) + H, round(x) : round(x) + W]
  else:
    box = (x, y, x + width, y + height)
    whole = Image.fromarray(np.ascontiguousarray(image))
    image = np.asarray(whole.resize((W, H), Image.Resampling.BICUBIC, box))
  return image[:, ::-1] if view.mirrored else image


def _rate(times: np.ndarray, view: View) -> float:
  """Frames a second that a view has; 0 of a single frame."""
  span = times[-1] - times[0]
  if view.shape[0] == 1 or not span:
    return 0.0
  return view.fps or float((len(times) - 1) / span)
