"""Worlds of moving digits beyond a straight path: walls, ground, a camera.

  places in the world --Camera.project--> places in the frame, their scale

A camera moves steadily over the ground and may zoom into the middle of the
frame. What a caption says of a digit's motion is over the ground. Positions
are those of `digits`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from vdit_jax.data import digits

# Numbers of a clip of many shapes, NaN where it has none: pixels and percent a
# frame of the camera; a digit's box in the first frame and its way to the last.
CAMERA = ("camera_x", "camera_y", "zoom")
BOX = ("box_left", "box_top", "box_right", "box_bottom", "box_dx", "box_dy")

BRIGHTEST = 0.2  # of the ground, on which the faintest stroke is still seen

LONGEST = 17  # frames of a clip with a moving camera

_PANS = (0.25, 0.5, 0.75)  # pixels a frame
_GROWN = (0.8, 1.0, 1.0, 1.25)  # by a whole clip's zoom
_LATTICE = 16  # random values a side, repeated
_CELL = 5.0  # pixels between two of them
_STRAIGHT = 5  # frames before the first wall, which tell the direction


@dataclasses.dataclass(frozen=True)
class Camera:
  """How a camera moves.

  Attributes:
    x, y: pixels a frame to the right and down, over the ground.
    zoom: percent a frame by which what is seen grows.
  """

  x: float = 0.0
  y: float = 0.0
  zoom: float = 0.0

  @property
  def moves(self) -> bool:
    """Whether it does anything."""
    return bool(self.x or self.y or self.zoom)

  def scale(self, num_frames: int) -> np.ndarray:
    """How much larger things are seen than in the first frame, [F]."""
    return (1 + self.zoom / 100) ** np.arange(num_frames)

  def project(self, places: np.ndarray, height: int, width: int) -> np.ndarray:
    """Give places in the frame, [..., F, 2], of those in the world."""
    F = places.shape[-2]
    moved = np.arange(F)[:, None] * [self.x, self.y]
    middle = np.array([width - 1, height - 1]) / 2
    return middle + self.scale(F)[:, None] * (places - moved - middle)


def draw_camera(rng: np.random.Generator, num_frames: int) -> Camera:
  """Draw a camera that pans, zooms or does both."""
  unit = list(digits.DIRECTIONS.values())[rng.integers(len(digits.DIRECTIONS))]
  speed = rng.choice(_PANS)
  grown = rng.choice(_GROWN)
  zoom = 100 * (grown ** (1 / (num_frames - 1)) - 1)
  return Camera(speed * unit[0], speed * unit[1], zoom)


def bouncing(
  rng: np.random.Generator,
  direction: str,
  speed: float,
  num_frames: int,
  *size: int,
) -> np.ndarray:
  """Draw a path that walls turn back at the frame's edges.

  Args:
    rng: draws the start, from which the first 5 frames meet no wall.
    direction, speed, num_frames: as those of `digits.trajectory`.
    size: its height, width and digit_size.

  Returns:
    Centres (x, y) in pixels, float64 [F, 2].
  """
  straight, (height, width, digit_size) = min(num_frames, _STRAIGHT), size
  start = digits.trajectory(rng, direction, speed, straight, *size)[0]
  step = np.array(digits.DIRECTIONS[direction]) * speed
  path = start + step * np.arange(num_frames)[:, None]
  low = (digit_size - 1) / 2
  free = np.array([width, height]) - float(digit_size)
  along = np.mod(path - low, np.maximum(2 * free, 1e-9))
  return low + np.minimum(along, 2 * free - along)


def seen_by(camera: Camera) -> Callable[..., np.ndarray]:
  """Give what draws straight paths, near the middle of what a camera sees."""

  def draw(
    rng: np.random.Generator,
    direction: str,
    speed: float,
    num_frames: int,
    *size: int,
  ) -> np.ndarray:
    height, width, digit_size = size
    step = np.array(digits.DIRECTIONS[direction]) * speed
    frames = np.arange(num_frames)[:, None]
    middle = np.array([width - 1, height - 1]) / 2
    free = np.maximum(np.array([width, height]) - digit_size, 0) / 2
    drift = step - [camera.x, camera.y]  # over the frame, but for the zoom
    free = np.maximum(free - np.abs(drift) * (num_frames - 1) / 2, 0)
    half = (num_frames - 1) / 2
    place = (
      middle + rng.uniform(-free, free) + half * np.array([camera.x, camera.y])
    )
    return place + step * (frames - half)

  return draw


def inside(
  seen: np.ndarray, camera: Camera, height: int, width: int, digit_size: int
) -> bool:
  """Whether boxes at places in the frame [n, F, 2] are in it all the time."""
  half = (digit_size * camera.scale(seen.shape[-2])[:, None] - 1) / 2
  low, high = seen - half, seen + half
  edge = np.array([width - 1, height - 1])
  return bool((low >= -1).all() and (high <= edge + 1).all())


def box_of(path: np.ndarray, digit_size: int) -> list[float]:
  """Give the box of a digit in a path's first frame, and its way to the last.

  Args:
    path: centres (x, y) in pixels, [F, 2].
    digit_size: side of its box in pixels.

  Returns:
    left, top, right, bottom of pixels in it, the last not, and (dx, dy); NaN
    for a path that is not straight, or of one frame.
  """
  steps = np.diff(path, axis=0)
  if not len(steps) or not np.allclose(steps, steps[0]):
    return [float("nan")] * 6
  low = path[0] - (digit_size - 1) / 2
  return [*low, *(low + digit_size), *(path[-1] - path[0])]


def ground(
  rng: np.random.Generator,
  camera: Camera,
  num_frames: int,
  height: int,
  width: int,
) -> np.ndarray:
  """Draw grey ground as a camera sees it, 0..`BRIGHTEST`, [F, H, W]."""
  values = rng.uniform(size=(_LATTICE, _LATTICE))
  scale = camera.scale(num_frames)[:, None]
  rows, columns = (
    _spline(
      (np.arange(size) - (size - 1) / 2) / scale
      + np.arange(num_frames)[:, None] * speed
      + rng.uniform(0, _LATTICE * _CELL)
    )
    for size, speed in ((height, camera.y), (width, camera.x))
  )
  grey = rows @ values @ columns.transpose(0, 2, 1)
  return (BRIGHTEST * np.clip(2 * grey - 0.5, 0, 1)).astype(np.float32)


def _spline(at: np.ndarray) -> np.ndarray:
  """Weights of the lattice's values at pixels [F, n]: [F, n, lattice]."""
  gap = np.abs(at[..., None] / _CELL - np.arange(_LATTICE)) % _LATTICE
  gap = np.minimum(gap, _LATTICE - gap)
  near = 2 / 3 - gap**2 + gap**3 / 2  # a cubic B-spline
  return np.where(gap < 1, near, np.maximum(2 - gap, 0) ** 3 / 6)
