"""A small Wan pipeline with all that a released folder has."""

import functools
from typing import Any

from etils import epath

from vdit_jax import strict_json
from vdit_jax.models.clip import system as clip
from vdit_jax.models.t5 import system as t5

_DIFFUSERS = "0.42.1"  # whose fields these are
_TEXT_WIDTH = 16
_IMAGE_WIDTH = 8
_HEADS, _HEAD_DIM = 2, 16
_IMAGES = 2 * 5  # tokens of two images: four patches each and the class's

_TRANSFORMER = dict(
  _class_name="WanTransformer3DModel",
  _diffusers_version=_DIFFUSERS,
  patch_size=[1, 2, 2],
  num_attention_heads=_HEADS,
  attention_head_dim=_HEAD_DIM,
  text_dim=_TEXT_WIDTH,
  freq_dim=32,
  ffn_dim=40,
  num_layers=2,
  cross_attn_norm=True,
  qk_norm="rms_norm_across_heads",
  eps=1e-6,
  rope_max_seq_len=64,
)
_VAE = dict(
  _class_name="AutoencoderKLWan",
  _diffusers_version=_DIFFUSERS,
  base_dim=8,
  dim_mult=[1, 1, 2, 2],
  num_res_blocks=1,
  temperal_downsample=[False, True, True],
  attn_scales=[],
  dropout=0.0,
)
_LATENTS = {False: 4, True: 6}  # channels, by whether it is residual

_SCHEDULER = dict(
  _class_name="UniPCMultistepScheduler",
  _diffusers_version=_DIFFUSERS,
  beta_start=0.0001,
  beta_end=0.02,
  beta_schedule="linear",
  disable_corrector=[],
  dynamic_thresholding_ratio=0.995,
  final_sigmas_type="zero",
  lower_order_final=True,
  num_train_timesteps=1000,
  predict_x0=True,
  prediction_type="flow_prediction",
  rescale_betas_zero_snr=False,
  sample_max_value=1.0,
  solver_order=2,
  solver_p=None,
  solver_type="bh2",
  steps_offset=0,
  thresholding=False,
  timestep_spacing="linspace",
  trained_betas=None,
  use_beta_sigmas=False,
  use_exponential_sigmas=False,
  use_flow_sigmas=True,
  use_karras_sigmas=False,
)

# Of each: whether images are shown, by which encoder, how many of them; the
# noise level from which on the first of two denoisers denoises; whether the
# autoencoder is 2.2's, with a noise level for each latent frame; the shift.
_FORMS: dict[str, dict[str, Any]] = {
  "2_1": dict(shift=3.0),
  "2_1_i2v": dict(shown=True, images=1, shift=3.0),
  "2_1_flf2v": dict(shown=True, images=2, shift=5.0),
  "2_2": dict(boundary=0.875, shift=12.0),
  "2_2_i2v": dict(shown=True, boundary=0.9, shift=5.0),
  "2_2_ti2v": dict(each=True, shift=5.0),
}


def write(
  variant: str, folder: epath.Path, captions: list[str]
) -> dict[str, dict[str, Any]]:
  """Write what is no network; return config.json of each network, by folder.

  Args:
    variant: one of `VARIANTS`.
    folder: of the pipeline.
    captions: that the tokenizer is trained on.
  """
  form = _FORMS[variant]
  pieces = t5.write_tiny_tokenizer(folder / "tokenizer", captions)
  scheduler = _SCHEDULER | dict(flow_shift=form["shift"])
  _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
  _write_json(folder / "model_index.json", _index(form))
  configs = {
    "text_encoder": t5.tiny(_TEXT_WIDTH, pieces, "UMT5"),
    "transformer": _transformer(form),
    "vae": _vae(form),
  }
  if "boundary" in form:
    configs["transformer_2"] = _transformer(form)
  if "images" in form:
    configs["image_encoder"] = clip.tiny(_IMAGE_WIDTH)
  return configs


VARIANTS = {name: functools.partial(write, name) for name in _FORMS}
GAINS = {
  r"norm_(q|k)/scale$": 2.0,  # attention that is not uniform
  r"^decoder/conv_out": 0.3,  # pixels within [-1, 1]
}


def _transformer(form: dict[str, Any]) -> dict[str, Any]:
  c = _LATENTS[form.get("each", False)]
  shown = c + 4 if form.get("shown") else 0
  config = _TRANSFORMER | dict(in_channels=c + shown, out_channels=c)
  if "images" in form:
    width = _HEADS * _HEAD_DIM
    config |= dict(image_dim=_IMAGE_WIDTH, added_kv_proj_dim=width)
    config["pos_embed_seq_len"] = _IMAGES if form["images"] > 1 else None
  return config


def _vae(form: dict[str, Any]) -> dict[str, Any]:
  residual = form.get("each", False)
  c = _LATENTS[residual]
  config = _VAE | dict(
    z_dim=c,
    is_residual=residual,
    latents_mean=[0.1 * (i - 1) for i in range(c)],
    latents_std=[0.5 + 0.3 * i for i in range(c)],
  )
  if residual:
    config |= dict(
      decoder_base_dim=12,
      in_channels=12,
      out_channels=12,
      patch_size=2,
      scale_factor_spatial=16,
      scale_factor_temporal=4,
    )
  return config


def _index(form: dict[str, Any]) -> dict[str, Any]:
  images, none = "ImageToVideo" * bool(form.get("shown")), [None, None]
  transformer = ["diffusers", _TRANSFORMER["_class_name"]]
  vision = [["transformers", name] for name in ("CLIPVisionModel",)]
  index = dict(
    _class_name=f"Wan{images}Pipeline",
    _diffusers_version=_DIFFUSERS,
    boundary_ratio=form.get("boundary"),
    expand_timesteps=form.get("each", False),
    scheduler=["diffusers", _SCHEDULER["_class_name"]],
    text_encoder=["transformers", "UMT5EncoderModel"],
    tokenizer=["transformers", "T5TokenizerFast"],
    transformer=transformer,
    transformer_2=transformer if "boundary" in form else none,
    vae=["diffusers", _VAE["_class_name"]],
  )
  if images:
    index["image_encoder"] = vision[0] if "images" in form else none
    index["image_processor"] = none
  return index


def _write_json(path: epath.Path, fields: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(strict_json.dumps(fields, indent=2, sort_keys=True) + "\n")
