"""What a comparison found, as a page to look at and a video side by side."""

import pathlib
from typing import Any

import numpy as np

from vdit_jax.compare import jobs, stages
from vdit_jax.media import formats, page, plots

PAGE, VIDEO = "index.html", "side_by_side.mp4"

_GAP = 4  # pixels between two videos
_SMALLEST = 256  # pixels that a video's shorter side is enlarged to
_NAMES = {
  "text": "text embeddings",
  "sample": "latents after the last step",
  "decode": "decoded video",
}


def write(
  folder: pathlib.Path,
  job: jobs.Job,
  ours: jobs.Run,
  theirs: jobs.Run,
  fps: float,
) -> None:
  """Write the page and the video, each whole or not at all.

  Args:
    folder: where to; made if absent.
    job: what was asked of both.
    ours, theirs: what they gave.
    fps: frames a second of the videos.
  """
  pair = side_by_side(theirs.video, ours.video)
  enlarge = max(1, _SMALLEST // min(ours.video.shape[1:3]))
  formats.write(folder / VIDEO, pair, fps, enlarge=enlarge)
  pieces = [
    page.paragraph(job.prompt),
    page.grid(_videos(ours, theirs, fps, enlarge)),
    page.heading("Stages"),
    page.paragraph(
      "Each stage is fed with what its own side's former stage gave, so "
      "errors add up. Seconds are those of a second run of the stage. Of "
      "PyTorch's sampling the first run takes one step."
    ),
    page.table(COLUMNS, rows(ours, theirs)),
    page.heading("Steps"),
    page.grid(_curves(ours, theirs)),
    page.heading("Memory"),
    page.paragraph(
      "PyTorch holds all networks from beginning to end, ours one at a time."
    ),
    page.table(*_memory(ours, theirs)),
    page.heading("Run"),
    page.table(("", ""), _facts(job, ours, theirs)),
  ]
  title = f"{pathlib.Path(job.checkpoint).name}: PyTorch and JAX"
  page.write(folder / PAGE, title, pieces)


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Join two videos [F, H, W, 3] in [0, 1] to one in [-1, 1]."""
  gap = np.zeros((*left.shape[:2], _GAP, 3), left.dtype)
  return np.concatenate([left, gap, right], axis=2) * 2 - 1


COLUMNS = (
  "stage",
  "max abs error",
  "relative error",
  "PSNR, dB",
  "PyTorch, s",
  "JAX, s",
  "JAX / PyTorch",
  "compilation, s",
)


def rows(ours: jobs.Run, theirs: jobs.Run) -> list[list[Any]]:
  """Make a row of `COLUMNS` for each stage."""
  return [
    [
      _NAMES[stage.name],
      stage.error.max_abs,
      stage.error.relative,
      stage.error.psnr,
      stage.torch_seconds,
      stage.jax_seconds,
      stage.jax_seconds / stage.torch_seconds,
      stage.compile_seconds,
    ]
    for stage in stages.stages(ours, theirs)
  ]


def _videos(ours, theirs, fps, enlarge):
  difference = np.abs(ours.video - theirs.video)
  most = float(difference.max())
  shown = difference / most if most else difference
  captions = {
    "PyTorch": theirs.video,
    "JAX": ours.video,
    f"absolute difference, {most:.2g} shown as white": shown,
  }
  return [
    page.video(video * 2 - 1, fps, caption, enlarge=enlarge)
    for caption, video in captions.items()
  ]


def _curves(ours, theirs):
  errors = stages.steps(ours, theirs)
  draw = plots.curves
  psnr = [float("nan") if e.psnr is None else e.psnr for e in errors]
  return [
    draw(
      "Error of the latents after each step",
      "step",
      {
        "max abs": [e.max_abs for e in errors],
        "relative": [e.relative for e in errors],
      },
      log=True,
    ),
    draw("PSNR of the latents after each step, dB", "step", {"PSNR": psnr}),
  ]


def _memory(ours, theirs):
  """Columns and rows of the peaks, in GiB."""
  kinds = sorted({*ours.peak_bytes, *theirs.peak_bytes}, reverse=True)
  gib = lambda run, kind: (
    run.peak_bytes[kind] / 2**30 if kind in run.peak_bytes else None
  )
  found = [[f"{k}, GiB", gib(theirs, k), gib(ours, k)] for k in kinds]
  return ("peak of the process", "PyTorch", "JAX"), found


def _facts(job, ours, theirs):
  facts = {
    "checkpoint": job.checkpoint,
    "negative prompt": repr(job.negative_prompt),
    "images": ", ".join(job.images),
    "frames x height x width": (
      f"{job.num_frames} x {job.height} x {job.width}"
    ),
    "steps": job.steps,
    "guidance": ", ".join(map(str, job.guidance)),
    "dtype": job.dtype,
    "seed of the noise": job.seed,
  }
  return list((facts | theirs.about | ours.about).items())
