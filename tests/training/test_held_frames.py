"""Frames that training holds as sampling does, where a system gives a mask."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import types
from vdit_jax.diffusion import objectives, schedules
from vdit_jax.models import families, networks
from vdit_jax.models.vdit import denoiser as vdit
from vdit_jax.training import denoiser, images

B, F, f = 4, 5, 2
CFG = vdit.Config(
  latent_channels=3,
  width=16,
  depth=1,
  heads=2,
  mlp_width=16,
  text_width=8,
  cond=("fps",),
  dtype="float32",
)


class Strided:
  """Stands in for an autoencoder: every fourth frame, every eighth pixel."""

  @staticmethod
  def video_frames(latents):
    return 4 * latents - 3

  @staticmethod
  def latent_shape(num_frames, height, width):
    return 1 + (num_frames - 1) // 4, height // 8, width // 8, 3

  @staticmethod
  def latent_mask(mask):
    return mask[:, ::4]

  @staticmethod
  def apply(variables, video, method):
    latents = jnp.asarray(video)[:, ::4, ::8, ::8]
    return latents if method == "encode" else (latents, latents * 0 - 30)


FIRST = dataclasses.replace(families.OURS, needs=lambda cfg: (0,))
MODULES = dataclasses.replace(
  networks.gather({"autoencoder": Strided, "denoiser": vdit.Denoiser(CFG)}),
  system=FIRST,
)
CLEAN = types.Image(noise_mean=-50.0, dropout=0.0)


def batch():
  rng = np.random.default_rng(0)
  return types.Batch(
    video=rng.integers(0, 256, (B, F, 32, 32, 3), np.uint8),
    weight=jnp.ones(B),
    captions={
      "text_encoder": types.Captions(
        mask=jnp.ones((B, 3), bool),
        embeds=rng.normal(size=(B, 3, 8)).astype(np.float32),
      )
    },
    cond=types.Cond(fps=jnp.full(B, 8.0)),
  )


@pytest.fixture(scope="module")
def params(randomise):
  text = types.Text(jnp.zeros((1, 1, 8)), jnp.ones((1, 1), bool))
  init = lambda: MODULES.denoiser.init(
    jax.random.key(0), jnp.zeros((1, 1, 2, 2, 3)), jnp.zeros(1), text
  )
  return randomise(jax.eval_shape(lambda: nn.meta.unbox(init())["params"]))


def test_frames_that_stay_are_the_first_ones():
  given = images.show(MODULES, CLEAN, {"autoencoder": None}, batch(), f, None)
  first = batch().video[:, :1, ::8, ::8] / 127.5 - 1
  np.testing.assert_allclose(given.latents[:, :1], first, atol=1e-6)
  assert given.cond is None
  np.testing.assert_array_equal(given.mask, [[True, False]] * B)


def test_a_clip_that_is_not_shown_is_not_held():
  often = types.Image(dropout=0.5)
  keys = jax.random.split(jax.random.key(5), B)
  given = images.show(MODULES, often, {"autoencoder": None}, batch(), f, keys)
  held = np.asarray(given.mask)
  assert held.dtype == bool and 0 < held[:, 0].sum() < B
  assert not held[:, 1:].any()
  assert not np.asarray(given.latents)[~held[:, 0]].any()


def test_the_loss_is_of_the_frames_that_are_not_given(params):
  goal = denoiser.Objective(shift=1.0, caption_dropout=0.0, cond_dropout=0.0)
  loss = denoiser.make_loss(MODULES, goal, images.shower(CLEAN))
  data = batch()
  drawn = loss.draw(data, jax.random.key(0))
  frozen = {"autoencoder": None}
  found = loss.terms({"denoiser": params}, frozen, data, drawn)["loss"]
  x0 = data.video[:, ::4, ::8, ::8] / 127.5 - 1
  draw = lambda key: jax.random.normal(key, x0.shape[1:])
  eps = jax.vmap(draw)(drawn["noise"])
  t = jnp.stack([jnp.zeros(B), drawn["t"]], 1)
  alpha, sigma = schedules.alpha_sigma(goal.schedule, t)
  x_t = objectives.add_noise(x0, eps, alpha, sigma)
  np.testing.assert_allclose(x_t[:, 0], x0[:, 0], atol=1e-6)
  captions = data.captions["text_encoder"]
  text = types.Text(jnp.asarray(captions.embeds), captions.mask)
  y = MODULES.denoiser.apply({"params": params}, x_t, t, text, data.cond)
  wanted = np.square(y - (eps - x0))[:, 1].mean((1, 2, 3))
  np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_numbers_are_told_beside_what_is_shown():
  shown = types.Cond(latents=jnp.ones((B, f, 4, 4, 3)))
  both = types.join_conds(shown, None, batch().cond)
  assert both.latents is shown.latents and both.fps is not None
  assert types.join_conds(None, None) is None
  with pytest.raises(ValueError, match="fps"):
    types.join_conds(batch().cond, batch().cond)
