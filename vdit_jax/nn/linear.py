"""Dense layers whose parameters carry logical axes, and their adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes

from vdit_jax import sharding

LECUN = nn.initializers.lecun_normal()
ZEROS = nn.initializers.zeros_init()


class Dense(nn.Dense):
  """A dense layer that adds (x a) b if it is given low-rank factors.

  They are params beside its kernel, a [in, r] and b [r, out], which
  `nn.lora.attach` puts there, and computed with in the layer's dtype.
  """

  def __call__(self, x: jax.Array) -> jax.Array:
    """Map [..., in] to [..., features]."""
    y = super().__call__(x)
    if not self.has_variable("params", "a"):
      return y
    for name in ("a", "b"):
      x, factor = dtypes.promote_dtype(
        x, self.get_variable("params", name), dtype=self.dtype
      )
      dims = (((x.ndim - 1,), (0,)), ((), ()))
      x = _flat_dot(x, factor, dims, self.precision)
    return y + x


def dense(
  features: int,
  axes: tuple[str | None, str | None],
  *,
  name: str,
  dtype: jnp.dtype,
  bias: bool = True,
  init: nn.initializers.Initializer = LECUN,
  precision: jax.lax.Precision | None = None,
) -> Dense:
  """Build a Dense [..., in] -> [..., features]; `axes` name its kernel's."""
  return Dense(
    features,
    use_bias=bias,
    dtype=dtype,
    kernel_init=sharding.boxed(init, axes),
    bias_init=sharding.boxed(ZEROS, axes[1:]),
    precision=precision,
    dot_general=_flat_dot,
    name=name,
  )


def dense32(
  features: int,
  axes: tuple[str | None, str | None],
  name: str,
  zero: bool = False,
) -> Dense:
  """Build a Dense on the conditioning: float32 whatever computes the rest."""
  return dense(
    features,
    axes,
    name=name,
    dtype=jnp.float32,
    init=ZEROS if zero else LECUN,
    precision=jax.lax.Precision.HIGHEST,
  )


def _flat_dot(x, kernel, dimension_numbers, precision=None, **kwargs):
  """Merge x's leading axes into one, unless the sequence is sharded.

  The gradient of a dot with two free axes is not a plain matmul to XLA's CPU
  compiler: 28 ms against 8.8 ms. A sharded sequence must stay an axis.
  """
  flat = x
  if x.ndim > 2 and sharding.mesh_size("sequence") == 1:
    flat = x.reshape(-1, x.shape[-1])
    dimension_numbers = (((1,), (0,)), ((), ()))
  y = jax.lax.dot_general(flat, kernel, dimension_numbers, precision, **kwargs)
  return y.reshape(*x.shape[:-1], kernel.shape[-1])
