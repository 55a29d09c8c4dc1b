"""CogVideoX as a system: how it is published to be run, told and shown."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vdit_jax import types
from vdit_jax.convert import schedulers
from vdit_jax.models import frame_positions, system
from vdit_jax.models.cogvideox import autoencoder, denoiser, keys, tiny
from vdit_jax.nn import sizes


def _recipe(snr_shift: float, **size: Any) -> types.Recipe:
  return types.Recipe(
    experts=(types.Expert(guidance=6.0),),
    objective="v",
    schedule=dict(
      kind="scaled_linear",
      beta_start=0.00085,
      beta_end=0.012,
      zero_terminal_snr=True,
      snr_shift=snr_shift,
    ),
    sampler="ddim",
    steps=50,
    shift=1.0,
    spacing=dict(kind="trailing"),
    negative_prompt="",
    **size,
  )


_480P = dict(num_frames=49, height=480, width=720, fps=8.0)
_768P = dict(num_frames=81, height=768, width=1360, fps=16.0)
RECIPES = {
  "2b": _recipe(3.0, **_480P),
  **dict.fromkeys(("5b", "5b_i2v"), _recipe(1.0, **_480P)),
  **dict.fromkeys(("1_5_5b", "1_5_5b_i2v"), _recipe(1.0, **_768P)),
}


def recipe(
  cfg: denoiser.Config, folder: epath.Path | None = None
) -> types.Recipe:
  """Find the published way to run a denoiser of any size.

  It is that of the variant with its positions and conditions, at its own size
  if it was trained at another one. The folder has no say in it.
  """
  del folder
  form = lambda cfg: (cfg.positions, cfg.image_channels > 0)
  variants = denoiser.VARIANTS
  name = next((k for k, v in variants.items() if form(v) == form(cfg)), None)
  if name is None:
    known = [form(v) for v in variants.values()]
    raise ValueError(
      f"(positions, has images) must be one of {known}, got {form(cfg)}"
    )
  if cfg.sample == variants[name].sample:
    return RECIPES[name]
  frames = (cfg.sample[0] - 1) * cfg.time_stride + 1
  h, w = (n * cfg.space_stride for n in cfg.sample[1:])
  size = dict(num_frames=frames, height=h, width=w)
  return dataclasses.replace(RECIPES[name], **size)


def latent_shape(
  modules: system.Modules, num_frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
  """Latents (f, h, w, c) to denoise for a video; refuse what does not fit.

  f is filled up to whole patches, as released: the first f - (n + 1) latent
  frames of a video of `time_stride` n + 1 frames are denoised with the others
  and dropped before they are decoded.
  """
  cfg = modules.denoiser.cfg
  f = sizes.latent_frames(num_frames, cfg.time_stride)
  space = [
    sizes.whole(name, size, cfg.space_stride * p) * p
    for name, size, p in zip(
      ("height", "width"), (height, width), cfg.patch[1:], strict=True
    )
  ]
  return f + -f % cfg.patch[0], *space, cfg.latent_channels


def fill(latents: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
  """Repeat the first of latents [B, f, h, w, c] until patches are whole.

  1.5 was trained so; where it samples, these frames are dropped.
  """
  first = [latents[:, :1]] * (-latents.shape[1] % patch[0])
  return jnp.concatenate([*first, latents], axis=1)


def unfill(latents: jax.Array, f: int) -> jax.Array:
  """Leave out the first of latents, which fill up patches; f stay."""
  return latents[:, latents.shape[1] - f :]


def condition(
  modules: system.Modules,
  apply: system.Apply,
  frames: jax.Array,
  mask: np.ndarray,
  draw: system.Draw,
) -> types.Given:
  """Make the condition that shows a denoiser its given frames.

  Args:
    modules: the networks.
    apply: runs the autoencoder.
    frames: video whose given frames matter, [B, F, H, W, 3] in [-1, 1].
    mask: which frames are given, bool [B, F]. Image-to-video takes the first
      alone; text-to-video none.
    draw: noise of the posterior's sample, as released, or None for its mean.

  Returns:
    A Cond whose latents [B, f, h, w, c] are the first frame's, then zeros;
    nothing for text-to-video.
  """
  cfg, given = modules.denoiser.cfg, np.asarray(mask, bool)
  if not cfg.image_channels:
    if given.any():
      images = sorted(k for k in denoiser.VARIANTS if k.endswith("_i2v"))
      raise ValueError(
        "this CogVideoX takes text alone, but frames are given; use one of "
        f"{images}"
      )
    return types.Given()
  frame_positions.check("CogVideoX's image-to-video", given, (0,))
  f, h, w, _ = latent_shape(modules, *frames.shape[1:4])
  noise = draw((1, h, w, cfg.image_channels))
  image = apply(frames[:, :1], noise, method="encode_condition")
  rest = jnp.zeros((len(frames), f - 1, h, w, image.shape[-1]), image.dtype)
  latents = jnp.concatenate([image, rest], axis=1)
  return types.Given(cond=types.Cond(latents=latents))


def check(modules: system.Modules, where: str) -> None:
  """Refuse networks of different systems, which differ in strides too."""
  cfg, vae = modules.denoiser.cfg, modules.autoencoder.cfg
  for what, field in (
    ("frames a latent frame of transformer and vae", "time_stride"),
    ("pixels a latent of transformer and vae", "space_stride"),
  ):
    system.check_equal(where, what, getattr(cfg, field), getattr(vae, field))
  system.check_widths(modules, where)


def _needs(cfg: denoiser.Config) -> tuple[int, ...]:
  return (0,) if cfg.image_channels else ()


# What diffusers 0.42.1 takes where a scheduler_config.json is silent.
_scheduler = functools.partial(
  schedulers.discrete,
  beta_start=0.00085,
  beta_end=0.012,
  beta_schedule="scaled_linear",
  snr_shift_scale=3.0,
  # Nothing in the two schedulers looks at these.
  clip_sample=True,
  clip_sample_range=1.0,
  sample_max_value=1.0,
)


SYSTEM = system.System(
  name="cogvideox",
  networks=(
    system.Network(
      family="cogvideox",
      kind="denoiser",
      module=denoiser.Denoiser,
      config=denoiser.Config,
      variants=denoiser.VARIANTS,
      example=denoiser.example,
      layers=("depth",),
      classes={"CogVideoXTransformer3DModel": keys.TRANSFORMER},
    ),
    system.Network(
      family="cogvideox",
      kind="autoencoder",
      module=autoencoder.Autoencoder,
      config=autoencoder.Config,
      variants=autoencoder.VARIANTS,
      example=autoencoder.example,
      classes={"AutoencoderKLCogVideoX": keys.AUTOENCODER},
      layers=("blocks",),
      former_names=("cogvideox_vae",),
    ),
  ),
  places={
    "autoencoder": system.Place("vae"),
    "text_encoder": system.Place("text_encoder", "tokenizer"),
    "denoiser": system.Place("transformer"),
  },
  pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
  schedulers={
    "CogVideoXDDIMScheduler": _scheduler("ddim"),
    "CogVideoXDPMScheduler": _scheduler("dpmpp_2m_sde"),
  },
  not_float16="T5's activations are beyond the largest float16",
  check=check,
  recipe=recipe,
  text={"text_encoder": system.TextRule(padding="seen", null="prompt")},
  text_lengths=lambda cfg: {"text_encoder": cfg.text_tokens},
  latent_shape=latent_shape,
  fill=fill,
  unfill=unfill,
  needs=_needs,
  # arXiv:2408.06072, section 3.1, and its code.
  image=types.Image(noise_mean=-3.0, noise_std=0.5, dropout=0.05),
  condition=condition,
  adapters=system.Adapters(targets=(r"blocks/attention/(q|k|v|out)",)),
  tiny=tiny.VARIANTS,
  tiny_gains=tiny.GAINS,
  baseline="vdit_jax.models.cogvideox.baseline",
)
