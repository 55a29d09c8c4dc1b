"""Laws of a denoiser's captions: tokens or embeddings, of one encoder."""

import pathlib
import shutil
import types as python

import numpy as np
import pytest

import vdit_jax
from configs import cogvideox, digits
from vdit_jax import checkpoint
from vdit_jax.training import captions
from vdit_jax.weights import text_encoder as text_encoders
from vdit_jax.weights import tiny

TOKENIZER = pathlib.Path(vdit_jax.__file__).parent / "packaged/tokenizer.model"
PROMPTS = ["two dogs run", "a red seven moving left"]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  path = tmp_path_factory.mktemp("released") / "pipe"
  tiny.write(path, "2b")
  return path


@pytest.fixture
def workdir(tmp_path):
  folder = tmp_path / "run"
  folder.mkdir()
  shutil.copy(TOKENIZER, folder / "tokenizer.model")
  return folder


def released_config(released):
  config = cogvideox.get_config(str(released))
  config.text_encoder.dtype, config.mesh.fsdp = "float32", 1
  config.data.max_length = 12
  return config


def latents(**metadata):
  """A dataset of latents, with embeddings if it says of which encoder."""
  widths = {"text_encoder": 16} if "text_encoder" in metadata else {}
  return python.SimpleNamespace(
    name="latents/mine",
    kind="latents",
    text_widths=widths,
    metadata={"data": "mine", "max_length": 12}
    | {f"{name}_dtype": "float32" for name in widths}
    | metadata,
  )


def test_tokens_are_those_of_the_workdirs_tokenizer(workdir):
  config = digits.get_config("dit")
  found = captions.words(config, latents(), workdir)
  assert list(found) == ["text_encoder"]
  words = found["text_encoder"]
  assert words.tokenizer.model == TOKENIZER.read_bytes()
  assert words.max_length == config.data.max_length == 16


def test_embeddings_need_no_tokenizer_and_pixels_that_of_the_encoder(
  released, workdir
):
  config = released_config(released)
  words = captions.words(config, latents(), workdir)["text_encoder"]
  assert words.tokenizer is None and words.max_length == 12
  clips = python.SimpleNamespace(kind="video")
  words = captions.words(config, clips, workdir)["text_encoder"]
  ours = text_encoders.load_tokenizer(released)
  for got, want in zip(
    words.tokenizer.encode(PROMPTS, 12), ours.encode(PROMPTS, 12), strict=True
  ):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("stay", [False, True])
def test_samples_are_encoded_behind_what_guidance_leads_away_from(
  released, stay
):
  config = released_config(released)
  config.sampling.negative_prompt = "snow falls"
  text, frozen = captions.encode(config, PROMPTS, stay)
  encoder = text_encoders.load(released, "float32")
  rows = ["snow falls", "snow falls", *PROMPTS, ""]
  want = encoder.encode(rows, 12, "seen")
  assert text.embeds.shape == (4, 12, 16) and np.all(text.mask)
  np.testing.assert_allclose(text.embeds, want.embeds[:4], atol=1e-5)
  null = frozen.pop("null")["text_encoder"]
  np.testing.assert_allclose(null.embeds, want.embeds[4], atol=1e-5)
  assert list(frozen) == (["text_encoder"] if stay else [])


def test_without_guidance_there_is_nothing_to_lead_away_from(released):
  config = released_config(released)
  config.sampling.guidance = 1.0
  text, _ = captions.encode(config, PROMPTS, False)
  assert text.embeds.shape == (2, 12, 16)


def test_embeddings_of_the_encoder_are_taken_and_of_another_refused(released):
  config = released_config(released)
  check = lambda source: captions.check_embeds(
    config, source, "text_encoder", "abc"
  )
  check(latents(text_encoder="abc", padding="seen"))
  check(latents(text_encoder="abc", sees_padding=True))  # as older ones say it
  message = "holds embeddings of text encoder xyz, but text_encoder_dir=.* abc"
  with pytest.raises(ValueError, match=message) as error:
    check(latents(text_encoder="xyz", padding="seen"))
  for part in (
    "python -m vdit_jax.cache",
    f"--text_encoder={released}",
    "--padding=seen",
    "--max_length=12 --data=mine",
  ):
    assert part in str(error.value)
  with pytest.raises(ValueError, match="holds no embeddings, but"):
    check(latents())


@pytest.mark.parametrize(
  "metadata, message",
  [
    ({"padding": "masked"}, "padding is masked, .* padding is seen"),
    ({}, "padding is masked, .* padding is seen"),
    ({"padding": "seen", "max_length": 9}, "of 9 tokens, .* of 12; make them"),
  ],
)
def test_embeddings_of_another_padding_are_refused(released, metadata, message):
  config = released_config(released)
  source = latents(text_encoder="abc", **metadata)
  with pytest.raises(ValueError, match=message):
    captions.check_embeds(config, source, "text_encoder", "abc")


def test_masked_embeddings_are_padded_to_any_length():
  config = digits.get_config("dit")
  config.text_encoder_dir, config.data.max_length = "t5", 20
  for padding in ("masked", "zeroed"):
    source = latents(text_encoder="abc", padding=padding, max_length=9)
    captions.check_embeds(config, source, "text_encoder", "abc")
  source = latents(text_encoder="abc", padding="seen", max_length=20)
  with pytest.raises(ValueError, match="padding is seen, .* is masked"):
    captions.check_embeds(config, source, "text_encoder", "abc")


def test_weights_go_on_with_the_tokens_that_they_know(workdir, tmp_path):
  config = digits.get_config("dit")
  before = tmp_path / "before"
  checkpoint.prepare_workdir(before, config)
  shutil.copy(TOKENIZER, before / "tokenizer.model")
  config.init_from = str(before)
  captions.check_same(config, workdir)
  (before / "tokenizer.model").write_bytes(TOKENIZER.read_bytes() + b"x")
  with pytest.raises(ValueError, match="with another tokenizer; copy .*before"):
    captions.check_same(config, workdir)


def test_weights_go_on_with_the_encoder_that_they_know(workdir, tmp_path):
  config = digits.get_config("dit")
  before = tmp_path / "before"
  checkpoint.prepare_workdir(before, config)
  config.init_from, config.text_encoder_dir = str(before), "t5"
  config.text_encoder_fingerprint = "abc"
  message = "with text encoder its own, this run is to be with abc"
  with pytest.raises(ValueError, match=message):
    captions.check_same(config, workdir)
  checkpoint.prepare_workdir(tmp_path / "same", config)
  config.init_from = str(tmp_path / "same")
  captions.check_same(config, workdir)
