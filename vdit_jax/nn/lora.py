"""Low-rank adapters of dense layers: LoRA (arXiv:2106.09685, equation 3).

A layer of kernel W [in, out] with factors a [in, r] and b [r, out] computes
x W + (alpha / r) (x a) b. Training changes the factors alone; W stays as it
was loaded, in any dtype. `variables` is what a network is applied with, and
`merge` puts the factors into the kernels for good.

Adapters are a tree like the params, {"blocks": {"attention": {"q": {"a", "b"},
...}}}; those of blocks that are scanned are stacked as the kernels are.
"""

import dataclasses
import re
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import sharding, trees
from vdit_jax.nn import linear

PARAMS = "denoiser_lora"  # where a run's params hold adapters of its denoiser


@dataclasses.dataclass(frozen=True)
class Lora:
  """Which layers have adapters, and of what rank.

  Attributes:
    rank: r; 0 is no adapters, the weights themselves are trained.
    alpha: the adapters' product counts alpha / r times.
    targets: regexes of the layers' paths, each of a whole path.
    base_dtype: of the weights that are not trained, in memory.
  """

  rank: int = 0
  alpha: float = 128.0
  targets: tuple[str, ...] = ()
  base_dtype: str = "bfloat16"

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f"lora.rank must be at least 0, got {self.rank}")
    if self.rank and not self.alpha > 0:
      raise ValueError(
        f"lora.alpha must be positive, got {self.alpha}; try {self.rank}"
      )
    if self.rank and not self.targets:
      raise ValueError("lora.targets must name at least one layer")

  @property
  def scale(self) -> float:
    """What the product of the factors counts."""
    return self.alpha / self.rank


def of(config: Any) -> Lora:
  """Read a run's config; older ones have no such group, and no adapters."""
  return Lora(**config.lora) if "lora" in config else Lora()


def init(boxed: Any, cfg: Lora, key: jax.Array) -> dict[str, Any]:
  """Initialise adapters: a uniform, b zero, so that they change nothing.

  Args:
    boxed: the network's params, boxed with logical axes; shapes do.
    cfg: which layers.
    key: of a, whose layers draw from keys of their own.

  Returns:
    The adapters, float32, boxed with the kernels' logical axes.

  Raises:
    ValueError: if a target is no layer of the network; lists those there are.
  """
  kernels = _kernels(boxed)
  flat = {}
  for path in _targets(kernels, cfg):
    kernel, names = kernels[path].value, kernels[path].names
    *stack, fan_in, out = kernel.shape
    bound = fan_in**-0.5
    draw = jax.random.fold_in(key, zlib.crc32(path.encode()))
    a = jax.random.uniform(
      draw, (*stack, fan_in, cfg.rank), jnp.float32, -bound, bound
    )
    b = jnp.zeros((*stack, cfg.rank, out), jnp.float32)
    flat[f"{path}/a"] = _box(a, (*names[:-1], None))
    flat[f"{path}/b"] = _box(b, (*names[:-2], None, names[-1]))
  return trees.unflatten(flat)


def variables(params: Any, adapters: Any, scale: float) -> dict[str, Any]:
  """Join params and adapters to what a network's `apply` takes."""
  return {"params": params, linear.ADAPTERS: scaled(adapters, scale)}


def scaled(adapters: Any, scale: float) -> Any:
  """Put the factor of their product into b: adapters whose own is 1."""
  flat = trees.flatten(adapters)
  return trees.unflatten(
    {k: x * scale if k.endswith("/b") else x for k, x in flat.items()}
  )


def merge(params: Any, adapters: Any, scale: float) -> Any:
  """Add the adapters' product to their kernels, in float32.

  Args:
    params: of the network; each leaf keeps its dtype.
    adapters: of it.
    scale: what their product counts.

  Raises:
    ValueError: if the adapters are not of these params; see `check`.
  """
  check(params, adapters, "adapters")
  flat, factors = trees.flatten(params), trees.flatten(adapters)
  for path in paths(adapters):
    a, b = (jnp.asarray(factors[f"{path}/{n}"], jnp.float32) for n in "ab")
    kernel = jnp.asarray(flat[f"{path}/kernel"])
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    merged = kernel.astype(jnp.float32) + scale * product
    flat[f"{path}/kernel"] = merged.astype(kernel.dtype)
  return trees.unflatten(flat)


def check(params: Any, adapters: Any, what: str) -> None:
  """Refuse adapters that are not of a network's params.

  Args:
    params: of the network, or their shapes.
    adapters: to be of it.
    what: the subject of the error, which lists all that does not fit.
  """
  kernels, problems = trees.flatten(params), []
  for path in paths(adapters):
    factors = trees.flatten(adapters)
    a, b = factors[f"{path}/a"].shape, factors[f"{path}/b"].shape
    found = (*a[:-1], b[-1])
    if f"{path}/kernel" not in kernels:
      problems.append(f"no such layer: {path} {found}")
    elif tuple(kernels[f"{path}/kernel"].shape) != found:
      shape = tuple(kernels[f"{path}/kernel"].shape)
      problems.append(f"differs: {path} {found}, the network's is {shape}")
  if problems:
    head = f"{what} do not fit the network, in {len(problems)} of its layers:"
    raise ValueError("\n  ".join([head, *problems]))


def paths(adapters: Any) -> list[str]:
  """List the layers that have adapters; refuse one with half of them."""
  flat = trees.flatten(adapters)
  found = sorted({name.rpartition("/")[0] for name in flat})
  wanted = {f"{path}/{name}" for path in found for name in "ab"}
  if wanted != set(flat):
    raise ValueError(
      f"adapters must be a and b of each layer, but "
      f"{sorted(wanted ^ set(flat))} are not in pairs"
    )
  return found


def _kernels(boxed: Any) -> dict[str, Any]:
  """Boxes of the dense layers' kernels, by the layer's path."""
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  found, _ = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=is_box)
  found = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in found
    if is_box(leaf)
  }
  return {
    name.removesuffix("/kernel"): leaf
    for name, leaf in found.items()
    if name.endswith("/kernel")
  }


def _targets(kernels: dict[str, Any], cfg: Lora) -> list[str]:
  chosen = set()
  for target in cfg.targets:
    found = [path for path in kernels if re.fullmatch(target, path)]
    if not found:
      raise ValueError(
        f"lora.targets: {target!r} is no layer; there are "
        f"{', '.join(sorted(kernels))}"
      )
    chosen |= set(found)
  return sorted(chosen)


def _box(x: jax.Array, names: tuple[str | None, ...]) -> Any:
  return sharding.boxed(lambda: x, names)()
