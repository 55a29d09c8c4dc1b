"""Networks that take a video chunk by chunk in time.

  chunk, past --one_chunk--> output, past

What a chunk must know of those before it is kept by the convolutions
(`nn.conv3d`), in a variable collection that goes from chunk to chunk.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vdit_jax.nn import conv3d


@flax.struct.dataclass
class Stream:
  """What a stream remembers between chunks.

  Attributes:
    past: the last input frames of every convolution.
    first: whether the next chunk begins the video.
  """

  past: Any
  first: bool = flax.struct.field(pytree_node=False, default=True)


def split(total: int, size: int) -> tuple[int, ...]:
  """Frames of each chunk: `size`, the first with what is left over."""
  count = max(total // size, 1)
  return total - (count - 1) * size, *(size,) * (count - 1)


def one_chunk(
  net: nn.Module, params: Any, past: Any, x: jax.Array, first: bool
) -> tuple[Any, jax.Array]:
  """Run a network (x, first) -> y over a chunk: what to remember, y."""
  variables = {"params": params, conv3d.STREAM: past}
  y, changed = net.apply(variables, x, first, mutable=[conv3d.STREAM])
  return changed[conv3d.STREAM], y


def all_chunks(
  net: nn.Module, params: Any, x: jax.Array, size: int
) -> jax.Array:
  """Run a network over all of [B, F, H, W, C], as `split` divides it."""
  lead, *rest = split(x.shape[1], size)
  past, y = one_chunk(net, params, {}, x[:, :lead], True)
  if not rest:
    return y

  def step(past, x):
    return one_chunk(net, params, past, x, False)

  x = x[:, lead:].reshape(x.shape[0], len(rest), size, *x.shape[2:])
  _, more = jax.lax.scan(step, past, jnp.moveaxis(x, 1, 0))
  more = jnp.moveaxis(more, 0, 1)  # [B, chunks, frames, ...]
  return jnp.concatenate([y, more.reshape(y.shape[0], -1, *y.shape[2:])], 1)
