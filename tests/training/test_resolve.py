"""Laws of completing a run's config: once, early, and of a copy."""

import pathlib
import shutil
import types as python

import jax.numpy as jnp
import pytest

import vdit_jax
from configs import cogvideox, digits
from vdit_jax import checkpoint
from vdit_jax.data import records
from vdit_jax.training import resolve
from vdit_jax.weights import autoencoder as autoencoders
from vdit_jax.weights import base_model, run_config, tiny
from vdit_jax.weights import text_encoder as text_encoders

PACKAGED = pathlib.Path(vdit_jax.__file__).parent / "packaged"
BUCKETS = {"max_tokens": 640, "frames": (1, 9), "areas": (1024,)}


def source(kind="video", captions="caption", widths=(), **metadata):
  """A dataset of clips, or of latents that say of themselves how."""
  form = records.Form(
    kind=kind,
    arrays=("mean", "logvar") if kind == "latents" else ("video",),
    shape=(3, 8, 8, 8) if kind == "latents" else (9, 32, 32, 3),
    captions=captions,
    label="",
    numbers=("fps",),
    text_widths=dict(widths),
    pooled_widths={},
  )
  return python.SimpleNamespace(
    name="mine",
    form=form,
    kind=kind,
    metadata={"data": "mine"} | metadata,
    text_widths=form.text_widths,
  )


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  folder = tmp_path_factory.mktemp("released")
  for name in ("2b", "5b_i2v"):
    tiny.write(folder / name, name)
  return folder


@pytest.fixture
def workdir(tmp_path):
  shutil.copy(PACKAGED / "tokenizer.model", tmp_path)
  return tmp_path


def denoiser():
  config = digits.get_config("dit")
  config.autoencoder_workdir = str(PACKAGED)
  return config


def tuned(folder, **data):
  config = cogvideox.get_config(str(folder))
  config.data.update({"max_length": 12} | data)
  config.samples.prompts = ()
  return config


def test_what_a_run_lacks_is_read_and_the_config_is_left_as_it_was(workdir):
  config = denoiser()
  config.text_encoder.vocab_size = 7
  config.autoencoder.latent_channels = 3
  before = config.to_json()
  got = resolve.complete(config, source(), workdir)
  assert config.to_json() == before
  assert got.text_encoder.vocab_size == 313
  want = autoencoders.read_config(PACKAGED, "float32")
  assert got.autoencoder.to_dict() == want.to_dict()
  assert got.init_fingerprint == "" and "text_encoder_fingerprint" not in got
  got.data.buckets.max_tokens = 9
  assert config.to_json() == before  # nor do they share a group


def test_what_batches_need_is_completed_in_a_copy(workdir):
  config = denoiser()
  config.autoencoder.latent_channels = 3
  before = config.to_json()
  got = resolve.for_batches(config, source(), None, 2)
  assert config.to_json() == before
  want = autoencoders.read_config(PACKAGED, "float32")
  assert got.autoencoder.to_dict() == want.to_dict()
  assert "init_fingerprint" not in got


def test_what_is_complete_is_completed_to_itself(workdir):
  once = resolve.complete(denoiser(), source(), workdir, parts=2)
  again = resolve.complete(once, source(), workdir, parts=2)
  assert again.to_dict() == once.to_dict()


def test_released_parts_are_named_by_their_content(released, workdir):
  folder = released / "2b"
  config = tuned(folder)
  got = resolve.complete(config, source(), workdir)
  assert got.init_fingerprint == base_model.check(config)
  made_by = text_encoders.fingerprint(folder)
  assert got.text_encoder_fingerprint == made_by
  assert got.text_encoder.dtype == config.text_encoder.dtype
  assert got.autoencoder_workdir == str(folder)
  config.init_from = "elsewhere"  # references are resolved in the copy
  assert got.text_encoder_dir == str(folder)


def _latents_of(folder, **changed):
  made_by = text_encoders.fingerprint(folder)
  known = autoencoders.names(folder / "vae") | {"text_encoder": made_by}
  known |= {"text_encoder_dtype": "float16", "padding": "seen"}
  known["max_length"] = 12
  widths = {"text_encoder": 16}
  return source("latents", "caption", widths, **known | changed)


def test_an_encoder_computes_as_it_did_for_the_dataset(released, workdir):
  folder = released / "2b"
  got = resolve.complete(tuned(folder), _latents_of(folder), workdir)
  assert got.text_encoder.dtype == "float16"


@pytest.mark.parametrize("what", ["autoencoder", "normalisation"])
def test_latents_of_another_autoencoder_are_refused(released, workdir, what):
  folder = released / "2b"
  other = _latents_of(folder, **{what: "other"})
  message = f"latents of {what} other, but that of autoencoder_workdir"
  with pytest.raises(ValueError, match=message):
    resolve.complete(tuned(folder), other, workdir)


def test_image_to_video_needs_frames_and_has_no_samples(released, workdir):
  folder = released / "5b_i2v"
  message = r"latents and frames \[\] of their clips, .* given frames \[0\]"
  with pytest.raises(ValueError, match=message):
    resolve.complete(tuned(folder), _latents_of(folder), workdir)
  resolve.complete(tuned(folder), _latents_of(folder, given=[0]), workdir)
  config = tuned(folder)
  resolve.complete(config, source(), workdir)
  config.samples.prompts = ("two dogs run",)
  with pytest.raises(ValueError, match="samples.prompts must be empty"):
    resolve.complete(config, source(), workdir)


def test_text_of_another_width_is_refused(released, workdir):
  config = denoiser()
  config.text_encoder_dir = str(released / "2b")
  message = "text_width is 128, but .* are 16 wide; set denoiser.text_width=16"
  with pytest.raises(ValueError, match=message):
    resolve.complete(config, source(), workdir)


def test_an_autoencoder_trains_on_videos(workdir):
  config = digits.get_config("vae")
  got = resolve.complete(config, source(), workdir)
  assert got.autoencoder == config.autoencoder
  with pytest.raises(ValueError, match="'mine' holds latents; an autoencoder"):
    resolve.complete(config, source("latents"), workdir)


def test_what_cannot_work_is_refused_before_anything_is_read(workdir):
  config = denoiser()
  config.task = "vocoder"
  with pytest.raises(ValueError, match="task must be one of .*'vocoder'"):
    resolve.complete(config, None, workdir)
  config = denoiser()
  config.data.number_templates = ("motion {motion}.",)
  with pytest.raises(ValueError, match=r"name \['motion'\], which records"):
    resolve.complete(config, source(), workdir)
  config = denoiser()
  config.autoencoder_workdir = str(workdir)
  with pytest.raises(
    ValueError, match="autoencoder_workdir has no .*safetensor"
  ):
    resolve.complete(config, source(), workdir)


@pytest.mark.parametrize("parts, accumulate", [(1, 1), (4, 1), (2, 3)])
def test_batches_of_buckets_differ_by_what_the_mesh_splits(parts, accumulate):
  config = digits.get_config("vae")
  config.data.buckets.update(BUCKETS)
  config.accumulate = accumulate
  got = resolve.with_buckets(config, None, parts)
  assert got.data.buckets.multiple_of == parts * accumulate
  assert config.data.buckets.multiple_of == 0
  # What is said stays, and what has no buckets has no multiple.
  config.data.buckets.multiple_of = 5
  got = resolve.with_buckets(config, None, parts)
  assert got.data.buckets.multiple_of == 5
  config = digits.get_config("vae")
  got = resolve.with_buckets(config, None, parts)
  assert got.data.buckets.multiple_of == 0


def _save(workdir):
  with checkpoint.manager(workdir) as manager:
    checkpoint.save(manager, 1, {"a": jnp.ones(1)})
    checkpoint.wait(manager)


def test_a_run_keeps_the_batches_that_it_began_with(tmp_path):
  config = digits.get_config("vae")
  config.data.buckets.update(BUCKETS)
  begun = resolve.with_buckets(config, tmp_path, 4)
  checkpoint.prepare_workdir(tmp_path, begun)
  again = resolve.with_buckets(config, tmp_path, 2)
  assert again.data.buckets.multiple_of == 2  # nothing was trained there
  _save(tmp_path)
  again = resolve.with_buckets(config, tmp_path, 2)  # on another mesh
  assert again.data.buckets.multiple_of == 4
  assert again.to_dict() == run_config.read(tmp_path).to_dict()


def test_a_run_that_began_without_buckets_has_none_to_keep(tmp_path):
  config = digits.get_config("vae")
  checkpoint.prepare_workdir(tmp_path, config)
  _save(tmp_path)
  config.data.buckets.update(max_tokens=10_000, shapes=((9, 32, 32),))
  found = resolve.with_buckets(config, tmp_path, 3)
  assert found.data.buckets.multiple_of == 3 * config.accumulate


def test_a_config_of_an_earlier_version_is_completed_too(workdir):
  config = denoiser()
  config.autoencoder.name = "causal_vae"
  with config.unlocked():
    del config.data.split, config.steps_a_call
  got = resolve.complete(config, source(), workdir)
  assert got.autoencoder.name == "vdit" and got.data.split == "train"
  assert got.steps_a_call == 1 and "split" not in config.data


def test_a_flip_looks_at_captions_first(workdir):
  config = denoiser()
  config.data.flip = True
  found = source("latents")
  with pytest.raises(ValueError, match="set fps=0 and flip=False"):
    resolve.for_batches(config, found, workdir, 1)
  seen = []
  config.data.buckets.update(BUCKETS)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(resolve.reading, "check_sides", seen.append)
    clips = source()
    got = resolve.for_batches(config, clips, None, 3)
  assert seen == [clips] and got.data.buckets.multiple_of == 3
