"""Clips made of what a person has: key frames, clips to go on with, to edit.

  pictures and clips --key_frames, join, loop, expand, repaint--> Edit
        generate(prompts, **edit.of(B))[:, edit.kept] --> videos

An `Edit` says which frames, or parts of them, are given of one clip, and which
frames of what is made are asked for; each of several clips is given the same.
What is longer than a clip of the model's is made in windows, each of which is
given the end of the one before it: `extend`, at a window's memory.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

_WINDOWS = 1_000_003  # between the seeds of a video's windows

Size = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Edit:
  """What is given of a clip, and what of it is asked for.

  Attributes:
    frames: whose given pixels matter, float in [-1, 1], [F, H, W, 3].
    mask: which are given, bool [F] or [F, H, W].
    kept: frames of the clip that is made which are asked for.
    strength: 1 makes what is not given anew; less keeps of `frames`.
  """

  frames: np.ndarray
  mask: np.ndarray
  kept: slice = dataclasses.field(default_factory=lambda: slice(None))
  strength: float = 1.0

  @property
  def size(self) -> Size:
    """Frames, height and width of the clip that is made."""
    return self.frames.shape[:3]  # pyright: ignore[reportReturnType]

  def of(self, number: int) -> dict[str, Any]:
    """Arguments of `pipeline.Pipeline.stream`, for a number of clips."""
    F, H, W = self.size
    alike = lambda x: np.broadcast_to(x, (number, *x.shape))
    return {
      "num_frames": F,
      "height": H,
      "width": W,
      "frames": alike(self.frames),
      "frame_mask": alike(self.mask),
      "strength": self.strength,
    }


class Makes(Protocol):
  """What makes videos, as `pipeline.Pipeline` does."""

  def generate(self, prompts: list[str], **asked: Any) -> np.ndarray:
    """Make a video for each prompt."""
    ...


def key_frames(images: dict[int, np.ndarray], num_frames: int) -> Edit:
  """Give single frames.

  Args:
    images: by the number of the frame, from the last one if negative, each
      [H, W, 3] in [-1, 1].
    num_frames: of the clip.
  """
  if not images:
    raise ValueError("key frames must be at least one, got none; give some")
  places = {n + num_frames * (n < 0): image for n, image in images.items()}
  if len(places) < len(images):
    raise ValueError(f"key frames must differ, got {sorted(images)}")
  if wrong := [n for n in places if not 0 <= n < num_frames]:
    raise ValueError(
      f"key frames must be of the clip's {num_frames}, 0 to {num_frames - 1}, "
      f"got {sorted(wrong)}; give earlier ones or more frames"
    )
  _check_alike([image.shape for image in images.values()], "key frames")
  frames, mask = _empty(num_frames, next(iter(images.values())).shape)
  for n, image in places.items():
    frames[n], mask[n] = image, True
  return Edit(frames, mask)


def join(before: np.ndarray, behind: np.ndarray, between: int) -> Edit:
  """Make frames that lead from a clip's end to another's beginning.

  Args:
    before, behind: given frames of the two, [n, H, W, 3].
    between: frames to make.
  """
  _check_alike([before.shape[1:], behind.shape[1:]], "clips to join")
  if between < 1:
    raise ValueError(f"frames between clips must be 1 or more, got {between}")
  start, stop = len(before), len(before) + between
  frames, mask = _empty(stop + len(behind), before.shape[1:])
  frames[:start], frames[stop:] = before, behind
  mask[:start], mask[stop:] = True, True
  return Edit(frames, mask, slice(start, stop))


def loop(image: np.ndarray, num_frames: int) -> Edit:
  """Make a clip whose first frame follows its last.

  Args:
    image: the first frame, [H, W, 3].
    num_frames: of the clip; one more is made, which is the first again.
  """
  frames, mask = _empty(num_frames + 1, image.shape)
  frames[[0, -1]], mask[[0, -1]] = image, True
  return Edit(frames, mask, slice(0, num_frames))


def expand(
  video: np.ndarray, left: int, top: int, right: int, bottom: int
) -> Edit:
  """Make what is around a clip.

  Args:
    video: [F, H, W, 3].
    left, top, right, bottom: pixels to add on each side.
  """
  added = left, top, right, bottom
  if min(added) < 0 or not any(added):
    raise ValueError(
      f"expand must add pixels on some side, got {added} for left, top, right "
      "and bottom; give numbers that are not negative"
    )
  F, H, W, _ = video.shape
  frames = np.zeros((F, H + top + bottom, W + left + right, 3), np.float32)
  mask = np.zeros(frames.shape[:3], bool)
  inside = np.s_[:, top : top + H, left : left + W]
  frames[inside], mask[inside] = video, True
  return Edit(frames, mask)


def repaint(video: np.ndarray, strength: float) -> Edit:
  """Make a clip anew that stays like another one, the more the less strength.

  Args:
    video: [F, H, W, 3].
    strength: above 0, up to 1.
  """
  mask = np.zeros(len(video), bool)
  return Edit(np.asarray(video, np.float32), mask, strength=strength)


def whole(edit: Edit, stride: int) -> Edit:
  """Add frames that are not asked for until the clip is `stride` n + 1 long."""
  F = len(edit.frames)
  more = -(F - 1) % stride
  if not more:
    return edit
  start, stop, _ = edit.kept.indices(F)
  pad = lambda x: np.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)])
  return dataclasses.replace(
    edit,
    frames=pad(edit.frames),
    mask=pad(edit.mask),
    kept=slice(start, stop),
  )


def extend(
  pipe: Makes,
  prompts: Sequence[str],
  videos: np.ndarray,
  number: int,
  *,
  window: int,
  given: int,
  seeds: Sequence[int],
  backwards: bool = False,
  **asked: Any,
) -> Iterator[np.ndarray]:
  """Make frames that go on from videos, or lead up to them.

  Args:
    pipe: makes the windows.
    prompts: of each video.
    videos: [B, n, H, W, 3] in [-1, 1].
    number: of the frames to make.
    window: frames of a window.
    given: frames of a window that are those before it, less than it has.
    seeds: of each video's first window; the others have other noise.
    backwards: whether frames are made that come before the videos'.
    asked: what `pipe.generate` takes else.

  Yields:
    The next frames [B, m, H, W, 3], of each window; backwards those before
    all that were yielded.
  """
  B, n = len(videos), videos.shape[1]
  if not 1 <= given < window:
    raise ValueError(f"given must be 1 to {window - 1} frames, got {given}")
  if number < 1:
    raise ValueError(f"frames to make must be 1 or more, got {number}")
  given = min(given, n)
  mask = np.arange(window) < given
  mask = mask[::-1] if backwards else mask
  edge = slice(None, given) if backwards else slice(-given, None)
  known, made, count = videos[:, edge], 0, 0
  while made < number:
    frames = np.zeros((B, window, *videos.shape[2:]), np.float32)
    frames[:, mask] = known
    own = [(seed + count * _WINDOWS) % 2**32 for seed in seeds]
    video = pipe.generate(
      list(prompts),
      num_frames=window,
      height=videos.shape[2],
      width=videos.shape[3],
      frames=frames,
      frame_mask=np.broadcast_to(mask, frames.shape[:2]),
      seed=own,
      **asked,
    )
    left = number - made
    found = video[:, ~mask]
    found = found[:, -left:] if backwards else found[:, :left]
    yield found
    known = video[:, edge]
    made, count = made + found.shape[1], count + 1


def _empty(
  num_frames: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Frames and mask of a clip of which nothing is given."""
  frames = np.zeros((num_frames, *shape), np.float32)
  return frames, np.zeros(num_frames, bool)


def _check_alike(shapes: list[tuple[int, ...]], what: str) -> None:
  if len(set(shapes)) > 1:
    raise ValueError(f"{what} must be of one size, got {shapes}; resize them")
