"""Print what the sizes of configs/vdit.py hold and cost, counted from code.

  python -m benchmarks.sizes

Nothing is computed. The first table: parameters, and FLOPs of a training step
on a clip of the config's size. The second: what length costs, for one size,
with joint and with factorised attention. A model that wrote the logits of
joint attention down would hold 10,000 times as many numbers for 100 frames as
for one; one that attends as splash attention does holds 100 times as many.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags

from configs import vdit as configs
from vdit_jax import types
from vdit_jax.cost import flops
from vdit_jax.models.vdit import denoiser as vdit
from vdit_jax.training import learner

_SIZE = flags.DEFINE_string("size", "5b", "Of the second table.")
_HEIGHT = flags.DEFINE_integer("height", 60, "Latents of the second table.")
_WIDTH = flags.DEFINE_integer("width", 90, "Latents of the second table.")
_FRAMES = (1, 10, 25, 50, 100)
_TEXT = 226  # tokens
_GIB = 2**30


def main(argv):
  """Print both tables."""
  del argv
  print(sizes())
  print()
  print(lengths(_SIZE.value, _HEIGHT.value, _WIDTH.value))


def sizes() -> str:
  """Parameters and FLOPs of each size."""
  lines = [
    "| size | width | depth | heads | parameters | PFLOPs a clip and step |",
    "|---|---|---|---|---|---|",
  ]
  for size in (name for name in vdit.VARIANTS if name != "digits"):
    cfg = vdit.VARIANTS[size]
    number, count = cost(configs.get_config(size))
    lines.append(
      f"| {size} | {cfg.width:,} | {cfg.depth} | {cfg.heads} | "
      f"{number / 1e9:.3f} B | {count / 1e15:.4f} |"
    )
  return "\n".join(lines)


def cost(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Parameters, and FLOPs of a training step on a clip of `sampling`'s size."""
  config = config.copy_and_resolve_references()
  config.batch_size = 1
  learned, clip = learner.make(config), config.sampling
  batch = learner.batch(config, clip.num_frames, clip.height, clip.width)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = nn.meta.unbox(jax.eval_shape(learned.init, key))
  count = flops.model_flops(
    lambda *args: learned.loss(*args)[0],
    params,
    nn.meta.unbox(learned.frozen),
    batch,
    key,
  )
  return sum(x.size for x in jax.tree.leaves(params)), count


def lengths(size: str, h: int, w: int) -> str:
  """Tokens, FLOPs and bytes of clips of 1 to 100 latent frames."""
  lines = [
    "| latent frames | tokens | TFLOPs forward: joint | x one frame | "
    "factorised | x one frame | GiB between blocks | x one frame | "
    "GiB of one block's logits: joint | x one frame | factorised |",
    "|---" * 11 + "|",
  ]
  first = None
  for f in _FRAMES:
    row = _length(size, f, h, w)
    first = first or row
    times = {name: f"{value / first[name]:,.1f}" for name, value in row.items()}
    lines.append(
      f"| {f} | {row['tokens']:,} | {row['joint'] / 1e12:,.1f} | "
      f"{times['joint']} | {row['factorised'] / 1e12:,.1f} | "
      f"{times['factorised']} | {row['kept'] / _GIB:.2f} | {times['kept']} | "
      f"{row['logits'] / _GIB:,.1f} | {times['logits']} | "
      f"{row['frame_logits'] / _GIB:,.1f} |"
    )
  return "\n".join(lines)


def _length(size: str, f: int, h: int, w: int) -> dict[str, float]:
  """One clip: FLOPs of a forward pass, bytes that training keeps."""
  cfg = vdit.VARIANTS[size]
  tokens = math.prod(n // p for n, p in zip((f, h, w), cfg.patch, strict=True))
  frames = f // cfg.patch[0]
  place = tokens // frames
  like = jax.ShapeDtypeStruct
  text = types.Text(
    embeds=like((1, _TEXT, cfg.text_width), jnp.float32),
    mask=like((1, _TEXT), jnp.bool_),
  )
  x = like((1, f, h, w, cfg.latent_channels), jnp.float32)
  t = like((1,), jnp.float32)
  joint = _forward(size, x, t, text)
  # Half of its blocks attend inside frames and half along time; counting the
  # dearer branch for all would be too much.
  dense = joint - cfg.depth * 4 * tokens * tokens * cfg.width
  per_block = 4 * tokens * cfg.width / 2 * (place + frames)
  return {
    "tokens": tokens,
    "joint": joint,
    "factorised": dense + cfg.depth * per_block,
    # bfloat16, with blocks computed again: the input of each.
    "kept": 2 * cfg.depth * tokens * cfg.width,
    # float32, were they written down.
    "logits": 4 * cfg.heads * tokens * tokens,
    "frame_logits": 4 * cfg.heads * tokens * max(place, frames),
  }


def _forward(size: str, x, t, text) -> int:
  module = vdit.Denoiser(vdit.VARIANTS[size])
  params = jax.eval_shape(module.init, jax.random.key(0), x, t, text)
  params = nn.meta.unbox(params)
  return flops.flops(module.apply, params, x, t, text)


if __name__ == "__main__":
  app.run(main)
