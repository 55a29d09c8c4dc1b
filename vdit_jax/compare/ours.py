"""Our side: the pipeline on what jax finds, stage by stage.

  python -m vdit_jax.compare.ours FOLDER

fills in what the job in FOLDER leaves open, makes the noise and runs. A
process of its own, started by `vdit_jax.compare`.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vdit_jax import conditioning, pipeline, tool, types
from vdit_jax.compare import jobs
from vdit_jax.media import formats

NAME = "jax"


def settle(job: jobs.Job, recipe: types.Recipe) -> jobs.Job:
  """Fill in what a job leaves open with what the release does."""
  own = {
    "steps": recipe.steps,
    "guidance": tuple(expert.guidance for expert in recipe.experts),
    "num_frames": recipe.num_frames,
    "height": recipe.height,
    "width": recipe.width,
  }
  open_fields = {k: v for k, v in own.items() if getattr(job, k) is None}
  job = dataclasses.replace(job, **open_fields)
  if len(job.guidance) == 1:
    each = job.guidance * len(recipe.experts)
    job = dataclasses.replace(job, guidance=each)
  return job


def draw(job: jobs.Job, pipe: pipeline.Pipeline) -> dict[str, np.ndarray]:
  """Draw the noise of a settled job.

  Returns:
    noise [1, f, h, w, c]; for a stochastic sampler also step_noise [steps, 1,
    f, h, w, c].
  """
  shape = 1, *pipe.latent_shape(job.num_frames, job.height, job.width)
  rng = np.random.default_rng(job.seed)
  noises = {"noise": rng.standard_normal(shape, np.float32)}
  if pipe.settings().draws_noise:
    shape = job.steps, *shape
    noises["step_noise"] = rng.standard_normal(shape, np.float32)  # pyright: ignore[reportCallIssue]
  return noises


def run(
  job: jobs.Job,
  pipe: pipeline.Pipeline,
  noise: np.ndarray,
  step_noise: np.ndarray | None = None,
) -> jobs.Run:
  """Run our pipeline, each stage twice: the first compiles.

  Args:
    job: what to sample, settled.
    pipe: of the job's checkpoint.
    noise, step_noise: as `draw` gives them.
  """
  # Weights are let go of behind a stage's second run, not its first.
  held = dataclasses.replace(pipe, sequential=False)
  how = pipe.settings(steps=job.steps, guidance=job.guidance)
  size = job.num_frames, job.height, job.width
  frames = _frames(job, held)
  given = held.give(size, noise.shape, frames)  # refuses misfits, first
  pipe.free("autoencoder", until=given)
  clock = _Clock(pipe)
  text = clock.time(
    "text",
    tuple(pipe.modules.text_encoders),
    lambda: held.encode_text(
      [job.prompt], [job.negative_prompt], guided=how.guided
    ),
  )
  latents, states = clock.time(
    "sample",
    tuple({expert.network: None for expert in how.experts}),
    lambda: held.sample(
      text,
      noise=noise,
      how=how,
      given=given,
      step_noise=step_noise,
      traced=True,
    ),
  )
  video = clock.time(
    "decode", ("autoencoder",), lambda: held.decode(latents, job.num_frames)
  )
  return jobs.Run(
    text=np.asarray(text.embeds, np.float32),
    latents=np.asarray(states)[:, 0],
    video=(np.clip(np.asarray(video[0], np.float32), -1, 1) + 1) / 2,
    seconds=clock.seconds,
    compile_seconds=clock.compile_seconds,
    peak_bytes=_peaks(),
    about={
      "jax": jax.__version__,
      "jax_device": jax.devices()[0].device_kind,
      "fps": pipe.recipe.fps,
    },
  )


class _Clock:
  """Runs stages twice and keeps what they took."""

  def __init__(self, pipe: pipeline.Pipeline):
    self._pipe = pipe
    self.seconds: dict[str, float] = {}
    self.compile_seconds: dict[str, float] = {}

  def time(
    self, name: str, networks: tuple[str, ...], stage: Callable[[], Any]
  ) -> Any:
    """Run a stage; what the first run took longer is its compilation.

    The networks' weights are read before and let go of behind it.
    """
    jax.block_until_ready([self._pipe.params[network] for network in networks])
    first, _ = _timed(stage)
    self.seconds[name], result = _timed(stage)
    self.compile_seconds[name] = max(first - self.seconds[name], 0.0)
    self._pipe.free(*networks, until=result)
    return result


def _timed(stage: Callable[[], Any]) -> tuple[float, Any]:
  start = time.perf_counter()
  result = jax.block_until_ready(stage())
  return time.perf_counter() - start, result


def _frames(job: jobs.Job, pipe: pipeline.Pipeline) -> conditioning.Frames:
  """The given frames: the images, or none."""
  if not job.images:
    return conditioning.Frames()
  positions = pipe.modules.needs or (0,)
  if len(positions) != len(job.images):
    raise ValueError(
      f"images must be one for each of the frames {positions}, -1 being the "
      f"last, got {len(job.images)}"
    )
  images = [formats.read_image(p, job.height, job.width) for p in job.images]
  given = conditioning.place(np.stack(images)[None], positions, job.num_frames)
  return conditioning.Frames(*given)


def _peaks() -> dict[str, int]:
  peaks = {"host": jobs.peak_host_bytes()}
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    peaks["device"] = stats["peak_bytes_in_use"]
  return peaks


def main(folder: str) -> None:
  """Run the job of a folder."""
  path = pathlib.Path(folder)
  job = jobs.read_job(path)
  if job.dtype == "float32":
    # A TPU would multiply float32 numbers as bfloat16.
    jax.config.update("jax_default_matmul_precision", "highest")
  pipe = pipeline.load(job.checkpoint, param_dtype=job.dtype, dtype=job.dtype)
  job = settle(job, pipe.recipe)
  noises = draw(job, pipe)
  jobs.write_job(path, job)
  np.savez(path / "noise.npz", **noises)
  jobs.write_run(path, NAME, run(job, pipe, **noises))


if __name__ == "__main__":
  try:
    main(sys.argv[1])
  except ValueError as error:
    if not tool.is_ours(error):
      raise
    jobs.write_refusal(pathlib.Path(sys.argv[1]), str(error))
