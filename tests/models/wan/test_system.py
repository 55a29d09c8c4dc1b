"""What Wan says of itself: recipes, experts, conditions, prompts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import pipeline
from vdit_jax.diffusion import samplers, schedules
from vdit_jax.models import networks
from vdit_jax.models.wan import autoencoder, denoiser, system
from vdit_jax.weights import tiny

CFG = denoiser.Config(
  latent_channels=3,
  depth=2,
  heads=2,
  head_dim=16,
  mlp_width=24,
  text_width=8,
  dtype="float32",
)
SHOWN = dataclasses.replace(CFG, mask_channels=4)
VAE = autoencoder.Config(
  latent_channels=3,
  width=4,
  decoder_width=4,
  blocks=1,
  mean=(0.0,) * 3,
  std=(1.0,) * 3,
  dtype="float32",
)


def _modules(cfg, vae=VAE):
  found = {"denoiser": denoiser.Denoiser(cfg)}
  return networks.gather(found | {"autoencoder": autoencoder.Autoencoder(vae)})


def _encode(video, method="encode"):
  """Stand in for an autoencoder: means over 8 x 8 pixels of every 4th frame."""
  assert method == "encode"
  B, F, H, W, _ = video.shape
  x = video[:, ::4].reshape(B, -1, H // 8, 8, W // 8, 8, 3)
  return jnp.asarray(x.mean((3, 5)))


def _condition(modules, frames, mask):
  return system.condition(modules, _encode, frames, mask, lambda shape: None)


@pytest.fixture
def frames():
  shape = 2, 9, 16, 24, 3
  return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def _mask(*positions):
  return np.isin(np.arange(9), positions) & np.ones((2, 1), bool)


def test_condition_is_given_frames_behind_a_mask(frames):
  cond = _condition(_modules(SHOWN), frames, _mask(0)).cond
  assert cond.latents.shape == (2, 3, 2, 3, 3)
  first = _encode(frames[:, :1])
  np.testing.assert_allclose(cond.latents[:, :1], first, atol=1e-6)
  np.testing.assert_array_equal(cond.latents[:, 1:], 0)
  assert cond.mask.shape == (2, 3, 2, 3, 4)
  np.testing.assert_array_equal(cond.mask[:, 0], 1)
  np.testing.assert_array_equal(cond.mask[:, 1:], 0)
  ends = dataclasses.replace(SHOWN, image_width=8, image_tokens=10)
  assert system.SYSTEM.needs(ends) == (0, -1)


def test_a_noise_level_for_each_frame_holds_the_first(frames):
  vae = dataclasses.replace(VAE, residual=True)
  given = _condition(_modules(CFG, vae), frames, _mask(0))
  assert given.cond is None and given.latents.shape == (2, 3, 2, 3, 3)
  np.testing.assert_array_equal(given.mask, [[True, False, False]] * 2)
  first = _encode(frames[:, :1])
  np.testing.assert_allclose(given.latents[:, :1], first, atol=1e-6)
  assert not jax.tree.leaves(_condition(_modules(CFG, vae), frames, _mask()))
  with pytest.raises(ValueError, match=r"first frame .* got frames \[8\]"):
    _condition(_modules(CFG, vae), frames, _mask(8))


def test_frames_that_it_was_not_trained_for_are_refused(frames):
  with pytest.raises(ValueError, match="text alone.*TI2V-5B"):
    _condition(_modules(CFG), frames, _mask(0))
  assert not jax.tree.leaves(_condition(_modules(CFG), frames, _mask()))
  for places in ((), (0, 8), (4,)):
    with pytest.raises(ValueError, match=r"the first frame of every clip"):
      _condition(_modules(SHOWN), frames, _mask(*places))


@pytest.mark.parametrize("variant", denoiser.VARIANTS)
def test_recipe_runs_its_variant(variant):
  cfg = denoiser.VARIANTS[variant]
  vae = autoencoder.VARIANTS["2_2" if variant == "5b" else "2_1"]
  recipe = system.RECIPES[variant]
  shape = system.SYSTEM.latent_shape(
    _modules(cfg, vae), recipe.num_frames, recipe.height, recipe.width
  )
  samplers.make(recipe.sampler, recipe.sampler_options)
  schedules.Schedule(**recipe.schedule)
  schedules.Spacing(**recipe.spacing)
  _, t, text, cond = denoiser.example(cfg)
  if cfg.shows_images:
    tiled = lambda x: jnp.zeros((1, *shape[:3], x.shape[-1]))
    cond = cond.replace(latents=tiled(cond.latents), mask=tiled(cond.mask))
  run = lambda: denoiser.Denoiser(cfg).init(
    jax.random.key(0), jnp.zeros((1, *shape)), t, text, cond
  )
  assert jax.eval_shape(run)


def test_tokens_of_the_recipes():
  count = lambda name, vae: (
    np.prod(
      system.SYSTEM.latent_shape(
        _modules(denoiser.VARIANTS[name], autoencoder.VARIANTS[vae]),
        *(getattr(system.RECIPES[name], k) for k in ("num_frames", "height")),
        system.RECIPES[name].width,
      )[:3]
    )
    // 4
  )
  assert count("1_3b", "2_1") == 32_760
  assert count("14b", "2_1") == 75_600
  assert count("5b", "2_2") == 27_280


@pytest.mark.parametrize("ratio", [0.875, 0.9])
def test_the_boundary_is_the_first_denoiser_s(ratio):
  """As t >= boundary in diffusers, of timesteps that are whole."""
  low, high = system.experts(ratio, 3.0, 4.0)
  assert (low.network, high.network) == ("denoiser_2", "denoiser")
  assert (low.guidance, high.guidance) == (3.0, 4.0)
  n = np.arange(1, 1001)
  t = jnp.asarray(n / 1000, jnp.float32)  # as the table has it
  first = np.asarray(t > jnp.asarray(low.t_high, jnp.float32))
  np.testing.assert_array_equal(first, n >= round(1000 * ratio))
  assert low.t_high == high.t_low and (low.t_low, high.t_high) == (0.0, 1.0)


@pytest.mark.parametrize(
  "variant, name",
  [
    ("2_1", "1_3b"),
    ("2_1_i2v", "14b_i2v"),
    ("2_1_flf2v", "14b_flf2v"),
    ("2_2", "a14b"),
    ("2_2_i2v", "a14b_i2v"),
    ("2_2_ti2v", "5b"),
  ],
)
def test_a_folder_is_run_as_what_it_is_like(variant, name, tmp_path):
  tiny.write(tmp_path / "pipe", f"wan:{variant}")
  recipe = pipeline.load(tmp_path / "pipe").recipe
  wanted = system.RECIPES[name]
  index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
  if index["boundary_ratio"]:
    low, high = (row.guidance for row in wanted.experts)
    wanted_rows = system.experts(index["boundary_ratio"], low, high)
    assert recipe.experts == wanted_rows
  else:
    assert recipe.experts == wanted.experts
  for field in ("steps", "fps", "num_frames", "negative_prompt", "objective"):
    assert getattr(recipe, field) == getattr(wanted, field)
  scheduler = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
  assert recipe.shift == json.loads(scheduler.read_text())["flow_shift"]


@pytest.mark.parametrize("change", ["boundary_ratio", "transformer_2"])
def test_a_second_denoiser_without_a_boundary_is_refused(change, tmp_path):
  tiny.write(tmp_path / "pipe", "wan:2_2")
  file = tmp_path / "pipe" / "model_index.json"
  none = {"boundary_ratio": None, "transformer_2": [None, None]}[change]
  file.write_text(json.dumps(json.loads(file.read_text()) | {change: none}))
  with pytest.raises(ValueError, match=r"model_index.json: boundary_ratio"):
    pipeline.load(tmp_path / "pipe")


def test_an_image_encoder_that_is_not_there_is_missed(tmp_path):
  tiny.write(tmp_path / "pipe", "wan:2_1_i2v")
  file = tmp_path / "pipe" / "model_index.json"
  changes = {"image_encoder": [None, None]}
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  with pytest.raises(ValueError, match="no image_encoder"):
    pipeline.load(tmp_path / "pipe")


@pytest.mark.parametrize(
  "text, wanted",
  [
    ("  a   red\n\tcar ", "a red car"),
    ("fish &amp;amp; chips &lt;3", "fish & chips <3"),
    ("l&#39;Ã©tÃ©", "l'été"),
    ("", ""),
  ],
)
def test_prompts_are_cleaned(text, wanted, tmp_path):
  assert system.clean(text) == wanted


def test_cleaning_is_diffusers():
  from diffusers.pipelines.wan import pipeline_wan

  for text in (
    "  a \u3000 b ",
    "&amp;lt;b&amp;gt;",
    "â€œquotedâ€\x9d",
    "ﬁsh x",
  ):
    assert system.clean(text) == pipeline_wan.prompt_clean(text)


def test_a_pipeline_cleans_its_prompts(tmp_path):
  tiny.write(tmp_path / "pipe", "wan:2_1")
  words = pipeline.load(tmp_path / "pipe").tokenizers["text_encoder"]
  one, other = words.encode(["two  dogs &amp; one", "two dogs & one"], 16)[0]
  np.testing.assert_array_equal(one, other)
