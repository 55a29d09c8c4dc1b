"""Training that gives frames: from pixels, from stills in a cache, buckets."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import digits as configs
from vdit_jax import checkpoint, pipeline, train
from vdit_jax.cache import dataset, latents
from vdit_jax.data import moving_digits, reading
from vdit_jax.models import networks
from vdit_jax.nn import stills
from vdit_jax.text import tokenizer
from vdit_jax.training import learner, resolve
from vdit_jax.weights import run_config
from vdit_jax.weights import workdir as workdirs

WORLDS = "moving_digits/tiny_worlds"
SHAPES = ((5, 32, 32), (9, 32, 32), (9, 32, 48))

tfds.disable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Clips, a random autoencoder, a cache of theirs."""
  folder = tmp_path_factory.mktemp("given")
  moving_digits.MovingDigits(
    config="tiny_worlds", data_dir=folder / "data", file_format="array_record"
  ).download_and_prepare()
  vae = folder / "vae"
  vae.mkdir()
  config = configs.get_config("worlds_vae")
  config.autoencoder.channels = (8, 8, 16)
  module = networks.build_module(config.autoencoder, "autoencoder")
  params = nn.meta.unbox(networks.init(module, jax.random.key(0)))
  (vae / "config.json").write_text(config.to_json())
  params = jax.tree.map(np.asarray, params)
  file = vae / workdirs.AUTOENCODER_FILE
  checkpoint.save_release(file, params, {}, np.float32)
  view = latents.View(SHAPES, options=reading.Options(crop="centre"))
  dataset.build(
    vae,
    WORLDS,
    folder / "data",
    "latents/worlds",
    ["train", "validation"],
    view=view,
    alone=True,
  )
  return folder


def _config(folder, name, workdir):
  """The config of worlds, made tiny."""
  config = configs.get_config("worlds")
  config.data.name, config.data.data_dir = name, str(folder / "data")
  config.data.buckets.update({"shapes": SHAPES, "max_tokens": 1_152})
  config.data.buckets.small = "drop"
  config.autoencoder_workdir = str(folder / "vae")
  config.denoiser.update({"width": 32, "depth": 1, "heads": 2, "unroll": 1})
  config.denoiser.update({"mlp_width": 64, "text_width": 16})
  config.text_encoder.update({"width": 16, "depth": 1, "mlp_width": 16})
  config.samples.every, config.validation.every = 0, 0
  config.validation.clips = 8
  config.optim.total_steps, config.optim.warmup_steps = 3, 1
  source = reading.open_source(WORLDS, "train", folder / "data")
  texts = sorted({t for r in reading.records(source) for t in r["captions"]})
  workdir.mkdir(exist_ok=True)
  tokenizer.train(texts, workdir / workdirs.TOKENIZER_FILE)
  return config


def test_a_cache_holds_each_frame_alone(folder):
  source = reading.open_source("latents/worlds", "train", folder / "data")
  assert source.metadata["stills"] == 4
  config = run_config.read(folder / "vae")
  module = networks.build_module(config.autoencoder, "autoencoder")
  params = checkpoint.load_release(folder / "vae" / workdirs.AUTOENCODER_FILE)
  apply = functools.partial(module.apply, {"params": params[0]})
  clips = reading.open_source(WORLDS, "train", folder / "data")
  rows = {key: i for i, key in enumerate(clips.index.keys.tolist())}
  seen = set()
  for record in reading.records(source):
    f, h, w, _ = record["mean"].shape
    found = record["given_autoencoder"]
    assert found.shape[:3] == (4 * f - 3, h, w)
    if found.shape in seen:
      continue
    seen.add(found.shape)
    shape = 4 * f - 3, 4 * h, 4 * w
    clip, _ = reading.read_clip(
      clips, rows[record["key"]], shape, None, reading.Options(crop="centre")
    )
    video = clip.arrays["video"][None].astype(np.float32) / 127.5 - 1
    wanted = stills.encode(apply, jnp.asarray(video))[0]
    np.testing.assert_allclose(found, wanted, atol=5e-3)
  assert len(seen) == 3


@pytest.mark.slow
def test_its_loss_is_that_from_pixels(folder, tmp_path):
  """With the same keys the same frames are given, and cost nothing."""
  losses = {}
  index = reading.open_source(WORLDS, "train", folder / "data").index
  sizes = np.stack([index.num_frames, index.height, index.width], 1)
  chosen = index.keys[(sizes == (9, 32, 32)).all(1)][:8].tolist()
  for name in ("latents/worlds", WORLDS):
    config = _config(folder, name, tmp_path)
    source = reading.open_source(name, "train", folder / "data")
    config = resolve.complete(config, source, tmp_path)
    made = learner.make(config)
    words = {
      "text_encoder": reading.Words(
        tokenizer.load(tmp_path / workdirs.TOKENIZER_FILE), 24
      )
    }
    latent = name != WORLDS
    shape = (3, 8, 8) if latent else (9, 32, 32)
    wanted = learner.wanted(config, words)
    wanted = dataclasses.replace(
      wanted, options=dataclasses.replace(wanted.options, crop="centre")
    )
    [(batch, keys)] = reading.batches(
      source,
      wanted,
      range(1),
      seed=0,
      planned=lambda step, s=source, shape=shape: (shape, _rows(s, chosen)),
    )
    weights = nn.meta.unbox(made.init(jax.random.key(0)))
    weights = jax.tree.map(lambda x: x + 0.05, weights)
    vae = folder / "vae" / workdirs.AUTOENCODER_FILE
    weights["autoencoder"] = checkpoint.load_release(vae)[0]

    @jax.jit
    def terms(batch, key, loss=made.loss, weights=weights):
      drawn = loss.draw(batch, key)
      drawn["posterior"] = None
      return loss.terms(weights, weights, batch, drawn)["loss"]

    losses[name] = keys, terms(batch, jax.random.key(1))
  (keys, found), (same, wanted) = losses.values()
  assert keys == same
  np.testing.assert_allclose(found, wanted, rtol=2e-3)
  assert np.std(wanted) > 0


def _rows(source, keys):
  """Places of records by their keys."""
  places = {key: i for i, key in enumerate(source.index.keys.tolist())}
  return np.array([places[key] for key in keys])


def test_a_run_on_buckets_leaves_a_model_that_takes_frames(folder, tmp_path):
  config = _config(folder, "latents/worlds", tmp_path)
  train.run(config, tmp_path)
  pipe = pipeline.load(tmp_path)
  video = np.random.default_rng(0).uniform(-1, 1, (1, 9, 32, 32, 3))
  mask = np.zeros((1, 9), bool)
  mask[:, [2, 8]] = True
  made = pipe.generate(
    ["a red seven moving left"],
    frames=video.astype(np.float32),
    frame_mask=mask,
    steps=2,
    numbers={"camera_x": 0.5},
  )
  np.testing.assert_allclose(made[mask], video[mask], atol=1e-6)


def test_a_cache_without_stills_is_refused(folder, tmp_path):
  view = latents.View(SHAPES, options=reading.Options(crop="centre"))
  args = folder / "vae", WORLDS, folder / "data", "latents/bare", ["train"]
  dataset.build(*args, view=view)
  config = _config(folder, "latents/bare", tmp_path)
  source = reading.open_source("latents/bare", "train", folder / "data")
  with pytest.raises(ValueError, match="vdit_jax.cache --stills"):
    resolve.complete(config, source, tmp_path)


def test_a_stride_that_is_not_the_autoencoder_s_is_refused(folder, tmp_path):
  config = _config(folder, WORLDS, tmp_path)
  config.denoiser.given = 2
  source = reading.open_source(WORLDS, "train", folder / "data")
  config = resolve.complete(config, source, tmp_path)
  with pytest.raises(ValueError, match="denoiser.given must be 0 or .* 4"):
    learner.make(config)
