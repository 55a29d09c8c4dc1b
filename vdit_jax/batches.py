"""From prompts to videos, one batch after another.

  Asked --make--> videos of each batch [b, F, H, W, 3], when they are made

`pipeline` has the stages, which this puts one behind the other. Nothing is held
that grows with the number of clips but their prompts and what is given for
them. A batch depends on nothing but itself, so any of them can be made again.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from vdit_jax import conditioning, sampling, types

Size = tuple[int, int, int]  # frames, height, width in pixels

_AHEAD = 32  # prompts whose texts are held, where networks take turns


@dataclasses.dataclass(frozen=True)
class Noise:
  """Standard normal noise in place of the seed's; None is the seed's.

  Attributes:
    initial: [B, f, h, w, c].
    image: of the posterior of a first frame that is shown, [B, 1, h, w, c].
    steps: of a stochastic sampler, [steps, B, f, h, w, c].
  """

  initial: np.ndarray | None = None
  image: np.ndarray | None = None
  steps: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
  """What videos are made of, all of it settled and checked.

  Attributes:
    encode: gives the text of a part of the clips, as `stages.sample` wants it.
    size: of the videos.
    shape: of the latents, [B, f, h, w, c].
    how: they are sampled.
    frames: that are given, [B, F, H, W, 3], or what gives those of a part.
    frame_mask: which of them are, [B, F], or which pixels [B, F, H, W].
    noise: in place of the keys'.
    keys: of the clips' noise, [B].
    cond: what is known of the clips.
  """

  encode: Callable[[slice], types.Text]
  size: Size
  shape: tuple[int, ...]
  how: sampling.Sampling
  frames: np.ndarray | Callable[[slice], np.ndarray] | None
  frame_mask: np.ndarray | None
  noise: Noise
  keys: jax.Array
  cond: types.Cond | None


class Stages(Protocol):
  """The stages, as `pipeline.Pipeline` has them; networks may take turns."""

  @property
  def sequential(self) -> bool:
    """Whether one network is held at a time."""
    ...

  @property
  def restores(self) -> bool:
    """Whether what is given comes back as it is."""
    ...

  def give(self, size: Size, shape: Any, frames: Any, *, draw: Any) -> Any:
    """Encode given frames."""

  def sample(self, text: types.Text, *, noise: Any, **options: Any) -> Any:
    """Sample latents."""

  def decode(self, latents: Any, num_frames: int | None = None) -> Any:
    """Decode latents."""

  def free(self, *names: str, until: Any = None) -> None:
    """Let go of networks."""


def make(
  stages: Stages,
  asked: Asked,
  parts: Sequence[slice],
  text_encoders: Sequence[str],
) -> Iterator[np.ndarray]:
  """Make the videos of one batch after another.

  Args:
    stages: that make them.
    asked: what to make.
    parts: of the clips that are a batch each.
    text_encoders: networks that are not needed any more by a batch whose text
      is encoded.
  """
  texts = _texts(stages, asked, parts, text_encoders)
  for rows in tqdm.tqdm(parts, "videos", unit="batch", disable=len(parts) == 1):
    shown = _shown(asked, rows)
    given = _give(stages, asked, rows, shown)
    latents = _sample(stages, asked, rows, next(texts), given)
    video = stages.decode(latents, asked.size[0])
    stages.free("autoencoder")
    if stages.restores:
      video = conditioning.restore(shown, video)
    if video.shape[1] != asked.size[0] and rows is parts[0]:
      logging.warning(
        "num_frames %d comes out as %d frames", asked.size[0], video.shape[1]
      )
    yield np.clip(video, -1, 1)


def parts(total: int, size: int | None) -> list[slice]:
  """Divide a batch into parts of a size; None leaves it whole."""
  if size is not None and size < 1:
    raise ValueError(f"batch_size must be at least 1, got {size}")
  size = size or total
  return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def rows_of(tree: Any, rows: slice, times: int = 1) -> Any:
  """Take a part of a batch that stands `times` behind itself."""
  take = lambda x: [y[rows] for y in jnp.split(jnp.asarray(x), times)]
  return jax.tree.map(lambda x: jnp.concatenate(take(x)), tree)


def _texts(
  stages: Stages,
  asked: Asked,
  parts: Sequence[slice],
  text_encoders: Sequence[str],
) -> Iterator[types.Text]:
  """Give the text of each batch; where networks take turns, many at once.

  Each batch is encoded by itself, so that its text does not depend on which
  others are made.
  """
  size, most = parts[0].stop - parts[0].start, 1
  if stages.sequential:
    most = max(_AHEAD // size, 1)
  for begin in range(0, len(parts), most):
    found = [
      jax.device_get(asked.encode(rows)) if most > 1 else asked.encode(rows)
      for rows in parts[begin : begin + most]
    ]
    stages.free(*text_encoders, until=found)
    yield from found


def _shown(asked: Asked, rows: slice) -> conditioning.Frames:
  """Take what is given of a batch."""
  frames, mask = asked.frames, asked.frame_mask
  if callable(frames):
    frames = frames(rows)
  elif frames is not None:
    frames = frames[rows]
  mask = None if mask is None else mask[rows]
  return conditioning.Frames(frames, mask, asked.how.strength)


def _give(
  stages: Stages, asked: Asked, rows: slice, shown: conditioning.Frames
) -> types.Given:
  """Encode the frames of a batch, and tell what is known of its clips."""
  keys, image = asked.keys[rows], asked.noise.image
  image = None if image is None else image[rows]
  draw = functools.partial(_draw, keys, image)
  shape = len(keys), *asked.shape[1:]
  given = stages.give(asked.size, shape, shown, draw=draw)
  cond = types.join_conds(given.cond, rows_of(asked.cond, rows))
  return given.replace(cond=cond)


def _sample(stages: Stages, asked: Asked, rows: slice, text, given) -> Any:
  """Sample the latents of a batch."""
  keys, noise = asked.keys[rows], asked.noise
  initial = None if noise.initial is None else noise.initial[rows]
  shape = len(keys), *asked.shape[1:]
  latents = stages.sample(
    text,
    noise=sampling.initial_noise(keys, shape, initial),
    how=asked.how,
    key=jax.vmap(jax.random.fold_in, (0, None))(keys, 1),
    given=given,
    step_noise=None if noise.steps is None else noise.steps[:, rows],
  )
  networks = (expert.network for expert in asked.how.experts)
  stages.free(*networks, until=latents)
  return latents


def _draw(keys, given, shape: tuple[int, ...]) -> jax.Array:
  """Draw what samples a posterior [B, *shape] from keys [B], or take it."""
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2)
  return sampling.initial_noise(keys, (len(keys), *shape), given, "image noise")
