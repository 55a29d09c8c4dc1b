"""Adapters of Wan as people have them: diffusers' names and the first ones."""

import numpy as np
import pytest
from safetensors import numpy as safe

from vdit_jax import trees
from vdit_jax.convert import adapter_keys, adapters
from vdit_jax.models.wan import keys, system
from vdit_jax.weights import adapters as files
from vdit_jax.weights import tiny

# What the first releases call the dense layers of a block, and the others.
_BLOCK = (
  *(f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"),
  *("cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"),
)
_OTHERS = (
  *("text_embedding.0", "text_embedding.2", "time_embedding.0"),
  *("time_embedding.2", "time_projection.1", "head.head"),
  *("img_emb.proj.1", "img_emb.proj.3"),
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  folder = tmp_path_factory.mktemp("wan") / "pipe"
  tiny.write(folder, "wan:2_1_i2v")
  parts = {"denoiser": folder / "transformer"}
  return files.bases(system.SYSTEM, parts)


def test_layers_have_the_names_of_the_first_releases(bases):
  names = [
    adapter_keys._spelled(stem, keys.ORIGINAL)
    for stem in bases["denoiser"].layers
  ]
  wanted = {f"blocks.{i}.{name}" for i in range(2) for name in _BLOCK}
  assert sorted(names) == sorted(wanted | set(_OTHERS))


@pytest.mark.parametrize(
  "prefix, parts, dots",
  [
    ("diffusion_model.", ("lora_down", "lora_up"), "."),
    ("diffusion_model.", ("lora_A", "lora_B"), "."),
    ("lora_unet_", ("lora_down", "lora_up"), "_"),
    ("base_model.model.", ("lora_A", "lora_B"), "."),
  ],
)
def test_their_files_are_read_as_diffusers_s(
  prefix, parts, dots, bases, tmp_path
):
  """With ranks and alphas that differ from layer to layer."""
  rng, base = np.random.default_rng(0), bases["denoiser"]
  theirs, plain = {}, {}
  for i, (stem, slot) in enumerate(base.layers.items()):
    if not stem.startswith("blocks."):
      continue
    r, alpha = 2 + i % 3, np.array(1 + i % 4, np.float32)
    shape = base.shapes[slot.path].shape[-2:]
    a, b = (
      rng.standard_normal(s).astype(np.float32)
      for s in ((r, shape[0]), (shape[1], r))
    )
    layer = adapter_keys._spelled(stem, keys.ORIGINAL).replace(".", dots)
    for part, x in zip(parts, (a, b), strict=True):
      theirs[f"{prefix}{layer}.{part}.weight"] = x
    theirs[f"{prefix}{layer}.alpha"] = alpha
    plain[f"transformer.{stem}.lora_A.weight"] = a
    plain[f"transformer.{stem}.lora_B.weight"] = b * (alpha / r)
  safe.save_file(theirs, tmp_path / "theirs.safetensors")
  safe.save_file(plain, tmp_path / "plain.safetensors")
  found, wanted = (
    trees.flatten(adapters.read(tmp_path / f"{name}.safetensors", bases))
    for name in ("theirs", "plain")
  )
  assert found.keys() == wanted.keys() and len(found) > 20
  for path, x in found.items():
    np.testing.assert_allclose(x, wanted[path], rtol=1e-6, err_msg=path)


def test_a_layer_that_it_has_not_is_listed(bases, tmp_path):
  x = np.zeros((2, 32), np.float32)
  tensors = {"diffusion_model.blocks.0.self_attn.z.lora_down.weight": x}
  safe.save_file(tensors, tmp_path / "x.safetensors")
  with pytest.raises(ValueError, match=r"self_attn\.z"):
    adapters.read(tmp_path / "x.safetensors", bases)
