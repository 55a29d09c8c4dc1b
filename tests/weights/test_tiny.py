"""Tiny pipelines are whole: diffusers and transformers read what is written."""

import numpy as np
import pytest

from vdit_jax import trees
from vdit_jax.models.t5 import tokenizer as tokenizers
from vdit_jax.weights import component, tiny

diffusers = pytest.importorskip("diffusers")

PROMPT = "A white dog runs along a bamboo street, snow & rain"


@pytest.fixture(scope="module", params=["2b", "5b_i2v"])
def folder(request, tmp_path_factory):
  path = tmp_path_factory.mktemp("tiny") / request.param
  tiny.write(path, request.param)
  return path


@pytest.fixture(scope="module")
def theirs(folder):
  return diffusers.DiffusionPipeline.from_pretrained(folder)


def _stored(module):
  """Tensors of a network's file, those that are tied to others once."""
  return {x.data_ptr(): x for x in module.state_dict().values()}.values()


def test_diffusers_reads_every_part(folder, theirs):
  images = "ImageToVideo" * folder.name.endswith("_i2v")
  assert type(theirs).__name__ == f"CogVideoX{images}Pipeline"
  for name in ("text_encoder", "transformer", "vae"):
    loaded, module = component.load(folder / name), getattr(theirs, name)
    ours = sum(x.size for x in trees.flatten(loaded.params).values())
    assert ours == sum(x.numel() for x in _stored(module)), name


def test_no_parameter_is_zero(folder):
  for name in ("text_encoder", "transformer", "vae"):
    for path, x in trees.flatten(component.load(folder / name).params).items():
      assert np.all(np.asarray(x) != 0), f"{name}: {path}"


def test_tokenizers_agree(folder, theirs):
  ids = theirs.tokenizer([PROMPT], padding="max_length", max_length=64)
  ours, _ = tokenizers.load(folder / "tokenizer" / "spiece.model").encode(
    [PROMPT], 64
  )
  assert ids["input_ids"] == ours.tolist()
  assert ours.max() < theirs.text_encoder.config.vocab_size


def test_refuses(tmp_path):
  with pytest.raises(ValueError, match="variant must be one of .*got '3b'"):
    tiny.write(tmp_path / "new", "3b")
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="not an empty folder"):
    tiny.write(tmp_path, "2b")
