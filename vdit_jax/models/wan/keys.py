"""Wan in diffusers' layout: config.json and keys of its networks."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from vdit_jax import schema
from vdit_jax.convert import configs, rules
from vdit_jax.convert.rules import Rule
from vdit_jax.models.wan import autoencoder, denoiser

_PATCH = schema.Field(list, 3, 3, each=schema.Field(int, 1, 16))
_ACROSS = "rms_norm_across_heads"

# What diffusers 0.42.1 takes where a config.json is silent.
_TRANSFORMER = configs.Table(
  dict(
    patch_size=configs.Row((1, 2, 2), _PATCH),
    num_attention_heads=configs.size(40),
    attention_head_dim=configs.size(128),
    in_channels=configs.size(16),
    out_channels=configs.size(16, optional=True),
    text_dim=configs.size(4096),
    freq_dim=configs.size(256),
    ffn_dim=configs.size(13_824),
    num_layers=configs.layers(40),
    cross_attn_norm=configs.flag(True),
    eps=configs.number(1e-6),
    image_dim=configs.size(None, optional=True),
    added_kv_proj_dim=configs.size(None, optional=True),
    rope_max_seq_len=configs.whole(1024),
    pos_embed_seq_len=configs.size(None, optional=True),
    # Nothing looks at these, which the first releases have.
    add_img_emb=configs.unused(False),
    window_size=configs.unused([-1, -1]),
  ),
  # No other norm has ever been built.
  fixed=dict(qk_norm=_ACROSS),
  products=(("num_attention_heads", "attention_head_dim"),),
)


def _transformer_config(given: dict[str, Any], dtype: Any) -> denoiser.Config:
  """Read the config.json of a WanTransformer3DModel."""
  out = given["out_channels"] or given["in_channels"]
  width = given["num_attention_heads"] * given["attention_head_dim"]
  images, added = given["image_dim"], given["added_kv_proj_dim"]
  if added != (width if images else None):
    raise ValueError(
      f"added_kv_proj_dim must be {width if images else None} where image_dim "
      f"is {images}: image tokens are as wide as the others, got {added}"
    )
  return denoiser.Config(
    latent_channels=out,
    mask_channels=_mask_channels(given["in_channels"], out),
    image_width=images or 0,
    image_tokens=given["pos_embed_seq_len"] or 0,
    patch=tuple(given["patch_size"]),
    depth=given["num_layers"],
    heads=given["num_attention_heads"],
    head_dim=given["attention_head_dim"],
    mlp_width=given["ffn_dim"],
    text_width=given["text_dim"],
    time_width=given["freq_dim"],
    cross_norm=given["cross_attn_norm"],
    max_places=given["rope_max_seq_len"],
    eps=given["eps"],
    dtype=jnp.dtype(dtype).name,
  )


def _mask_channels(channels: int, out: int) -> int:
  """Channels beside the noised latents, without those of shown latents."""
  if channels == out:
    return 0
  if channels <= 2 * out:
    raise ValueError(
      f"in_channels must be out_channels {out}, or more than twice as many: "
      f"noised latents, shown ones and a mask; got {channels}"
    )
  return channels - 2 * out


def transformer_rules(module: denoiser.Denoiser) -> tuple[Rule, ...]:
  """Table of a WanTransformer3DModel's keys."""
  cfg, embedder = module.cfg, "condition_embedder"
  time, text = f"{embedder}.time_embedder", f"{embedder}.text_embedder"
  table = [
    Rule("patch_embedding.weight", "patch_in/kernel", _patches(cfg)),
    Rule("patch_embedding.bias", "patch_in/bias"),
    *rules.dense(f"{time}.linear_1", "conditioning/time_in"),
    *rules.dense(f"{time}.linear_2", "conditioning/time_out"),
    *rules.dense(f"{embedder}.time_proj", "modulation"),
    *rules.dense(f"{text}.linear_1", "text_in/in"),
    *rules.dense(f"{text}.linear_2", "text_in/out"),
    *rules.in_blocks(_block(cfg), theirs="blocks"),
    Rule("scale_shift_table", "final/scale_shift_table", rules.ONE),
    *rules.dense("proj_out", "final/out"),
  ]
  if cfg.image_width:
    images = f"{embedder}.image_embedder"
    table += rules.norm(f"{images}.norm1", "image_in/norm_in")
    table += rules.dense(f"{images}.ff.net.0.proj", "image_in/in")
    table += rules.dense(f"{images}.ff.net.2", "image_in/out")
    table += rules.norm(f"{images}.norm2", "image_in/norm_out")
    if cfg.image_tokens:
      table.append(Rule(f"{images}.pos_embed", "image_in/positions", rules.ONE))
  return tuple(table)


def _block(cfg: denoiser.Config) -> list[Rule]:
  table = [Rule("scale_shift_table", "scale_shift_table", rules.ONE)]
  for theirs, ours in (
    ("attn1", "self_attention"),
    ("attn2", "cross_attention"),
  ):
    for name in ("q", "k", "v"):
      table += rules.dense(f"{theirs}.to_{name}", f"{ours}/{name}")
    for name in ("norm_q", "norm_k"):
      table += rules.norm(f"{theirs}.{name}", f"{ours}/{name}", bias=False)
    table += rules.dense(f"{theirs}.to_out.0", f"{ours}/out")
  if cfg.cross_norm:
    table += rules.norm("norm2", "norm_c")
  if cfg.image_width:
    ours = "cross_attention"
    for name in ("k", "v"):
      table += rules.dense(f"attn2.add_{name}_proj", f"{ours}/{name}_image")
    table += rules.norm(
      "attn2.norm_added_k", f"{ours}/norm_k_image", bias=False
    )
  table += rules.dense("ffn.net.0.proj", "mlp/in")
  return table + rules.dense("ffn.net.2", "mlp/out")


def _patches(cfg: denoiser.Config) -> rules.Transform:
  """Transform of the patches' convolution, [D, c, p_f, p_h, p_w]."""
  return rules.Transform(
    lambda x: x.reshape(x.shape[0], -1).T,
    lambda x: x.T.reshape(x.shape[1], -1, *cfg.patch),
  )


# How the first releases call the same layers, and so do most adapters.
ORIGINAL = {
  r"^blocks\.(\d+)\.attn1\.": r"blocks.\1.self_attn.",
  r"^blocks\.(\d+)\.attn2\.add_([kv])_proj": r"blocks.\1.cross_attn.\2_img",
  r"^blocks\.(\d+)\.attn2\.": r"blocks.\1.cross_attn.",
  r"_attn\.to_([qkv])$": r"_attn.\1",
  r"_attn\.to_out\.0$": "_attn.o",
  r"\.ffn\.net\.0\.proj$": ".ffn.0",
  r"\.ffn\.net\.2$": ".ffn.2",
  r"^condition_embedder\.text_embedder\.linear_1$": "text_embedding.0",
  r"^condition_embedder\.text_embedder\.linear_2$": "text_embedding.2",
  r"^condition_embedder\.time_embedder\.linear_1$": "time_embedding.0",
  r"^condition_embedder\.time_embedder\.linear_2$": "time_embedding.2",
  r"^condition_embedder\.time_proj$": "time_projection.1",
  r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$": "img_emb.proj.1",
  r"^condition_embedder\.image_embedder\.ff\.net\.2$": "img_emb.proj.3",
  r"^proj_out$": "head.head",
}

TRANSFORMER = rules.Component(
  module=denoiser.Denoiser,
  fields=_TRANSFORMER,
  config=_transformer_config,
  example=denoiser.example,
  rules=transformer_rules,
  # The first image-to-video releases have it; nothing looks at it.
  ignored=(r"blocks\.\d+\.attn2\.norm_added_q\.weight",),
)

_NUMBERS = schema.Field(list, 1, 1024, each=schema.Field(float))
_FLAGS = schema.Field(list, 1, 8, each=schema.Field(bool))
_RATIO = configs.whole(None, high=64, optional=True)

# What diffusers 0.42.1 takes where a config.json is silent.
_AUTOENCODER = configs.Table(
  dict(
    base_dim=configs.size(96),
    decoder_base_dim=configs.size(None, optional=True),
    z_dim=configs.size(16),
    dim_mult=configs.sizes((1, 2, 4, 4), most=8),
    num_res_blocks=configs.layers(2),
    temperal_downsample=configs.Row((False, True, True), _FLAGS),
    latents_mean=configs.Row(autoencoder.MEAN, _NUMBERS),
    latents_std=configs.Row(autoencoder.STD, _NUMBERS),
    is_residual=configs.flag(False),
    in_channels=configs.size(3),
    out_channels=configs.size(3),
    patch_size=configs.whole(None, high=16, optional=True),
    scale_factor_temporal=_RATIO,
    scale_factor_spatial=_RATIO,
    # Where other programs would clip; nothing here looks at it.
    clip_output=configs.unused(False),
  ),
  # No release sets these otherwise, and our network does not have them.
  fixed=dict(attn_scales=[], dropout=0.0),
)


def _autoencoder_config(
  given: dict[str, Any], dtype: Any
) -> autoencoder.Config:
  """Read the config.json of an AutoencoderKLWan."""
  patch = given["patch_size"] or 1
  for name in ("in_channels", "out_channels"):
    if given[name] != 3 * patch**2:
      raise ValueError(
        f"{name} must be {3 * patch**2}, of patches of {patch} pixels, got "
        f"{given[name]}"
      )
  cfg = autoencoder.Config(
    latent_channels=given["z_dim"],
    patch=patch,
    width=given["base_dim"],
    decoder_width=given["decoder_base_dim"] or given["base_dim"],
    levels=tuple(given["dim_mult"]),
    blocks=given["num_res_blocks"],
    halve_time=tuple(given["temperal_downsample"])[
      : len(given["dim_mult"]) - 1
    ],
    residual=given["is_residual"],
    mean=tuple(given["latents_mean"]),
    std=tuple(given["latents_std"]),
    dtype=jnp.dtype(dtype).name,
  )
  for name, ours in (
    ("temporal", cfg.time_stride),
    ("spatial", cfg.space_stride),
  ):
    said = given[f"scale_factor_{name}"]
    if said not in (None, ours):
      raise ValueError(
        f"scale_factor_{name} must be {ours}, as the levels make it, got {said}"
      )
  return cfg


def autoencoder_rules(module: autoencoder.Autoencoder) -> tuple[Rule, ...]:
  """Table of an AutoencoderKLWan's keys."""
  cfg = module.cfg
  table = [
    *rules.conv("quant_conv", "quant", rules.POINT),
    *rules.conv("post_quant_conv", "post_quant", rules.POINT),
  ]
  for half in ("encoder", "decoder"):
    for name in ("conv_in", "conv_out"):
      table += rules.conv(f"{half}.{name}", f"{half}/{name}")
    table.append(_norm(f"{half}.norm_out", f"{half}/norm_out"))
    table += _middle(f"{half}.mid_block", half)
  for level in range(len(cfg.levels)):
    for way in (_down, _up):
      table += way(cfg, level)
  return tuple(table)


def _middle(theirs: str, half: str) -> list[Rule]:
  attention, ours = f"{theirs}.attentions.0", f"{half}/mid_attention"
  return [
    *_block_rules(f"{theirs}.resnets.0", f"{half}/mid_block_0"),
    *_block_rules(f"{theirs}.resnets.1", f"{half}/mid_block_1"),
    _norm(f"{attention}.norm", f"{ours}/norm"),
    *rules.conv(f"{attention}.to_qkv", f"{ours}/qkv", _POINT2D),
    *rules.conv(f"{attention}.proj", f"{ours}/out", _POINT2D),
  ]


def _down(cfg: autoencoder.Config, level: int) -> list[Rule]:
  """Rules of a level of the encoder: one list of blocks where not residual."""
  first, table = level * (cfg.blocks + 1), []
  for i in range(cfg.blocks):
    name = f"{first + i}"
    if cfg.residual:
      name = f"{level}.resnets.{i}"
    theirs = f"encoder.down_blocks.{name}"
    table += _block_rules(theirs, f"encoder/down_{level}_block_{i}")
  if level < len(cfg.levels) - 1:
    name = f"{level}.downsampler" if cfg.residual else f"{first + cfg.blocks}"
    theirs = f"encoder.down_blocks.{name}"
    table += _resample(theirs, f"encoder/down_{level}", cfg.halve_time[level])
  return table


def _up(cfg: autoencoder.Config, level: int) -> list[Rule]:
  theirs, ours = f"decoder.up_blocks.{level}", f"decoder/up_{level}"
  table = []
  for i in range(cfg.blocks + 1):
    table += _block_rules(f"{theirs}.resnets.{i}", f"{ours}_block_{i}")
  if level < len(cfg.levels) - 1:
    name = "upsampler" if cfg.residual else "upsamplers.0"
    table += _resample(f"{theirs}.{name}", ours, cfg.halve_time[::-1][level])
  return table


def _resample(theirs: str, ours: str, time: bool) -> list[Rule]:
  table = rules.conv(f"{theirs}.resample.1", f"{ours}_space", rules.CONV2D)
  if time:
    table += rules.conv(f"{theirs}.time_conv", f"{ours}_time")
  return table


def _block_rules(theirs: str, ours: str) -> list[Rule]:
  """Rules of a residual block."""
  table = []
  for i in (1, 2):
    table.append(_norm(f"{theirs}.norm{i}", f"{ours}/norm_{i}"))
    table += rules.conv(f"{theirs}.conv{i}", f"{ours}/conv_{i}")
  shortcut = f"{theirs}.conv_shortcut"
  return table + [
    Rule(
      f"{shortcut}.weight", f"{ours}/shortcut/kernel", rules.POINT, None, True
    ),
    Rule(f"{shortcut}.bias", f"{ours}/shortcut/bias", optional=True),
  ]


def _norm(theirs: str, ours: str) -> Rule:
  """Rule of a norm's scale, which has axes of size 1 behind its channels."""
  ones = 2 if "attentions" in theirs else 3
  lengthen = lambda x: np.reshape(x, (*x.shape, *[1] * ones))
  flatten = rules.Transform(lambda x: x.reshape(x.shape[0]), lengthen)
  return Rule(f"{theirs}.gamma", f"{ours}/scale", flatten)


# A 2D convolution of one place is a matrix: [o, i, 1, 1] <-> [i, o].
_POINT2D = rules.Transform(
  lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T[..., None, None]
)

AUTOENCODER = rules.Component(
  module=autoencoder.Autoencoder,
  fields=_AUTOENCODER,
  config=_autoencoder_config,
  example=autoencoder.example,
  rules=autoencoder_rules,
)
