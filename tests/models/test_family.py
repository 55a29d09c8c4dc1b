"""What a family of a few files may say of itself that others do not.

`tests/models/toy` is one. What every system gets by its row in the list is in
`test_systems.py`.
"""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from configs import defaults
from tests.models.toy import system as toy
from vdit_jax import pipeline, train, types
from vdit_jax.cache import dataset
from vdit_jax.data import moving_digits, reading
from vdit_jax.models import families, system
from vdit_jax.training import denoiser
from vdit_jax.weights import run_config, tiny
from vdit_jax.weights import text_encoder as text_encoders

PROMPTS = ["a red seven moving left", "two dogs run"]
DIGITS, LATENTS = "moving_digits/tiny", "latents/toy"


@pytest.fixture(scope="module", autouse=True)
def row():
  """The family's row."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(families.SYSTEMS, "toy", toy.SYSTEM)
    yield


@pytest.fixture(scope="module")
def folder(row, tmp_path_factory):
  """A random pipeline of it."""
  path = tmp_path_factory.mktemp("toy") / "pipe"
  tiny.write(path, "toy:small")
  return path


@pytest.fixture(scope="module")
def second(row, tmp_path_factory):
  """The same pipeline with a second denoiser."""
  path = tmp_path_factory.mktemp("toy") / "pipe2"
  tiny.write(path, "toy:small2")
  return path


@pytest.fixture(scope="module")
def own(row, tmp_path_factory):
  """The same pipeline in a layout of the family's own."""
  path = tmp_path_factory.mktemp("toy") / "own"
  tiny.write(path, "toy:own")
  return path


@pytest.fixture(scope="module")
def latents(folder, tmp_path_factory):
  """A data directory with its latents and embeddings."""
  path = tmp_path_factory.mktemp("data")
  builder = moving_digits.MovingDigits(
    config="tiny", data_dir=path, file_format="array_record"
  )
  builder.download_and_prepare()
  text = dataset.TextOptions(folder, dtype="float32")
  splits = ["train", "validation"]
  dataset.build(folder / "vae", DIGITS, path, LATENTS, splits, text, "float32")
  return path


def _config(folder, data_dir):
  config = defaults.tune_folder(toy.SYSTEM, str(folder))
  config.data.update({"name": LATENTS, "data_dir": str(data_dir)})
  config.mesh.fsdp, config.batch_size, config.log_every = 1, 8, 1
  config.optim.update({"lr": 1e-2, "total_steps": 2, "warmup_steps": 1})
  config.validation.update({"every": 0, "clips": 8, "levels": (0.3, 0.8)})
  return config


def test_it_samples_with_two_encoders_two_experts_and_three_branches(folder):
  pipe = pipeline.load(folder)
  assert pipe.system is toy.SYSTEM and len(pipe.tokenizers) == 2
  video = pipe.generate(PROMPTS, seed=1)
  assert video.shape == (2, 3, 32, 32, 3) and np.isfinite(video).all()
  frames = np.zeros_like(video)
  mask = np.arange(3)[None].repeat(2, 0) == 0
  shown = pipe.generate(PROMPTS, seed=1, frames=frames, frame_mask=mask)
  assert np.abs(shown - video).max() > 1e-3
  more = pipe.generate(
    PROMPTS, seed=1, frames=frames, frame_mask=mask, image_guidance=4.0
  )
  assert np.abs(more - shown).max() > 1e-3
  with pytest.raises(ValueError, match="first frame alone"):
    pipe.generate(PROMPTS, frames=frames, frame_mask=mask | True)


def test_an_optional_network_is_there_or_not(folder, second, tmp_path):
  without, pipe = pipeline.load(folder), pipeline.load(second)
  networks = {"autoencoder", "denoiser", *toy.NAMES}
  assert without.params.keys() == without.modules.networks.keys() == networks
  assert pipe.params.keys() == networks | {"denoiser_2"}
  assert {e.network for e in without.recipe.experts} == {"denoiser"}
  assert pipe.recipe.experts[1].network == "denoiser_2"
  video = pipe.generate(PROMPTS[:1], seed=1)
  assert np.abs(video - without.generate(PROMPTS[:1], seed=1)).max() > 1e-3
  shutil.copytree(second, tmp_path / "broken")
  shutil.rmtree(tmp_path / "broken" / "transformer_2")
  with pytest.raises(ValueError, match="without transformer_2/config.json"):
    pipeline.load(tmp_path / "broken")


def test_a_run_of_one_of_two_denoisers_samples_with_it_alone(second):
  recipe = run_config.recipe(defaults.tune_folder(toy.SYSTEM, str(second)))
  assert recipe.experts == (types.Expert(guidance=3.0),)


def test_only_what_no_run_asks_for_is_optional():
  places = toy.SYSTEM.places | {
    name: system.Place(name, optional=True) for name in ("denoiser", "vae")
  }
  with pytest.raises(ValueError, match="not be optional for denoiser, which"):
    dataclasses.replace(toy.SYSTEM, places=places)


def test_texts_are_as_long_as_it_says_or_as_t5s():
  cfg, some = toy.SYSTEM.network("denoiser").config(), {"text_encoder": 7}
  own = dict(zip(toy.NAMES, (12, 7), strict=True))
  assert toy.SYSTEM.max_lengths(cfg) == own
  silent = dataclasses.replace(toy.SYSTEM, text_lengths=lambda cfg: some)
  assert silent.max_lengths(cfg) == some | {"text_encoder_2": 512}


def test_a_layout_of_its_own_is_the_same_pipeline(folder, own):
  assert not (own / "model_index.json").exists()
  pipe, same = pipeline.load(own), pipeline.load(folder)
  assert pipe.system is toy.SYSTEM and pipe.sequential
  assert pipe.recipe == same.recipe
  assert pipe.recipe.spacing == {"kind": "flow_euler"}
  one, two = (p.generate(PROMPTS[:1], seed=1) for p in (pipe, same))
  np.testing.assert_array_equal(one, two)
  config = defaults.tune_folder(toy.SYSTEM, str(own))
  assert config.autoencoder == _config(folder, "").autoencoder
  assert text_encoders.names(own) == list(toy.NAMES)
  with pytest.raises(ValueError, match="step is of a workdir"):
    pipeline.load(own, step=1)


def test_padding_is_zeros_and_both_texts_count(folder):
  pipe = pipeline.load(folder)
  text = pipe.encode_text(PROMPTS, guided=False)
  assert text.embeds.shape == (2, 12 + 7, 8) and np.all(text.mask)
  lengths = [
    t.encode(PROMPTS, pipe.max_lengths[name])[1]
    for name, t in pipe.tokenizers.items()
  ]
  said = np.concatenate([lengths[0], np.ones_like(lengths[1])], 1)
  assert not lengths[0].all() and not lengths[1].all()
  assert not np.any(np.asarray(text.embeds)[~said])
  assert np.abs(np.asarray(text.embeds)[said]).min() > 0


def test_a_pooled_embedding_reaches_the_denoiser(folder):
  pipe = pipeline.load(folder)
  text = pipe.encode_text(PROMPTS)
  assert text.pooled.shape == (4, 6)
  other = text.replace(pooled=text.pooled[::-1])
  a, b, c = (
    pipe.generate(PROMPTS, text=text, seed=1) for text in (text, text, other)
  )
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - c).max() > 1e-3


def test_guidance_leads_away_from_the_empty_prompt(folder):
  pipe = pipeline.load(folder)
  assert pipe.recipe.negative_prompt is None
  ours, empty = pipe.encode_text(PROMPTS), pipe.encode_text(PROMPTS, ["", ""])
  jax.tree.map(np.testing.assert_array_equal, ours, empty)


def test_its_cache_holds_what_each_encoder_gave(latents):
  source = reading.open_source(LATENTS, "train", latents)
  assert source.text_widths == dict.fromkeys(toy.NAMES, 8)
  made = [
    [source.metadata[f"{name}_{what}"] for what in ("padding", "max_length")]
    for name in toy.NAMES
  ]
  assert made == [["zeroed", 12], ["seen", 7]]
  record = next(reading.records(source))
  assert record["mean"].shape == (9, 4, 4, 3)
  assert record["embeds_2"][0].shape == (7, 8)
  assert record["pooled_2"][0].shape == (6,) and "pooled" not in record


def _batch(name, data_dir, pipe, tokenizers):
  source = reading.open_source(name, "train", data_dir)
  words = {
    name: reading.Words(tokenizers.get(name), length)
    for name, length in pipe.max_lengths.items()
  }
  batches = reading.batches(
    source, reading.Wanted(words), range(1), seed=3, batch_size=8
  )
  [(batch, _)] = batches
  return batch


def test_its_loss_from_the_cache_is_that_from_pixels(folder, latents):
  """Pooled embeddings too, and those of the empty caption."""
  pipe = pipeline.load(folder)
  weights = {name: pipe.params[name] for name in pipe.modules.networks}
  weights["null"] = {
    name: jax.tree.map(
      lambda x: np.asarray(x[0]),
      text_encoders.load(folder, "float32", name=name).encode(
        [""], pipe.max_lengths[name], rule.padding
      ),
    )
    for name, rule in toy.SYSTEM.text.items()
  }

  def losses(batch, dropout=0.0):
    goal = denoiser.Objective("flow", shift=1.0, caption_dropout=dropout)
    loss = denoiser.make_loss(pipe.modules, goal)
    drawn = loss.draw(batch, jax.random.key(1))
    return np.asarray(loss.terms(weights, weights, batch, drawn)["loss"])

  cached = _batch(LATENTS, latents, pipe, {})
  pixels = _batch(DIGITS, latents, pipe, pipe.tokenizers)
  kept = losses(cached)
  np.testing.assert_allclose(kept, losses(pixels), rtol=2e-3)
  two = cached.captions["text_encoder_2"]
  assert two.pooled.shape == (8, 6) and two.embeds.shape == (8, 7, 8)
  for field in ("pooled", "embeds"):
    rolled = two.replace(**{field: np.roll(getattr(two, field), 1, 0)})
    rolled = dict(cached.captions) | {"text_encoder_2": rolled}
    assert np.abs(losses(cached.replace(captions=rolled)) - kept).max() > 1e-3
  nulls = {
    name: types.Captions(
      **{k: np.stack([x] * 8) for k, x in vars(null).items() if x is not None}
    )
    for name, null in weights["null"].items()
  }
  want = losses(cached.replace(captions=nulls))
  np.testing.assert_allclose(losses(cached, dropout=0.999), want, rtol=1e-5)
  assert np.abs(want - kept).max() > 1e-3


def test_it_trains_from_a_layout_of_its_own(own, latents, tmp_path):
  config = _config(own, latents)
  config.data.name = DIGITS
  train.run(config, tmp_path / "run")
  assert (tmp_path / "run" / "checkpoints" / "2").exists()
