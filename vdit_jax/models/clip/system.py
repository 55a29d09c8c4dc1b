"""CLIP's vision tower as a network that systems share."""

from typing import Any

from vdit_jax.models import system
from vdit_jax.models.clip import keys, vision

NETWORK = system.Network(
  family="clip",
  kind="image_encoder",
  module=vision.VisionEncoder,
  config=vision.Config,
  variants=vision.VARIANTS,
  example=vision.example,
  layers=("depth",),
  classes={"CLIPVisionModel": keys.VISION},
)


def tiny(width: int) -> dict[str, Any]:
  """The config.json of a small tower, of so many embeddings' numbers."""
  return dict(
    architectures=["CLIPVisionModel"],
    model_type="clip_vision_model",
    hidden_size=width,
    intermediate_size=2 * width,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=14,
    image_size=28,
    hidden_act="gelu",
    layer_norm_eps=1e-5,
    projection_dim=width,
    dtype="float32",
  )
