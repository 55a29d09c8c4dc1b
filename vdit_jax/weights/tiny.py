"""A whole released pipeline's folder, tiny and random, of any system.

It has all that a released folder has (the networks, the tokenizer, the
scheduler, an index) in less than 1 MB, and no parameter is zero: what runs on
it runs on a release. Torch is not needed to make it.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from vdit_jax import trees
from vdit_jax.convert import folders, placement
from vdit_jax.models import families
from vdit_jax.weights import component

_CAPTIONS = (
  "a red seven moving left",
  "two dogs run along the beach at sunset",
  "a panda plays the guitar in a quiet bamboo forest",
  "the camera follows a white car up a steep dirt road",
  "a woman walks down a street in the rain, her umbrella bright yellow",
  "snow falls slowly on the roofs of an old town",
)


def variants() -> dict[str, tuple[str, str]]:
  """Name the pipelines that can be made: (system, variant) of each.

  One is called by its system and variant, and by its variant alone where no
  other system has such.
  """
  every = [(s.name, v) for s in families.SYSTEMS.values() for v in s.tiny]
  alone = [v for _, v in every]
  short = {v: (s, v) for s, v in every if alone.count(v) == 1}
  return short | {f"{s}:{v}": (s, v) for s, v in every}


def write(path: epath.PathLike, variant: str, seed: int = 0) -> None:
  """Write a pipeline folder, whole or not at all.

  Args:
    path: the folder to make.
    variant: one of `variants`.
    seed: of the parameters.

  Raises:
    ValueError: if the variant is not known or the path is not free.
  """
  known = variants()
  if variant not in known:
    raise ValueError(f"variant must be one of {sorted(known)}, got {variant!r}")
  name, form = known[variant]
  with folders.replacing(path) as folder:
    system = families.system(name)
    configs = system.tiny[form](folder, list(_CAPTIONS))
    for i, (part, config) in enumerate(configs.items()):
      made = _random(config, seed + i, system.tiny_gains)
      component.save(made, folder / part)


def _random(
  config: dict[str, Any], seed: int, gains: Mapping[str, float]
) -> component.Loaded:
  """Make a component of its config.json, with random parameters."""
  known = families.component(folders.class_name(config))
  module = known.build(config, np.dtype(np.float32))
  shapes = trees.flatten(placement.unboxed(known.abstract(module)))
  rng = np.random.default_rng(seed)
  params = {}
  for path, described in shapes.items():
    x = _draw(rng, path, described.shape)
    for pattern, gain in gains.items():
      x = x * gain if re.search(pattern, path) else x
    params[path] = jnp.asarray(x, jnp.float32)
  return component.Loaded(module, trees.unflatten(params), config)


def _draw(
  rng: np.random.Generator, path: str, shape: tuple[int, ...]
) -> np.ndarray:
  """Draw a parameter as a trained one might be, none of its numbers zero."""
  kind, x = path.rpartition("/")[2], rng.standard_normal(shape)
  if kind == "kernel":
    # [in, out], layers of those, or a convolution's [t, h, w, in, out].
    fan_in = shape[-2] if len(shape) < 4 else np.prod(shape[:-1])  # pyright: ignore[reportGeneralTypeIssues]
    x /= np.sqrt(fan_in)
  elif kind == "scale":
    x = 1 + 0.3 * x
  elif kind == "bias":
    x *= 0.3
  return x
