"""How a denoiser computes, and not what: fields of every Config of one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vdit_jax import schema
from vdit_jax.nn import attention, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
  """What may be chosen anew for the same weights.

  Attributes:
    kernel: of attentions and norms, one of `nn.attention.KERNELS`.
    context: how self-attention joins a sequence split over devices, one of
      `nn.attention.CONTEXTS`.
    remat: what the backward pass computes again: "none"; "attention": all
      but the attentions; "full": whole blocks.
    unroll: blocks a trip of the loop over layers.
    dtype: compute type.
  """

  kernel: str = "auto"
  context: str = "ulysses"
  remat: str = "none"
  unroll: int = 1
  dtype: str = "bfloat16"

  def __post_init__(self):
    check_choice(self, "kernel", attention.KERNELS)
    check_choice(self, "context", attention.CONTEXTS)
    check_choice(self, "remat", layers.REMAT)


DTYPES = ("float32", "bfloat16", "float16")  # to compute in
FIELDS = tuple(field.name for field in dataclasses.fields(Compute))


def check_choice(config: Any, name: str, known: Sequence[Any]) -> None:
  """Refuse a config whose field is none of the known values."""
  if (value := getattr(config, name)) not in known:
    said = schema.quote(value)
    raise ValueError(f"{name} must be one of {known}, got {said}")
