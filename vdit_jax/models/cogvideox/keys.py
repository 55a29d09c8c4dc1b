"""CogVideoX in diffusers' layout: config.json and keys of its networks."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from vdit_jax import schema
from vdit_jax.convert import configs, rules
from vdit_jax.convert.rules import Rule
from vdit_jax.models.cogvideox import autoencoder, denoiser

# What diffusers 0.42.1 takes where a config.json is silent: the older ones
# know fewer fields.
_TRANSFORMER = configs.Table(
  dict(
    num_attention_heads=configs.size(30),
    attention_head_dim=configs.size(64),
    in_channels=configs.size(16),
    out_channels=configs.size(16),
    time_embed_dim=configs.size(512),
    ofs_embed_dim=configs.size(None, optional=True),
    text_embed_dim=configs.size(4096),
    num_layers=configs.layers(30),
    attention_bias=configs.flag(True),
    sample_width=configs.whole(90),
    sample_height=configs.whole(60),
    sample_frames=configs.whole(49),
    patch_size=configs.whole(2, high=64),
    patch_size_t=configs.whole(None, high=64, optional=True),
    temporal_compression_ratio=configs.whole(4, high=64),
    max_text_seq_length=configs.whole(226),
    norm_eps=configs.number(1e-5),
    spatial_interpolation_scale=configs.number(1.875, 1e-3, 1e3),
    temporal_interpolation_scale=configs.number(1.0, 1e-3, 1e3),
    use_rotary_positional_embeddings=configs.flag(False),
    use_learned_positional_embeddings=configs.flag(False),
    patch_bias=configs.flag(True),
  ),
  # No release sets these otherwise, and our network does not have them.
  fixed=dict(
    flip_sin_to_cos=True,
    freq_shift=0,
    dropout=0.0,
    activation_fn="gelu-approximate",
    timestep_activation_fn="silu",
    norm_elementwise_affine=True,
  ),
  products=(("num_attention_heads", "attention_head_dim"),),
)


def _transformer_config(given: dict[str, Any], dtype: Any) -> denoiser.Config:
  """Read the config.json of a CogVideoXTransformer3DModel."""
  p, p_f = given["patch_size"], given["patch_size_t"]
  stride = given["temporal_compression_ratio"]
  return denoiser.Config(
    latent_channels=given["out_channels"],
    image_channels=_image_channels(given),
    patch=(p_f or 1, p, p),
    depth=given["num_layers"],
    heads=given["num_attention_heads"],
    head_dim=given["attention_head_dim"],
    text_width=given["text_embed_dim"],
    text_tokens=given["max_text_seq_length"],
    time_width=given["time_embed_dim"],
    ofs=_ofs(given),
    positions=_positions(given),
    sample=(
      (given["sample_frames"] - 1) // stride + 1,
      given["sample_height"],
      given["sample_width"],
    ),
    interpolation=(
      given["temporal_interpolation_scale"],
      given["spatial_interpolation_scale"],
    ),
    time_stride=stride,
    attention_bias=given["attention_bias"],
    # diffusers does not look at it for 1.5, whose patches always have one.
    patch_bias=given["patch_bias"] or p_f is not None,
    eps=given["norm_eps"],
    dtype=jnp.dtype(dtype).name,
  )


def transformer_rules(module: denoiser.Denoiser) -> tuple[Rule, ...]:
  """Table of a CogVideoXTransformer3DModel's keys.

  A fixed table of positions (2B) is not among them: diffusers does not store
  it and the network computes it. The learned one (5B image-to-video) is.
  """
  cfg = module.cfg
  table = [
    Rule("patch_embed.proj.weight", "patch_in/kernel", _patches(cfg)),
    *rules.dense("patch_embed.text_proj", "text_in"),
    *rules.dense("time_embedding.linear_1", "conditioning/time_in"),
    *rules.dense("time_embedding.linear_2", "conditioning/time_out"),
    *_block(cfg),
    *rules.norm("norm_final", "final/norm_in"),
    *rules.dense("norm_out.linear", "final/modulation"),
    *rules.norm("norm_out.norm", "final/norm_out"),
    *rules.dense("proj_out", "final/out"),
  ]
  if cfg.patch_bias:
    table.append(Rule("patch_embed.proj.bias", "patch_in/bias"))
  if cfg.ofs:
    table += rules.dense("ofs_embedding.linear_1", "conditioning/ofs_in")
    table += rules.dense("ofs_embedding.linear_2", "conditioning/ofs_out")
  if cfg.positions == "crop_learned":
    table.append(Rule("patch_embed.pos_embedding", "position_table", rules.ONE))
  return tuple(table)


def _block(cfg):
  """Rules of the blocks, whose index is the first group."""
  table = []
  for theirs, ours in (("norm1", "norm_a"), ("norm2", "norm_m")):
    table += rules.dense(f"{theirs}.linear", f"{ours}/modulation")
    table += rules.norm(f"{theirs}.norm", f"{ours}/norm")
  for name in ("q", "k", "v"):
    bias = cfg.attention_bias
    table += rules.dense(f"attn1.to_{name}", f"attention/{name}", bias)
  for name in ("norm_q", "norm_k"):
    table += rules.norm(f"attn1.{name}", f"attention/{name}")
  table += rules.dense("attn1.to_out.0", "attention/out")
  table += rules.dense("ff.net.0.proj", "mlp/in")
  table += rules.dense("ff.net.2", "mlp/out")
  return rules.in_blocks(table)


def _patches(cfg):
  """Transform of the patches' weight: a convolution's in 1.0, [D, c, p, p]."""
  if cfg.positions == "slice":
    return rules.LINEAR
  patch = cfg.patch[1:]
  return rules.Transform(
    lambda x: x.reshape(x.shape[0], -1).T,
    lambda x: x.T.reshape(x.shape[1], -1, *patch),
  )


def _image_channels(given):
  channels, out = given["in_channels"], given["out_channels"]
  if channels < out:
    raise ValueError(
      f"out_channels must be at most in_channels {channels}, got {out}: the "
      "channels in are those of the noised latents and of an image's"
    )
  return channels - out


def _ofs(given):
  ofs, width = given["ofs_embed_dim"], given["time_embed_dim"]
  if ofs and ofs != width:
    raise ValueError(
      f"ofs_embed_dim must be time_embed_dim {width}, got {ofs}: the two "
      "embeddings are added"
    )
  return bool(ofs)


def _positions(given):
  """Name the positions that the fields' combination stands for."""
  rotary = given["use_rotary_positional_embeddings"]
  learned = given["use_learned_positional_embeddings"]
  if learned and not rotary:
    raise ValueError(
      "use_learned_positional_embeddings needs "
      "use_rotary_positional_embeddings: diffusers has no network with the "
      "first alone"
    )
  if given["patch_size_t"] is not None:
    if learned or not rotary:
      raise ValueError(
        f"patch_size_t {given['patch_size_t']} needs "
        "use_rotary_positional_embeddings and no learned ones, whose table "
        "has a row for each latent frame"
      )
    return "slice"
  if (
    learned
    and (given["sample_frames"] - 1) % (given["temporal_compression_ratio"])
  ):
    raise ValueError(
      f"sample_frames {given['sample_frames']} is not one more than a multiple "
      f"of temporal_compression_ratio {given['temporal_compression_ratio']}: "
      "diffusers would never look at the learned positions"
    )
  if learned:
    return "crop_learned"
  return "crop" if rotary else "sincos"


TRANSFORMER = rules.Component(
  module=denoiser.Denoiser,
  fields=_TRANSFORMER,
  config=_transformer_config,
  example=denoiser.example,
  rules=transformer_rules,
)

# What the released network reads, and what of it is left in older files.
_AUTOENCODER = configs.Table(
  dict(
    block_out_channels=configs.sizes((128, 256, 256, 512), most=8),
    latent_channels=configs.size(16),
    layers_per_block=configs.layers(3),
    norm_eps=configs.number(1e-6),
    norm_num_groups=configs.size(32),
    # diffusers declares a float.
    temporal_compression_ratio=configs.number(4, 1, 64),
    sample_height=configs.whole(480),
    sample_width=configs.whole(720),
    scaling_factor=configs.number(1.15258426, 1e-6, 1e6),
    invert_scale_latents=configs.flag(False),
    down_block_types=configs.words(None, most=8),
    up_block_types=configs.words(None, most=8),
    # Nothing in diffusers looks at these.
    force_upcast=configs.unused(True),
    mid_block_add_attention=configs.unused(True),
    sample_size=configs.unused(None),
  ),
  # The quant convolutions have the image's channels in diffusers, so they
  # cannot run on latents; shift, mean and std are in no pipeline's arithmetic.
  fixed=dict(
    in_channels=3,
    out_channels=3,
    act_fn="silu",
    shift_factor=None,
    latents_mean=None,
    latents_std=None,
    use_quant_conv=False,
    use_post_quant_conv=False,
  ),
)


def _autoencoder_config(
  given: dict[str, Any], dtype: Any
) -> autoencoder.Config:
  """Read the config.json of an AutoencoderKLCogVideoX."""
  channels = tuple(given["block_out_channels"])
  for way in ("Down", "Up"):
    name = f"{way.lower()}_block_types"
    wanted = [f"CogVideoX{way}Block3D"] * len(channels)
    # Four is what diffusers takes where the file is silent.
    found = given[name] or wanted[:1] * 4
    if list(found) != wanted:
      raise ValueError(
        f"{name} must be {wanted}, one for each of block_out_channels "
        f"{channels}, got {schema.quote(found)}; mend it"
      )
  return autoencoder.Config(
    latent_channels=given["latent_channels"],
    channels=channels,
    blocks=given["layers_per_block"],
    groups=given["norm_num_groups"],
    eps=given["norm_eps"],
    time_stride=_whole(given["temporal_compression_ratio"]),
    scale=given["scaling_factor"],
    invert_scale_latents=given["invert_scale_latents"],
    tile=(given["sample_height"] // 2, given["sample_width"] // 2),
    dtype=jnp.dtype(dtype).name,
  )


def _whole(ratio):
  """An integer, if it is one."""
  return int(ratio) if ratio == int(ratio) else ratio


def autoencoder_rules(module: autoencoder.Autoencoder) -> tuple[Rule, ...]:
  """Table of an AutoencoderKLCogVideoX's keys."""
  cfg = module.cfg
  table = [
    *rules.conv(r"(encoder|decoder).conv_(in|out).conv", r"\1/conv_\2"),
    *rules.norm("encoder.norm_out", "encoder/norm_out"),
    *_spatial_norm("decoder.norm_out", "decoder/norm_out"),
    *_resnets(
      r"(encoder).mid_block.resnets.(\d+)", r"\1/mid_block_\2", rules.norm
    ),
    *_resnets(
      r"(decoder).mid_block.resnets.(\d+)", r"\1/mid_block_\2", _spatial_norm
    ),
    *_resnets(
      r"encoder.down_blocks.(\d+).resnets.(\d+)",
      r"encoder/down_\1_block_\2",
      rules.norm,
    ),
    *_resnets(
      r"decoder.up_blocks.(\d+).resnets.(\d+)",
      r"decoder/up_\1_block_\2",
      _spatial_norm,
    ),
  ]
  if len(cfg.channels) > 1:
    for half, way in (("encoder", "down"), ("decoder", "up")):
      theirs = rf"{half}.{way}_blocks.(\d+).{way}samplers.0.conv"
      table += rules.conv(theirs, rf"{half}/{way}_\1_conv", rules.CONV2D)
  return tuple(table)


def _resnets(theirs, ours, norm):
  """Rules of residual blocks; the last group is the norm's or the conv's."""
  return [
    *norm(rf"{theirs}.norm([12])", rf"{ours}/norm_\3"),
    *rules.conv(rf"{theirs}.conv([12]).conv", rf"{ours}/conv_\3"),
    *(
      dataclasses.replace(rule, optional=True)
      for rule in rules.conv(
        f"{theirs}.conv_shortcut", f"{ours}/shortcut", rules.POINT
      )
    ),
  ]


def _spatial_norm(theirs, ours):
  return [
    *rules.norm(f"{theirs}.norm_layer", f"{ours}/norm"),
    *rules.conv(f"{theirs}.conv_y.conv", f"{ours}/scale", rules.POINT),
    *rules.conv(f"{theirs}.conv_b.conv", f"{ours}/shift", rules.POINT),
  ]


AUTOENCODER = rules.Component(
  module=autoencoder.Autoencoder,
  fields=_AUTOENCODER,
  config=_autoencoder_config,
  example=autoencoder.example,
  rules=autoencoder_rules,
)
