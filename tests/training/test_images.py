"""Laws of the first frames that a denoiser is shown in training."""

import dataclasses
import types as python

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.toy import autoencoder, denoiser
from tests.models.toy import system as toy
from vdit_jax import types
from vdit_jax.models import system
from vdit_jax.training import images

B, F = 3, 3
CLEAN = types.Image()
NOISY = types.Image(noise_mean=-3.0, noise_std=0.5, dropout=0.05)


def batch_of(rows=B, size=16):
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (rows, F, size, size, 3), np.uint8)
  return types.Batch(video=video, weight=np.ones(rows, np.float32))


def pixels(positions=(0,)):
  """Modules of a system that shows the frames as they are."""
  asked = []

  def condition(modules, apply, frames, mask, draw):
    asked.append((frames, mask, draw))
    return types.Given(cond=types.Cond(latents=frames))

  known = system.System(
    name="pixels",
    networks=(),
    places={},
    needs=lambda cfg: positions,
    condition=condition,
  )
  vae = python.SimpleNamespace(video_frames=lambda f: 2 * f - 1)
  denoiser = python.SimpleNamespace(cfg=None)
  return system.Modules(
    known, {"autoencoder": vae, "denoiser": denoiser}
  ), asked


def show(image, batch, keys=None, f=2):
  modules, _ = pixels()
  frozen = {"autoencoder": {}}
  return images.show(modules, image, frozen, batch, f, keys).cond.latents


def keys_of(rows, seed=0):
  return jax.random.split(jax.random.key(seed), rows)


def first_of(batch):
  return batch.video[:, 0].astype(np.float32) / 127.5 - 1


def test_without_keys_the_first_frame_is_shown_clean_and_no_other():
  batch = batch_of()
  modules, asked = pixels()
  frozen = {"autoencoder": {}}
  given = images.show(modules, NOISY, frozen, batch, 2, None)
  got = given.cond.latents
  assert got.shape == (B, 3, 16, 16, 3)  # of 2 latent frames of stride 2
  np.testing.assert_allclose(got[:, 0], first_of(batch), atol=1e-6)
  assert not np.any(got[:, 1:])
  [(_, mask, draw)] = asked
  np.testing.assert_array_equal(mask, [[True, False, False]] * B)
  assert draw((4, 4)) is None  # the posterior's mean


def test_images_beside_latents_are_the_first_frames():
  batch = batch_of()
  beside = batch.replace(video=None, frames=batch.video[:, :1])
  for image, keys in ((CLEAN, None), (NOISY, keys_of(B))):
    np.testing.assert_array_equal(
      show(image, beside, keys), show(image, batch, keys)
    )


def test_first_and_last_are_shown_where_the_system_needs_them():
  batch, (modules, asked) = batch_of(), pixels((0, -1))
  for given in (
    batch,
    batch.replace(video=None, frames=batch.video[:, [0, 2]]),
  ):
    images.show(modules, CLEAN, {"autoencoder": {}}, given, 2, None)
    frames, mask, _ = asked.pop()
    np.testing.assert_array_equal(mask, [[True, False, True]] * B)
    want = batch.video[:, [0, 2]] / 127.5 - 1
    np.testing.assert_allclose(frames[:, [0, 2]], want, atol=1e-6)
    assert not np.any(frames[:, 1])


def test_what_was_encoded_before_is_not_encoded_again():
  """Of an image encoder, whose weights are not even there."""

  def condition(modules, apply, frames, mask, draw):
    embeds = apply(frames[:, 0], method="__call__", network="image_encoder")
    return types.Given(cond=types.Cond(image_embeds=embeds))

  modules, _ = pixels()
  known = dataclasses.replace(modules.system, condition=condition)
  modules = dataclasses.replace(modules, system=known)
  embeds = np.full((B, 1, 4, 8), 2, np.float16)
  batch = batch_of().replace(encoded={"image_encoder": embeds})
  given = images.show(modules, CLEAN, {"autoencoder": {}}, batch, 2, None)
  np.testing.assert_array_equal(given.cond.image_embeds, embeds[:, 0])
  assert given.cond.image_embeds.dtype == np.float32


def test_a_network_that_is_run_twice_cannot_be_cached():
  def condition(modules, apply, frames, mask, draw):
    for _ in range(2):
      apply(frames[:, 0], method="__call__", network="image_encoder")

  encoder = python.SimpleNamespace(apply=lambda *args, method: jnp.ones(B))
  modules, _ = pixels()
  known = dataclasses.replace(modules.system, condition=condition)
  beside = modules.networks | {"image_encoder": encoder}
  modules = system.Modules(known, beside)
  with pytest.raises(ValueError, match="must run image_encoder once to be"):
    images.encode(modules, {"image_encoder": {}}, batch_of().video)


def test_noise_has_the_deviation_that_is_said():
  batch = batch_of()
  image = types.Image(noise_mean=-1.0, noise_std=0.0, dropout=0.0)
  got = show(image, batch, keys_of(B))
  noise = got[:, 0] - first_of(batch)
  np.testing.assert_allclose(
    np.std(noise, (1, 2, 3)), np.exp(-1.0) * np.ones(B), rtol=0.08
  )
  assert not np.any(got[:, 1:])
  np.testing.assert_allclose(
    show(CLEAN, batch, keys_of(B))[:, 0], first_of(batch), atol=1e-6
  )


def test_the_logarithm_of_a_clips_deviation_is_normal():
  rows = 400
  batch = batch_of(rows, size=8)
  image = types.Image(noise_mean=-2.0, noise_std=0.5, dropout=0.0)
  noise = show(image, batch, keys_of(rows))[:, 0] - first_of(batch)
  logs = np.log(np.std(noise, (1, 2, 3)))
  np.testing.assert_allclose(np.mean(logs), -2.0, atol=0.08)
  np.testing.assert_allclose(np.std(logs), 0.5, rtol=0.12)


def test_of_the_dropout_share_nothing_is_shown():
  rows = 400
  batch = batch_of(rows, size=8)
  image = types.Image(noise_mean=-3.0, noise_std=0.0, dropout=0.3)
  got = np.asarray(show(image, batch, keys_of(rows)))
  gone = np.all(got == 0, axis=(1, 2, 3, 4))
  assert abs(gone.mean() - 0.3) < 0.07
  kept = types.Image(noise_mean=-3.0, noise_std=0.0, dropout=0.0)
  all_shown = np.asarray(show(kept, batch, keys_of(rows)))
  np.testing.assert_array_equal(got[~gone], all_shown[~gone])


def test_a_clip_is_shown_the_same_in_any_batch():
  batch, keys = batch_of(), keys_of(B)
  image = types.Image(noise_mean=-1.0, dropout=0.5)
  whole = show(image, batch, keys)
  for row in range(B):
    one = batch.replace(video=batch.video[row : row + 1])
    alone = show(image, one, keys[row : row + 1])
    np.testing.assert_allclose(alone[0], whole[row], atol=1e-6)


def test_the_posterior_is_sampled_by_noise_of_its_own():
  batch, (modules, asked) = batch_of(), pixels()
  image = types.Image(noise_mean=0.0, noise_std=0.0, dropout=0.0)
  images.show(modules, image, {"autoencoder": {}}, batch, 2, keys_of(B))
  [(frames, _, draw)] = asked
  drawn = np.asarray(draw((16, 16, 3)))
  assert drawn.shape == (B, 16, 16, 3) and abs(np.std(drawn) - 1) < 0.05
  added = np.asarray(frames[:, 0]) - first_of(batch)
  for one in (drawn, drawn[::-1]):
    assert abs(np.corrcoef(added.ravel(), one.ravel())[0, 1]) < 0.1
  assert abs(np.corrcoef(drawn[0].ravel(), drawn[1].ravel())[0, 1]) < 0.2


def test_the_autoencoder_encodes_it_and_is_not_trained(randomise):
  vae = autoencoder.Autoencoder(autoencoder.Config())
  net = denoiser.Denoiser(denoiser.Config(given=(0,)))
  modules = system.Modules(toy.SYSTEM, {"autoencoder": vae, "denoiser": net})
  batch = batch_of()
  video = first_of(batch)[:, None]
  shapes = jax.eval_shape(vae.init, jax.random.key(0), video)["params"]
  params = randomise(nn.meta.unbox(shapes))

  @jax.jit
  def run(params):
    def loss(params):
      frozen = {"autoencoder": params}
      cond = images.show(modules, CLEAN, frozen, batch, F, None).cond
      return jnp.sum(cond.latents**2), cond.latents

    grads, shown = jax.grad(loss, has_aux=True)(params)
    return grads, shown, vae.apply({"params": params}, video, method="encode")

  grads, got, want = run(params)
  assert got.shape == (B, F + 1, 2, 2, 3) and not np.any(got[:, 1:])
  np.testing.assert_allclose(got[:, :1], want, atol=1e-5)
  assert not any(np.any(x) for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"dropout": 1.0}, r"image.dropout must be in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, r"image.dropout must be in \[0, 1\), got -0.1"),
    ({"noise_std": -1.0}, "image.noise_std must not be negative, got -1.0"),
  ],
)
def test_shares_and_deviations_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    types.Image(**fields)
