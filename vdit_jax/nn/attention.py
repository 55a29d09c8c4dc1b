"""Scaled dot-product attention: a specification, and what networks call.

`dot` is the specification that kernels must equal. `attend` is what networks
call: it chooses the kernel by the mesh's platform and sees to a sequence that
is split over devices.
"""

import functools

import jax
import jax.numpy as jnp
from jax import ad_checkpoint

from vdit_jax import sharding
from vdit_jax.kernels import blocks, cudnn, splash
from vdit_jax.nn import context as contexts
from vdit_jax.nn import layers

KERNELS = ("auto", "dot", "blocks", "splash", "cudnn")
CONTEXTS = contexts.METHODS


def dot(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  bias: jax.Array | None = None,
  scale: float | None = None,
) -> jax.Array:
  """Attend with every query to every key, softmax in float32.

  Args:
    q: queries [B, L, N, K].
    k: keys [B, S, N, K].
    v: values [B, S, N, K].
    mask: True where a key may be seen, [B, S]. A row with no key at all gives
      the mean of the values: the caller must see that it is not used.
    bias: added to the logits, [N, L, S].
    scale: of the logits; K ** -0.5 when not given.

  Returns:
    [B, L, N, K] in v's dtype.
  """
  if scale is None:
    scale = q.shape[-1] ** -0.5
  # Heads first, then plain batched matmuls: on XLA's CPU compiler 3.5 ms
  # where einsum "blnk,bsnk->bnls" takes 26 ms.
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))
  logits = jnp.matmul(
    q, jnp.swapaxes(k, 2, 3), preferred_element_type=jnp.float32
  )
  if bias is not None:
    logits = logits + bias
  if mask is not None:
    lowest = jnp.finfo(jnp.float32).min
    logits = jnp.where(mask[:, None, None, :], logits, lowest)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.swapaxes(jnp.matmul(weights, v), 1, 2)  # [B, L, N, K]


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  kernel: str = "auto",
  context: str | None = "ulysses",
) -> jax.Array:
  """Attend as `dot`, by a kernel and over all devices of the current mesh.

  What the backward pass needs and costs most carries the checkpoint name
  `layers.ATTENDED`: the output of self-attention, and the kernels'
  log-sum-exp. Attention to a text is cheap to compute again.

  Args:
    q: queries [B, L, N, K].
    k: keys [B, S, N, K].
    v: values [B, S, N, K].
    mask: True where a key may be seen, [B, S].
    kernel: one of `KERNELS`. "auto" is "splash" on a TPU, which is interpreted
      and slow elsewhere, "cudnn" on an NVIDIA GPU where it has a kernel for
      these arrays, and "blocks" elsewhere; "blocks" is "dot" where the logits
      are few.
    context: how a sequence split over devices is joined, one of `CONTEXTS`;
      None where every device has all keys, those of a text.

  Returns:
    [B, L, N, K] in v's dtype.
  """
  asked, kernel = kernel, choose(kernel)
  if kernel == "cudnn" != asked and not cudnn.takes(q, k, v):
    kernel = "blocks"
  if kernel == "blocks" and blocks.count(q, k) <= _logits():
    kernel = "dot"
  saved = layers.ATTENDED if context else None
  local = _LOCAL[kernel](saved)
  # Without a kernel, jit itself splits batch and heads.
  whole = kernel == "dot" and sharding.mesh_size("sequence") == 1
  if whole or jax.sharding.get_abstract_mesh().empty:
    return local(q, k, v, mask)
  return contexts.attend(local, q, k, v, mask, context)


def attend_in_frames(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Attend as `dot` inside each of a batch of frames [B, L, N, K].

  Each device has whole frames, and all heads of them: an autoencoder's.
  """
  few = blocks.count(q, k) <= _logits()
  local = _dot(None) if few else _blocks(None)
  frames = ["batch", None, None, None]
  run = functools.partial(local, mask=None)
  return contexts.each(run, [q, k, v], [frames] * 3, frames)


def choose(kernel: str) -> str:
  """Say which kernel one of `KERNELS` is on the current mesh's platform."""
  if kernel == "auto":
    return _BEST.get(sharding.platform(), "dot")
  return kernel


def _dot(saved: str | None):
  def run(q, k, v, mask):
    y = dot(q, k, v, mask=mask)
    return ad_checkpoint.checkpoint_name(y, saved) if saved else y

  return run


def _blocks(saved: str | None):
  def run(q, k, v, mask):
    return blocks.attend(q, k, v, mask=mask, logits=_logits(), saved=saved)

  return run


def _logits() -> int:
  """How many logits a block may have on the current mesh's platform."""
  on_gpu = sharding.platform() == "gpu"
  return blocks.GPU_LOGITS if on_gpu else blocks.LOGITS


def _cudnn(saved: str | None):
  def run(q, k, v, mask):
    return cudnn.attend(q, k, v, mask=mask, saved=saved)

  return run


def _splash(saved: str | None):
  on_tpu = sharding.platform() == "tpu"
  kind = sharding.device_kind() if on_tpu else "TPU v5"

  def run(q, k, v, mask):
    return splash.attend(
      q,
      k,
      v,
      mask=mask,
      sizes=splash.sizes_of(kind),
      saved=saved,
      interpret=not on_tpu,
    )

  return run


_BEST = {"tpu": "splash", "cpu": "blocks", "gpu": "cudnn"}
# Of the checkpoint name: attention of one device's q, k, v and mask.
_LOCAL = {"dot": _dot, "blocks": _blocks, "splash": _splash, "cudnn": _cudnn}
