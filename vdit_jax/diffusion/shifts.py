"""Shifts of diffusion times that follow a clip's size.

  latents (f, h, w) --SizeShift.factor--> the factor of `schedules.shift`

A larger clip repeats its content more often, so that the same sigma hides less
of it, and training and sampling move their times towards noise.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

KINDS = ("tokens", "area")


@dataclasses.dataclass(frozen=True)
class SizeShift:
  """The factor of a clip: scale x space x sqrt(latent frames).

  Attributes:
    kind: what space is. "tokens": a line in the tokens of a frame, through
      (low_tokens, low_shift) and (high_tokens, high_shift) and on beyond them
      (Open-Sora 2.0, arXiv:2503.09642). "area": the side of a square of a
      frame's latents, over `side` (Open-Sora 1.2 and 1.3: of 512 pixels).
    low_tokens, low_shift, high_tokens, high_shift: see "tokens".
    side: see "area"; latents.
    unit: latent frames count in whole units of so many (1.2: 5).
    left_out: latent frames that do not count (1.3: 1). One always does.
    scale: of clips of more than one latent frame.
  """

  kind: str = "tokens"
  low_tokens: int = 256
  low_shift: float = 1.0
  high_tokens: int = 4096
  high_shift: float = 3.0
  side: float = 64.0
  unit: int = 1
  left_out: int = 0
  scale: float = 1.0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"shift's kind must be one of {KINDS}: {self.kind!r}")
    if self.low_tokens >= self.high_tokens:
      raise ValueError(
        "shift's low_tokens must be below its high_tokens, got "
        f"{self.low_tokens} and {self.high_tokens}"
      )
    for name in ("low_shift", "high_shift", "side", "unit", "scale"):
      if getattr(self, name) <= 0:
        raise ValueError(
          f"shift's {name} must be positive, got {getattr(self, name)}"
        )

  def factor(
    self, shape: tuple[int, ...], patch: tuple[int, int, int] = (1, 1, 1)
  ) -> float:
    """Return the factor for latents.

    Args:
      shape: of a clip's latents, (f, h, w, ...).
      patch: latents of a token along them.
    """
    f, h, w = (n // p for n, p in zip(shape, patch, strict=False))
    if min(f, h, w) < 1:
      raise ValueError(
        f"latents {shape[:3]} must be at least a patch, {patch}, for a shift"
      )
    counted = max(f // self.unit * self.unit - self.left_out, 1)
    scale = self.scale if f > 1 else 1.0
    return scale * self._space(shape, h * w) * math.sqrt(counted)

  def _space(self, shape: tuple[int, ...], tokens: int) -> float:
    if self.kind == "area":
      return math.sqrt(shape[1] * shape[2]) / self.side
    slope = self.high_shift - self.low_shift
    slope /= self.high_tokens - self.low_tokens
    return self.low_shift + slope * (tokens - self.low_tokens)


def read(shift: Any) -> float | SizeShift:
  """Read a shift of a recipe or a config: a number, or a SizeShift's fields.

  None is the SizeShift of the defaults.
  """
  if shift is None:
    return SizeShift()
  if isinstance(shift, Mapping):
    return SizeShift(**shift)
  return shift if isinstance(shift, SizeShift) else float(shift)


def factor(
  shift: float | SizeShift,
  shape: tuple[int, ...],
  patch: tuple[int, int, int],
) -> float:
  """Return the factor of a clip's latents (f, h, w, ...); see `SizeShift`."""
  if isinstance(shift, SizeShift):
    return shift.factor(shape, patch)
  return shift
