"""What the two sides are asked and what they give back, as files.

A folder holds `job.json`, `noise.npz`, and of each side `NAME.json` (seconds,
memory, versions) and `NAME.npz` (arrays, in our layout).
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np

from vdit_jax import strict_json

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Job:
  """One video to sample; None is the release's own, which ours fills in.

  Attributes:
    checkpoint: a diffusers pipeline folder.
    prompt, negative_prompt: texts.
    images: files of the frames that an image-to-video model must be given, in
      their order.
    steps: of the sampler.
    guidance: scale of every denoiser, or of each from low noise to high.
    num_frames, height, width: of the video in pixels.
    dtype: of weights and computations, one of `DTYPES`.
    seed: of the noise.
  """

  checkpoint: str
  prompt: str
  negative_prompt: str
  images: tuple[str, ...]
  steps: int | None
  guidance: tuple[float, ...] | None
  num_frames: int | None
  height: int | None
  width: int | None
  dtype: str
  seed: int

  @property
  def guided(self) -> bool:
    """Whether a settled job has guidance."""
    return any(scale != 1 for scale in self.guidance or ())


@dataclasses.dataclass(frozen=True)
class Run:
  """What one side gave.

  Attributes:
    text: embeddings of the negative prompt and the prompt, [2, M, E]; of the
      prompt alone without guidance.
    latents: after each step, [steps, f, h, w, c].
    video: in [0, 1], [F, H, W, 3].
    seconds: of each stage ("text", "sample", "decode") after warm-up.
    compile_seconds: of each stage; empty where nothing is compiled.
    peak_bytes: of memory, by kind: "host", and "device" on an accelerator.
    about: versions and device.
  """

  text: np.ndarray
  latents: np.ndarray
  video: np.ndarray
  seconds: dict[str, float]
  compile_seconds: dict[str, float]
  peak_bytes: dict[str, int]
  about: dict[str, Any]


_ARRAYS = ("text", "latents", "video")
_REFUSAL = "refusal.txt"


def write_job(folder: pathlib.Path, job: Job) -> None:
  """Write what is asked."""
  text = strict_json.dumps(dataclasses.asdict(job), indent=2)
  (folder / "job.json").write_text(text)


def read_job(folder: pathlib.Path) -> Job:
  """Read what is asked."""
  fields = json.loads((folder / "job.json").read_text())
  lists = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
  return Job(**fields | lists)


def write_refusal(folder: pathlib.Path, message: str) -> None:
  """Write why a side does not run a job, for who asked for it."""
  (folder / _REFUSAL).write_text(message)


def read_refusal(folder: pathlib.Path) -> str:
  """Read why a side does not run a job; "" where none was refused."""
  path = folder / _REFUSAL
  return path.read_text() if path.exists() else ""


def write_run(folder: pathlib.Path, name: str, run: Run) -> None:
  """Write what a side gave."""
  fields = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
  arrays = {k: np.asarray(fields.pop(k), np.float32) for k in _ARRAYS}
  np.savez(folder / f"{name}.npz", **arrays)
  (folder / f"{name}.json").write_text(strict_json.dumps(fields, indent=2))


def read_run(folder: pathlib.Path, name: str) -> Run:
  """Read what a side gave."""
  fields = json.loads((folder / f"{name}.json").read_text())
  with np.load(folder / f"{name}.npz") as arrays:
    return Run(**fields, **{k: arrays[k] for k in _ARRAYS})


def peak_host_bytes() -> int:
  """Most memory that this process has had resident, of Linux."""
  # getrusage's figure would be the parent's, where that was larger.
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1))
