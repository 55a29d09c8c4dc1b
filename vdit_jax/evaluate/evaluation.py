"""What is measured of a checkpoint, and where the results are written.

  Plan --run--> entries of the JSON, pieces of the page --write--> files

The metrics are listed in `vdit_jax.evaluate`'s tool.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath

from vdit_jax import pipeline, strict_json, writing
from vdit_jax.data import digits as scenes
from vdit_jax.data import moving_digits, reading
from vdit_jax.data import prompt_files as files
from vdit_jax.diffusion import schedules
from vdit_jax.evaluate import clips, scores
from vdit_jax.media import formats, page, sheets
from vdit_jax.metrics import classifier as classifiers
from vdit_jax.metrics import digits, features, weights
from vdit_jax.training import denoiser
from vdit_jax.training import learner as learners
from vdit_jax.weights import run_config

# Metrics, and the networks that each needs.
METRICS = {
  "loss": (),
  "vae": (),
  "lpips_alex": ("alexnet",),
  "lpips_vgg": ("vgg16",),
  "consistency": ("alexnet",),
  "frechet": ("alexnet", "i3d"),
  "digits": (),
}
OPTIONAL = ("lpips_vgg",)  # measured only when asked for

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels of a released model's loss

_CONFIG = "config.json"  # of a workdir or a release of ours
_NETWORKS = {
  "alexnet": weights.ALEXNET,
  "vgg16": weights.VGG16,
  "i3d": weights.I3D,
}
_RECONSTRUCTED = {"vae", "lpips_alex", "lpips_vgg"}
_DESCRIBED = {"consistency", "frechet"}
_SHOWN = 12  # clips of the contact sheet, and of each kind on the page


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to measure.

  Attributes:
    metrics: names in `METRICS`.
    prompts: of the generated clips; None takes the data's.
    num_prompts: clips to generate where the data give the prompts.
    num_clips: clips of the loss and of the autoencoder.
    digit_counts: numbers of digits in a clip to measure; the names of metrics
      of other counts than one end in "_two" and so on.
    batch_size: clips at once.
    seed: of the prompts and the noise.
  """

  metrics: tuple[str, ...]
  prompts: tuple[files.Prompt, ...] | None = None
  num_prompts: int = 144
  num_clips: int = 256
  digit_counts: tuple[int, ...] = (1,)
  batch_size: int = 48
  seed: int = 0

  def __post_init__(self):
    for name in ("num_prompts", "num_clips", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1: {getattr(self, name)}")

  @property
  def networks(self) -> list[str]:
    """Names of the networks that the metrics need."""
    return sorted({n for metric in self.metrics for n in METRICS[metric]})


def choose(
  asked: list[str], data: str, prompts: tuple[files.Prompt, ...] | None
) -> tuple[str, ...]:
  """Settle the metrics: what was asked for, or all that go with the data."""
  if unknown := sorted(set(asked) - set(METRICS)):
    raise ValueError(
      f"metrics must be of {', '.join(METRICS)}, got {', '.join(unknown)}"
    )
  checked = clips.is_digits(data) and prompts is None
  if "digits" in asked and not checked:
    raise ValueError(
      "metrics=digits needs data=moving_digits/... and its own prompts; leave "
      "digits out of --metrics, or --prompts"
    )
  out = set(OPTIONAL) | (set() if checked else {"digits"})
  return tuple(m for m in METRICS if (m in asked if asked else m not in out))


def run(
  plan: Plan,
  path: epath.PathLike,
  data: str,
  data_dir: epath.PathLike,
  *,
  sheet: epath.Path | None = None,
) -> tuple[scores.Results, list[str]]:
  """Measure a checkpoint.

  Args:
    plan: what to measure.
    path: of the checkpoint.
    data, data_dir: name of the dataset, and where it lies.
    sheet: file for a contact sheet of the first generated clips.

  Returns:
    entries of the JSON, and pieces of the page.
  """
  weights.check_installed(_NETWORKS[name] for name in plan.networks)
  source = reading.open_source(data, "validation", data_dir)
  _check_kind(source, plan)
  pipe = pipeline.load(path)
  held_out = clips.look_at(source, pipe.recipe)
  _check_length(held_out, plan)
  if plan.prompts and pipe.modules.needs:
    raise ValueError(
      f"prompts need a text-to-video model, but {path} is shown an image; "
      "leave them out: captions and frames of the data are taken"
    )
  networks = {
    name: jax.device_put(weights.read(_NETWORKS[name]))
    for name in plan.networks
  }
  results, pieces = {}, []
  if "loss" in plan.metrics:
    results |= _loss(plan, pipe, path, held_out)
  if _RECONSTRUCTED & set(plan.metrics):
    results |= _autoencoder(plan, pipe, held_out, networks)
  if (_DESCRIBED | {"digits"}) & set(plan.metrics):
    real = clips.open_real(data, data_dir)
    real = clips.look_at(real, pipe.recipe)
    read = None
    if "digits" in plan.metrics:
      read, results["classifier"] = _digit_reader(real.source, data_dir)
    for group in clips.groups(
      real.source, plan.prompts, plan.num_prompts, plan.digit_counts, plan.seed
    ):
      rows, shown = _generated(plan, pipe, real, group, networks, read, sheet)
      results |= {f"{name}{group.suffix}": row for name, row in rows.items()}
      pieces, sheet = pieces + shown, None
  return results, pieces


def write(
  path: epath.Path, results: scores.Results, pieces: list[str], title: str
) -> None:
  """Write the JSON, and the page beside it, each whole or not at all."""
  writing.write(path, strict_json.dumps(results, indent=2) + "\n")
  columns = "metric", "value", "95 % interval", "ceiling", "n"
  rows = [
    (name, row["value"], _interval(row["ci95"]), row["ceiling"], row["n"])
    for name, row in results.items()
  ]
  page.write(
    path.with_suffix(".html"), title, [page.table(columns, rows), *pieces]
  )


def _interval(ci95: list[float] | None) -> str | None:
  return None if ci95 is None else f"{ci95[0]:.4g} to {ci95[1]:.4g}"


def _check_kind(source: reading.Source, plan: Plan) -> None:
  """Refuse latents for what looks at clips."""
  if source.kind == "latents" and set(plan.metrics) != {"loss"}:
    raise ValueError(
      f"data={source.name} holds latents, of which only the loss can be "
      "measured; name a dataset of videos, or --metrics=loss"
    )


def _check_length(data: clips.Data, plan: Plan) -> None:
  """Refuse clips that are too short for a metric."""
  least = {"consistency": 3, "frechet": features.I3D_FRAMES}
  for metric in sorted(set(plan.metrics) & set(least)):
    if data.size[0] < least[metric]:
      raise ValueError(
        f"metrics={metric} needs at least {least[metric]} frames, but clips of "
        f"{data.source.name} have {data.size[0]}; leave it out of --metrics"
      )


def _loss(plan, pipe, path, data) -> scores.Results:
  """Measure the loss as the run's config has it, or the release's recipe."""
  if (epath.Path(path) / _CONFIG).exists():
    config = run_config.read(path)
    goal, levels = learners.objective(config), config.validation.levels
  else:
    schedule = schedules.Schedule(**pipe.recipe.schedule)
    goal, levels = denoiser.Objective(pipe.recipe.objective, schedule), LEVELS
  words = {
    name: reading.Words(tokenizer, pipe.max_lengths[name])
    for name, tokenizer in pipe.tokenizers.items()
  }
  given = bool(pipe.modules.needs)
  batches = data.batches(plan.batch_size, words, given)
  first = (batch for batch, _ in _first(batches, plan, "validation loss"))
  return scores.loss(pipe, goal, levels, first)


def _autoencoder(plan, pipe, data, networks) -> scores.Results:
  """Measure reconstructions by the metrics that were chosen."""
  batches = data.batches(plan.batch_size)
  first = _first(batches, plan, "autoencoder")
  videos = (batch.video[batch.weight > 0] for batch, _ in first)
  lpips = {
    metric.removeprefix("lpips_"): networks[METRICS[metric][0]]
    for metric in plan.metrics
    if metric.startswith("lpips_")
  }
  rows = scores.autoencoder(pipe, videos, lpips)
  if "vae" in plan.metrics:
    return rows
  return {name: row for name, row in rows.items() if "lpips" in name}


def _first(batches: reading.Batches, plan: Plan, name: str) -> reading.Batches:
  """Take the first clips, in whole batches, with a progress bar."""
  number = -(-plan.num_clips // plan.batch_size)
  return iter(tqdm.tqdm(itertools.islice(batches, number), name, number))


def _digit_reader(source: reading.Source, data_dir: epath.PathLike):
  """Make what reads clips of digits: the function, and its accuracy's entry."""
  builder = moving_digits.MovingDigits
  config: Any = builder.builder_configs[source.name.partition("/")[2]]
  path = epath.Path(data_dir) / f"classifier_{config.digit_size}.npz"
  classifier = classifiers.load(path, config.digit_size)
  accuracy = classifiers.accuracy(classifier, "test")
  logging.info("digit classifier: %.4f of the test scans", accuracy)
  read = functools.partial(
    digits.read, classifier=classifier, slowest=min(config.speeds)
  )
  count = len(scenes.scans("test")[1])
  return read, scores.single(accuracy, count, ceiling=1.0)


def _generated(plan, pipe, data, group, networks, read, sheet):
  """Measure generated clips beside real ones: entries and pieces of a page."""
  count, size = len(group.prompts), plan.batch_size
  chosen = {n for m in _DESCRIBED & set(plan.metrics) for n in METRICS[m]}
  look = functools.partial(
    scores.look,
    networks={n: networks[n] for n in sorted(chosen)},
    read=read,
    shown=_SHOWN,
  )
  # Of the real clips, a second half gives the ceiling of a distance.
  wanted = 2 * count if "frechet" in plan.metrics else count
  captions = clips.captions(data.source, group.digits, wanted)
  real = look(clips.real(data, captions, size, "real clips"))
  few = dict(itertools.islice(captions.items(), count))
  images = None
  if pipe.modules.needs:
    images = clips.real(data, few, size, "given frames")
  seconds = []
  made = look(
    clips.generate(
      pipe, group.texts, data.size, size, plan.seed, seconds, images
    )
  )
  rows = {}
  if "digits" in plan.metrics:
    originals = clips.real(data, few, size, "through the autoencoder")
    passed = (scores.through(pipe, video) for video in originals)
    through = look(passed, networks={})
    texts = group.texts, list(few.values())
    rows |= scores.checks(made, real, through, *texts)
  if "consistency" in plan.metrics:
    dimensions = [prompt.dimensions for prompt in group.prompts]
    rows |= scores.consistent(made.described, real.described, dimensions)
  if "frechet" in plan.metrics:
    rows |= scores.distances(made.described, real.described)
  rows["seconds_a_clip"] = scores.single(sum(seconds) / count, count)
  if sheet is not None:
    formats.write_image(sheet, _sheet(made.shown, group.texts))
  return rows, [
    *_gallery(f"Generated{group.suffix}", made.shown, group.texts, pipe),
    *_gallery(f"Real{group.suffix}", real.shown, captions.values(), pipe),
  ]


def _sheet(clips: list[np.ndarray], texts: list[str]) -> np.ndarray:
  factor = max(96 // min(clips[0].shape[1:3]), 1)
  return sheets.draw(
    np.stack(clips), texts[: len(clips)], columns=9, factor=factor
  )


def _gallery(
  title: str,
  clips: list[np.ndarray],
  texts: Iterable[str],
  pipe: pipeline.Pipeline,
) -> Iterator[str]:
  yield page.heading(title)
  yield page.grid(
    page.video(
      clip,
      pipe.recipe.fps,
      text,
      enlarge=max(192 // min(clip.shape[1:3]), 1),
    )
    for clip, text in zip(clips, texts, strict=False)
  )
