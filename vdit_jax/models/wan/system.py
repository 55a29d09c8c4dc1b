"""Wan as a system: how it is published to be run, told and shown."""

import dataclasses
import html
import re
from collections.abc import Mapping
from typing import Any

import ftfy
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vdit_jax import inputs, schema, types
from vdit_jax.convert import folders, schedulers
from vdit_jax.models import frame_positions, system
from vdit_jax.models.clip import pictures
from vdit_jax.models.wan import autoencoder, denoiser, keys, tiny

_NEGATIVE = (
  "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体"
  "发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的"
  "手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画"
  "面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_SHAKES, _CUTS = "镜头晃动，", "镜头切换，"  # of image-to-video
_480P, _720P = dict(height=480, width=832), dict(height=720, width=1280)
_INDEX = {  # of model_index.json, beside what every pipeline's has
  "boundary_ratio": schema.Field(float, 0.0, 1.0, optional=True),
  "expand_timesteps": schema.Field(bool),
}


def _recipe(shift: float, steps: int = 50, **changes: Any) -> types.Recipe:
  fields: dict[str, Any] = dict(
    experts=(types.Expert(guidance=5.0),),
    objective="flow",
    schedule=dict(kind="rectified_flow", num_timesteps=1000),
    sampler="unipc",
    sampler_options=dict(order=2, lower_order_final=True),
    spacing=dict(kind="flow_unipc"),
    num_frames=81,
    fps=16.0,
    negative_prompt=_NEGATIVE,
  )
  return types.Recipe(**fields | changes, shift=shift, steps=steps)


def experts(
  boundary: float, low: float, high: float
) -> tuple[types.Expert, ...]:
  """Two denoisers, of which the first takes noise levels from a boundary on.

  Args:
    boundary: noise level, which is the first one's own.
    low, high: guidance of the second and of the first.
  """
  below = float(np.nextafter(np.float32(boundary), np.float32(0)))
  return (
    types.Expert(0.0, below, low, "denoiser_2"),
    types.Expert(below, 1.0, high, "denoiser"),
  )


# The defaults of the releases' own programs.
RECIPES = {
  "1_3b": _recipe(8.0, experts=(types.Expert(guidance=6.0),), **_480P),
  "14b": _recipe(5.0, **_720P),
  "14b_i2v": _recipe(3.0, 40, negative_prompt=_SHAKES + _NEGATIVE, **_480P),
  "14b_flf2v": _recipe(
    16.0, negative_prompt=_CUTS + _SHAKES + _NEGATIVE, **_720P
  ),
  "a14b": _recipe(12.0, 40, experts=experts(0.875, 3.0, 4.0), **_720P),
  "a14b_i2v": _recipe(5.0, 40, experts=experts(0.9, 3.5, 3.5), **_720P),
  "5b": _recipe(5.0, num_frames=121, fps=24.0, height=704, width=1280),
}


def recipe(
  cfg: denoiser.Config, folder: epath.Path | None = None
) -> types.Recipe:
  """Find the published way to run a denoiser of any size.

  Args:
    cfg: of the denoiser.
    folder: of its pipeline, whose model_index.json says whether there is a
      second denoiser, from which noise level on the first one denoises, and
      whether each latent frame has a noise level.
  """
  said = {} if folder is None else _said(folder)
  name = _variant(cfg, said)
  found, boundary = RECIPES[name], said.get("boundary_ratio")
  if len(found.experts) == 1:
    return found
  low, high = (row.guidance for row in found.experts)
  rows = (types.Expert(guidance=high),)  # of one alone
  if boundary is not None:
    rows = experts(boundary, low, high)
  return dataclasses.replace(found, experts=rows)


def _said(folder: epath.Path) -> dict[str, Any]:
  file = folder / folders.PIPELINE
  if not file.exists():
    return {}
  index = inputs.read_json(file)
  schema.check(str(file), index, _INDEX)
  second = any(index.get("transformer_2") or ())
  ratio = index.get("boundary_ratio")
  if second != (ratio is not None):
    raise ValueError(
      f"{file}: boundary_ratio must be there where transformer_2 is, and only "
      f"there, got {ratio}; download it again"
    )
  each = index.get("expand_timesteps", False)
  return {"boundary_ratio": ratio, "expand_timesteps": each}


def _variant(cfg: denoiser.Config, said: Mapping[str, Any]) -> str:
  """Name the published denoiser that one of any size is like."""
  if cfg.image_tokens:
    return "14b_flf2v"
  if cfg.image_width:
    return "14b_i2v"
  each = denoiser.VARIANTS["5b"].latent_channels == cfg.latent_channels
  if said.get("expand_timesteps", each):
    return "5b"
  if said.get("boundary_ratio") is not None or cfg.shows_images:
    return "a14b_i2v" if cfg.shows_images else "a14b"
  wide = cfg.width >= denoiser.VARIANTS["14b"].width
  return "14b" if wide else "1_3b"


def clean(text: str) -> str:
  """Mend a prompt's encoding, HTML entities and white space, as released."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return re.sub(r"\s+", " ", text).strip()


def condition(
  modules: system.Modules,
  apply: system.Apply,
  frames: jax.Array,
  mask: np.ndarray,
  draw: system.Draw,
) -> types.Given:
  """Make what shows a denoiser its given frames.

  Args:
    modules: the networks.
    apply: runs the autoencoder, and the image encoder if there is one.
    frames: video whose given frames matter, [B, F, H, W, 3] in [-1, 1].
    mask: which frames are given, bool [B, F]: the first of image-to-video,
      the first and the last of first-and-last-frame, none of text-to-video.
      2.2's model with a noise level for each latent frame takes the first or
      none.
    draw: not asked: the released pipelines show the posterior's mean.

  Raises:
    ValueError: for frames that the denoiser was not trained to be given.
  """
  del draw
  cfg, given = modules.denoiser.cfg, np.asarray(mask, bool)
  if not cfg.shows_images:
    return _hold_first(modules, apply, frames, given)
  frame_positions.check("this Wan", given, _needs(cfg))
  positions = given[0].nonzero()[0]
  shown = jnp.where(given[..., None, None, None], frames, 0)
  latents = apply(shown, method="encode")
  f, h, w = latents.shape[1:4]
  stride = cfg.mask_channels
  told = np.concatenate([given[:, :1]] * (stride - 1) + [given], axis=1)
  told = told.reshape(len(given), f, 1, 1, stride).astype(np.float32)
  told = jnp.broadcast_to(jnp.asarray(told), (len(given), f, h, w, stride))
  cond = types.Cond(latents=latents, mask=told)
  if cfg.image_width:
    side = modules["image_encoder"].cfg.image
    images = frames[:, positions].reshape(-1, *frames.shape[2:])
    images = pictures.prepare(images, side)
    embeds = apply(images, method="penultimate", network="image_encoder")
    embeds = embeds.reshape(len(given), -1, embeds.shape[-1])
    cond = cond.replace(image_embeds=embeds)
  return types.Given(cond=cond)


def _hold_first(modules, apply, frames, given) -> types.Given:
  """Give the first latent frame, which stays, where the model knows of it."""
  if not given.any():
    return types.Given()
  if not modules.autoencoder.cfg.residual:
    raise ValueError(
      "this Wan takes text alone, but frames are given; use an image-to-video "
      "model, or 2.2's TI2V-5B"
    )
  frame_positions.check("this Wan", given, (0,))
  f, h, w, c = modules.autoencoder.latent_shape(*frames.shape[1:4])
  latents = apply(frames[:, :1], method="encode")
  rest = jnp.zeros((len(given), f - 1, h, w, c), latents.dtype)
  latents = jnp.concatenate([latents, rest], axis=1)
  held = np.broadcast_to(np.arange(f) == 0, (len(given), f))
  return types.Given(latents=latents, mask=jnp.asarray(held))


def _needs(cfg: denoiser.Config) -> tuple[int, ...]:
  if cfg.image_tokens:
    return (0, -1)
  return (0,) if cfg.shows_images else ()


def check(modules: system.Modules, where: str) -> None:
  """Refuse networks of different systems."""
  system.check_widths(modules, where)
  cfg, stride = modules.denoiser.cfg, modules.autoencoder.cfg.time_stride
  if cfg.shows_images:
    what = "frames a latent frame of transformer's mask and vae"
    system.check_equal(where, what, cfg.mask_channels, stride)
  if not cfg.image_width:
    return
  if "image_encoder" not in modules.networks:
    raise ValueError(
      f"{where} has no image_encoder, which its transformer needs; download "
      "the pipeline again"
    )
  images = modules["image_encoder"].cfg
  what = "widths of images of transformer and image_encoder"
  system.check_equal(where, what, cfg.image_width, images.width)
  if cfg.image_tokens:
    what = "tokens of two images of transformer and image_encoder"
    system.check_equal(where, what, cfg.image_tokens, 2 * images.tokens)


SYSTEM = system.System(
  name="wan",
  networks=(
    system.Network(
      family="wan",
      kind="denoiser",
      module=denoiser.Denoiser,
      config=denoiser.Config,
      variants=denoiser.VARIANTS,
      example=denoiser.example,
      layers=("depth",),
      classes={"WanTransformer3DModel": keys.TRANSFORMER},
    ),
    system.Network(
      family="wan",
      kind="autoencoder",
      module=autoencoder.Autoencoder,
      config=autoencoder.Config,
      variants=autoencoder.VARIANTS,
      example=autoencoder.example,
      classes={"AutoencoderKLWan": keys.AUTOENCODER},
      layers=("blocks",),
    ),
  ),
  places={
    "autoencoder": system.Place("vae"),
    "text_encoder": system.Place("text_encoder", "tokenizer"),
    "denoiser": system.Place("transformer"),
    "denoiser_2": system.Place("transformer_2", optional=True),
    "image_encoder": system.Place("image_encoder", optional=True),
  },
  pipelines=("WanPipeline", "WanImageToVideoPipeline"),
  schedulers={**schedulers.UNIPC, **schedulers.FLOW_EULER},
  not_float16="UMT5's activations are beyond the largest float16",
  check=check,
  recipe=recipe,
  text={"text_encoder": system.TextRule("zeroed", null="prompt", clean=clean)},
  text_lengths=lambda cfg: {"text_encoder": cfg.text_tokens},
  needs=_needs,
  condition=condition,
  adapters=system.Adapters(
    targets=(r"blocks/(self|cross)_attention/(q|k|v|out)",),
    spellings=(keys.ORIGINAL,),
  ),
  tiny=tiny.VARIANTS,
  tiny_gains=tiny.GAINS,
  baseline="vdit_jax.models.wan.baseline",
)
