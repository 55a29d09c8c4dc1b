"""What the attention kernels share: windows on tokens, matmuls, masks.

Arrays are [B, L, N K], as a projection leaves them: a head of K = 128 is one
tile of lanes, so a window (tokens of a block, lanes of a head) is cut out by
the kernel's own copies, and nothing is transposed. Lengths need not be
multiples of the blocks: what a window has beyond its array is garbage, maybe
NaN, and is not written back. Kernels replace it where it would be summed, in
the last block alone.

A head that is not 128n wide is no whole tile; there the caller passes one head
a row, [B N, L, K], and heads = 1.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LOG2_E = math.log2(math.e)
# In place of a logit that is masked; finite, since inf - inf is NaN.
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tokens of one grid step, and the part of the keys worked on at once."""

  queries: int = 1024
  keys: int = 1024
  compute: int = 512


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What a kernel knows statically.

  Attributes:
    queries: L.
    keys: S.
    scale: of the logits.
    masked: whether keys are masked one by one.
    blocks: of the grid.
  """

  queries: int
  keys: int
  scale: float
  masked: bool
  blocks: Blocks

  @property
  def binary_scale(self) -> float:
    """Scale of logits to the base of 2: exp(x) is one multiplication more."""
    return self.scale * LOG2_E

  @property
  def grid(self) -> tuple[int, int]:
    """Blocks of queries and of keys."""
    rows = pl.cdiv(self.queries, self.blocks.queries)
    return rows, pl.cdiv(self.keys, self.blocks.keys)

  @property
  def parts(self) -> list[slice]:
    """Parts of a block of keys."""
    step = self.blocks.compute
    return [slice(n, n + step) for n in range(0, self.blocks.keys, step)]


def sizes(
  q: jax.Array,
  k: jax.Array,
  mask: jax.Array | None,
  heads: int,
  scale: float | None,
  blocks: Blocks,
) -> Sizes:
  """Describe q [B, L, N K] and k [B, S, N K]; refuse what no grid covers."""
  L, S, K = q.shape[1], k.shape[1], q.shape[2] // heads
  if K not in (64, LANES):
    raise ValueError(f"head dim must be 64 or 128, got {K}; use nn.attention")
  if heads > 1 and K % LANES:
    raise ValueError(
      f"heads of {K} must come one a row, got {heads} side by side; pass"
      " [B N, L, K]"
    )
  for name, block in (("queries", blocks.queries), ("keys", blocks.keys)):
    if block % LANES:
      raise ValueError(f"blocks.{name} must be 128n, got {block}")
  if blocks.keys % blocks.compute or blocks.compute % LANES:
    raise ValueError(
      f"blocks.compute must be 128n and divide blocks.keys {blocks.keys}, got"
      f" {blocks.compute}; try {LANES}"
    )
  scale = K**-0.5 if scale is None else scale
  return Sizes(L, S, scale, mask is not None, blocks)


def specs(
  heads: int, head_dim: int, rows: int, blocks: Blocks, keys_first: bool = False
) -> tuple[pl.BlockSpec, ...]:
  """Return the windows of queries, keys, statistics and mask in a grid.

  Args:
    heads: side by side in a row of lanes.
    head_dim: K.
    rows: batch x heads, over which the mask's rows are shared out.
    blocks: sizes.
    keys_first: the grid is (head, key block, query block), not (head, query
      block, key block).
  """
  # lax.div: `//` asks for the kind of chip, which a compile without one does
  # not know.
  row = lambda h: jax.lax.div(h, heads)
  lane = lambda h: jax.lax.rem(h, heads)

  def window(shape, index):
    if keys_first:
      return pl.BlockSpec(shape, lambda h, j, i: index(h, i, j))
    return pl.BlockSpec(shape, index)

  bq, bk, K = blocks.queries, blocks.keys, head_dim
  return (
    window((None, bq, K), lambda h, i, j: (row(h), i, lane(h))),
    window((None, bk, K), lambda h, i, j: (row(h), j, lane(h))),
    window((None, 1, bq), lambda h, i, j: (h, 0, i)),
    window((None, 1, bk), lambda h, i, j: (jax.lax.div(h, rows), 0, j)),
  )


def noted(blocks: Blocks, heads: int) -> dict[str, str]:
  """Note blocks and heads in the compiled text, for `cost.hlo_cost`."""
  notes = {"block_q": blocks.queries, "block_kv": blocks.keys, "heads": heads}
  return {"xprof_metadata": json.dumps(notes)}


def params(outer: str, vmem: int | None = None) -> pltpu.CompilerParams:
  """Say what two cores may share: the first axis, the second if "parallel"."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", outer, "arbitrary"),
    vmem_limit_bytes=vmem,
  )


def last_apart(
  step: Callable[[bool], None], axis: int, garbage: bool, always: bool = False
) -> None:
  """Run a grid step, by `step(True)` where its windows hold garbage.

  Args:
    step: of whether to look out for garbage.
    axis: of the grid, whose last window has it.
    garbage: whether that one has.
    always: whether to look out in every step.
  """
  blocks = pl.num_programs(axis)
  if always or not garbage:
    step(always)
  elif isinstance(blocks, int) and blocks == 1:
    step(True)
  else:
    last = pl.program_id(axis) == blocks - 1
    pl.when(last)(lambda: step(True))
    pl.when(jnp.logical_not(last))(lambda: step(False))


def inside(shape: tuple[int, int], axis: int, count: jax.Array) -> jax.Array:
  """Return where in a window [n, m] the index along an axis is < count."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis) < count


def column(row: jax.Array) -> jax.Array:
  """Turn [1, n] into [n, LANES], all lanes equal."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row(column: jax.Array) -> jax.Array:
  """Turn [n, LANES], all lanes equal, into [1, n]."""
  return column.T[:1]


def spread(column: jax.Array, width: int) -> jax.Array:
  """Widen [n, LANES], all lanes equal, to [n, width]."""
  return jnp.tile(column, (1, pl.cdiv(width, LANES)))[:, :width]


def scaled(x: jax.Array, scale: float) -> jax.Array:
  """Multiply in float32, round once."""
  return (x.astype(jnp.float32) * scale).astype(x.dtype)


def _matmul(a, b, a_dim, b_dim):
  # A float32 operand would otherwise be rounded to bfloat16 by the MXU.
  highest = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((a_dim,), (b_dim,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if highest else None,
    preferred_element_type=jnp.float32,
  )


times = functools.partial(_matmul, a_dim=1, b_dim=0)
times_transposed = functools.partial(_matmul, a_dim=1, b_dim=1)
transposed_times = functools.partial(_matmul, a_dim=0, b_dim=0)
