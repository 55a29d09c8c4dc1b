"""CogVideoX by diffusers, for `vdit_jax.compare`.

  python -m vdit_jax.models.cogvideox.baseline FOLDER

runs the job in FOLDER on the noise that ours left there.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.cogvideo import pipeline_cogvideox_image2video
from diffusers.schedulers import scheduling_dpm_cogvideox

from vdit_jax.compare import jobs, torch_side


def _given(pipe: Any, job: jobs.Job) -> dict[str, Any]:
  """The first frame, of image-to-video."""
  del pipe
  if not job.images:
    return {}
  # Ours shows the denoiser the mean of an image's latents, not a sample.
  plain = pipeline_cogvideox_image2video.retrieve_latents
  pipeline_cogvideox_image2video.retrieve_latents = (
    lambda output, generator=None: plain(output, sample_mode="argmax")
  )
  (image,) = torch_side.read_images(job)
  return {"image": image}


def _encode(pipe: Any, job: jobs.Job) -> dict[str, torch.Tensor | None]:
  """Encode the prompt, and the negative one where there is guidance."""
  prompt, negative = pipe.encode_prompt(
    job.prompt,
    job.negative_prompt,
    do_classifier_free_guidance=job.guided,
    max_sequence_length=pipe.transformer.config.max_text_seq_length,
  )
  return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


def _decode(pipe: Any, job: jobs.Job, latents: torch.Tensor) -> torch.Tensor:
  """Decode as the pipeline does, without the frames of padding in front."""
  frames = (job.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
  return pipe.decode_latents(latents[:, -frames:])


@contextlib.contextmanager
def _steps_noise(
  step_noise: np.ndarray | None, done: list[torch.Tensor]
) -> Iterator[None]:
  """Let the stochastic scheduler draw what it is given, step by step."""
  plain = scheduling_dpm_cogvideox.randn_tensor
  if step_noise is not None:
    noises = [torch_side.channels_to(x, SIDE.channel_axis) for x in step_noise]

    def draw(shape, generator=None, device=None, dtype=None):
      return noises[len(done)].to(dtype)

    scheduling_dpm_cogvideox.randn_tensor = draw
  try:
    yield
  finally:
    scheduling_dpm_cogvideox.randn_tensor = plain


SIDE = torch_side.Side(
  schedulers=("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
  given=_given,
  encode=_encode,
  steps_noise=_steps_noise,
  decode=_decode,
)

if __name__ == "__main__":
  torch_side.main(SIDE, sys.argv[1])
