"""What is given of training's clips, for a denoiser that takes any frames.

  (seed, step), shares --draw--> which frames and regions --show--> Given

Each clip draws a kind of its own: nothing, its first or last frame, both, a
beginning, an end, both of those, single frames, or a region of all frames. The
frames are encoded alone, here or by the cache, and carry a little noise.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vdit_jax import encoding, types
from vdit_jax.models.system import Modules
from vdit_jax.nn import stills as stills_of
from vdit_jax.schema import Field

MOST = 8  # single frames of a clip

KINDS = (
  "first",
  "last",
  "ends",
  "beginning",
  "end",
  "between",
  "single",
  "region",
)


@dataclasses.dataclass(frozen=True)
class Shares:
  """Shares of the clips that are given something; the rest is given nothing.

  Attributes:
    first, last, ends: one frame, or these two.
    beginning, end: a clip's first or last frames, up to all but one.
    between: frames of both ends.
    single: 2 to 8 frames anywhere.
    region: a rectangle of all frames, or what is around it.
    noise: most of the deviation of the noise on what is given, drawn for each
      clip, latents' being 1.
  """

  first: float = 0.1
  last: float = 0.05
  ends: float = 0.1
  beginning: float = 0.15
  end: float = 0.05
  between: float = 0.05
  single: float = 0.1
  region: float = 0.1
  noise: float = 0.1

  def __post_init__(self):
    if sum(self.of_kinds) > 1:
      raise ValueError(
        f"shares of given must sum up to at most 1, got {self.of_kinds}; lower "
        "some, the rest being given nothing"
      )

  @property
  def of_kinds(self) -> tuple[float, ...]:
    """The share of each of `KINDS`."""
    return tuple(getattr(self, kind) for kind in KINDS)


FIELDS = {
  field.name: Field(float, 0, 1) for field in dataclasses.fields(Shares)
}


def shower(shares: Shares) -> Callable[..., types.Given]:
  """Give `show` with its shares settled, as `training.denoiser` takes it."""
  return lambda modules, *clips: show(modules, shares, *clips)


def show(
  modules: Modules,
  shares: Shares,
  frozen: Any,
  batch: types.Batch,
  f: int,
  keys: jax.Array | None,
) -> types.Given:
  """Show a denoiser something of each clip.

  Args:
    modules: the networks.
    shares: of the kinds.
    frozen: weights, with the autoencoder's.
    batch: clips, or their latents and stills; see `Batch.encoded`.
    f: latent frames of a clip.
    keys: of each clip [B]; without them nothing is given.
  """
  if keys is None:
    return types.Given()
  stills = _stills(modules, frozen, batch).astype(jnp.float32)
  shape = (modules.autoencoder.video_frames(f), *stills.shape[2:4])

  def one(key, stills):
    drawn, level, noise = jax.random.split(key, 3)
    deviation = jax.random.uniform(level, maxval=shares.noise)
    noise = deviation * jax.random.normal(noise, stills.shape)
    return stills + noise, draw(drawn, shares, shape)

  stills, known = jax.vmap(one)(keys, stills)
  known = stills_of.erode(known)
  cond = stills_of.lay_out(stills, known, modules.denoiser.cfg.given)
  return types.Given(cond=cond, known=stills_of.whole(cond))


def draw(
  key: jax.Array, shares: Shares, shape: tuple[int, int, int]
) -> jax.Array:
  """Draw what is given of a clip of F frames: bool [F, h, w].

  Args:
    key: of the clip.
    shares: of the kinds.
    shape: F frames, h and w latents.
  """
  keys = dict(
    zip(("kind", "long", "few", "box"), jax.random.split(key, 4), strict=True)
  )
  F, h, w = shape
  at = jnp.arange(F)
  n = jax.random.randint(keys["long"], (2,), 1, max(F, 2))
  few = jax.random.randint(keys["few"], (), 2, MOST + 1)
  order = jax.random.permutation(jax.random.fold_in(keys["few"], 1), F)
  first, last = at == 0, at == F - 1
  frames = {
    "first": first,
    "last": last,
    "ends": first | last,
    "beginning": at < n[0],
    "end": at >= F - n[1],
    "between": (at <= n[0] // 2) | (at >= F - 1 - n[1] // 2),
    "single": order < few,
    "region": at >= 0,
    "nothing": at < 0,
  }
  bounds = jnp.cumsum(jnp.array(shares.of_kinds))
  kind = jnp.sum(jax.random.uniform(keys["kind"]) >= bounds)
  known = jnp.stack(list(frames.values()))[kind]
  box = _box(keys["box"], h, w) | (kind != KINDS.index("region"))
  return known[:, None, None] & box


def _box(key, h, w):
  """Draw a rectangle, or what is around it: bool [h, w]."""
  sides = jax.random.uniform(key, (5,))

  def span(a, b, n):
    low, high = jnp.minimum(a, b) * n, jnp.maximum(a, b) * n
    return (jnp.arange(n) >= jnp.floor(low)) & (jnp.arange(n) < jnp.ceil(high))

  a, b, c, d, turn = sides
  inside = span(a, b, h)[:, None] & span(c, d, w)
  return jnp.where(turn < 0.5, inside, ~inside)


def _stills(modules: Modules, frozen: Any, batch: types.Batch) -> jax.Array:
  """Latents of each frame alone [B, F, h, w, c], of the batch or encoded."""
  if "autoencoder" in batch.encoded:
    return batch.encoded["autoencoder"]
  variables = {"params": frozen["autoencoder"]}
  apply = functools.partial(modules.autoencoder.apply, variables)
  video = encoding.to_float(batch.video)
  return jax.lax.stop_gradient(stills_of.encode(apply, video))
