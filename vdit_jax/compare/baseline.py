"""PyTorch's side: diffusers' pipeline on the CPU, stage by stage.

  python -m vdit_jax.compare.baseline FOLDER

runs the job in FOLDER on the noise that ours left there. A process of its own,
started by `vdit_jax.compare`: the only module of the package that imports
torch, and nothing imports it.
"""

import contextlib
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.cogvideo import pipeline_cogvideox_image2video
from diffusers.schedulers import scheduling_dpm_cogvideox
from PIL import Image

from vdit_jax.compare import jobs

NAME = "torch"
_SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")


def run(
  job: jobs.Job, noise: np.ndarray, step_noise: np.ndarray | None = None
) -> jobs.Run:
  """Run diffusers' pipeline.

  Args:
    job: what to sample.
    noise: initial noise [1, f, h, w, c].
    step_noise: of the steps of a stochastic scheduler [steps, 1, f, h, w, c];
      None for one that draws none.
  """
  pipe = _load(job)
  given = _given(pipe, job, noise)
  seconds, latents = {}, []

  def note(pipe, step, t, tensors):
    latents.append(tensors["latents"])
    return {}

  sample = functools.partial(pipe, **given)
  with torch.no_grad(), _noise_of_steps(step_noise, latents):
    encode = functools.partial(_encode, pipe, job)
    encode()
    seconds["text"], text = _timed(encode)
    sample = functools.partial(sample, **text)
    sample(num_inference_steps=1)
    seconds["sample"], sampled = _timed(
      sample, num_inference_steps=job.steps, callback_on_step_end=note
    )
    decode = functools.partial(_decode, pipe, job, sampled.frames)
    decode()
    seconds["decode"], video = _timed(decode)
  embeds = [x for x in reversed(text.values()) if x is not None]
  return jobs.Run(
    text=torch.cat(embeds).float().numpy(),
    latents=np.stack([_channels_last(x)[0] for x in latents]),
    video=pipe.video_processor.postprocess_video(video.float(), "np")[0],
    seconds=seconds,
    compile_seconds={},
    peak_bytes={"host": jobs.peak_host_bytes()},
    about={
      "torch": torch.__version__,
      "diffusers": diffusers.__version__,
      "transformers": transformers.__version__,
      "torch_device": "cpu",
      "torch_threads": torch.get_num_threads(),
    },
  )


def _load(job: jobs.Job) -> Any:
  pipe = diffusers.DiffusionPipeline.from_pretrained(
    job.checkpoint,
    dtype=getattr(torch, job.dtype),
    local_files_only=True,
  )
  name = type(pipe.scheduler).__name__
  if name not in _SCHEDULERS:
    raise ValueError(
      f"scheduler must be one of {_SCHEDULERS}, got {name}; ours has no such"
    )
  return pipe


def _given(pipe: Any, job: jobs.Job, noise: np.ndarray) -> dict[str, Any]:
  """Arguments of the pipeline that do not change."""
  given = dict(
    height=job.height,
    width=job.width,
    num_frames=job.num_frames,
    guidance_scale=job.guidance,
    latents=_channels_second(noise).to(pipe.transformer.dtype),
    output_type="latent",
  )
  if job.image is not None:
    # Ours shows the denoiser the mean of an image's latents, not a sample.
    plain = pipeline_cogvideox_image2video.retrieve_latents
    pipeline_cogvideox_image2video.retrieve_latents = (
      lambda output, generator=None: plain(output, sample_mode="argmax")
    )
    given["image"] = Image.open(job.image).convert("RGB")
  return given


def _encode(pipe: Any, job: jobs.Job) -> dict[str, torch.Tensor | None]:
  prompt, negative = pipe.encode_prompt(
    job.prompt,
    job.negative_prompt,
    do_classifier_free_guidance=job.guidance > 1,
    max_sequence_length=pipe.transformer.config.max_text_seq_length,
  )
  return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


def _decode(pipe: Any, job: jobs.Job, latents: torch.Tensor) -> torch.Tensor:
  """Decode as the pipeline does, without the frames of padding in front."""
  frames = (job.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
  return pipe.decode_latents(latents[:, -frames:])


@contextlib.contextmanager
def _noise_of_steps(
  step_noise: np.ndarray | None, done: list[torch.Tensor]
) -> Iterator[None]:
  """Let the stochastic scheduler draw what it is given, step by step."""
  plain = scheduling_dpm_cogvideox.randn_tensor
  if step_noise is not None:
    noises = [_channels_second(x) for x in step_noise]

    def draw(shape, generator=None, device=None, dtype=None):
      return noises[len(done)].to(dtype)

    scheduling_dpm_cogvideox.randn_tensor = draw
  try:
    yield
  finally:
    scheduling_dpm_cogvideox.randn_tensor = plain


def _timed(run: Callable[..., Any], **given: Any) -> tuple[float, Any]:
  start = time.perf_counter()
  result = run(**given)
  return time.perf_counter() - start, result


def _channels_second(x: np.ndarray) -> torch.Tensor:
  """Our layout [B, f, h, w, c] to diffusers', [B, f, c, h, w]."""
  return torch.tensor(np.moveaxis(x, -1, 2))


def _channels_last(x: torch.Tensor) -> np.ndarray:
  return np.moveaxis(x.float().numpy(), 2, -1)


def main(folder: str) -> None:
  """Run the job of a folder."""
  path = pathlib.Path(folder)
  with np.load(path / "noise.npz") as arrays:
    noise, step_noise = arrays["noise"], arrays.get("step_noise")
  job = jobs.read_job(path)
  jobs.write_run(path, NAME, run(job, noise, step_noise))


if __name__ == "__main__":
  main(sys.argv[1])
