"""A small CogVideoX pipeline with all that a released folder has."""

import functools
from typing import Any

from etils import epath

from vdit_jax import strict_json
from vdit_jax.models.t5 import system as t5

_DIFFUSERS = "0.42.1"  # whose fields these are
_TEXT_WIDTH = 16
_LATENTS = 4  # channels

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
_FORMS = {
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


def write(
  variant: str, folder: epath.Path, captions: list[str]
) -> dict[str, dict[str, Any]]:
  """Write what is no network; return config.json of each network, by folder.

  Args:
    variant: one of `VARIANTS`.
    folder: of the pipeline.
    captions: that the tokenizer is trained on.
  """
  pieces = t5.write_tiny_tokenizer(folder / "tokenizer", captions)
  shift = 3.0 if variant == "2b" else 1.0
  scheduler = _SCHEDULER | dict(snr_shift_scale=shift)
  _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
  _write_json(folder / "model_index.json", _index(variant))
  return {
    "text_encoder": t5.tiny(_TEXT_WIDTH, pieces),
    "transformer": _TRANSFORMER | _FORMS[variant],
    "vae": _VAE | _scales(variant),
  }


VARIANTS = {name: functools.partial(write, name) for name in _FORMS}
GAINS = {
  r"norm_(q|k)/scale$": 2.0,  # attention that is not uniform
  r"^decoder/conv_out": 0.3,  # pixels within [-1, 1]
}


def _index(variant: str) -> dict[str, Any]:
  images = "ImageToVideo" * variant.endswith("_i2v")
  return dict(
    _class_name=f"CogVideoX{images}Pipeline",
    _diffusers_version=_DIFFUSERS,
    scheduler=["diffusers", _SCHEDULER["_class_name"]],
    text_encoder=["transformers", "T5EncoderModel"],
    tokenizer=["transformers", "T5Tokenizer"],
    transformer=["diffusers", _TRANSFORMER["_class_name"]],
    vae=["diffusers", _VAE["_class_name"]],
  )


def _scales(variant: str) -> dict[str, Any]:
  return dict(
    scaling_factor=1.15258426 if variant == "2b" else 0.7,
    invert_scale_latents=variant == "1_5_5b_i2v",
  )


def _write_json(path: epath.Path, fields: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(strict_json.dumps(fields, indent=2, sort_keys=True) + "\n")
