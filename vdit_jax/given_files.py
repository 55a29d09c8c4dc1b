"""What a person gives of a clip on the command line: pictures, clips, numbers.

  flags' values --Files--> plan(files, pipe, size, fps) --> Plan
        Plan.stream --> videos [B, F, H, W, 3] of each batch

All of it is read and refused before anything is made. `editing` has what a
clip is given; here it is read from files, at the model's size and rate.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from vdit_jax import batches, conditioning, editing, encoding, pipeline
from vdit_jax.data import clips, digit_worlds
from vdit_jax.data.build import probe
from vdit_jax.media import formats

Size = batches.Size

_LONGEST = 3_600  # seconds that are made
_MOST_BYTES = 2**31  # of a clip's file

# Pixels and percent a frame: what is seen moves the other way.
CAMERAS = {
  "still": (0.0, 0.0, 0.0),
  "left": (-0.5, 0.0, 0.0),
  "right": (0.5, 0.0, 0.0),
  "up": (0.0, -0.5, 0.0),
  "down": (0.0, 0.5, 0.0),
  "in": (0.0, 0.0, 2.0),
  "out": (0.0, 0.0, -2.0),
}


@dataclasses.dataclass(frozen=True)
class Files:
  """What is given.

  Attributes:
    images: pictures of the frames that the model is given, first to last.
    keyframes: pictures at times of the clip, "FILE@SECONDS".
    video: a clip to go on with or to change.
    extend, extend_back: seconds to make behind the clip, and before it.
    join: two clips between which frames are made.
    between: seconds between them.
    loop: whether the first frame is to follow the last.
    strength: how much of the clip is made anew, up to 1; None is not asked.
    expand: pixels to make left of the clip, above, right and below.
    reframe: (height, width) in whose middle the clip is to lie.
  """

  images: tuple[str, ...] = ()
  keyframes: tuple[str, ...] = ()
  video: str | None = None
  extend: float = 0.0
  extend_back: float = 0.0
  join: tuple[str, ...] = ()
  between: float = 1.0
  loop: bool = False
  strength: float | None = None
  expand: tuple[int, ...] = ()
  reframe: tuple[int, ...] = ()

  def __post_init__(self):
    for name in ("extend", "extend_back", "between"):
      if not 0 <= getattr(self, name) <= _LONGEST:
        raise ValueError(
          f"{name} must be 0 to {_LONGEST} seconds, got {getattr(self, name)}"
        )
    asked = self._of_video()
    if self.video and len(asked) != 1:
      raise ValueError(
        "video must be given with one of extend (and extend_back), strength, "
        f"expand and reframe, got {asked or 'none'}"
      )
    if asked and not self.video:
      raise ValueError(f"{asked[0]} needs a clip; give video")
    kinds = {
      "image": bool(self.images),
      "keyframe": bool(self.keyframes),
      "video": bool(self.video),
      "join": bool(self.join),
    }
    given = [name for name, there in kinds.items() if there]
    if len(given) > 1:
      raise ValueError(f"one of {', '.join(given)} must be given, not several")
    if self.loop and (given not in ([], ["image"]) or len(self.images) > 1):
      raise ValueError(
        f"loop must be alone or with one image, its first frame, got {given}"
      )
    if self.join and len(self.join) != 2:
      raise ValueError(f"join must be two clips, got {len(self.join)}")
    for name, many in (("expand", 4), ("reframe", 2)):
      if len(getattr(self, name)) not in (0, many):
        raise ValueError(f"{name} must be {many} numbers of pixels")

  def _of_video(self) -> list[str]:
    longer = self.extend > 0 or self.extend_back > 0
    asked = {
      "extend": longer,
      "strength": self.strength is not None,
      "expand": bool(self.expand),
      "reframe": bool(self.reframe),
    }
    return [name for name, there in asked.items() if there]

  @property
  def paths(self) -> list[str]:
    """The files, of which each must be there."""
    at = [_split(text)[0] for text in self.keyframes]
    video = [self.video] if self.video else []
    return [*self.images, *at, *video, *self.join]


@dataclasses.dataclass(frozen=True)
class Plan:
  """How videos are made of what is given.

  Attributes:
    size: frames, height and width of what the model makes at once.
    stream: (prompts, seeds, batch_size, negative_prompt, settings) -> videos
      of each batch; settings as `pipeline.Pipeline.stream` takes them.
  """

  size: Size
  stream: Callable[..., Iterator[np.ndarray]]


def plan(files: Files, pipe: pipeline.Pipeline, size: Size, fps: float) -> Plan:
  """Read what is given; say how videos are made of it.

  Args:
    files: what is given.
    pipe: that makes them.
    size: frames, height and width asked for.
    fps: frames a second of what the model makes.

  Raises:
    ValueError: for what the model does not take, times and sizes that no clip
      has, files that are none.
  """
  if files.images and not files.loop:
    return _plain(pipe, _needed(files.images, pipe, size), size)
  if not (files.paths or files.loop):
    return _plain(pipe, None, size)
  _check_takes(pipe)
  if files.loop:
    return _loop(pipe, files.images, size)
  if files.keyframes:
    return _of_edit(pipe, _key_frames(files.keyframes, size, fps))
  if files.join:
    ends = [_read(path, size[1:], fps) for path in files.join]
    return _join(pipe, ends, round(files.between * fps), size)
  if files.video and (files.extend or files.extend_back):
    clip = _read(files.video, size[1:], fps)
    more = round(files.extend_back * fps), round(files.extend * fps)
    return _extension(pipe, clip, more, size)
  return _of_edit(pipe, _changed(files, pipe, size, fps))


def numbers(camera: str | None, motion: str | None) -> dict[str, float]:
  """Read what a denoiser is told of a camera, and of a box that moves.

  Args:
    camera: one of `CAMERAS`, or X,Y,ZOOM in pixels and percent a frame.
    motion: LEFT,TOP,RIGHT,BOTTOM:DX,DY in pixels, the way being that from the
      first frame to the last.
  """
  found = {}
  if camera is not None:
    values = CAMERAS.get(camera) or _numbers(camera, 3)
    if values is None:
      raise ValueError(
        f"camera must be one of {', '.join(CAMERAS)} or X,Y,ZOOM, got "
        f"{camera!r}; write 0.5,0,0"
      )
    found |= dict(zip(digit_worlds.CAMERA, values, strict=True))
  if motion is not None:
    box, _, way = motion.partition(":")
    corners, moved = _numbers(box, 4), _numbers(way, 2)
    if corners is None or moved is None:
      raise ValueError(
        f"motion must be LEFT,TOP,RIGHT,BOTTOM:DX,DY, got {motion!r}; write "
        "2,8,16,22:12,0"
      )
    found |= dict(zip(digit_worlds.BOX, corners + moved, strict=True))
  return found


def _plain(pipe, edit: dict[str, Any] | None, size: Size) -> Plan:
  """Make clips of what `pipe.stream` is given as it is."""

  def stream(prompts, seeds, batch_size, negative, **settings):
    shape = dict(zip(("num_frames", "height", "width"), size, strict=True))
    given = {k: _alike(x, len(prompts)) for k, x in (edit or {}).items()}
    return pipe.stream(
      prompts,
      seed=seeds,
      batch_size=batch_size,
      **_of_each(negative, prompts),
      **shape,
      **given,
      **settings,
    )

  return Plan(size, stream)


def _of_edit(
  pipe, edit: editing.Edit, around: Callable[..., Any] = lambda x: x
) -> Plan:
  """Make clips of an edit; around: what is asked for -> what is written."""
  edit = editing.whole(edit, pipe.modules.autoencoder.cfg.time_stride)

  def stream(prompts, seeds, batch_size, negative, **settings):
    asked = edit.of(len(prompts)) | settings | _of_each(negative, prompts)
    made = pipe.stream(prompts, seed=seeds, batch_size=batch_size, **asked)
    yield from (around(video[:, edit.kept]) for video in made)

  return Plan(edit.size, stream)


def _loop(pipe, images: Sequence[str], size: Size) -> Plan:
  """Make loops, from a picture or from one that the model makes."""
  first = None
  if images:
    first = _to_float(formats.read_image(images[0], *size[1:]))
  stride = pipe.modules.autoencoder.cfg.time_stride
  F = (size[0] - 1) // stride * stride or stride

  def stream(prompts, seeds, batch_size, negative, **settings):
    shape = dict(zip(("height", "width"), size[1:], strict=True)) | settings
    for rows in batches.parts(len(prompts), batch_size):
      said, own = prompts[rows], seeds[rows]
      start = [first] * len(said)
      alike = shape | _of_each(negative, said)
      if first is None:
        start = pipe.generate(said, seed=own, num_frames=1, **alike)[:, 0]
      edits = [editing.loop(image, F) for image in start]
      given = {
        "frames": np.stack([edit.frames for edit in edits]),
        "frame_mask": np.stack([edit.mask for edit in edits]),
      }
      asked = alike | {"num_frames": F + 1} | given
      yield pipe.generate(said, seed=own, **asked)[:, edits[0].kept]

  return Plan((F + 1, *size[1:]), stream)


def _join(pipe, ends, between: int, size: Size) -> Plan:
  """Make what lies between two clips, and write all three."""
  before, behind = ends
  room = size[0] - between
  if room < 2:
    raise ValueError(
      f"between must leave frames of both clips, got {between} frames of "
      f"num_frames {size[0]}; give less, or more num_frames"
    )
  n = min(len(before), room - room // 2), min(len(behind), room // 2)
  edit = editing.join(before[-n[0] :], behind[: n[1]], between)

  def around(video):
    ends = (_alike(x, len(video)) for x in (before, behind))
    first, last = ends
    return np.concatenate([first, video, last], axis=1)

  return _of_edit(pipe, edit, around)


def _extension(pipe, clip, more: tuple[int, int], size: Size) -> Plan:
  """Make what comes before a clip and behind it, in windows."""
  given = (size[0] + 1) // 2

  def stream(prompts, seeds, batch_size, negative, **settings):
    for rows in batches.parts(len(prompts), batch_size):
      said, own = prompts[rows], seeds[rows]
      parts = [_alike(clip, len(said))]
      for number, backwards in zip(more, (True, False), strict=True):
        if not number:
          continue
        made = editing.extend(
          pipe,
          said,
          parts[0] if backwards else parts[-1],
          number,
          window=size[0],
          given=given,
          seeds=own,
          backwards=backwards,
          **_of_each(negative, said),
          **settings,
        )
        for piece in made:
          parts.insert(0, piece) if backwards else parts.append(piece)
      yield np.concatenate(parts, axis=1)

  return Plan(size, stream)


def _changed(files: Files, pipe, size: Size, fps: float) -> editing.Edit:
  """Read a clip of which something is made anew, or around which."""
  if files.strength is not None:
    return editing.repaint(
      _read(files.video, size[1:], fps, size[0]), files.strength
    )
  if files.expand:
    left, top, right, bottom = files.expand
    inside = size[1] - top - bottom, size[2] - left - right
    _check_inside(inside, size)
    clip = _read(files.video, inside, fps, size[0])
    return editing.expand(clip, left, top, right, bottom)
  height, width = files.reframe
  clip = _read(files.video, None, fps, size[0])
  scale = min(height / clip.shape[1], width / clip.shape[2])
  stride = pipe.modules.autoencoder.cfg.space_stride
  inside = [
    min(max(round(n * scale / stride), 1) * stride, most)
    for n, most in zip(clip.shape[1:3], (height, width), strict=True)
  ]
  clip = _read(files.video, inside, fps, size[0])
  top, left = (height - inside[0]) // 2, (width - inside[1]) // 2
  sides = left, top, width - inside[1] - left, height - inside[0] - top
  return editing.expand(clip, *sides)


def _needed(paths: Sequence[str], pipe, size: Size) -> dict[str, np.ndarray]:
  """Let pictures be the frames that a model is given, first and last."""
  needs = pipe.modules.needs
  positions = needs or (0, -1)
  if not len(needs) <= len(paths) <= len(positions):
    raise ValueError(
      f"image must be given for each of the frames {positions}, -1 being the "
      f"last, got {len(paths)} images"
    )
  images = np.stack([formats.read_image(p, *size[1:]) for p in paths])
  video, mask = conditioning.place(images, positions[: len(paths)], size[0])
  return {"frames": video, "frame_mask": mask}


def _key_frames(texts: Sequence[str], size: Size, fps: float) -> editing.Edit:
  """Read pictures at times, in whole frames."""
  images = {}
  for text in texts:
    path, seconds = _split(text)
    frame = round(seconds * fps)
    if frame in images:
      raise ValueError(
        f"keyframe {text!r} is at frame {frame}, as another is; give other "
        f"times, a frame being {1 / fps:.3g} seconds"
      )
    image = formats.read_image(path, *size[1:])
    images[frame] = _to_float(image)
  return editing.key_frames(images, size[0])


def _split(text: str) -> tuple[str, float]:
  """Split FILE@SECONDS."""
  path, _, seconds = text.rpartition("@")
  found = _numbers(seconds, 1)
  if not path or found is None:
    raise ValueError(
      f"keyframe must be FILE@SECONDS, got {text!r}; write last.png@1.0"
    )
  return path, found[0]


def _numbers(text: str, many: int) -> tuple[float, ...] | None:
  """Read numbers with commas between; None for others, or more or fewer."""
  try:
    found = tuple(float(part) for part in text.split(","))
  except ValueError:
    return None
  return found if len(found) == many and np.isfinite(found).all() else None


def _read(
  path: str, size: Sequence[int] | None, fps: float, most: int | None = None
) -> np.ndarray:
  """Read a clip at a rate, in a size or in its own, [F, H, W, 3] in [-1, 1].

  Args:
    path: of the file.
    size: height and width, which the clip's middle fills; None is its own.
    fps: frames a second.
    most: frames to read, which the clip must have; None is all.
  """
  found = probe.probe(path, 1, _MOST_BYTES)
  if isinstance(found, probe.Reject):
    raise ValueError(
      f"video {path} cannot be read as a clip ({found.reason}, {found.detail});"
      " give another"
    )
  F, own = found.num_frames, (found.height, found.width)
  F = int(clips.available(F, found.fps, fps))
  if most is not None and F < most:
    raise ValueError(
      f"video {path} has {F} frames at {fps:g} a second, fewer than the {most} "
      "of num_frames; give a longer one, or --num_frames"
    )
  view = clips.View((most or F, *(size or own)), fps)
  video, _ = clips.read(epath.Path(path).read_bytes(), view)
  return _to_float(video)


def _to_float(video: np.ndarray) -> np.ndarray:
  """Give uint8 pixels as floats in [-1, 1]."""
  return np.asarray(encoding.to_float(video))


def _of_each(
  negative: str | None, prompts: Sequence[str]
) -> dict[str, list[str]]:
  """Give each prompt the negative one, if there is one."""
  if negative is None:
    return {}
  return {"negative_prompts": [negative] * len(prompts)}


def _alike(x: np.ndarray, number: int) -> np.ndarray:
  """Repeat what one clip is given for a number of them, at no memory."""
  return np.broadcast_to(x, (number, *x.shape))


def _check_takes(pipe: pipeline.Pipeline) -> None:
  """Refuse to give parts of clips to a model that was not trained for it."""
  if not pipe.modules.takes:
    raise ValueError(
      f"this {pipe.system.name} was not trained to be given parts of a clip; "
      "use one with denoiser.given, or --image where it is given frames"
    )


def _check_inside(inside: tuple[int, int], size: Size) -> None:
  if min(inside) < 1:
    raise ValueError(
      f"expand must leave room for the clip in {size[1]}x{size[2]} pixels, got "
      f"{inside}; add fewer, or ask for a larger --height and --width"
    )
