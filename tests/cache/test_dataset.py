"""Training from a cache: latents and captions encoded once, by whom, the same.

Digits, a tiny autoencoder and a tiny T5 of transformers', all random.
"""

import dataclasses
import io
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tensorflow_datasets as tfds

from configs import vdit as configs
from tests.data.forms import wanted, words
from vdit_jax import checkpoint, pipeline, train, types
from vdit_jax.cache import dataset
from vdit_jax.cache import latents as latents_lib
from vdit_jax.data import moving_digits, reading
from vdit_jax.models import networks
from vdit_jax.models.t5 import encoder as t5
from vdit_jax.models.vdit import autoencoder as causal_vae
from vdit_jax.models.vdit import denoiser as vdit
from vdit_jax.training import denoiser
from vdit_jax.weights import component, text_encoder
from vdit_jax.weights import workdir as workdirs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VAE = causal_vae.VARIANTS["digits"]
DIGITS = "moving_digits/tiny"
SPLITS = ["train", "validation"]
M = 40  # tokens of a cached caption; all captions are shorter
PROMPTS = ("a red seven moving left", "a blue two standing still")
DIT = {
  "latent_channels": VAE.latent_channels,
  "width": 32,
  "depth": 2,
  "heads": 2,
  "mlp_width": 64,
  "text_width": 16,
  "dtype": "float32",
}

tfds.disable_progress_bar()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A data folder with a few clips, training's and validation's."""
  folder = tmp_path_factory.mktemp("data")
  moving_digits.MovingDigits(
    config="tiny", data_dir=folder, file_format="array_record"
  ).download_and_prepare()
  return folder


@pytest.fixture(scope="module")
def vae_dir(tmp_path_factory):
  """The workdir of a random autoencoder."""
  folder = tmp_path_factory.mktemp("vae")
  cfg = dataclasses.replace(VAE, channels=(8, 8, 16))
  module = causal_vae.Autoencoder(cfg)
  params = jax.jit(lambda key: networks.init(module, key))(jax.random.key(0))
  _write_autoencoder(folder, cfg, nn.meta.unbox(params))
  return folder


def _write_autoencoder(folder, cfg, params):
  config = configs.get_config("vae")
  config.autoencoder = configs.defaults.module("causal_vae", cfg)
  (folder / "config.json").write_text(config.to_json())
  params = jax.tree.map(np.asarray, params)
  file = folder / workdirs.AUTOENCODER_FILE
  checkpoint.save_release(file, params, {}, np.float32)


@pytest.fixture(scope="module")
def t5_dir(data_dir, tmp_path_factory):
  """A random T5 in the layout of a diffusers pipeline."""
  folder = tmp_path_factory.mktemp("released")
  (folder / "tokenizer").mkdir()
  model = _spiece(data_dir)
  (folder / "tokenizer" / "spiece.model").write_bytes(model)
  _write_t5(folder / "text_encoder", seed=0)
  return folder


def _spiece(data_dir):
  source = reading.open_source(DIGITS, "train", data_dir)
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(r["caption"] for r in reading.records(source)),
    model_writer=model,
    model_type="unigram",
    vocab_size=200,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()


def _write_t5(folder, seed):
  config = transformers.T5Config(
    vocab_size=300,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    feed_forward_proj="gated-gelu",
  )
  torch.manual_seed(seed)
  model = transformers.T5EncoderModel(config)
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5))
  model.save_pretrained(folder)


@pytest.fixture(scope="module")
def latents(data_dir, vae_dir, t5_dir):
  """The cache of the tiny dataset, by both encoders, in several files."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(latents_lib, "_SHARD", 1)
    _cache(data_dir, vae_dir, t5_dir)
  return reading.open_source("latents/tiny", "train", data_dir)


def _cache(data_dir, vae_dir, t5_dir, name="latents/tiny"):
  text = dataset.TextOptions(t5_dir, M, "float32")
  dataset.build(vae_dir, DIGITS, data_dir, name, SPLITS, text)


def _config(data_dir, vae_dir, t5_dir):
  """A config of configs/vdit.py, made tiny."""
  config = configs.get_config("s")
  config.data.update({"name": "latents/tiny", "data_dir": str(data_dir)})
  config.data.max_length = M + 4
  config.batch_size = 8
  config.optim.update({"total_steps": 2, "warmup_steps": 1})
  config.mesh.fsdp = 1
  config.autoencoder_workdir = str(vae_dir)
  config.text_encoder_dir = str(t5_dir)
  config.denoiser.update(DIT)
  config.validation.update({"every": 0, "clips": 16})
  config.samples.update({"every": 0, "prompts": PROMPTS})
  config.sampling.update(
    {"steps": 2, "num_frames": 9, "height": 32, "width": 32}
  )
  return config


@pytest.fixture(scope="module")
def dit_dir(latents, data_dir, vae_dir, t5_dir, tmp_path_factory):
  """The workdir of two training steps from the cache."""
  workdir = tmp_path_factory.mktemp("dit")
  train.run(_config(data_dir, vae_dir, t5_dir), workdir)
  return workdir


def test_records_are_the_source_s_in_order(latents, data_dir):
  source = reading.open_source(DIGITS, "train", data_dir)
  assert len(list((data_dir / "latents").rglob("*-train.array*"))) == 2
  for a, b in zip(
    reading.records(latents), reading.records(source), strict=True
  ):
    assert (a["key"], a["caption"]) == (b["key"], b["caption"])


def _files(folder):
  return {p.name: p.stat().st_mtime_ns for p in folder.glob("[!.]*record*")}


@pytest.fixture
def small(monkeypatch):
  """Files of as few records as there can be; gives those encoded since."""
  encoded, inner = [], latents_lib._examples

  def examples(task, *args):
    encoded.append(task.path.name)
    yield from inner(task, *args)

  monkeypatch.setattr(latents_lib, "_SHARD", 1)
  monkeypatch.setattr(latents_lib, "_BATCH", 8)
  monkeypatch.setattr(latents_lib, "_examples", examples)
  return encoded


def test_broken_off_cache_goes_on(
  small, data_dir, vae_dir, t5_dir, tmp_path, monkeypatch
):
  (tmp_path / "moving_digits").symlink_to(data_dir / "moving_digits")
  work, left = tmp_path / "latents" / "1.0.0.unfinished", [20]
  inner = latents_lib.half

  def half(*args):
    left[0] -= 1
    if not left[0]:
      raise KeyboardInterrupt
    return inner(*args)

  monkeypatch.setattr(latents_lib, "half", half)
  with pytest.raises(KeyboardInterrupt):
    dataset.build(vae_dir, DIGITS, tmp_path, "latents", SPLITS)
  done = _files(work)
  assert list(done) == ["train-000-000000000-000000008.array_record"]
  assert len(small) == 2
  with pytest.raises(ValueError, match="made by text_encoder none, not by"):
    _cache(tmp_path, vae_dir, t5_dir, "latents")
  with pytest.raises(ValueError, match="not prepared"):
    reading.open_source("latents", "train", tmp_path)
  small.clear()
  dataset.build(vae_dir, DIGITS, tmp_path, "latents", SPLITS)
  assert len(small) == 7 and not work.exists()  # of 48 and 16 clips, by 8
  work.mkdir()  # killed while it was removed
  dataset.build(vae_dir, DIGITS, tmp_path, "latents", SPLITS)
  assert len(small) == 7 and not work.exists()
  files = _files(tmp_path / "latents" / "1.0.0")
  assert len(files) == 8
  assert files["latents-train.array_record-00000-of-00006"] in done.values()
  source = reading.open_source("latents", "train", tmp_path)
  keys = [record["key"] for record in reading.records(source)]
  assert keys == [f"train-{i:06d}" for i in range(48)]


def test_processes_share_a_cache(
  small, latents, data_dir, vae_dir, t5_dir, tmp_path, monkeypatch
):
  """In turn: each writes its own files, and process 0 what is left to do."""
  (tmp_path / "moving_digits").symlink_to(data_dir / "moving_digits")
  waited, shares = [], {}
  monkeypatch.setattr(dataset.jax, "process_count", lambda: 2)
  for process in (1, 0):
    monkeypatch.setattr(dataset.jax, "process_index", lambda p=process: p)
    monkeypatch.setattr(dataset, "_wait", lambda p=process: waited.append(p))
    _cache(tmp_path, vae_dir, t5_dir)
    shares[process], small[:] = set(small), []
  assert waited == [1, 1, 0, 0]
  assert not shares[0] & shares[1] and len(shares[0]) == len(shares[1]) == 4
  other = reading.open_source("latents/tiny", "train", tmp_path)
  for a, b in zip(
    reading.records(latents), reading.records(other), strict=True
  ):
    assert (a["key"], a["caption"]) == (b["key"], b["caption"])
    for name in ("mean", "logvar", "embeds"):
      # Batches of another size are summed in another order.
      np.testing.assert_allclose(
        np.float32(a[name]), np.float32(b[name]), atol=4e-3
      )


def test_cached_embeddings_are_those_of_transformers(latents, t5_dir):
  model = transformers.T5EncoderModel.from_pretrained(t5_dir / "text_encoder")
  tokenizer = transformers.T5Tokenizer.from_pretrained(t5_dir / "tokenizer")
  lengths = set()
  for record in list(reading.records(latents))[::8]:
    tokens = tokenizer([record["caption"]], return_tensors="pt")
    with torch.no_grad():
      want = model(**tokens).last_hidden_state[0].numpy()
    assert record["embeds"][0].dtype == np.float16
    np.testing.assert_allclose(record["embeds"][0], want, atol=3e-3)
    lengths.add(len(want))
  assert len(lengths) > 1 and max(lengths) < M


def test_loss_from_the_cache_is_that_from_pixels(
  latents, data_dir, vae_dir, t5_dir, dit_dir
):
  """The same keys: posterior, noise, time and dropped captions."""
  frozen = text_encoder.load(t5_dir, "float32")
  config = checkpoint.read_config(vae_dir).autoencoder
  modules = networks.gather(
    {
      "autoencoder": networks.build_module(config, "autoencoder"),
      "text_encoder": frozen.module,
      "denoiser": vdit.Denoiser(vdit.Config(**DIT)),
    }
  )
  weights = {
    "autoencoder": _autoencoder(vae_dir),
    "text_encoder": frozen.params,
  }
  boxed = jax.eval_shape(
    lambda: networks.init_denoiser(modules, jax.random.key(0))["denoiser"]
  )
  weights["denoiser"] = _random(nn.meta.unbox(boxed))
  goal = denoiser.Objective(caption_dropout=0.3)
  options = {"seed": 3, "batch_size": 8}
  source = reading.open_source(DIGITS, "train", data_dir)
  cached = reading.batches(latents, wanted(None, M + 4), range(2), **options)
  pixels = reading.batches(
    source, wanted(frozen.tokenizer, M + 4), range(2), **options
  )
  loss = denoiser.make_loss(modules, goal)

  @jax.jit
  def losses(batch, key):
    drawn = loss.draw(batch, key)
    return loss.terms(weights, weights, batch, drawn)["loss"], drawn["keep"]

  for (a, names), (b, same) in zip(cached, pixels, strict=True):
    assert names == same
    assert words(a).tokens is None and words(b).embeds is None
    np.testing.assert_array_equal(words(a).mask, words(b).mask)
    got, keep = losses(a, jax.random.key(1))
    assert 0 < keep.sum() < len(keep)
    want, _ = losses(b, jax.random.key(1))
    assert np.mean(want) > 0.5
    np.testing.assert_allclose(np.mean(got), np.mean(want), rtol=1e-5)
    np.testing.assert_allclose(got, want, rtol=2e-4)  # float16 of each clip
    rolled = words(a).replace(embeds=np.roll(words(a).embeds, 1, axis=0))
    shifted = a.replace(captions={"text_encoder": rolled})
    assert np.abs(losses(shifted, jax.random.key(1))[0] - want).max() > 1e-2


def _autoencoder(vae_dir):
  return checkpoint.load_release(vae_dir / workdirs.AUTOENCODER_FILE)[0]


def _random(shapes):
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  scales = [max(math.prod(x.shape[-2:-1]), 1) ** -0.5 for x in leaves]
  return tree.unflatten(
    jnp.asarray(rng.normal(size=x.shape) * scale, jnp.float32)
    for x, scale in zip(leaves, scales, strict=True)
  )


def test_run_from_the_cache_trains_validates_and_samples(dit_dir, t5_dir):
  params = checkpoint.restore_params(dit_dir, "params")
  assert set(params) == {"denoiser"}
  config = checkpoint.read_config(dit_dir)
  assert (config.text_encoder.width, config.text_encoder.depth) == (16, 2)
  assert config.text_encoder_fingerprint == text_encoder.fingerprint(t5_dir)
  assert "validation_loss" in (dit_dir / "metrics.jsonl").read_text()
  assert list((dit_dir / "samples").glob("*.png"))
  assert not (dit_dir / workdirs.TOKENIZER_FILE).exists()


def test_pipeline_encodes_prompts_as_the_run_did(dit_dir, t5_dir):
  pipe = pipeline.load(dit_dir)
  pipe.params["denoiser"] = _random(pipe.params["denoiser"])
  prompts = list(PROMPTS)
  video = pipe.generate(prompts, steps=2)
  assert video.shape == (2, 9, 32, 32, 3) and np.isfinite(video).all()
  frozen = text_encoder.load(t5_dir, "float32")
  text = frozen.encode(prompts, pipe.max_lengths["text_encoder"])
  bare = dataclasses.replace(pipe, tokenizers={})
  for guidance in (1.0, 6.0):
    settings = {"steps": 2, "guidance": guidance}
    a = pipe.generate(prompts, **settings)
    b = bare.generate(prompts, text=text, **settings)
    np.testing.assert_allclose(a, b, atol=1e-4)
  swapped = types.Text(embeds=text.embeds[::-1], mask=text.mask[::-1])
  c = bare.generate(prompts, text=swapped, **settings)
  assert np.abs(c - b).max() > 1e-2
  with pytest.raises(ValueError, match="of the 1 prompts, 1 rows, got 2"):
    bare.generate(prompts[:1], text=text)
  with pytest.raises(ValueError, match="negative_prompts need text=None"):
    bare.generate(prompts, text=text, negative_prompts=prompts)


def test_pipeline_without_its_text_encoder_is_refused(
  dit_dir, t5_dir, data_dir, tmp_path
):
  moved = t5_dir.with_name("moved")
  t5_dir.rename(moved)
  try:
    with pytest.raises(ValueError, match=f"{t5_dir} is not there; put"):
      pipeline.load(dit_dir)
  finally:
    moved.rename(t5_dir)
  _copy(dit_dir, tmp_path, text_encoder_dir=_other_t5(tmp_path, data_dir))
  with pytest.raises(ValueError, match="text_encoder_dir must be of text enc"):
    pipeline.load(tmp_path)


def _copy(workdir, target, **changes):
  """Copy what a release has of a workdir, with another config."""
  config = checkpoint.read_config(workdir)
  config.update({name: str(value) for name, value in changes.items()})
  (target / "config.json").write_text(config.to_json())
  name = workdirs.AUTOENCODER_FILE
  (target / name).write_bytes((workdir / name).read_bytes())
  params = checkpoint.restore_params(workdir, "ema")
  checkpoint.save_release(target / workdirs.RELEASE_FILE, params, {})


def _other_t5(tmp_path, data_dir):
  """A T5 that has its tokenizer beside it, and other weights."""
  folder = tmp_path / "other_t5"
  _write_t5(folder, seed=1)
  (folder / "spiece.model").write_bytes(_spiece(data_dir))
  return folder


@pytest.mark.slow
def test_fine_tuning_needs_the_same_text_encoder(
  dit_dir, data_dir, vae_dir, t5_dir, tmp_path
):
  config = _config(data_dir, vae_dir, t5_dir)
  config.init_from = str(tmp_path)
  _copy(dit_dir, tmp_path, text_encoder_dir=t5_dir)
  train.run(config, tmp_path / "work")
  _copy(dit_dir, tmp_path, text_encoder_dir="")
  with pytest.raises(ValueError, match="with text encoder its own, this run"):
    train.run(config, tmp_path / "another")


@pytest.mark.parametrize(
  ("old", "padding"),
  [
    ({}, "masked"),
    ({"sees_padding": True}, "seen"),
    ({"sees_padding": False, "padding": "zeroed"}, "zeroed"),
  ],
)
def test_metadata_of_before_are_read(old, padding):
  """Padding and tokens were said once, for all text encoders."""
  old |= {"max_length": 40, "text_encoder_dtype": "float32", "data": "mine"}
  made = text_encoder.made(old)
  assert made == {
    "text_encoder_dtype": "float32",
    "data": "mine",
    "text_encoder_padding": padding,
    "text_encoder_max_length": 40,
  }
  assert text_encoder.made(made) == made


def test_another_text_encoder_is_refused(
  latents, data_dir, vae_dir, t5_dir, tmp_path
):
  other = _other_t5(tmp_path, data_dir)
  names = text_encoder.fingerprint(t5_dir), text_encoder.fingerprint(other)
  message = (
    f"holds embeddings of text encoder {names[0]}, but .* is {names[1]}; make "
    f"them with python -m vdit_jax.cache --autoencoder={vae_dir} "
    f"--text_encoder={other} --padding=masked --max_length={M + 4} "
    f"--data={DIGITS} "
  )
  with pytest.raises(ValueError, match=message):
    train.run(_config(data_dir, vae_dir, other), tmp_path / "work")
  with pytest.raises(ValueError, match=f"made by text_encoder {names[0]}, not"):
    _cache(data_dir, vae_dir, other)


@pytest.mark.parametrize("what", ["autoencoder", "normalisation"])
def test_another_autoencoder_is_refused_by_name(
  what, latents, data_dir, vae_dir, t5_dir, tmp_path
):
  params = _autoencoder(vae_dir)
  if what == "normalisation":
    params["latent_std"] = params["latent_std"] * 2
  else:
    params["encoder"] = jax.tree.map(lambda x: x * 1.01, params["encoder"])
  cfg = dataclasses.replace(VAE, channels=(8, 8, 16))
  _write_autoencoder(tmp_path, cfg, params)
  with pytest.raises(ValueError, match=f"holds latents of {what} "):
    train.run(_config(data_dir, tmp_path, t5_dir), tmp_path / "work")
  with pytest.raises(ValueError, match=f"was made by {what} "):
    _cache(data_dir, tmp_path, t5_dir)


def test_latents_without_embeddings_are_refused(data_dir, vae_dir, t5_dir):
  dataset.build(vae_dir, DIGITS, data_dir, "latents/mute", ["train"])
  config = _config(data_dir, vae_dir, t5_dir)
  config.data.name = "latents/mute"
  with pytest.raises(ValueError, match="holds no embeddings.*vdit_jax.cache"):
    train.run(config, data_dir / "work")


def test_width_of_the_embeddings_is_the_denoiser_s(
  latents, data_dir, vae_dir, t5_dir, tmp_path
):
  config = _config(data_dir, vae_dir, t5_dir)
  config.denoiser.text_width = 64
  with pytest.raises(ValueError, match="set denoiser.text_width=16"):
    train.run(config, tmp_path / "work")


def test_fingerprint_is_of_the_content(t5_dir, data_dir, tmp_path):
  """Whatever the layout; a number of the weights, or a piece, changes it."""
  name = text_encoder.fingerprint(t5_dir)
  assert text_encoder.fingerprint(t5_dir / "text_encoder") == name
  for file in (t5_dir / "text_encoder").iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  pieces = t5_dir / "tokenizer" / "spiece.model"
  (tmp_path / pieces.name).write_bytes(pieces.read_bytes())
  assert text_encoder.fingerprint(tmp_path) == name
  for changed in ("spiece.model", "model.safetensors", "config.json"):
    whole = (tmp_path / changed).read_bytes()
    last = b" }" if changed == "config.json" else b"12"
    (tmp_path / changed).write_bytes(whole[:-2] + last)
    assert text_encoder.fingerprint(tmp_path) != name, changed
    (tmp_path / changed).write_bytes(whole)


def test_orbax_copy_of_a_text_encoder_encodes_the_same(t5_dir, tmp_path):
  loaded = component.load(t5_dir / "text_encoder")
  component.save_orbax(loaded, tmp_path / "text_encoder")
  (tmp_path / "tokenizer").symlink_to(t5_dir / "tokenizer")
  assert text_encoder.fingerprint(tmp_path) != text_encoder.fingerprint(t5_dir)
  ours, theirs = (
    text_encoder.load(path, "float32").encode(list(PROMPTS), M)
    for path in (tmp_path, t5_dir)
  )
  np.testing.assert_array_equal(ours.embeds, theirs.embeds)


def test_max_length_does_not_change_an_embedding(t5_dir):
  frozen = text_encoder.load(t5_dir, "float32")
  short, long = (frozen.encode(list(PROMPTS), m) for m in (M, 2 * M))
  np.testing.assert_array_equal(long.mask[:, :M], short.mask)
  np.testing.assert_allclose(
    long.embeds[:, :M][short.mask], short.embeds[short.mask], atol=1e-5
  )


def test_what_is_no_text_encoder_is_refused(t5_dir, tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    text_encoder.load(tmp_path / "none", "float32")
  (tmp_path / "config.json").write_text('{"_class_name": "WanVAE"}')
  with pytest.raises(
    ValueError, match="'WanVAE', which is no known text encoder"
  ):
    text_encoder.load(tmp_path, "float32")
  config = (t5_dir / "text_encoder" / "config.json").read_text()
  (tmp_path / "config.json").write_text(config)
  with pytest.raises(
    ValueError, match="has no spiece.model or tokenizer.json, nor"
  ):
    text_encoder.fingerprint(tmp_path)


def test_shape_of_the_text_encoder_needs_its_config_alone(t5_dir, tmp_path):
  text = (t5_dir / "text_encoder" / "config.json").read_text()
  (tmp_path / "config.json").write_text(text)
  _, cfg = text_encoder.describe(tmp_path, "bfloat16")
  assert isinstance(cfg, t5.Config)
  assert (cfg.vocab_size, cfg.width, cfg.dtype) == (300, 16, "bfloat16")


@pytest.mark.parametrize("value", [7e4, -np.inf, np.nan])
def test_numbers_beyond_float16_are_refused(value):
  values = np.array([1.0, value], np.float32)
  with pytest.raises(ValueError, match="embeds of record clip-7 has"):
    latents_lib.half("embeds", "clip-7", values)
  assert latents_lib.half("mean", "clip-7", values[:1]).dtype == np.float16
