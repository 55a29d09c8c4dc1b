"""What is measured of a pipeline: the entries of `vdit_jax.evaluate`'s JSON.

Every function returns {metric: entry}, an entry being what `entry` makes:

  value    mean over clips, or a distance between two sets of clips
  ci95     95 % interval of a mean
  ceiling  the same of real clips, or of a perfect result
  n        clips, of each set

None stands for what there is not. Names say what was looked at: `fvd` is of
I3D's logits, `consistency_alexnet_first` of AlexNet's features. How the metrics
are defined is said in `vdit_jax.metrics`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from vdit_jax import encoding, pipeline, types
from vdit_jax.media import sheets
from vdit_jax.metrics import (
  consistency,
  digits,
  features,
  frames,
  frechet,
  lpips,
  motion,
)
from vdit_jax.training import denoiser, images

Results = dict[str, dict[str, Any]]

# What a network of `features` sees at once: bounds the memory.
_CHUNK_CLIPS = 16
_CHUNK_PIXELS = 2**21


@dataclasses.dataclass(frozen=True)
class Look:
  """What was seen of clips.

  Attributes:
    described: `describe`d; empty where nothing was.
    readings: of moving digits, one a clip; empty where none were read.
    shown: the first clips, uint8 [F, H, W, 3].
  """

  described: dict[str, np.ndarray] = dataclasses.field(repr=False)
  readings: list[digits.Reading]
  shown: list[np.ndarray] = dataclasses.field(repr=False)


def entry(
  values: np.ndarray, ceiling: np.ndarray | float | None = None
) -> dict[str, Any]:
  """Sum up a value a clip [n], beside the same of real clips or a number."""
  if isinstance(ceiling, np.ndarray):
    ceiling = digits.summarise(ceiling)["value"]
  return digits.summarise(values) | {"ceiling": ceiling}


def single(value: float, n: int, ceiling: float | None = None) -> dict:
  """Make the entry of a value that is not a mean of the clips' values."""
  return {"value": value, "ci95": None, "n": n, "ceiling": ceiling}


def loss(
  pipe: pipeline.Pipeline,
  goal: denoiser.Objective,
  levels: tuple[float, ...],
  batches: Iterable[types.Batch],
) -> Results:
  """Measure the denoiser's loss at fixed noise levels, and their mean."""
  # Frames that a denoiser must be given are shown as they are.
  check = jax.jit(
    denoiser.make_validation(
      pipe.modules,
      goal,
      levels,
      images.shower(types.Image()) if pipe.modules.needs else None,
    )
  )
  params = {name: pipe.params[name] for name in pipe.params}
  total, count = np.zeros(len(levels)), 0
  for seed, batch in enumerate(batches):
    losses, number = check(params, params, batch, seed)
    total, count = total + np.asarray(losses), count + int(number)
  names = ["validation_loss", *(f"validation_loss_t{t:g}" for t in levels)]
  values = [total.mean(), *total]
  return {
    name: single(float(value / count), count)
    for name, value in zip(names, values, strict=True)
  }


def autoencoder(
  pipe: pipeline.Pipeline,
  videos: Iterable[np.ndarray],
  networks: Mapping[str, features.Weights],
) -> Results:
  """Measure how like clips are after the autoencoder.

  Args:
    pipe: whose autoencoder.
    videos: batches of clips, uint8 [B, F, H, W, 3].
    networks: those of `lpips.NETWORKS` to measure LPIPS with, and their
      weights.
  """
  rows = []
  for batch in videos:
    video = np.asarray(encoding.to_float(batch))
    output = through(pipe, video)
    scores = {
      "vae_psnr": frames.psnr(output, video),
      "vae_ssim": frames.ssim(output, video),
    }
    for name, weights in networks.items():
      measure = functools.partial(lpips.distance, weights, network=name)
      scores[f"vae_lpips_{name}"] = _chunked(measure, output, video)
    rows.append({name: np.asarray(x) for name, x in scores.items()})
  perfect = {"vae_psnr": None, "vae_ssim": 1.0}
  return {
    name: entry(values, perfect.get(name, 0.0))
    for name, values in _join(rows).items()
  }


def through(pipe: pipeline.Pipeline, video: np.ndarray) -> np.ndarray:
  """Pass video [B, F, H, W, 3] in [-1, 1] through the autoencoder."""
  return np.clip(pipe.decode(pipe.encode(video), video.shape[1]), -1, 1)


def describe(
  video: np.ndarray, networks: Mapping[str, features.Weights]
) -> dict[str, np.ndarray]:
  """Compute of clips what `consistent` and `distances` compare.

  Args:
    video: [B, F, H, W, 3] in [-1, 1].
    networks: weights of "alexnet" and, for the distances, "i3d".

  Returns:
    arrays of the clips: `frames` [B, F, 256], `smoothness` and `amount` [B],
    and with I3D its logits `i3d` [B, 400].
  """
  look = functools.partial(features.frames, networks["alexnet"])
  found = {"frames": _chunked(look, video)}
  found["smoothness"], found["amount"] = _chunked(motion.measure, video)
  if "i3d" in networks:
    watch = functools.partial(features.i3d, networks["i3d"])
    found["i3d"] = _chunked(watch, video)
  return found


def look(
  videos: Iterable[np.ndarray],
  *,
  networks: Mapping[str, features.Weights],
  read: Callable[[np.ndarray], list[digits.Reading]] | None = None,
  shown: int = 0,
) -> Look:
  """Look at batches of clips [B, F, H, W, 3], one batch in memory at a time.

  Args:
    videos: batches, float in [-1, 1].
    networks: see `describe`; none describes nothing.
    read: reads moving digits, see `digits.read`; None reads nothing.
    shown: clips to keep.
  """
  rows, readings, kept = [], [], []
  for video in videos:
    if networks:
      rows.append(describe(video, networks))
    if read is not None:
      readings += read(video)
    if len(kept) < shown:
      kept.extend(sheets.to_uint8(video[: shown - len(kept)]))
  return Look(_join(rows) if rows else {}, readings, kept)


def consistent(
  made: Mapping[str, np.ndarray],
  real: Mapping[str, np.ndarray],
  dimensions: list[tuple[str, ...]],
) -> Results:
  """Measure consistency between frames, beside the motion.

  Args:
    made, real: `describe`d generated and real clips.
    dimensions: of each generated clip's prompt. What they name is measured
      apart too, as `metric/dimension`.
  """
  rows = {}
  for name, measure in _CONSISTENCY.items():
    values, ceiling = measure(made), measure(real)
    rows[name] = entry(values, ceiling)
    for dimension in sorted({d for names in dimensions for d in names}):
      chosen = [dimension in names for names in dimensions]
      rows[f"{name}/{dimension}"] = entry(values[chosen], ceiling)
  return rows


def checks(
  made: Look,
  real: Look,
  through: Look,
  prompts: list[str],
  captions: list[str],
) -> Results:
  """Check generated clips of moving digits against what they should show.

  Args:
    made: generated clips.
    real: real clips, of whose values the ceilings are made.
    through: the same, passed through the autoencoder.
    prompts, captions: of the generated and of the real clips.
  """
  ceiling = real.readings[: len(captions)]
  rows = digits.results(made.readings, prompts, ceiling, captions)
  passed = digits.results(through.readings, captions, ceiling, captions)
  named = {f"vae_{name}": passed[name] for name in ("all", "consistency")}
  return rows | named


def distances(
  made: Mapping[str, np.ndarray], real: Mapping[str, np.ndarray]
) -> Results:
  """Measure Frechet distances of generated clips from real ones.

  The real clips are halved: one half is what the generated clips are compared
  with, the other half's distance from it the ceiling. All sets are of one
  size, since the distance's bias depends on it.
  """
  n = min(len(made["i3d"]), len(real["i3d"]) // 2)
  if n < 2:
    raise ValueError(
      f"Frechet distances need two generated and four real clips, got "
      f"{len(made['i3d'])} and {len(real['i3d'])}; measure more, or leave "
      "frechet out of --metrics"
    )

  def rows(name, flat):
    one, other, ours = (
      flat(x) for x in (real[name][:n], real[name][n : 2 * n], made[name][:n])
    )
    apart = frechet.distance(one, other)
    return single(frechet.distance(one, ours), n, apart)

  return {
    "fvd": rows("i3d", lambda x: x),
    "frechet_alexnet_frames": rows("frames", lambda x: x.reshape(-1, 256)),
  }


_CONSISTENCY: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
  "consistency_alexnet_neighbour": lambda x: consistency.neighbour(x["frames"]),
  "consistency_alexnet_first": lambda x: consistency.first(x["frames"]),
  "motion_smoothness": lambda x: x["smoothness"],
  "motion_amount": lambda x: x["amount"],
}


def _chunked(function: Callable, *videos: np.ndarray) -> Any:
  """Apply a function of clips to a few at a time, in one compiled size."""
  n = len(videos[0])
  pixels = int(np.prod(videos[0].shape[1:4]))
  size = min(n, _CHUNK_CLIPS, max(_CHUNK_PIXELS // pixels, 1))
  parts = []
  for start in range(0, n, size):
    chunk = [x[start : start + size] for x in videos]
    # Repeats clips to fill up.
    padded = [np.resize(x, (size, *x.shape[1:])) for x in chunk]
    found = jax.tree.map(np.asarray, function(*padded))
    parts.append(found)
  return jax.tree.map(lambda *x: np.concatenate(x)[:n], *parts)


def _join(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
