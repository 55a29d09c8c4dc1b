"""Attention of one device on TPU: jax's splash kernel, padded and masked.

The logits [L, S] are never in HBM: flash attention (arXiv:2205.14135). Lengths
are padded to blocks, and a key that is padding or behind the mask is of
another segment than the queries. The backward pass needs the output and the
log-sum-exp of the logits; both carry a checkpoint name, so that a remat policy
which saves that name does not run the forward kernel again. (Saving only the
output does not do.)
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask_info,
)

from vdit_jax.kernels import backward

# Compiled by libtpu 0.0.42 for v5e at head_dim 128, a step over a tile of 512 x
# 512 takes 1172 bundles forward and about 150 more of loop, which is what 66
# more keys would take. The backward kernels take 2001 + 1498: three times.
_STEP = 66
_BACKWARD = 3.0
_WHOLE = 640  # a larger block is worked on in parts, to fit the registers


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Blocks that a generation's kernels may have, in tokens.

  Attributes:
    forward: of the forward kernel, multiples of 128.
    backward: of the backward kernels, multiples of 128.
    compute: keys of a large block that are worked on at once.
    own: whether `kernels.backward` runs the backward pass, for heads of 64 and
      128. The library's kernels run on one of the two cores of a v4 or v5p,
      and take seven matmuls a tile where `backward.dqkv` takes five.
    cores: of a device, over which `dqkv` spreads heads.
    vmem: bytes of a core's memory that `dqkv` may take; 0: it does not run.
  """

  forward: tuple[int, ...]
  backward: tuple[int, ...]
  compute: int
  own: bool
  cores: int = 1
  vmem: int = 0


# Chosen by what the compiler says, not measured. v5e: at 1024 the forward
# kernel has 6 % more bundles a FLOP than at 512, the backward ones 5 to 8 %
# fewer. v5p: at 1024, in parts of 256, 1 to 3 % fewer in all. v6e and 7x
# multiply 256 x 256 at a time, so no block of an odd multiple of 128 there.
_SMALL = (128, 256, 384, 512)
_MIB = 2**20
_V4 = Sizes((*_SMALL, 640, 1024), (*_SMALL, 640, 1024), 256, True, cores=2)
_V6E = Sizes((128, 256, 512), (128, 256, 512, 1024), 512, own=False)
SIZES = {
  "TPU v4": _V4,
  "TPU v5": dataclasses.replace(_V4, vmem=64 * _MIB),
  "TPU v5 lite": Sizes(
    (*_SMALL, 640), (*_SMALL, 640, 1024), 512, True, vmem=128 * _MIB
  ),
  "TPU v6 lite": dataclasses.replace(_V6E, own=True, vmem=128 * _MIB),
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
  L, S = q.shape[1], k.shape[1]
  queries, keys = _fit(L, sizes), _fit(S, sizes)
  plan = Plan(
    forward=_blocks(queries.forward, keys.forward, sizes.compute),
    backward=_blocks(queries.backward, keys.backward, sizes.compute),
    fused=_fits(sizes, q.shape[0] * q.shape[2], queries.padded),
    saved=saved,
    interpret=interpret,
  )
  q = _heads_first(q * q.shape[-1] ** -0.5, queries.padded)
  k, v = _heads_first(k, keys.padded), _heads_first(v, keys.padded)
  seen = _seen(mask, q.shape[0], S, keys.padded)
  run = _own if sizes.own and q.shape[-1] in (64, 128) else _library
  out = run(q, k, v, seen, plan)
  return jnp.swapaxes(out[:, :, :L], 1, 2).astype(v.dtype)


@dataclasses.dataclass(frozen=True)
class Fit:
  """How a length is cut: its padded length, and blocks that divide that."""

  padded: int
  forward: int
  backward: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the kernels are built from."""

  forward: backward.Blocks
  backward: backward.Blocks
  fused: bool
  saved: str | None
  interpret: bool


def _fits(sizes: Sizes, heads: int, padded: int) -> bool:
  """Whether `dqkv` has the memory, and as many heads for each core."""
  return heads % sizes.cores == 0 and backward.fused_bytes(padded) <= sizes.vmem


def _fit(length: int, sizes: Sizes) -> Fit:
  """Choose the blocks of which a length costs the fewest cycles."""

  def fit(pair):
    step = math.lcm(*pair)
    return Fit(length + -length % step, *pair)

  def cost(fit):
    forward, again = (1 + _STEP / b for b in (fit.forward, fit.backward))
    return fit.padded * (forward + _BACKWARD * again)

  return min(
    map(fit, itertools.product(sizes.forward, sizes.backward)), key=cost
  )


def _blocks(queries: int, keys: int, compute: int) -> backward.Blocks:
  return backward.Blocks(queries, keys, keys if keys <= _WHOLE else compute)


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


def _kernel(plan: Plan, residuals: bool):
  """Build the library's kernel for all logits of one clip.

  Its own constructor would look at every block of a mask that is full, which
  takes minutes at 100,000 tokens; with no mask the kernel takes every block.
  """
  f, b = plan.forward, plan.backward
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
    save_residuals=residuals,
    mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=plan.saved,
    mask_function=None,
    interpret=plan.interpret,
  )


def _library(q, k, v, seen, plan: Plan, residuals: bool = False):
  """Run on [B, N, L, K] and [B, N, S, K], the library's backward pass."""
  kernel = _kernel(plan, residuals)
  if seen is None:
    return jax.vmap(kernel)(q, k, v)
  segments = splash_attention.SegmentIds(
    q=jnp.ones(q.shape[2], jnp.int32), kv=seen
  )
  axes = splash_attention.SegmentIds(q=None, kv=0)
  return jax.vmap(kernel, in_axes=(0, 0, 0, axes))(q, k, v, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _own(q, k, v, seen, plan: Plan):
  """Run as `_library`, but for the backward pass."""
  return _library(q, k, v, seen, plan)


def _own_forward(q, k, v, seen, plan):
  out, (logsumexp,) = _library(q, k, v, seen, plan, residuals=True)
  # Here, since the library's names are inside of a rule that is not looked at.
  if plan.saved:
    out = ad_checkpoint.checkpoint_name(out, plan.saved)
    logsumexp = ad_checkpoint.checkpoint_name(logsumexp, plan.saved)
  return out, (q, k, v, seen, out, logsumexp)


def _own_backward(plan, saved, do):
  q, k, v, seen, out, logsumexp = saved
  # In float32: a sum of products that nearly cancel.
  delta = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
  mask = jnp.ones((k.shape[0], k.shape[2]), bool) if seen is None else seen
  args = q, k, v, do.astype(v.dtype), logsumexp, delta, mask
  options = dict(blocks=plan.backward, interpret=plan.interpret)
  if plan.fused:
    return *backward.dqkv(*args, **options), None
  return backward.dq(*args, **options), *backward.dkv(*args, **options), None


_own.defvjp(_own_forward, _own_backward)
