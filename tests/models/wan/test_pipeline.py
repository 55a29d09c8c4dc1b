"""Whole tiny pipelines of Wan are diffusers', each variant's."""

import dataclasses
import importlib

import numpy as np
import pytest
from PIL import Image

from vdit_jax import conditioning, pipeline
from vdit_jax.compare import jobs, stages
from vdit_jax.compare import ours as sides
from vdit_jax.models.wan import tiny as forms
from vdit_jax.weights import tiny

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
torch_side = importlib.import_module("vdit_jax.compare.torch_side")
baseline = importlib.import_module("vdit_jax.models.wan.baseline")

JOB = jobs.Job(
  checkpoint="",
  prompt="two dogs run &amp; a   red seven",
  negative_prompt="a panda plays",
  images=(),
  steps=5,
  guidance=None,
  num_frames=9,
  height=32,
  width=48,
  dtype="float32",
  seed=0,
)
IMAGES = {"2_1_i2v": 1, "2_1_flf2v": 2, "2_2_i2v": 1}


def _job(variant, folder, **changes):
  tiny.write(folder / "pipe", f"wan:{variant}")
  rng, paths = np.random.default_rng(0), []
  for i in range(IMAGES.get(variant, 0)):
    paths.append(str(folder / f"{i}.png"))
    pixels = rng.integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(paths[-1])
  given = {"checkpoint": str(folder / "pipe"), "images": tuple(paths)}
  width = 64 if variant == "2_2_ti2v" else 48
  return dataclasses.replace(JOB, width=width, **given | changes)


def _both(job):
  pipe = pipeline.load(job.checkpoint, dtype="float32")
  job = sides.settle(job, pipe.recipe)
  noises = sides.draw(job, pipe)
  theirs = torch_side.run(baseline.SIDE, job, **noises)
  return sides.run(job, pipe, **noises), theirs


def _check(ours, theirs):
  for error in stages.steps(ours, theirs):
    assert 0 < error.relative < 1e-4
  assert stages.measure(ours.text, theirs.text).relative < 1e-4
  assert stages.measure(ours.video, theirs.video, 1.0).psnr > 60
  assert ours.video.std() > 0.02


@pytest.mark.parametrize("variant", forms.VARIANTS)
def test_a_pipeline_is_diffusers(variant, tmp_path):
  """The prompt's cleaning, the padding's zeros and both experts included."""
  job = _job(variant, tmp_path)
  ours, theirs = _both(job)
  _check(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_a_trajectory_of_other_lengths_is_diffusers(steps, tmp_path):
  _check(*_both(_job("2_2", tmp_path, steps=steps)))


@pytest.mark.slow
def test_one_frame_without_guidance_is_diffusers(tmp_path):
  changes = dict(num_frames=1, guidance=(1.0,), steps=3)
  _check(*_both(_job("2_1", tmp_path, **changes)))


def test_a_first_frame_that_is_held_is_diffusers(tmp_path):
  """TI2V-5B: its noise level is 0, those of the other latent frames are t."""
  job = _job("2_2_ti2v", tmp_path)
  pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
  pipe = pipeline.load(job.checkpoint, dtype="float32")
  job = sides.settle(job, pipe.recipe)
  noise = sides.draw(job, pipe)["noise"]
  frames, mask = conditioning.place(pixels[None, None], (0,), job.num_frames)
  given = dict(frames=frames, frame_mask=mask, noise=noise, steps=job.steps)
  size = dict(num_frames=job.num_frames, height=job.height, width=job.width)
  make = lambda **given: pipe.generate(
    [job.prompt], negative_prompts=[job.negative_prompt], **size, **given
  )
  found = make(**given)
  plain = diffusers.DiffusionPipeline.from_pretrained(job.checkpoint)
  parts = dict(plain.components, image_encoder=None, image_processor=None)
  theirs = diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)
  with torch.no_grad():
    latents = theirs(
      image=Image.fromarray(pixels),
      **size,
      **baseline.SIDE.encode(theirs, job),
      num_inference_steps=job.steps,
      guidance_scale=job.guidance[0],
      latents=torch_side.channels_to(noise, 1),
      output_type="latent",
    ).frames
    video = baseline.SIDE.decode(theirs, job, latents)
  want = np.moveaxis(video.numpy(), 1, -1)
  assert stages.measure(found, want, 2.0).psnr > 60
  free = make(noise=noise, steps=job.steps)
  assert stages.measure(free, want, 2.0).psnr < 40


def test_experts_that_change_a_step_later_differ(tmp_path):
  job = _job("2_2", tmp_path, steps=8)
  pipe = pipeline.load(job.checkpoint, dtype="float32")
  job = sides.settle(job, pipe.recipe)
  noises = sides.draw(job, pipe)
  want = sides.run(job, pipe, **noises)
  low, high = pipe.recipe.experts
  below = low.t_high - 0.1
  rows = (
    dataclasses.replace(low, t_high=below),
    dataclasses.replace(high, t_low=below),
  )
  recipe = dataclasses.replace(pipe.recipe, experts=rows)
  found = sides.run(job, dataclasses.replace(pipe, recipe=recipe), **noises)
  assert stages.measure(found.latents, want.latents).relative > 1e-3
