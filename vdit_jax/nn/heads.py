"""From a projection to the heads that attention reads.

One projection holds all parts of a head side by side, so that sharding its
last axis shards heads. `cut` takes it apart, norms queries and keys and gives
them rotary positions; on a TPU in one kernel, which XLA cannot look into to
shard it.
"""

import functools
from collections.abc import Sequence

import jax

from vdit_jax import sharding
from vdit_jax.kernels import heads as kernels
from vdit_jax.kernels import pairs, windows
from vdit_jax.nn import attention, context, norms, positions


def cut(
  x: jax.Array,
  scales: Sequence[jax.Array],
  angles: jax.Array | None = None,
  *,
  heads: int,
  parts: int,
  eps: float,
  kernel: str = "auto",
) -> list[jax.Array]:
  """Cut a projection into heads; norm and rotate the first parts of each.

  Args:
    x: a projection [B, L, N P K].
    scales: of the root-mean-square norms [K], of as many parts as they are.
    angles: rotary angles [L, K / 2] for the parts that are normalised.
    heads: N.
    parts: P, such as 3 for query, key and value.
    eps: of the norms.
    kernel: as in `attention.attend`; heads of 128n alone have one.

  Returns:
    `parts` arrays [B, L, N, K] in x's dtype.
  """
  K = x.shape[-1] // heads // parts
  known = attention.choose(kernel) == "splash" and not K % windows.LANES
  run = _by_kernel if known else _plain
  return run(x, tuple(scales), angles, heads, parts, eps)


def rotate_pairs(
  x: jax.Array, angles: jax.Array, heads: int, kernel: str = "auto"
) -> jax.Array:
  """Give heads rotary positions: dimension 2i of one turns with 2i + 1.

  Args:
    x: queries or keys, heads side by side, [B, L, N K].
    angles: [L, K / 2].
    heads: N.
    kernel: as in `attention.attend`.

  Returns:
    [B, L, N, K] in x's dtype.
  """
  B, L, width = x.shape
  local = width // sharding.mesh_size("act_heads")
  wide = pairs.lanes(width // heads)
  if attention.choose(kernel) == "splash" and not local % wide:
    context.check_heads(heads)
    interpret = sharding.platform() != "tpu"
    run = functools.partial(pairs.rotate, interpret=interpret)
    split, line = ["batch", "sequence", "act_heads"], ["sequence", None]
    arrays = [x, *pairs.tables(angles)]
    x = context.each(run, arrays, [split, line, line], split)
    return x.reshape(B, L, heads, -1)
  x = x.reshape(B, L, heads, -1)
  x = sharding.constrain(x, "batch", "sequence", "act_heads", None)
  return positions.rotate_pairs(x, angles)


def _plain(x, scales, angles, heads, parts, eps):
  x = x.reshape(*x.shape[:2], heads, parts, -1)
  x = sharding.constrain(x, "batch", "sequence", "act_heads", None, None)
  found = [x[..., i, :] for i in range(parts)]
  for i, scale in enumerate(scales):
    found[i] = norms.rms_norm(found[i], scale, eps)
  if angles is not None:
    for i in range(len(scales)):
      found[i] = positions.rotate(found[i], angles)
  return found


def _by_kernel(x, scales, angles, heads, parts, eps):
  context.check_heads(heads)
  tables = () if angles is None else kernels.tables(angles)
  local = heads // sharding.mesh_size("act_heads")
  interpret = sharding.platform() != "tpu"

  def run(x, *rest):
    return kernels.cut(
      x,
      rest[: len(scales)],
      rest[len(scales) :],
      heads=local,
      parts=parts,
      eps=eps,
      interpret=interpret,
    )

  split = ["batch", "sequence", "act_heads"]
  names = [split, *[[None]] * len(scales), *[["sequence", None]] * len(tables)]
  found = context.each(run, [x, *scales, *tables], names, split)
  return [part.reshape(*part.shape[:2], heads, -1) for part in found]
