"""Low-rank adapters of dense layers: LoRA (arXiv:2106.09685, equation 3).

A layer of kernel W [in, out] with factors a [in, r] and b [r, out] computes
x W + (alpha / r) (x a) b. Training changes the factors alone; W stays as it
was loaded, in any dtype. `attach` puts the factors beside the kernels, and
whatever takes the network's params computes with them then: training, sampling
and evaluation alike. `merge` puts them into the kernels for good, and into
kernels of bfloat16 nothing small fits: half the distance between two of its
numbers near 0.02 is 6e-5, and a fine-tuning changes weights by less.

Adapters are a tree like the params, {"blocks": {"attention": {"q": {"a", "b"},
...}}}; those of blocks that are scanned are stacked as the kernels are.
"""

import dataclasses
import re
import zlib
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax import schema, sharding, trees

PARAMS = "denoiser_lora"  # where a run's params hold adapters of its denoiser
MOST_RANK = 8192  # of factors that are read; more is no low rank

FIELDS = {
  "rank": schema.Field(int, 0, MOST_RANK),
  "alpha": schema.Field(float, 1e-6, optional=True),
  "targets": schema.Field(list, each=schema.Field(str, 1)),
  "base_dtype": schema.Field(str, choices=("bfloat16", "float16", "float32")),
  "init_from": schema.Field(str),
}


@dataclasses.dataclass(frozen=True)
class Lora:
  """Which layers have adapters, and of what rank.

  Attributes:
    rank: r; 0 is no adapters, the weights themselves are trained.
    alpha: the adapters' product counts alpha / r times; None is once, whatever
      the rank is.
    targets: regexes of the layers' paths, each of a whole path.
    base_dtype: of the weights that are not trained, in memory.
    init_from: file of adapters that training begins from, see
      `weights.adapters`; "" begins from ones that change nothing.
  """

  rank: int = 0
  alpha: float | None = None
  targets: tuple[str, ...] = ()
  base_dtype: str = "bfloat16"
  init_from: str = ""

  def __post_init__(self):
    schema.check("config.lora", dataclasses.asdict(self), FIELDS)
    if self.rank and not self.targets:
      raise ValueError("config.lora.targets must name at least one layer")
    if self.init_from and not self.rank:
      raise ValueError(
        f"config.lora.init_from={self.init_from!r} needs adapters; set "
        "config.lora.rank to theirs"
      )

  @property
  def scale(self) -> float:
    """What the product of the factors counts."""
    return 1.0 if self.alpha is None else self.alpha / self.rank


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
  for path in check_targets(kernels, cfg):
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


def attach(params: Any, adapters: Any, scale: float = 1.0) -> Any:
  """Put adapters beside their kernels, to be computed with as they are.

  Args:
    params: of the network.
    adapters: of it.
    scale: what their product counts.

  Returns:
    The params of the network with them, for `apply`.

  Raises:
    ValueError: if the adapters are not of these params; see `check`. Or some
      are there.
  """
  check(params, adapters, "adapters")
  flat, beside = trees.flatten(params), trees.flatten(scaled(adapters, scale))
  if twice := sorted(set(flat) & set(beside)):
    raise ValueError(
      f"params must have no adapters yet, but have {twice[0]}; add both up"
    )
  return trees.unflatten(flat | beside)


def scaled(adapters: Any, scale: float) -> Any:
  """Put the factor of their product into b: adapters whose own is 1."""
  flat = trees.flatten(adapters)
  return trees.unflatten(
    {k: x * scale if k.endswith("/b") else x for k, x in flat.items()}
  )


def add(one: Any, other: Any) -> Any:
  """Add adapters of a network: the sum of their products, the ranks' too."""
  flat, more = trees.flatten(one), trees.flatten(other)
  for path, x in more.items():
    if path in flat:
      x = np.concatenate([flat[path], x], -1 if path.endswith("/a") else -2)
    flat[path] = x
  return trees.unflatten(flat)


def merge(
  params: Any, adapters: Any, scale: float, key: jax.Array | None = None
) -> Any:
  """Add the adapters' product to their kernels, in float32.

  A kernel of fewer bits is rounded up or down by chance (key), so that what
  is added is right on the average: rounded to the nearest, a change that is
  small beside the distance of two numbers is lost, the same in every weight.

  Args:
    params: of the network; each leaf keeps its dtype.
    adapters: of it.
    scale: what their product counts.
    key: of the rounding; kernels of float32 need none.

  Raises:
    ValueError: if the adapters are not of these params; see `check`. Or a
      kernel needs the key.
  """
  check(params, adapters, "adapters")
  flat, factors = trees.flatten(params), trees.flatten(adapters)
  for path in paths(adapters):
    a, b = (jnp.asarray(factors[f"{path}/{n}"], jnp.float32) for n in "ab")
    kernel = jnp.asarray(flat[f"{path}/kernel"])
    if kernel.dtype == jnp.float32:
      own = None
    elif key is None:
      raise ValueError(
        f"key must be given to merge with {path} of {kernel.dtype}, which is "
        "rounded by chance; or cast the params to float32"
      )
    else:
      own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    flat[f"{path}/kernel"] = _merged(kernel, a, b, scale, own)
  return trees.unflatten(flat)


def begin(fresh: Any, found: Any, cfg: Lora) -> Any:
  """Let new adapters begin from others of the same network.

  Args:
    fresh: as `init` makes them: what the others leave out stays so, a column
      of a that is zero there too, since one with a zero b never changes.
    found: the others, whose product counts once.
    cfg: of the new ones.

  Raises:
    ValueError: if the others do not fit in; see `check_begin`.
  """
  check_begin(found, cfg)
  flat, others = trees.flatten(fresh), trees.flatten(found)
  for path in paths(found):
    a, b = (np.array(flat[f"{path}/{name}"]) for name in "ab")
    rank = others[f"{path}/a"].shape[-1]
    own = np.any(others[f"{path}/a"] != 0, -2, keepdims=True)
    a[..., :rank] = np.where(own, others[f"{path}/a"], a[..., :rank])
    b[..., :rank, :] = own.swapaxes(-1, -2) * others[f"{path}/b"] / cfg.scale
    flat |= {f"{path}/a": a, f"{path}/b": b}
  return trees.unflatten(flat)


def check_begin(found: Any, cfg: Lora) -> None:
  """Refuse adapters that new ones cannot begin from.

  Raises:
    ValueError: if they have a layer or a rank that the new ones lack.
  """
  is_target = lambda path: any(re.fullmatch(x, path) for x in cfg.targets)
  if more := [path for path in paths(found) if not is_target(path)]:
    raise ValueError(
      "config.lora.targets must have all layers of config.lora.init_from="
      f"{schema.quote(cfg.init_from)}, but {', '.join(more)} are not among them"
    )
  flat = trees.flatten(found)
  rank = max(flat[f"{path}/a"].shape[-1] for path in paths(found))
  if rank > cfg.rank:
    raise ValueError(
      f"config.lora.rank must be at least {rank}, the rank of "
      f"config.lora.init_from={schema.quote(cfg.init_from)}, got {cfg.rank}"
    )


def check_targets(layers: Iterable[str], cfg: Lora) -> list[str]:
  """List the layers that are to have adapters, of those that there are.

  Raises:
    ValueError: if a target is no layer of the network; lists those there are.
  """
  layers, chosen = sorted(layers), set()
  for target in cfg.targets:
    try:
      found = [path for path in layers if re.fullmatch(target, path)]
    except re.error as error:
      raise ValueError(
        f"config.lora.targets must be regexes, got {schema.quote(target)}: "
        f"{error}"
      ) from error
    if not found:
      raise ValueError(
        f"config.lora.targets: {schema.quote(target)} is no layer; "
        f"{schema.near(target, layers)}"
      )
    chosen |= set(found)
  return sorted(chosen)


def check(params: Any, adapters: Any, what: str) -> None:
  """Refuse adapters that are not of a network's params.

  Args:
    params: of the network, or their shapes.
    adapters: to be of it.
    what: the subject of the error, which lists all that does not fit.
  """
  kernels, problems = trees.flatten(params), []
  factors = trees.flatten(adapters)
  for path in paths(adapters):
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


@jax.jit
def _merged(
  kernel: jax.Array,
  a: jax.Array,
  b: jax.Array,
  scale: float,
  key: jax.Array | None,
) -> jax.Array:
  """Add a product to a kernel, of its dtype."""
  product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  merged = kernel.astype(jnp.float32) + scale * product
  return merged if key is None else _rounded(merged, kernel.dtype, key)


def _rounded(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
  """Round float32 to one of two neighbours, the nearer one more often."""
  near = x.astype(dtype)
  lost = x - near.astype(jnp.float32)
  towards = jnp.where(lost > 0, jnp.inf, -jnp.inf).astype(dtype)
  far = jnp.nextafter(near, towards)
  gap = jnp.abs(far.astype(jnp.float32) - near.astype(jnp.float32))
  is_far = jax.random.uniform(key, x.shape) * gap < jnp.abs(lost)
  return jnp.where(is_far, far, near)


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


def _box(x: jax.Array, names: tuple[str | None, ...]) -> Any:
  return sharding.boxed(lambda: x, names)()
