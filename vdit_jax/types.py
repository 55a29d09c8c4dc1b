"""The values that cross a border: batches, text, conditions, recipes.

Legend of the dim letters, the same everywhere:

  pixels   B batch, F frames, H height, W width, C channels
  latents  B, then f h w c (compressed frames, height, width; channels)
  tokens   L video tokens, M text tokens, S keys of an attention
  network  N heads, K head dim, D width, E mlp width or text width

A lone `t` is diffusion time: float32 in [0, 1], 0 is data and 1 is noise.
"""

import dataclasses
from collections.abc import Mapping
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
    guidance: scale that a distilled denoiser is told, [B].

  A number that is not known of a clip is NaN.
  """

  latents: Array | None = None
  mask: Array | None = None
  image_embeds: Array | None = None
  fps: Array | None = None
  size: Array | None = None
  scores: Array | None = None
  guidance: Array | None = None


def join_conds(*conds: Cond | None) -> Cond | None:
  """Join what different parts tell a denoiser; a field is told by one."""
  told: dict[str, Any] = {}
  for cond in conds:
    fields = vars(cond) if cond is not None else {}
    found = {k: v for k, v in fields.items() if v is not None}
    if twice := sorted(told.keys() & found.keys()):
      raise ValueError(f"{', '.join(twice)} of Cond must be told by one part")
    told |= found
  return Cond(**told) if told else None


class Given(flax.struct.PyTreeNode):
  """Frames that a caller gives, as a denoiser takes them.

  Attributes:
    latents: of the given frames, or of a clip to edit, [B, f, h, w, c]; None
      for neither.
    mask: which latent frames are given and stay as they are, bool [B, f];
      their noise level is 0. None for none.
    cond: what the denoiser is shown beside its latents; None for nothing.
    known: which latents `cond` shows whole, bool [B, f, h, w], of which no
      loss is taken; None for none.
  """

  latents: Array | None = None
  mask: Array | None = None
  cond: Cond | None = None
  known: Array | None = None


class Text(flax.struct.PyTreeNode):
  """Encoded captions: embeds [B, M, E], mask bool [B, M], pooled [B, E]."""

  embeds: Array
  mask: Array
  pooled: Array | None = None


class Captions(flax.struct.PyTreeNode):
  """A batch's captions for one text encoder: as tokens, or encoded before.

  Attributes:
    mask: True where there is a token and not padding, bool [B, M].
    tokens: ids, padded, int32 [B, M]; None when embeddings were read in their
      place.
    embeds: [B, M, E]; None when the tokens were read.
    pooled: one embedding a caption, [B, E]; None where the encoder has none.
  """

  mask: Array
  tokens: Array | None = None
  embeds: Array | None = None
  pooled: Array | None = None


class Batch(flax.struct.PyTreeNode):
  """One step's clips with their captions.

  Attributes:
    video: uint8 in 0..255 as read, [B, F, H, W, 3]; None when the latents'
      posterior was read in its place.
    weight: weight of each clip in the loss, float32 [B]; 0 for a record that
      could not be read and only keeps its place.
    captions: by the name of the text encoder that takes them; empty where
      captions are not read.
    moments: posterior (mean, log-variance) of the normalised latents as two
      arrays [B, f, h, w, c]; None when the video was read.
    cond: numbers known of the clips, NaN where not; None unless asked for.
    frames: frames as read that a denoiser must be given, uint8 [B, n, H, W,
      3], beside `moments`; None otherwise.
    encoded: what networks made of these before, by the network's name, such as
      an image encoder's embeddings of n frames [B, n, S, E]; what is not there
      is encoded in the step.
  """

  video: Array | None
  weight: Array
  captions: Mapping[str, Captions] = dataclasses.field(default_factory=dict)
  moments: tuple[Array, Array] | None = None
  cond: Cond | None = None
  frames: Array | None = None
  encoded: Mapping[str, Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Image:
  """How a denoiser that is given frames is shown them in training.

  Noise whose standard deviation is log-normal, so that a user's image need not
  be as clean as a video's frame, and sometimes no image at all.

  Attributes:
    noise_mean, noise_std: of the logarithm of the noise's deviation, pixels
      being in [-1, 1]; a mean of None is no noise.
    dropout: share of clips whose frames are zeros.
  """

  noise_mean: float | None = None
  noise_std: float = 0.0
  dropout: float = 0.0

  def __post_init__(self):
    if not 0 <= self.dropout < 1:
      raise ValueError(f"image.dropout must be in [0, 1), got {self.dropout}")
    if self.noise_std < 0:
      raise ValueError(
        f"image.noise_std must not be negative, got {self.noise_std}"
      )


@dataclasses.dataclass(frozen=True)
class Expert:
  """A denoiser of a recipe, and the times that it denoises.

  Attributes:
    t_low, t_high: noise levels t_low < t <= t_high are its own; 0 too where
      t_low is 0.
    guidance: scale of the guidance at these times; 1 is none.
    network: its name among the system's networks.
  """

  t_low: float = 0.0
  t_high: float = 1.0
  guidance: float = 1.0
  network: str = "denoiser"


@dataclasses.dataclass(frozen=True)
class Branch:
  """A branch of guidance: what one run of the denoiser is told.

  Attributes:
    text: "prompt" or "negative".
    hides: fields of the Cond that are zeros in it, such as those of `SHOWN`.
  """

  text: str
  hides: tuple[str, ...] = ()


# Fields of a Cond of what is given; the others are told in every branch.
SHOWN = "latents", "mask", "image_embeds"

# Away from the negative prompt, or the null, towards the prompt.
CLASSIFIER_FREE = Branch("negative"), Branch("prompt")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The published way to run a system.

  Attributes:
    experts: one for each denoiser, from low noise to high.
    objective: what the network's output means: "flow", "v", "eps" or "x0".
    schedule: arguments of `diffusion.schedules.Schedule`.
    sampler: name of a function in `diffusion.samplers`.
    steps: sampling steps.
    shift: shift of the sampling times towards noise; 1 is none. Or arguments
      of `diffusion.shifts.SizeShift`, by which it follows the clip's size.
    num_frames, height, width: size of a clip in pixels.
    fps: frames a second of the written video.
    rescale: guidance rescale (arXiv:2305.08891, section 3.4); 0 is none.
    negative_prompt: the guidance's other branch; None is the null.
    spacing: arguments of `diffusion.schedules.Spacing`, for systems that
      space their steps as a released scheduler; None is our own spacing.
    sampler_options: arguments of the sampler, such as eta.
    guidance_kind: how the scale goes with the steps, one of
      `diffusion.guidance.KINDS`.
    guidance_options: arguments of `diffusion.guidance.Course` beside the kind.
    image_guidance: scale of what is shown, in systems whose guidance tells it
      from the text's (three branches); others have no use for it.
    image_guidance_options: arguments of its Course that are not the text's.
  """

  experts: tuple[Expert, ...]
  objective: str
  schedule: dict[str, Any]
  sampler: str
  steps: int
  shift: float | dict[str, Any]
  num_frames: int
  height: int
  width: int
  fps: float
  rescale: float = 0.0
  negative_prompt: str | None = None
  spacing: dict[str, Any] | None = None
  sampler_options: dict[str, Any] = dataclasses.field(default_factory=dict)
  guidance_kind: str = "constant"
  guidance_options: dict[str, Any] = dataclasses.field(default_factory=dict)
  image_guidance: float = 1.0
  image_guidance_options: dict[str, Any] = dataclasses.field(
    default_factory=dict
  )
