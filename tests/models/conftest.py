"""Weights of which none is zero."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def randomise() -> Callable[..., Any]:
  """Fill a tree of shapes with normals, kernels scaled by their fan-in.

  Networks begin with gates and outputs at zero, which hide whatever lies
  behind them: a law that holds at initialisation may hold of nothing.
  """
  return _randomise


def _randomise(tree: Any, seed: int = 0) -> Any:
  rng = np.random.default_rng(seed)
  draw = lambda path, leaf: _draw(rng, path, leaf)
  return jax.tree_util.tree_map_with_path(draw, tree)


def _draw(rng: np.random.Generator, path: tuple, leaf: Any) -> jax.Array:
  name = path[-1].key
  x = rng.standard_normal(leaf.shape)
  if name == "kernel":
    # [in, out], a stack of those, or a convolution's [t, h, w, in, out].
    fan_in = leaf.shape[-2] if len(leaf.shape) < 5 else leaf.shape[:-1]
    x = x / np.sqrt(np.prod(fan_in))
  elif name == "scale":
    x = 1 + 0.3 * x
  elif name.endswith("_std"):
    x = 0.5 + np.abs(x)
  elif name != "embedding":
    x = 0.3 * x
  return jnp.asarray(x, leaf.dtype)
