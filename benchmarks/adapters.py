"""What adapters lose in merged weights, and cost beside them.

  python -m benchmarks.adapters

A layer of bfloat16 weights of standard deviation 0.02 is changed by adapters
of rank 16. Of the change each way keeps a share (its projection on what it
should be), and its output has an error, relative to that of the change alone
in float32, for normal inputs. Then a small denoiser runs with its adapters
beside its weights and with merged ones, in turns: CPU seconds, to which other
work on the machine adds little.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from vdit_jax import types
from vdit_jax.models.cogvideox import denoiser, system
from vdit_jax.nn import linear, lora

_REPEATS = flags.DEFINE_integer("repeats", 40, "Times each thing is timed.", 1)

_WIDTH, _RANK, _STD = 512, 16, 0.02
_CHANGES = 3e-5, 1e-4, 1e-3
_RANKS = 16, 128
_CFG = denoiser.Config(
  depth=2,
  heads=8,
  text_width=64,
  text_tokens=64,
  positions="sincos",
  sample=(2, 32, 32),
  dtype="float32",
)


def losses(change: float) -> dict[str, tuple[float, float]]:
  """Share kept and error of the output, by how a change is computed."""
  rng = np.random.default_rng(0)
  draw = lambda *s: rng.standard_normal(s).astype(np.float32)
  weights = jnp.asarray(_STD * draw(_WIDTH, _WIDTH), jnp.bfloat16)
  before = np.asarray(weights, np.float32)
  a, b, x = draw(_WIDTH, _RANK), draw(_RANK, _WIDTH), draw(256, _WIDTH)
  b *= change / np.std(a @ b)
  product, factors = a @ b, {"q": {"a": a, "b": b}}
  merge = lambda w, key=None: lora.merge({"q": {"kernel": w}}, factors, 1, key)
  layer = linear.dense(
    _WIDTH, (None, None), name="q", dtype=jnp.float32, bias=False
  )
  attached = lora.attach({"q": {"kernel": weights}}, factors)["q"]
  # The layer is linear: of the unit vectors it gives its own matrix.
  beside = layer.apply({"params": attached}, np.eye(_WIDTH, dtype=np.float32))
  ways = {
    "beside": beside,
    "merged, to the nearest": (before + product).astype(jnp.bfloat16),
    "merged, by chance": merge(weights, jax.random.key(0))["q"]["kernel"],
    "merged in float32": merge(before)["q"]["kernel"],
  }
  found = {}
  for name, after in ways.items():
    moved = np.asarray(after, np.float32) - before
    kept = np.vdot(moved, product) / np.vdot(product, product)
    error = np.linalg.norm(x @ (moved - product)) / np.linalg.norm(x @ product)
    found[name] = float(kept), float(error)
  return found


def cost(rank: int, repeats: int) -> dict[str, float]:
  """CPU seconds of a denoiser, with its adapters beside or merged."""
  inputs = _inputs()
  module = denoiser.Denoiser(_CFG)
  boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  params = nn.meta.unbox(module.init(jax.random.key(0), *inputs)["params"])
  cfg = lora.Lora(rank=rank, targets=system.SYSTEM.adapters.targets)
  factors = nn.meta.unbox(lora.init(boxed, cfg, jax.random.key(1)))
  run = jax.jit(lambda params: module.apply({"params": params}, *inputs))
  ways = {
    "beside": lora.attach(params, factors),
    "merged": lora.merge(params, factors, 1.0),
  }
  calls = {name: lambda p=p: run(p) for name, p in ways.items()}
  return _cpu_seconds(calls, repeats)


def _cpu_seconds(
  runs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
  """Least CPU seconds of each run, in turns after one call of each."""
  least = dict.fromkeys(runs, float("inf"))
  for turn in range(repeats + 1):
    for name, run in runs.items():
      start = time.process_time()
      jax.block_until_ready(run())
      if turn:
        least[name] = min(least[name], time.process_time() - start)
  return least


def _inputs():
  f, h, w = _CFG.sample
  embeds = jnp.zeros((1, _CFG.text_tokens, _CFG.text_width))
  text = types.Text(embeds, jnp.ones(embeds.shape[:2], bool))
  latents = jnp.ones((1, f, h, w, _CFG.latent_channels))
  return latents, jnp.ones(1), text


def main(argv: list[str]) -> None:
  """Log both."""
  del argv
  logging.set_verbosity(logging.INFO)
  for change in _CHANGES:
    for name, (kept, error) in losses(change).items():
      logging.info("%g %s: kept %.2f, error %.2f", change, name, kept, error)
  f, h, w = (n // p for n, p in zip(_CFG.sample, _CFG.patch, strict=True))
  tokens = f * h * w + _CFG.text_tokens
  for rank in _RANKS:
    found = cost(rank, _REPEATS.value)
    logging.info(
      "width %d, %d tokens, rank %d: %.3f s beside, %.3f s merged, ratio %.2f",
      *(_CFG.width, tokens, rank, found["beside"], found["merged"]),
      found["beside"] / found["merged"],
    )


if __name__ == "__main__":
  app.run(main)
