"""Attention of one device on TPU: our own kernels, or jax's splash kernel.

The logits [L, S] are never in HBM: flash attention (arXiv:2205.14135). Our own
kernels, `forward` and `backward`, read the arrays as they are; for the
library's, lengths are padded to blocks, and a key that is padding or behind
the mask is of another segment than the queries. The backward pass needs the
output and the log-sum-exp of the logits; both carry a checkpoint name, so that
a remat policy which saves that name does not run the forward kernel again.
(Saving only the output does not do.)
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask_info,
)

from vdit_jax.kernels import backward, forward, windows

# Compiled by libtpu 0.0.42 for v5e at head_dim 128, a step over a tile of 512 x
# 512 takes 1172 bundles forward and about 150 more of loop, which is what 66
# more keys would take. The backward kernels take 2001 + 1498: three times.
_STEP = 66
_BACKWARD = 3.0
# Our own take 1121 forward; backward their five matmuls' 2560, and the loop.
_FORWARD_TILE, _BACKWARD_TILE, _LOOP = 1121, 2560, 150
# A larger block is worked on in parts, to fit the registers.
_WHOLE, _OWN_WHOLE = 640, 768


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Blocks that a generation's kernels may have, in tokens.

  Attributes:
    forward: of the forward kernel, multiples of 128.
    backward: of the backward kernels, multiples of 128.
    compute: keys of a large block that are worked on at once.
    own: blocks of our own kernels, for heads of 64 and 128; none: the library's
      run. Its backward ones run on one of the two cores of a v4 or v5p, and
      take seven matmuls a tile where `backward.dqkv` takes five.
    cores: of a device, over which `dqkv` spreads heads.
    vmem: bytes of a core's memory that `dqkv` may take; 0: it does not run.
  """

  forward: tuple[int, ...]
  backward: tuple[int, ...]
  compute: int
  own: tuple[int, ...] = ()
  cores: int = 1
  vmem: int = 0


# Chosen by what the compiler says, not measured. v5e: at 1024 the forward
# kernel has 6 % more bundles a FLOP than at 512, the backward ones 5 to 8 %
# fewer. v5p: at 1024, in parts of 256, 1 to 3 % fewer in all. v6e and 7x
# multiply 256 x 256 at a time, so no block of an odd multiple of 128 there.
_SMALL = (128, 256, 384, 512)
_MIB = 2**20
_OWN = (*_SMALL, 640, 768, 1024)
_V4 = Sizes((*_SMALL, 640, 1024), (*_SMALL, 640, 1024), 256, _OWN, cores=2)
_V6E = Sizes((128, 256, 512), (128, 256, 512, 1024), 512)
SIZES = {
  "TPU v4": _V4,
  "TPU v5": dataclasses.replace(_V4, vmem=64 * _MIB),
  "TPU v5 lite": Sizes(
    (*_SMALL, 640), (*_SMALL, 640, 1024), 512, _OWN, vmem=128 * _MIB
  ),
  "TPU v6 lite": dataclasses.replace(
    _V6E, own=(128, 256, 512, 768, 1024), vmem=128 * _MIB
  ),
  "TPU7x": _V6E,
}


def sizes_of(kind: str) -> Sizes:
  """Look up the blocks of a kind of device, as jax names it."""
  if kind not in SIZES:
    raise ValueError(
      f"no block sizes for {kind!r}, only for {sorted(SIZES)}; add a row to "
      "kernels.splash.SIZES, or set kernel='dot'"
    )
  return SIZES[kind]


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  sizes: Sizes,
  saved: str | None,
  interpret: bool = False,
) -> jax.Array:
  """Attend as `nn.attention.dot`, on one device.

  Args:
    q: queries [B, L, N, K].
    k: keys [B, S, N, K].
    v: values [B, S, N, K].
    mask: True where a key may be seen, [B, S]. A row with no key at all gives
      something finite, with gradients: the caller must see that it is not used.
    sizes: blocks to choose from.
    saved: checkpoint name of what the backward pass needs beside q, k, v;
      None gives it none.
    interpret: run on the CPU.

  Returns:
    [B, L, N, K] in v's dtype.
  """
  plan = Plan(sizes, saved, interpret)
  run = _own if sizes.own and q.shape[-1] in (64, 128) else _library
  return run(q, k, v, mask, plan).astype(v.dtype)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the kernels are built from."""

  sizes: Sizes
  saved: str | None
  interpret: bool


@dataclasses.dataclass(frozen=True)
class Fit:
  """How a length is cut: its padded length, and blocks that divide that."""

  padded: int
  forward: int
  backward: int


def _fits(sizes: Sizes, heads: int, padded: int) -> bool:
  """Whether `dqkv` has the memory, and as many heads for each core."""
  return heads % sizes.cores == 0 and backward.fused_bytes(padded) <= sizes.vmem


def _fit(length: int, sizes: Sizes) -> Fit:
  """Choose the library's blocks, of which a length costs the fewest cycles."""

  def fit(pair):
    step = math.lcm(*pair)
    return Fit(length + -length % step, *pair)

  def cost(fit):
    forward, again = (1 + _STEP / b for b in (fit.forward, fit.backward))
    return fit.padded * (forward + _BACKWARD * again)

  return min(
    map(fit, itertools.product(sizes.forward, sizes.backward)), key=cost
  )


def _best(queries: int, keys: int, sizes: Sizes, tile: int) -> windows.Blocks:
  """Choose our own kernels' blocks, of which these cost the fewest cycles.

  Args:
    queries: L.
    keys: S.
    sizes: to choose from.
    tile: cycles of 512 x 512.
  """

  def cost(pair):
    lengths = zip((queries, keys), pair, strict=True)
    steps = math.prod(-(-n // block) for n, block in lengths)
    return steps * (tile * math.prod(pair) / 512**2 + _LOOP)

  best = min(itertools.product(sizes.own, sizes.own), key=cost)
  whole = best[1] <= _OWN_WHOLE
  return windows.Blocks(*best, best[1] if whole else sizes.compute)


def _blocks(queries: int, keys: int, compute: int) -> windows.Blocks:
  return windows.Blocks(queries, keys, keys if keys <= _WHOLE else compute)


def _heads_first(x: jax.Array, padded: int) -> jax.Array:
  """Turn [B, L, N, K] to [B, N, padded, K], zeros behind."""
  x = jnp.swapaxes(x, 1, 2)
  return jnp.pad(x, ((0, 0), (0, 0), (0, padded - x.shape[2]), (0, 0)))


def _seen(mask, B: int, S: int, padded: int) -> jax.Array | None:
  """Say which keys may be seen, int32 [B, padded]; None: every one."""
  if mask is None and padded == S:
    return None
  mask = jnp.ones((B, S), bool) if mask is None else mask
  return jnp.pad(mask, ((0, 0), (0, padded - S))).astype(jnp.int32)


def _kernel(queries: Fit, keys: Fit, plan: Plan):
  """Build the library's kernel for all logits of one clip.

  Its own constructor would look at every block of a mask that is full, which
  takes minutes at 100,000 tokens; with no mask the kernel takes every block.
  """
  compute = plan.sizes.compute
  f = _blocks(queries.forward, keys.forward, compute)
  b = _blocks(queries.backward, keys.backward, compute)
  every = splash_attention_mask_info.MaskInfo(None, None, None, None, None)
  return splash_attention_kernel.SplashAttentionKernel(
    every,
    every,
    every,
    block_sizes=splash_attention.BlockSizes(
      block_q=f.queries,
      block_kv=f.keys,
      block_kv_compute=f.compute,
      block_q_dkv=b.queries,
      block_kv_dkv=b.keys,
      block_kv_dkv_compute=b.compute,
      block_q_dq=b.queries,
      block_kv_dq=b.keys,
    ),
    is_mqa=False,
    save_residuals=False,
    mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=plan.saved,
    mask_function=None,
    interpret=plan.interpret,
  )


def _library(q, k, v, mask, plan: Plan):
  """Run the library's kernels, heads first and padded."""
  B, L, S = *q.shape[:2], k.shape[1]
  queries, keys = _fit(L, plan.sizes), _fit(S, plan.sizes)
  kernel = _kernel(queries, keys, plan)
  q = _heads_first(q * q.shape[-1] ** -0.5, queries.padded)
  k, v = _heads_first(k, keys.padded), _heads_first(v, keys.padded)
  seen = _seen(mask, B, S, keys.padded)
  if seen is None:
    out: Any = jax.vmap(kernel)(q, k, v)
  else:
    segments = splash_attention.SegmentIds(
      q=jnp.ones(q.shape[2], jnp.int32), kv=seen
    )
    axes = splash_attention.SegmentIds(q=None, kv=0)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, axes))(q, k, v, segments)
  return jnp.swapaxes(out[:, :, :L], 1, 2)


def _own(q, k, v, mask, plan: Plan):
  """Run our own kernels: heads of 128 stay where they are."""
  B, L, N, K = q.shape
  if mask is not None:
    mask = mask.astype(jnp.int32)[:, None]
  if K % windows.LANES:
    q, k, v = (_heads_first(x, x.shape[1]) for x in (q, k, v))
    q, k, v = (x.reshape(B * N, -1, K) for x in (q, k, v))
    out = _attend(q, k, v, mask, 1, plan).reshape(B, N, L, K)  # pyright: ignore[reportAttributeAccessIssue]
    return jnp.swapaxes(out, 1, 2)
  q, k, v = (x.reshape(B, -1, N * K) for x in (q, k, v))
  return _attend(q, k, v, mask, N, plan).reshape(B, L, N, K)  # pyright: ignore[reportAttributeAccessIssue]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, mask, heads: int, plan: Plan) -> Any:
  return _attend_forward(q, k, v, mask, heads, plan)[0]


def _attend_forward(q, k, v, mask, heads, plan):
  sizes = plan.sizes
  lengths = q.shape[1], k.shape[1]
  out, logsumexp = forward.attend(
    q,
    k,
    v,
    mask,
    heads=heads,
    blocks=_best(*lengths, sizes, _FORWARD_TILE),
    interpret=plan.interpret,
  )
  if plan.saved:
    out = ad_checkpoint.checkpoint_name(out, plan.saved)
    logsumexp = ad_checkpoint.checkpoint_name(logsumexp, plan.saved)
  return out, (q, k, v, mask, out, logsumexp)


def _attend_backward(heads, plan, saved, do):
  q, k, v, mask, out, logsumexp = saved
  sizes, options = plan.sizes, dict(heads=heads, interpret=plan.interpret)
  do = do.astype(v.dtype)
  delta = backward.delta(out, do, **options)
  L, S = q.shape[1], k.shape[1]
  blocks = _best(L, S, sizes, _BACKWARD_TILE)
  options |= dict(blocks=blocks)
  args = q, k, v, do, logsumexp, delta, mask
  padded = -(-L // blocks.queries) * blocks.queries
  if _fits(sizes, q.shape[0] * heads, padded):
    return *backward.dqkv(*args, **options), None
  return backward.dq(*args, **options), *backward.dkv(*args, **options), None


_attend.defvjp(_attend_forward, _attend_backward)
