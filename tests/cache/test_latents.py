"""Latents of clips: of one shape and of several, as training from pixels.

Few files of a few frames, a tiny random autoencoder, embeddings made up.
"""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.data import videos
from tests.data.forms import wanted, words
from vdit_jax import encoding, types
from vdit_jax.cache import dataset, latents
from vdit_jax.data import plan, reading
from vdit_jax.data.build import dataset as clips_dataset
from vdit_jax.data.build import jobs
from vdit_jax.models import networks
from vdit_jax.models.t5 import encoder as t5
from vdit_jax.models.vdit import autoencoder as causal_vae
from vdit_jax.models.vdit import denoiser as vdit
from vdit_jax.training import denoiser

CFG = dataclasses.replace(causal_vae.VARIANTS["digits"], channels=(8, 8, 16))
E, M = 8, 9  # of the made-up embeddings
ONE = ((5, 16, 16),)
SEVERAL = ((5, 16, 32), (5, 32, 16), (1, 16, 16))
CENTRE = reading.Options(crop="centre")
SIZES = [(32, 64), (64, 32), (34, 66), (64, 32), (32, 64), (66, 36)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A dataset of clips of many sizes, each of five frames, and two images."""
  folder = tmp_path_factory.mktemp("clips")
  lines = []
  for i, (height, width) in enumerate(SIZES):
    size = {"height": height, "width": width, "num_frames": 5, "seed": i}
    videos.write(folder / f"{i}.mp4", **size)
    captions = [f"clip {i}", f"seen again {i}"][: 1 + i % 2]
    lines.append({"file": f"{i}.mp4", "caption": captions, "motion": i})
  for name in ("a.png", "b.png"):
    Image.fromarray(videos.picture(7, 20, 20)).save(folder / name)
    lines.append({"file": name, "caption": f"image {name}"})
  (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
  spec = jobs.Spec(str(folder / "all.jsonl"), "", validation=0.0)
  clips_dataset.build(spec, folder, "mine/clips", workers=0)
  return folder


@pytest.fixture(scope="module")
def autoencoder():
  module = causal_vae.Autoencoder(CFG)
  init = jax.jit(lambda key: networks.init(module, key))
  return module, nn.meta.unbox(init(jax.random.key(0)))


@pytest.fixture(scope="module")
def encoders(autoencoder):
  """The autoencoder, and embeddings that tell a caption's letters."""
  module, params = autoencoder

  @jax.jit
  def encode(video):
    video = encoding.to_float(video)
    return module.apply({"params": params}, video, method="moments")

  def text(captions):
    assert len(captions) % 8 == 0  # batches that are always alike
    mask = np.arange(M) < [[min(len(c), M)] for c in captions]
    letters = np.array([[ord(x) for x in c.ljust(M)[:M]] for c in captions])
    embeds = letters[..., None] * np.arange(1, E + 1) / 1024
    return types.Text(embeds=embeds.astype(np.float32), mask=mask)

  words = latents.Words(text, E, M)
  return latents.Encoders(
    encode, {"text_encoder": words}, {"autoencoder": "tiny"}
  )


@pytest.fixture
def cached(data_dir, encoders, monkeypatch):
  """Makes the latents of the clips in some shapes."""
  monkeypatch.setattr(dataset, "make_encoders", lambda *args: encoders)
  monkeypatch.setattr(latents, "_BATCH", 8)

  def make(shapes, name, **options):
    view = latents.View(shapes, options=CENTRE, **options)
    args = "mine/clips", data_dir, name, ["train"]
    dataset.build(data_dir, *args, view=view)
    return reading.open_source(name, "train", data_dir)

  return make


@pytest.fixture(scope="module")
def source(data_dir):
  return reading.open_source("mine/clips", "train", data_dir)


def batches(source, shape, positions, seed=3):
  """Read one batch as training does."""
  [(batch, keys)] = reading.batches(
    source,
    wanted(None, M, CENTRE),
    range(1),
    seed=seed,
    planned=lambda step: (shape, np.asarray(positions)),
  )
  return batch, keys


def test_one_shape_holds_what_the_clips_do(cached, source, encoders):
  found = cached(ONE, "one_shape")
  assert found.form.uniform and found.shape == (2, 4, 4, CFG.latent_channels)
  assert found.metadata["left_out"] == {
    "train": {"of no shape": 2, "unreadable": 0}
  }
  of_clips = [i for i, n in enumerate(source.index.num_frames) if n > 1]
  assert found.index.keys.tolist() == source.index.keys[of_clips].tolist()
  assert found.index.num_frames.tolist() == [2] * 6
  stored = list(reading.records(found))
  for position, record in zip(of_clips, stored, strict=True):
    clip, error = reading.read_clip(source, position, ONE[0], None, CENTRE)
    assert not error and record["captions"] == list(clip.captions)
    video = np.zeros((8, *ONE[0], 3), np.uint8)
    video[0] = clip.arrays["video"]
    moments = encoders.video(video)
    for name, want in zip(("mean", "logvar"), moments, strict=True):
      np.testing.assert_allclose(record[name], want[0], rtol=1e-3, atol=1e-3)
    text = encoders.text["text_encoder"].encode(
      [*clip.captions] + [""] * (8 - len(clip.captions))
    )
    for row, embeds in enumerate(record["embeds"]):
      want = text.embeds[row, text.mask[row]].astype(np.float16)
      np.testing.assert_array_equal(embeds, want)
  clip, _ = reading.read_clip(found, 0, found.shape[:3], None, CENTRE)
  motion = float(clip.key[0])
  want = {"fps": 10, "height": 16, "width": 16, "motion": motion}
  assert clip.numbers == want


def test_embeddings_are_of_the_caption_that_is_drawn(cached, source, encoders):
  found, drawn = cached(ONE, "one_shape"), set()
  row = found.index.keys.tolist().index("1.mp4")  # has two captions
  for seed in range(8):
    batch, _ = batches(found, found.shape[:3], [row], seed)
    at = source.index.keys.tolist().index("1.mp4")
    rng = np.random.default_rng(plan.record_seed(seed, 0, 0))
    clip, _ = reading.read_clip(source, at, ONE[0], rng, CENTRE)
    want = encoders.text["text_encoder"].encode([clip.text] + [""] * 7)
    np.testing.assert_array_equal(words(batch).mask[0], want.mask[0])
    np.testing.assert_array_equal(
      words(batch).embeds[0],
      want.embeds[0].astype(np.float16) * want.mask[0][:, None],
    )
    drawn.add(clip.text)
  assert len(drawn) == 2


def test_loss_from_the_cache_is_that_from_pixels(cached, source, autoencoder):
  found = cached(ONE, "one_shape")
  module, params = autoencoder
  cfg = vdit.Config(
    latent_channels=CFG.latent_channels,
    width=32,
    depth=1,
    heads=2,
    mlp_width=64,
    text_width=E,
    dtype="float32",
  )
  text_encoder = dataclasses.replace(t5.VARIANTS["digits"], width=E)
  modules = networks.gather(
    {
      "autoencoder": module,
      "text_encoder": t5.TextEncoder(text_encoder),
      "denoiser": vdit.Denoiser(cfg),
    }
  )
  boxed = jax.eval_shape(
    lambda: networks.init_denoiser(modules, jax.random.key(0))["denoiser"]
  )
  leaves, tree = jax.tree.flatten(nn.meta.unbox(boxed))
  rng = np.random.default_rng(0)
  weights = tree.unflatten(
    jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype) for x in leaves
  )
  weights = {"autoencoder": params, "denoiser": weights}
  loss = denoiser.make_loss(modules, denoiser.Objective(caption_dropout=0.3))

  @jax.jit
  def losses(batch, key):
    return loss.terms(weights, weights, batch, loss.draw(batch, key))["loss"]

  rows = [4, 0, 2, 5]
  cached_batch, keys = batches(found, found.shape[:3], rows)
  where = {key: i for i, key in enumerate(source.index.keys.tolist())}
  pixels, same = batches(source, ONE[0], [where[key] for key in keys])
  assert keys == same and pixels.moments is None
  pixels = pixels.replace(captions=cached_batch.captions)
  got, want = (
    losses(batch, jax.random.key(1)) for batch in (cached_batch, pixels)
  )
  assert np.mean(want) > 0.5
  np.testing.assert_allclose(np.mean(got), np.mean(want), rtol=1e-5)
  np.testing.assert_allclose(got, want, rtol=2e-4)  # float16 of each clip


def test_several_shapes_are_read_each_in_its_own(cached, source, encoders):
  found = cached(SEVERAL, "several_shapes")
  assert not found.form.uniform and found.shape is None
  c = CFG.latent_channels
  index = found.index
  sizes = np.stack([index.num_frames, index.height, index.width], 1).tolist()
  assert sizes == [[2, 4, 8]] * 3 + [[2, 8, 4]] * 3 + [[1, 4, 4]] * 2
  keys = index.keys.tolist()
  assert sorted(keys) == sorted(source.index.keys.tolist())
  where = {key: i for i, key in enumerate(source.index.keys.tolist())}
  for shape, rows in zip(SEVERAL, ([2, 0], [3, 5], [7, 6]), strict=True):
    latent = tuple(sizes[rows[0]])
    batch, got = batches(found, latent, rows)
    assert got == [keys[row] for row in rows]
    mean, logvar = batch.moments
    assert mean.shape == (2, *latent, c) and batch.weight.tolist() == [1, 1]
    pixels, same = batches(source, shape, [where[key] for key in got])
    assert same == got
    video = np.zeros((8, *shape, 3), np.uint8)
    video[:2] = pixels.video
    moments = encoders.video(video)
    for moment, want in zip((mean, logvar), moments, strict=True):
      np.testing.assert_allclose(moment, want[:2], rtol=1e-3, atol=1e-3)
  read = reading.evaluation_batches(found, wanted(None, M), 2, (2, 8, 4))
  assert [k for _, ks in read for k in ks] == [*keys[3:6], ""]
  with pytest.raises(ValueError, match="is that of no record"):
    list(reading.evaluation_batches(found, wanted(None, M), 2, (2, 4, 4)))
  with pytest.raises(ValueError, match="shape must be given"):
    list(reading.evaluation_batches(found, wanted(None, M), 2))


def test_what_can_not_be_shown_is_refused(cached, data_dir):
  with pytest.raises(ValueError, match="shapes must be given, as clips"):
    cached((), "none")
  with pytest.raises(ValueError, match="are none of the 8 records"):
    cached(((9, 16, 16),), "long")
  with pytest.raises(ValueError, match="made by shapes .*5, 16, 16.*, not by"):
    cached(ONE, "one_shape")
    cached(((1, 16, 16),), "one_shape")
  with pytest.raises(ValueError, match="got '17x32'; try 17x256x256"):
    dataset.parse_shape("17x32")
