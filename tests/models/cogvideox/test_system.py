"""What CogVideoX says of itself: sizes, conditions, recipes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import types
from vdit_jax.diffusion import samplers, schedules
from vdit_jax.models import networks
from vdit_jax.models.cogvideox import denoiser, system

CFG = denoiser.Config(
  latent_channels=3,
  image_channels=2,
  patch=(2, 2, 2),
  depth=2,
  heads=4,
  head_dim=16,
  text_width=16,
  text_tokens=6,
  time_width=16,
  ofs=True,
  positions="slice",
  sample=(2, 4, 6),
  eps=0.01,
  dtype="float32",
)
M = 6


def _modules(cfg):
  return networks.gather({"denoiser": denoiser.Denoiser(cfg)})


@pytest.mark.parametrize(
  "variant, video, shape",
  [
    ("2b", (49, 480, 720), (13, 60, 90, 16)),
    ("5b", (1, 480, 720), (1, 60, 90, 16)),
    ("1_5_5b", (81, 768, 1360), (22, 96, 170, 16)),
    ("1_5_5b_i2v", (85, 768, 1360), (22, 96, 170, 16)),
  ],
)
def test_latent_shape_has_whole_patches(variant, video, shape):
  cfg = denoiser.VARIANTS[variant]
  assert system.latent_shape(_modules(cfg), *video) == shape


def test_size_that_does_not_fit_is_refused():
  shape = functools.partial(
    system.latent_shape, _modules(denoiser.VARIANTS["5b"])
  )
  for video, match in (
    ((48, 480, 720), r"4n\+1, got 48; try 49"),
    ((0, 480, 720), r"got 0; try 1"),
    ((49, 472, 720), "height must be .* 16, got 472; try 4"),
    ((49, 480, 724), "width must be .* 16, got 724; try 720"),
  ):
    with pytest.raises(ValueError, match=match):
      shape(*video)


def _encode(video, noise=None, method="encode_condition"):
  """Stand in for an autoencoder: means over 8 x 8 pixels, the first frame's."""
  B, F, H, W, _ = video.shape
  assert (F, noise, method) == (1, None, "encode_condition")
  return video.reshape(B, 1, H // 8, 8, W // 8, 8, 3).mean((3, 5))[..., :2]


def _condition(cfg, frames, mask):
  draw = lambda shape: None
  return system.condition(_modules(cfg), _encode, frames, mask, draw)


def test_condition_is_the_first_frame_and_zeros():
  rng = np.random.default_rng(0)
  frames = rng.uniform(-1, 1, (2, 9, 32, 48, 3)).astype(np.float32)
  mask = np.arange(9) == np.zeros((2, 1))
  cond = _condition(CFG, frames, mask).cond
  assert cond.latents.shape == (2, 4, 4, 6, 2)
  np.testing.assert_allclose(cond.latents[:, :1], _encode(frames[:, :1]))
  np.testing.assert_array_equal(cond.latents[:, 1:], 0)
  x_t = jnp.zeros((2, 4, 4, 6, CFG.latent_channels))
  t, embeds = jnp.zeros(2), jnp.zeros((2, CFG.text_tokens, CFG.text_width))
  text = types.Text(embeds=embeds, mask=jnp.ones(embeds.shape[:2], bool))
  run = functools.partial(denoiser.Denoiser(CFG).init, jax.random.key(0))
  jax.eval_shape(run, x_t, t, text, cond)


def test_condition_that_a_variant_was_not_trained_for_is_refused():
  frames, mask = np.zeros((2, 9, 32, 48, 3)), np.zeros((2, 9), bool)
  text_to_video = dataclasses.replace(CFG, image_channels=0, ofs=False)
  cond = _condition(text_to_video, frames, mask).cond
  assert not jax.tree.leaves(cond)
  with pytest.raises(ValueError, match=r"first frame .* got frames \[\]"):
    _condition(CFG, frames, mask)
  mask[:, [0, 8]] = True
  with pytest.raises(ValueError, match=r"first frame .* got frames \[0, 8\]"):
    _condition(CFG, frames, mask)
  with pytest.raises(ValueError, match="5b_i2v"):
    _condition(text_to_video, frames, mask)


@pytest.mark.parametrize("variant", denoiser.VARIANTS)
def test_recipe_runs_its_variant(variant):
  cfg, recipe = denoiser.VARIANTS[variant], system.RECIPES[variant]
  video = recipe.num_frames, recipe.height, recipe.width
  shape = system.latent_shape(_modules(cfg), *video)
  schedule = schedules.Schedule(**recipe.schedule)
  assert schedules.has_zero_terminal_snr(schedule)
  samplers.get(recipe.sampler)
  x_t = jnp.zeros((1, *shape))
  _, t, text, cond = denoiser.example(cfg)
  if cfg.image_channels:
    cond = types.Cond(latents=jnp.zeros((1, *shape[:3], cfg.image_channels)))
  inputs = x_t, t, text, cond
  run = functools.partial(denoiser.Denoiser(cfg).init, jax.random.key(0))
  assert jax.eval_shape(run, *inputs)
