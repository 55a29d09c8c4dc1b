"""Wan by diffusers, for `vdit_jax.compare`.

  python -m vdit_jax.models.wan.baseline FOLDER

runs the job in FOLDER on the noise that ours left there.
"""

import json
import pathlib
import sys
from typing import Any

import diffusers
import torch
import transformers

from vdit_jax.compare import jobs, torch_side

_TEXT_TOKENS = 512


def _parts(job: jobs.Job) -> dict[str, Any]:
  """Images by Pillow: the other backend of transformers is one of torchvision.

  A folder without a file of the processor has that of every release.
  """
  folder = pathlib.Path(job.checkpoint)
  index = json.loads((folder / "model_index.json").read_text())
  if not any(index.get("image_encoder") or ()):
    return {}
  make, file = transformers.CLIPImageProcessorPil, folder / "image_processor"
  if file.exists():
    return {"image_processor": make.from_pretrained(file)}
  config = json.loads((folder / "image_encoder" / "config.json").read_text())
  side = config["image_size"]
  size = {"shortest_edge": side}, {"height": side, "width": side}
  return {"image_processor": make(size=size[0], crop_size=size[1])}


def _given(pipe: Any, job: jobs.Job) -> dict[str, Any]:
  """Images, and the guidance of the second of two denoisers."""
  names = ("image", "last_image")[: len(job.images)]
  given = dict(zip(names, torch_side.read_images(job), strict=True))
  if len(job.guidance) > 1:
    given["guidance_scale_2"] = job.guidance[0]
  if isinstance(pipe, diffusers.WanImageToVideoPipeline) and not given:
    raise ValueError("images must be given to image-to-video; pass them")
  return given


def _encode(pipe: Any, job: jobs.Job) -> dict[str, torch.Tensor | None]:
  """Encode the prompt, and the negative one where there is guidance."""
  prompt, negative = pipe.encode_prompt(
    job.prompt,
    job.negative_prompt,
    do_classifier_free_guidance=job.guided,
    max_sequence_length=_TEXT_TOKENS,
  )
  return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


def _decode(pipe: Any, job: jobs.Job, latents: torch.Tensor) -> torch.Tensor:
  """Decode as the pipeline does."""
  del job
  config = pipe.vae.config
  vector = lambda x: torch.tensor(x).view(1, -1, 1, 1, 1).to(latents)
  latents = latents * vector(config.latents_std) + vector(config.latents_mean)
  return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]


SIDE = torch_side.Side(
  schedulers=("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"),
  given=_given,
  encode=_encode,
  steps_noise=torch_side.draws_nothing,
  decode=_decode,
  channel_axis=1,
  parts=_parts,
)

if __name__ == "__main__":
  torch_side.main(SIDE, sys.argv[1])
