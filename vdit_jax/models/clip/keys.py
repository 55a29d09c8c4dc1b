"""CLIP's vision tower in transformers' layout: config.json and keys."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from vdit_jax.convert import configs, rules
from vdit_jax.convert.rules import Rule
from vdit_jax.models.clip import vision

# What transformers 5.23.0 takes where a config.json is silent.
_VISION = configs.Table(
  dict(
    hidden_size=configs.size(768),
    num_hidden_layers=configs.layers(12),
    num_attention_heads=configs.size(12),
    intermediate_size=configs.size(3072),
    patch_size=configs.size(32),
    image_size=configs.whole(224, high=4096),
    hidden_act=configs.word("quick_gelu", *vision.ACTIVATIONS),
    layer_norm_eps=configs.number(1e-5),
  ),
  fixed=dict(num_channels=3),
  strict=False,
)


def _config(given: dict[str, Any], dtype: Any) -> vision.Config:
  """Read the config.json of a CLIPVisionModel."""
  return vision.Config(
    width=given["hidden_size"],
    depth=given["num_hidden_layers"],
    heads=given["num_attention_heads"],
    mlp_width=given["intermediate_size"],
    patch=given["patch_size"],
    image=given["image_size"],
    activation=given["hidden_act"],
    eps=given["layer_norm_eps"],
    dtype=jnp.dtype(dtype).name,
  )


def table(module: vision.VisionEncoder) -> tuple[Rule, ...]:
  """Make the rules of the tower."""
  embeddings, side = "embeddings", module.cfg.patch
  patch = rules.Transform(
    lambda x: x.reshape(x.shape[0], -1).T,
    lambda x: np.reshape(x.T, (x.shape[1], 3, side, side)),
  )
  block, ours = r"encoder.layers.(\d+)", r"layers_\1"
  layers = [
    *rules.dense(rf"{block}.self_attn.(q|k|v)_proj", rf"{ours}/\2"),
    *rules.dense(f"{block}.self_attn.out_proj", f"{ours}/out"),
    *rules.dense(f"{block}.mlp.fc1", f"{ours}/mlp_in"),
    *rules.dense(f"{block}.mlp.fc2", f"{ours}/mlp_out"),
    *rules.norm(f"{block}.layer_norm1", f"{ours}/norm_a"),
    *rules.norm(f"{block}.layer_norm2", f"{ours}/norm_m"),
  ]
  return (
    Rule(f"{embeddings}.class_embedding", "embedder/class_token"),
    Rule(
      f"{embeddings}.patch_embedding.weight", "embedder/patch_in/kernel", patch
    ),
    Rule(f"{embeddings}.position_embedding.weight", "embedder/positions"),
    *rules.norm("pre_layrnorm", "norm_in"),
    *layers,
    *rules.norm("post_layernorm", "norm_out"),
  )


VISION = rules.Component(
  module=vision.VisionEncoder,
  fields=_VISION,
  config=_config,
  example=vision.example,
  rules=table,
  # Places, which older files count out.
  ignored=(r"embeddings\.position_ids",),
  prefix="vision_model.",  # of keys that transformers 4 wrote
)
