"""A whole pipeline folder in diffusers' layout, tiny and random.

It has all that a released folder has (model_index.json, the networks, the
tokenizer, the scheduler) in less than 1 MB, and no parameter is zero: what
runs on it runs on a release. diffusers and transformers read it, and torch is
not needed to make it.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vdit_jax import trees
from vdit_jax.convert import folders, placement
from vdit_jax.text import tokenizer as tokenizers
from vdit_jax.weights import component

_DIFFUSERS = "0.42.1"  # whose fields these are
_TEXT_WIDTH = 16
_SENTINELS = 100  # of T5's tokenizer
_LATENTS = 4  # channels

_CAPTIONS = (
  "a red seven moving left",
  "two dogs run along the beach at sunset",
  "a panda plays the guitar in a quiet bamboo forest",
  "the camera follows a white car up a steep dirt road",
  "a woman walks down a street in the rain, her umbrella bright yellow",
  "snow falls slowly on the roofs of an old town",
)

_TRANSFORMER = dict(
  _class_name="CogVideoXTransformer3DModel",
  _diffusers_version=_DIFFUSERS,
  num_attention_heads=2,
  attention_head_dim=16,
  in_channels=_LATENTS,
  out_channels=_LATENTS,
  time_embed_dim=32,
  text_embed_dim=_TEXT_WIDTH,
  num_layers=2,
  sample_width=6,
  sample_height=4,
  sample_frames=9,
  max_text_seq_length=226,  # what diffusers' pipelines pad to
)
_ROTARY = dict(use_rotary_positional_embeddings=True)
_IMAGE = dict(in_channels=2 * _LATENTS)
_1_5 = dict(patch_size_t=2, patch_bias=False, **_ROTARY)
_LEARNED = dict(use_learned_positional_embeddings=True)
VARIANTS = {
  "2b": {},
  "5b": _ROTARY,
  "5b_i2v": _ROTARY | _IMAGE | _LEARNED,
  "1_5_5b": _1_5,
  "1_5_5b_i2v": _1_5 | _IMAGE | dict(ofs_embed_dim=32),
}

_LEVELS = [8, 8, 16, 16]  # four of them: 8 pixels a latent's, as released
_VAE = dict(
  _class_name="AutoencoderKLCogVideoX",
  _diffusers_version=_DIFFUSERS,
  block_out_channels=_LEVELS,
  down_block_types=["CogVideoXDownBlock3D"] * len(_LEVELS),
  up_block_types=["CogVideoXUpBlock3D"] * len(_LEVELS),
  latent_channels=_LATENTS,
  layers_per_block=1,
  norm_num_groups=4,
  sample_height=32,
  sample_width=48,
  temporal_compression_ratio=4,
)

_T5: dict[str, Any] = dict(
  architectures=["T5EncoderModel"],
  model_type="t5",
  d_model=_TEXT_WIDTH,
  d_kv=8,
  d_ff=32,
  num_layers=2,
  num_heads=2,
  relative_attention_num_buckets=32,
  relative_attention_max_distance=128,
  feed_forward_proj="gated-gelu",
  layer_norm_epsilon=1e-6,
  is_encoder_decoder=True,
  pad_token_id=0,
  eos_token_id=1,
  decoder_start_token_id=0,
  dtype="float32",
)

_SCHEDULER = dict(
  _class_name="CogVideoXDDIMScheduler",
  _diffusers_version=_DIFFUSERS,
  beta_start=0.00085,
  beta_end=0.012,
  beta_schedule="scaled_linear",
  clip_sample=False,
  num_train_timesteps=1000,
  prediction_type="v_prediction",
  rescale_betas_zero_snr=True,
  sample_max_value=1.0,
  set_alpha_to_one=True,
  steps_offset=0,
  timestep_spacing="trailing",
  trained_betas=None,
)


def write(path: epath.PathLike, variant: str = "2b", seed: int = 0) -> None:
  """Write a pipeline folder, whole or not at all.

  Args:
    path: the folder to make.
    variant: which CogVideoX it is like, one of `VARIANTS`.
    seed: of the parameters.

  Raises:
    ValueError: if the variant is not known or the path is not free.
  """
  if variant not in VARIANTS:
    raise ValueError(
      f"variant must be one of {sorted(VARIANTS)}, got {variant!r}"
    )
  with folders.replacing(path) as folder:
    words = _write_tokenizer(folder / "tokenizer")
    configs = {
      "text_encoder": _T5 | dict(vocab_size=words + _SENTINELS),
      "transformer": _TRANSFORMER | VARIANTS[variant],
      "vae": _VAE | _scales(variant),
    }
    for i, (name, config) in enumerate(configs.items()):
      component.save(_random(config, seed + i), folder / name)
    shift = 3.0 if variant == "2b" else 1.0
    scheduler = _SCHEDULER | dict(snr_shift_scale=shift)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", _index(variant))


def _index(variant: str) -> dict[str, Any]:
  images = "ImageToVideo" * variant.endswith("_i2v")
  return dict(
    _class_name=f"CogVideoX{images}Pipeline",
    _diffusers_version=_DIFFUSERS,
    scheduler=["diffusers", _SCHEDULER["_class_name"]],
    text_encoder=["transformers", *_T5["architectures"]],
    tokenizer=["transformers", "T5Tokenizer"],
    transformer=["diffusers", _TRANSFORMER["_class_name"]],
    vae=["diffusers", _VAE["_class_name"]],
  )


def _scales(variant: str) -> dict[str, Any]:
  return dict(
    scaling_factor=1.15258426 if variant == "2b" else 0.7,
    invert_scale_latents=variant == "1_5_5b_i2v",
  )


def _write_tokenizer(folder: epath.Path) -> int:
  """Train a tokenizer on a few captions; return its number of pieces."""
  words = tokenizers.train(list(_CAPTIONS), folder / "spiece.model", 400)
  config = dict(tokenizer_class="T5Tokenizer", extra_ids=_SENTINELS)
  _write_json(folder / "tokenizer_config.json", config)
  return words.vocab_size


def _random(config: dict[str, Any], seed: int) -> component.Loaded:
  """Make a component of its config.json, with random parameters."""
  known = component.COMPONENTS[folders.class_name(config)]
  module = known.build(config, np.dtype(np.float32))
  shapes = trees.flatten(placement.unboxed(known.abstract(module)))
  rng = np.random.default_rng(seed)
  params = {path: _draw(rng, path, shapes[path].shape) for path in shapes}
  return component.Loaded(module, trees.unflatten(params), config)


def _draw(
  rng: np.random.Generator, path: str, shape: tuple[int, ...]
) -> jax.Array:
  """Draw a parameter as a trained one might be, none of its numbers zero."""
  kind, x = path.rpartition("/")[2], rng.standard_normal(shape)
  if kind == "kernel":
    # [in, out], layers of those, or a convolution's [t, h, w, in, out].
    fan_in = shape[-2] if len(shape) < 4 else np.prod(shape[:-1])  # pyright: ignore[reportGeneralTypeIssues]
    x /= np.sqrt(fan_in)
  elif kind == "scale":
    x = 1 + 0.3 * x
  elif kind == "bias":
    x *= 0.3
  if path.endswith(("norm_q/scale", "norm_k/scale")):
    x *= 2  # attention that is not uniform
  if path.startswith("decoder/conv_out"):
    x *= 0.3  # pixels within [-1, 1]
  return jnp.asarray(x, jnp.float32)


def _write_json(path: epath.Path, fields: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
