"""The values that cross a border: batches, text, conditions, recipes.

Legend of the dim letters, the same everywhere:

  pixels   B batch, F frames, H height, W width, C channels
  latents  B, then f h w c (compressed frames, height, width; channels)
  tokens   L video tokens, M text tokens, S keys of an attention
  network  N heads, K head dim, D width, E mlp width or text width

A lone `t` is diffusion time: float32 in [0, 1], 0 is data and 1 is noise.
"""

import dataclasses
from typing import Any

import flax.struct
import jax

Array = jax.Array


class Cond(flax.struct.PyTreeNode):
  """What conditions a denoiser beside its text; every field is optional.

  Attributes:
    latents: given latents, zero where not given, [B, f, h, w, *].
    mask: 1 where `latents` are given, [B, f, h, w, *].
    image_embeds: embedding of a conditioning image, [B, S, E].
    fps: frames a second, [B].
    size: height and width in pixels, [B, 2].
    scores: scores such as aesthetic or motion, [B, *].

  A number that is not known of a clip is NaN.
  """

  latents: Array | None = None
  mask: Array | None = None
  image_embeds: Array | None = None
  fps: Array | None = None
  size: Array | None = None
  scores: Array | None = None


class Batch(flax.struct.PyTreeNode):
  """One step's clips with their captions.

  Attributes:
    video: uint8 in 0..255 as read, [B, F, H, W, 3]; None when the latents'
      posterior was read in its place.
    tokens: caption's token ids, padded, int32 [B, M]; None when their
      embeddings were read in their place.
    mask: True where `tokens` is a token and not padding, bool [B, M].
    weight: weight of each clip in the loss, float32 [B]; 0 for a record that
      could not be read and only keeps its place.
    moments: posterior (mean, log-variance) of the normalised latents as two
      arrays [B, f, h, w, c]; None when the video was read.
    embeds: captions' embeddings by a frozen text encoder, [B, M, E]; None
      when the tokens were read.
    cond: numbers known of the clips, NaN where not; None unless asked for.
    image: first frames as read, uint8 [B, H, W, 3], beside `moments` for a
      denoiser that is shown them; None otherwise.
  """

  video: Array | None
  tokens: Array | None
  mask: Array
  weight: Array
  moments: tuple[Array, Array] | None = None
  embeds: Array | None = None
  cond: Cond | None = None
  image: Array | None = None


class Text(flax.struct.PyTreeNode):
  """Encoded captions: embeds [B, M, E], mask bool [B, M], pooled [B, E]."""

  embeds: Array
  mask: Array
  pooled: Array | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The published way to run a system.

  Attributes:
    denoisers: rows (t_low, t_high, guidance): one row for each expert.
    objective: what the network's output means: "flow", "v", "eps" or "x0".
    schedule: arguments of `diffusion.schedules.Schedule`.
    sampler: name of a function in `diffusion.samplers`.
    steps: sampling steps.
    shift: shift of the sampling times towards noise; 1 is none.
    num_frames, height, width: size of a clip in pixels.
    fps: frames a second of the written video.
    rescale: guidance rescale (arXiv:2305.08891, section 3.4); 0 is none.
    negative_prompt: the guidance's other branch; None is the learned null.
    spacing: arguments of `diffusion.schedules.Spacing`, for systems that
      sample at the timesteps of training; None spaces by `shift`.
    dynamic_guidance: whether guidance is of `diffusion.guidance.dynamic`.
    sees_padding: whether tokens of text see the padding behind them.
  """

  denoisers: tuple[tuple[float, float, float], ...]
  objective: str
  schedule: dict[str, Any]
  sampler: str
  steps: int
  shift: float
  num_frames: int
  height: int
  width: int
  fps: float
  rescale: float = 0.0
  negative_prompt: str | None = None
  spacing: dict[str, Any] | None = None
  dynamic_guidance: bool = False
  sees_padding: bool = False
