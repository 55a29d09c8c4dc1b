"""PyTorch's side: diffusers' pipeline on the CPU, stage by stage.

A family's `baseline` says what is its own (`Side`) and calls `main`, in a
process of its own that `vdit_jax.compare` starts on the noise that ours left.
Only these modules of the package import torch, and nothing else imports them.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from vdit_jax.compare import jobs
from vdit_jax.media import formats

NAME = "torch"


@dataclasses.dataclass(frozen=True)
class Side:
  """What differs from family to family.

  Attributes:
    schedulers: classes that ours has too.
    given: (pipeline, job) -> arguments of the pipeline beside all have.
    encode: (pipeline, job) -> arguments of the pipeline that hold the encoded
      prompt and what guidance leads away from, named as it names them.
    steps_noise: (noise of the steps, list of states so far) -> a context in
      which the scheduler draws that noise.
    decode: (pipeline, job, latents) -> video.
    channel_axis: of the pipeline's latents; 2 is [B, f, c, h, w].
    parts: job -> parts of the pipeline that are not its folder's.
  """

  schedulers: tuple[str, ...]
  given: Callable[[Any, jobs.Job], dict[str, Any]]
  encode: Callable[[Any, jobs.Job], dict[str, torch.Tensor | None]]
  steps_noise: Callable[..., contextlib.AbstractContextManager]
  decode: Callable[[Any, jobs.Job, torch.Tensor], torch.Tensor]
  channel_axis: int = 2
  parts: Callable[[jobs.Job], dict[str, Any]] = lambda job: {}


def read_images(job: jobs.Job) -> list[Image.Image]:
  """Read a job's images in the size of its video, as ours does."""
  size = job.height, job.width
  found = [formats.read_image(path, *size) for path in job.images]
  return [Image.fromarray(image) for image in found]


@contextlib.contextmanager
def draws_nothing(
  step_noise: np.ndarray | None, done: list[torch.Tensor]
) -> Iterator[None]:
  """Be the `Side.steps_noise` of schedulers that draw none."""
  del done
  if step_noise is not None:
    raise ValueError("step_noise must be None: this scheduler draws none")
  yield


def run(
  side: Side,
  job: jobs.Job,
  noise: np.ndarray,
  step_noise: np.ndarray | None = None,
) -> jobs.Run:
  """Run diffusers' pipeline.

  Args:
    side: of the family.
    job: what to sample.
    noise: initial noise [1, f, h, w, c].
    step_noise: of the steps of a stochastic scheduler [steps, 1, f, h, w, c];
      None for one that draws none.
  """
  pipe = _load(side, job)
  given = side.given(pipe, job) | dict(
    height=job.height,
    width=job.width,
    num_frames=job.num_frames,
    guidance_scale=job.guidance[-1],
    latents=channels_to(noise, side.channel_axis).to(pipe.transformer.dtype),
    output_type="latent",
  )
  seconds, latents = {}, []

  def note(pipe, step, t, tensors):
    latents.append(tensors["latents"])
    return {}

  sample = functools.partial(pipe, **given)
  with torch.no_grad(), side.steps_noise(step_noise, latents):
    encode = functools.partial(side.encode, pipe, job)
    encode()
    seconds["text"], text = _timed(encode)
    sample = functools.partial(sample, **text)
    sample(num_inference_steps=1)
    seconds["sample"], sampled = _timed(
      sample, num_inference_steps=job.steps, callback_on_step_end=note
    )
    decode = functools.partial(side.decode, pipe, job, sampled.frames)
    decode()
    seconds["decode"], video = _timed(decode)
  embeds = [x for x in reversed(text.values()) if x is not None]
  return jobs.Run(
    text=torch.cat(embeds).float().numpy(),
    latents=np.stack([_channels_last(side, x)[0] for x in latents]),
    video=pipe.video_processor.postprocess_video(video.float(), "np")[0],
    seconds=seconds,
    compile_seconds={},
    peak_bytes={"host": jobs.peak_host_bytes()},
    about=_about(),
  )


def channels_to(x: np.ndarray, axis: int) -> torch.Tensor:
  """Our layout [B, f, h, w, c] to that of a pipeline whose c is at `axis`."""
  return torch.tensor(np.moveaxis(x, -1, axis))


def _about() -> dict[str, Any]:
  return {
    "torch": torch.__version__,
    "diffusers": diffusers.__version__,
    "transformers": transformers.__version__,
    "torch_device": "cpu",
    "torch_threads": torch.get_num_threads(),
  }


def _load(side: Side, job: jobs.Job) -> Any:
  pipe = diffusers.DiffusionPipeline.from_pretrained(
    job.checkpoint,
    dtype=getattr(torch, job.dtype),
    local_files_only=True,
    **side.parts(job),
  )
  name = type(pipe.scheduler).__name__
  if name not in side.schedulers:
    raise ValueError(
      f"scheduler must be one of {side.schedulers}, got {name}; ours has no "
      "such"
    )
  return pipe


def _timed(run: Callable[..., Any], **given: Any) -> tuple[float, Any]:
  start = time.perf_counter()
  result = run(**given)
  return time.perf_counter() - start, result


def _channels_last(side: Side, x: torch.Tensor) -> np.ndarray:
  return np.moveaxis(x.float().numpy(), side.channel_axis, -1)


def main(side: Side, folder: str) -> None:
  """Run the job of a folder."""
  path = pathlib.Path(folder)
  with np.load(path / "noise.npz") as arrays:
    noise, step_noise = arrays["noise"], arrays.get("step_noise")
  job = jobs.read_job(path)
  jobs.write_run(path, NAME, run(side, job, noise, step_noise))
