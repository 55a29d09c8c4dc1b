"""CLIP's vision tower is transformers', and so is what images go through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.models import parity
from vdit_jax.models.clip import keys, pictures, vision
from vdit_jax.weights import component

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

KIND = parity.Kind(keys.VISION)
TINY = dict(
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=3,
  image_size=42,
  patch_size=14,
  hidden_act="gelu",
  layer_norm_eps=0.02,
)
# config.json of the tower that Wan's image-to-video has.
VIT_H_14 = dict(
  hidden_act="gelu",
  hidden_size=1280,
  image_size=224,
  intermediate_size=5120,
  layer_norm_eps=1e-05,
  num_attention_heads=16,
  num_hidden_layers=32,
  patch_size=14,
)


def _model(config):
  return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config))


class Case:
  """Both networks with the same weights."""

  def __init__(self, folder, **changes):
    self.config = TINY | changes
    self.torch = _model(self.config).float().eval()
    gains = {r"[qk]_proj\.weight": 3.0}
    self.tensors = parity.draw(self.torch.state_dict(), gains)
    state = {k: torch.tensor(v) for k, v in self.tensors.items()}
    self.torch.load_state_dict(state)
    self.torch.save_pretrained(folder)
    self.loaded = component.load(folder)
    self.module, self.params = self.loaded.module, self.loaded.params

  def images(self, batch=3):
    shape = batch, 42, 42, 3
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)

  def run_torch(self, images, dtype=torch.float32, model=None):
    pixels = torch.tensor(images).permute(0, 3, 1, 2).to(dtype)
    found = (model or self.torch)(pixels, output_hidden_states=True)
    return found.hidden_states[-2], found.pooler_output


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  return Case(tmp_path_factory.mktemp("clip"))


@functools.partial(parity.jit, static_argnums=(0, 1))
def _apply(module, method, params, images):
  return module.apply({"params": params}, images, method=method)


@pytest.mark.parametrize("activation", vision.ACTIVATIONS)
def test_both_outputs_are_transformers(activation, tmp_path):
  case = Case(tmp_path, hidden_act=activation)
  images = case.images()
  with torch.no_grad():
    tokens, pooled = case.run_torch(images)
  found = _apply(case.module, "penultimate", case.params, images)
  assert found.shape == (3, 10, 24)
  assert parity.error(found, tokens) <= 1e-5
  found = _apply(case.module, "__call__", case.params, images)
  assert parity.error(found, pooled) <= 1e-5


def test_gradients_are_transformers(case):
  images = case.images()

  def loss(params):
    y = case.module.apply({"params": params}, images)
    z = case.module.apply({"params": params}, images, method="penultimate")
    return jnp.mean(y**3) + jnp.mean(z**3)

  tokens, pooled = case.run_torch(images)
  ((pooled**3).mean() + (tokens**3).mean()).backward()
  want = {k: p.grad.numpy() for k, p in case.torch.named_parameters()}
  case.torch.zero_grad()
  found = parity.jit(jax.grad(loss))(case.params)
  want, found = KIND.params(case.module, want), dict(found)
  for name in [k for k in found if k.startswith("layers_")]:
    # A bias on the keys shifts all logits of a query alike.
    for grads in (found, want):
      grads[name]["k"].pop("bias")
  parity.check_gradients(found, want)


def test_bfloat16_is_as_near_as_torchs(case):
  images = case.images()
  with torch.no_grad():
    exact, _ = case.run_torch(images)
    narrow = _model(case.config)
    narrow.load_state_dict(case.torch.state_dict())
    narrow = narrow.to(torch.bfloat16).eval()
    theirs, _ = case.run_torch(images, torch.bfloat16, narrow)
  module = KIND.module(case.config, "bfloat16")
  found = _apply(module, "penultimate", case.params, images)
  assert found.dtype == jnp.float32
  theirs = parity.error(theirs.float(), exact)
  assert 1e-3 < parity.error(found, exact) <= 2 * theirs


def test_the_released_size_is_transformers():
  module = KIND.module(VIT_H_14, "bfloat16")
  assert module.cfg == vision.VARIANTS["vit_h_14"]
  with torch.device("meta"):
    model = _model(VIT_H_14)
  assert KIND.check_size(module, model) == 630_766_080


def test_keys_of_older_files_are_read(case, tmp_path):
  """transformers 4 began all keys with the model's name, and kept places."""
  from safetensors import numpy as safe

  component.save(case.loaded, tmp_path / "saved")
  (file,) = (tmp_path / "saved").glob("*.safetensors")
  tensors = {f"vision_model.{k}": v for k, v in case.tensors.items()}
  places = np.arange(10, dtype=np.int64)[None]
  tensors["vision_model.embeddings.position_ids"] = places
  safe.save_file(tensors, file)
  loaded = component.load(tmp_path / "saved")
  jax.tree.map(np.testing.assert_array_equal, loaded.params, case.params)


def test_transformers_reads_back_what_it_wrote(case, tmp_path):
  component.save(case.loaded, tmp_path / "saved")
  model = transformers.CLIPVisionModel.from_pretrained(tmp_path / "saved")
  found = model.state_dict()
  assert found.keys() == case.tensors.keys()
  for key, x in case.tensors.items():
    np.testing.assert_array_equal(found[key].numpy(), x, key)


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(hidden_act="relu"), "hidden_act must be"),
    (dict(num_channels=4), "num_channels=4"),
    (dict(image_size=43), "image must be a multiple of 14, got 43"),
    (dict(num_attention_heads=5), "width must be a multiple of 5, got 24"),
  ],
)
def test_fields_that_cannot_be_honoured_are_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    KIND.module(TINY | changes)


def test_images_of_another_size_are_refused(case):
  with pytest.raises(ValueError, match=r"\[B, 42, 42, 3\].*prepare"):
    _apply(case.module, "penultimate", case.params, np.zeros((1, 40, 42, 3)))


# Reduced, enlarged, and both; cut above and below, and to the sides.
@pytest.mark.parametrize(
  "size", [(480, 832), (832, 480), (100, 60), (224, 300), (31, 47)]
)
def test_images_are_prepared_as_by_transformers(size):
  rng = np.random.default_rng(0)
  # Smooth with noise on it: clips happen at both ends.
  rows, columns = np.meshgrid(*map(np.arange, size), indexing="ij")
  smooth = (
    128 + 160 * np.sin(rows / 9)[..., None] * np.cos(columns / 7)[..., None]
  )
  noise = rng.normal(0, 40, (*size, 3))
  pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
  processor = transformers.CLIPImageProcessorPil()
  want = processor(Image.fromarray(pixels), return_tensors="np")
  want = np.moveaxis(np.asarray(want["pixel_values"])[0], 0, -1)
  frames = pixels[None].astype(np.float32) / 127.5 - 1
  found = parity.jit(pictures.prepare, static_argnums=1)(frames, 224)[0]
  # A byte is 0.015 of a deviation: a few are rounded to the next one.
  off = np.abs(np.asarray(found) - want)
  assert off.max() < 0.02
  assert (off > 1e-4).mean() < 1e-3
