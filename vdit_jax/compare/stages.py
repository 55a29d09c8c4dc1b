"""How far two runs are apart, stage by stage: plain numbers."""

import dataclasses
import math
from typing import Any

import numpy as np

from vdit_jax.compare import jobs


@dataclasses.dataclass(frozen=True)
class Error:
  """How far an array is from another.

  Attributes:
    max_abs: largest difference.
    relative: norm of the difference over the norm of the other.
    psnr: in dB; the peak is 1 for a video, and otherwise the range of the
      other. None where the two are equal.
  """

  max_abs: float
  relative: float
  psnr: float | None


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of both runs: its error and its seconds.

  Attributes:
    name: of the stage.
    error: of what it gives; of the sampling, after the last step.
    torch_seconds, jax_seconds: after warm-up.
    compile_seconds: of ours.
  """

  name: str
  error: Error
  torch_seconds: float
  jax_seconds: float
  compile_seconds: float


def measure(
  found: np.ndarray, wanted: np.ndarray, peak: float | None = None
) -> Error:
  """Measure how far `found` is from `wanted`.

  Args:
    found: any array.
    wanted: one of the same shape.
    peak: of the PSNR; None takes the range of `wanted`.

  Raises:
    ValueError: if the shapes differ or a number is not finite.
  """
  if found.shape != wanted.shape:
    raise ValueError(
      f"found is {found.shape}, but wanted {wanted.shape}: the two sides did "
      "not make the same thing"
    )
  if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
    raise ValueError(
      "a number is not finite; some networks' activations are beyond the "
      "largest float16, or bfloat16: try --dtype=float32"
    )
  found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
  difference = found - wanted
  peak = np.ptp(wanted) if peak is None else peak
  mse = np.mean(difference**2)
  norm = np.linalg.norm(wanted) or 1.0
  return Error(
    max_abs=float(np.abs(difference).max()),
    relative=float(np.linalg.norm(difference) / norm),
    psnr=float(10 * math.log10(peak**2 / mse)) if mse and peak else None,
  )


def steps(ours: jobs.Run, theirs: jobs.Run) -> list[Error]:
  """Measure the latents after each step; errors of former ones add up."""
  return [
    measure(a, b) for a, b in zip(ours.latents, theirs.latents, strict=True)
  ]


def stages(ours: jobs.Run, theirs: jobs.Run) -> list[Stage]:
  """Measure the stages, each fed with what its own side's former one gave."""
  errors = {
    "text": measure(ours.text, theirs.text),
    "sample": measure(ours.latents[-1], theirs.latents[-1]),
    "decode": measure(ours.video, theirs.video, peak=1.0),
  }
  return [
    Stage(
      name=name,
      error=error,
      torch_seconds=theirs.seconds[name],
      jax_seconds=ours.seconds[name],
      compile_seconds=ours.compile_seconds[name],
    )
    for name, error in errors.items()
  ]


def summary(job: jobs.Job, ours: jobs.Run, theirs: jobs.Run) -> dict[str, Any]:
  """Put all that was measured in one dict, for JSON."""
  return {
    "job": dataclasses.asdict(job),
    "stages": [dataclasses.asdict(s) for s in stages(ours, theirs)],
    "steps": [dataclasses.asdict(e) for e in steps(ours, theirs)],
    "peak_bytes": {"torch": theirs.peak_bytes, "jax": ours.peak_bytes},
    "about": theirs.about | ours.about,
  }
