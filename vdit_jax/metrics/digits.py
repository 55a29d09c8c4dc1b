"""Exact checks of generated clips of moving coloured digits.

`read` says what a clip shows, an object a colour: which digit, which way it
moves, and whether it stays itself; `score` compares that with the prompts and
`results` sums up beside the same measures of real clips, the ceiling. The
world is that of `data.digits`: flat colours on black, straight steady paths.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats

from vdit_jax.data import digits as scenes
from vdit_jax.metrics import classifier as classifiers

# Results that are shares of clips, and those that are distances.
SHARES = ("identity", "colour", "direction", "count", "all", "consistency")
DISTANCES = ("appearance", "appearance_first")

_COLOURS = tuple(scenes.COLOURS)
_BATCH = 16  # clips a compiled call, which bounds the memory
_SHARPNESS = 50.0  # of the choice of colour: halfway is 0.25 in distance^2
_LEAST_MASS = 0.035  # of the box; half of the thinnest scan's ink
_LEAST_SHARE = 0.12  # of the largest ink; the thinnest scan has 0.14
_VISIBLE = 0.6  # of an object's usual mass; below it, the object is hidden
_WHOLE = 0.9  # likewise for one that crosses another, which hides or tints it
_EXTENT = 1.3  # boxes; what reaches further is more than one digit


@dataclasses.dataclass(frozen=True)
class Seen:
  """One object of a clip.

  Attributes:
    colour: key of `data.digits.COLOURS`.
    digit: 0..9, by the mean log-probability of the frames that show it.
    direction: key of `data.digits.DIRECTIONS`.
    velocity: (x, y) in pixels a frame.
    mass: median ink in pixels of the frames that show it whole.
    log_probs: mean log-probability of each of the ten digits.
    digits: digit of each frame, None where the object is hidden.
    steady: every frame that shows it shows the same digit, and every frame
      shows it in which no other object is near.
    drift: mean RMS distance of neighbouring frames, aligned by their centres,
      in ink of 0..1. Only compare clips of like sharpness: blur lowers it.
    drift_first: the same of each later frame from the first.
  """

  colour: str
  digit: int
  direction: str
  velocity: tuple[float, float]
  mass: float
  log_probs: tuple[float, ...]
  digits: tuple[int | None, ...]
  steady: bool
  drift: float
  drift_first: float


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a clip shows: objects, the largest first, and how many digits.

  The count is larger than the number of objects when ink of one colour
  reaches further than one digit does.
  """

  objects: tuple[Seen, ...]
  count: int


def read(
  videos: jax.Array | np.ndarray,
  classifier: classifiers.Classifier,
  *,
  slowest: float = 0.75,
) -> list[Reading]:
  """Read what each clip shows.

  Args:
    videos: float in [-1, 1], [B, F, H, W, 3].
    classifier: `metrics.classifier.Classifier` for the clips' digit_size.
    slowest: the least speed of a moving digit in pixels a frame; below half
      of it, an object stands still.

  Returns:
    a list of B readings.
  """
  videos = np.asarray(videos)
  _check_videos(videos)
  readings = []
  for start in range(0, len(videos), _BATCH):
    clips = videos[start : start + _BATCH].astype(np.float32)
    padded = np.resize(clips, (_BATCH, *clips.shape[1:]))  # repeats clips
    measured = jax.tree.map(np.asarray, _measure(padded, classifier))
    for index in range(len(clips)):
      one = {name: array[index] for name, array in measured.items()}
      readings.append(_reading(one, classifier.digit_size, slowest))
  return readings


def score(
  readings: Sequence[Reading], prompts: Sequence[str]
) -> dict[str, np.ndarray]:
  """Check each reading against its prompt.

  Prompted digits are looked for by colour. Those whose colour is missing are
  compared with the largest of the other objects, in the best assignment, so
  that a wrong colour is not also counted as a wrong digit and direction.

  Args:
    readings: of n clips.
    prompts: n captions that `data.digits.parse` reads, of digits of different
      colours.

  Returns:
    a dict of arrays [n]: booleans for `SHARES` ("all" is the first four) and
    distances for `DISTANCES`, NaN where nothing was seen.
  """
  if len(readings) != len(prompts):
    raise ValueError(
      f"prompts must be one a reading, got {len(prompts)} for {len(readings)}"
      " readings; give as many"
    )
  rows = [
    _check(reading, scenes.parse(prompt))
    for reading, prompt in zip(readings, prompts, strict=True)
  ]
  return {
    name: np.array(
      [row[name] for row in rows], bool if name in SHARES else float
    )
    for name in SHARES + DISTANCES
  }


def summarise(values: np.ndarray) -> dict[str, Any]:
  """Sum up values of clips with a 95 % interval.

  Wilson's score interval (JASA 1927) for booleans; a normal one for numbers,
  of which those that are NaN count for nothing.

  Args:
    values: bool or float [n].

  Returns:
    {"value": mean, "ci95": [low, high], "n": n}; None for what n is too small
    to tell.
  """
  values = np.asarray(values)
  z = float(scipy.stats.norm.ppf(0.975))
  known = values[~np.isnan(values.astype(float))]
  n = len(known)
  if n == 0:
    return {"value": None, "ci95": None, "n": 0}
  mean = float(known.mean())
  if values.dtype == bool:
    centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    spread = mean * (1 - mean) / n + z**2 / (4 * n**2)
    margin = z * spread**0.5 / (1 + z**2 / n)
    interval = [max(centre - margin, 0.0), min(centre + margin, 1.0)]
  elif n == 1:
    interval = None
  else:
    margin = z * float(known.std(ddof=1)) / n**0.5
    interval = [mean - margin, mean + margin]
  return {"value": mean, "ci95": interval, "n": n}


def results(
  readings: Sequence[Reading],
  prompts: Sequence[str],
  real_readings: Sequence[Reading],
  real_prompts: Sequence[str],
) -> dict[str, dict[str, Any]]:
  """Score generated clips beside real ones, ready for JSON.

  Args:
    readings, prompts: of the generated clips.
    real_readings, real_prompts: of held-out clips of the dataset.

  Returns:
    {metric: {"value", "ci95", "n", "ceiling"}}, the ceiling being the value of
    the real clips.
  """
  found, real = score(readings, prompts), score(real_readings, real_prompts)
  return {
    name: summarise(found[name]) | {"ceiling": summarise(real[name])["value"]}
    for name in found
  }


def _check_videos(videos):
  if videos.ndim != 5 or videos.shape[-1] != 3 or videos.shape[1] < 3:
    raise ValueError(
      "videos must be [B, F, H, W, 3] with at least 3 frames to tell motion,"
      f" got shape {videos.shape}; read longer clips"
    )
  if not jnp.issubdtype(videos.dtype, jnp.floating):
    raise ValueError(
      f"videos must be float in [-1, 1], got {videos.dtype}; divide uint8 by"
      " 127.5 and subtract 1"
    )
  if not np.isfinite(videos.astype(np.float32)).all():
    raise ValueError("videos must be finite, got NaN or inf; mend the sampler")


@jax.jit
def _measure(videos, classifier):
  """Measure each colour's ink, k colours: a dict of arrays [B, ...]."""
  size = classifier.digit_size
  value, votes = _votes(jnp.clip((videos + 1) / 2, 0, 1))
  mass, _ = classifiers.centroid(_ink(value, votes))  # [B, F, k]
  least = jnp.maximum(
    _LEAST_MASS * size**2, _LEAST_SHARE * mass.max(-1, keepdims=True)
  )
  present = (mass > least).mean(1) > 0.5  # [B, k]
  # Edges between colours look like others; absent ones give up their votes.
  ink = _ink(value, votes * present[:, None, :, None, None])
  mass, centres = classifiers.centroid(ink)
  logits, windows = classifiers.logits(classifier, ink, centres)
  return {
    "present": present,
    "mass": mass,
    "centres": centres,
    "log_probs": jax.nn.log_softmax(logits),
    "windows": windows,
    "wide": _extent(ink) > _EXTENT * size + 1,
  }


def _votes(rgb):
  """Brightness [B, F, H, W] and the palette's local votes [B, F, k, H, W]."""
  palette = jnp.array(list(scenes.COLOURS.values()))
  value = rgb.max(-1)
  hue = rgb / jnp.maximum(value, 0.1)[..., None]
  distance = jnp.square(hue[..., None, :] - palette).sum(-1)
  belief = (
    jax.nn.softmax(-_SHARPNESS * distance)
    * classifiers.bright(value)[..., None]
  )
  return value, classifiers.smooth(jnp.moveaxis(belief, -1, -3))


def _ink(value, votes):
  """Divide the ink among colours by the votes around each pixel."""
  ink = classifiers.clean(value, votes.sum(-3))[..., None, :, :]
  strength = jnp.square(jnp.square(votes))
  return ink * strength / jnp.maximum(strength.sum(-3, keepdims=True), 1e-12)


def _extent(ink):
  """Longer side in pixels of what holds all but the outermost ink."""
  sides = []
  for axis in (-2, -1):
    line = ink.sum(axis)
    share = jnp.cumsum(line, -1) / jnp.maximum(line.sum(-1), 1e-6)[..., None]
    sides.append(((share > 0.03) & (share < 0.97)).sum(-1))
  return jnp.maximum(*sides)


def _reading(one, size, slowest):
  """Turn one clip's measures into a reading."""
  colours = np.flatnonzero(one["present"])
  centres = [one["centres"][:, k] for k in colours]
  shares = [_share(one["mass"][:, k]) for k in colours]
  paths = [
    _fit(centre, share >= _VISIBLE)[0]
    for centre, share in zip(centres, shares, strict=True)
  ]
  crossing = _crossing(paths, 1.5 * size)
  objects = []
  for index, k in enumerate(colours):
    near = crossing[index]
    shown = shares[index] >= np.where(near, _WHOLE, _VISIBLE)
    _, velocity = _fit(centres[index], shown)
    measures = {
      name: one[name][shown, k] for name in ("log_probs", "windows", "mass")
    }
    objects.append(_seen(_COLOURS[k], measures, shown, near, velocity, slowest))
  objects.sort(key=lambda seen: -seen.mass)
  wide = (one["wide"].mean(0) > 0.5)[colours]
  return Reading(tuple(objects), len(objects) + int(wide.sum()))


def _share(mass):
  """Mass [F] by its usual value, the upper quartile: some frames may hide."""
  return mass / np.quantile(mass, 0.75)


def _fit(centres, shown):
  """Fit a steady path to the frames shown: places [F, 2], velocity [2]."""
  frames = np.arange(len(shown))
  if shown.sum() < 3:  # too few to tell a motion
    shown = np.ones(len(shown), bool)
  slope, offset = np.polyfit(frames[shown], centres[shown], 1)
  return offset + frames[:, None] * slope, slope


def _crossing(paths, reach):
  """True where a path comes within reach of another, a list of [F]."""
  return [
    np.any(
      [
        np.linalg.norm(path - other, axis=-1) < reach
        for other in paths
        if other is not path
      ]
      or [np.zeros(len(path), bool)],
      axis=0,
    )
    for path in paths
  ]


def _seen(colour, measures, shown, near, velocity, slowest):
  """Judge an object by the measures of the frames that show it whole."""
  log_probs, windows = measures["log_probs"], measures["windows"]
  guesses = iter(log_probs.argmax(-1).tolist())
  digits = tuple(next(guesses) if frame else None for frame in shown)
  mean = log_probs.mean(0)
  return Seen(
    colour=colour,
    digit=int(mean.argmax()),
    direction=_direction(velocity, slowest),
    velocity=tuple(velocity.tolist()),
    mass=float(np.median(measures["mass"])),
    log_probs=tuple(mean.tolist()),
    digits=digits,
    steady=bool((shown | near).all()) and len(set(digits) - {None}) == 1,
    drift=_rms(windows[1:] - windows[:-1]),
    drift_first=_rms(windows[1:] - windows[:1]),
  )


def _rms(differences):
  """Mean over frames [n, 20, 20] of each one's RMS, NaN for none."""
  return _mean(np.sqrt(np.square(differences).mean((1, 2))))


def _direction(velocity, slowest):
  if np.linalg.norm(velocity) < slowest / 2:
    return scenes.STILL
  return max(
    (word for word in scenes.DIRECTIONS if word != scenes.STILL),
    key=lambda word: np.dot(velocity, scenes.DIRECTIONS[word]),
  )


def _check(reading, scene):
  """Compare one reading with its scene: a value for each metric."""
  pairs = list(zip(scene, _match(reading, scene), strict=True))
  row = {
    "identity": all(seen and seen.digit == want.digit for want, seen in pairs),
    "colour": all(seen and seen.colour == want.colour for want, seen in pairs),
    "direction": all(
      seen and seen.direction == want.direction for want, seen in pairs
    ),
    "count": reading.count == len(scene),
  }
  steady = [seen.steady for seen in reading.objects]
  return row | {
    "all": all(row.values()),
    "consistency": bool(steady) and all(steady),
    "appearance": _mean([seen.drift for seen in reading.objects]),
    "appearance_first": _mean([seen.drift_first for seen in reading.objects]),
  }


def _mean(values):
  """Mean of the values that are not NaN, NaN if there is none."""
  known = [value for value in values if not np.isnan(value)]
  return float(np.mean(known)) if known else np.nan


def _match(reading, scene):
  """Find each prompted digit's object, None where there is none left."""
  colours = [want.colour for want in scene]
  if len(set(colours)) < len(colours):
    raise ValueError(
      f"prompts must have digits of different colours, got {colours}; objects"
      " are told apart by colour"
    )
  found = {seen.colour: seen for seen in reading.objects}
  matched = [found.get(colour) for colour in colours]
  rest = [i for i, seen in enumerate(matched) if seen is None]
  spare = [s for s in reading.objects if s.colour not in colours][: len(rest)]
  cost = [[-s.log_probs[scene[i].digit] for s in spare] for i in rest]
  if rest and spare:
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    for row, column in zip(rows, columns, strict=True):
      matched[rest[row]] = spare[column]
  return matched
