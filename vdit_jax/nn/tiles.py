"""Overlapping tiles of a video's height and width, run apart and blended."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Axis:
  """Tiles along height or width.

  Attributes:
    size: of a tile of the input; the last ones may be smaller.
    hop: from where a tile of the input begins to where the next one does.
    blend: of the output, how much is mixed with the tile before.
    keep: of the output, how much of a tile stays: what corresponds to hop.
  """

  size: int
  hop: int
  blend: int
  keep: int

  def spans(self, length: int) -> list[tuple[int, int]]:
    """Begin and end of each tile of an axis of this length."""
    begins = range(0, length, self.hop)
    return [(i, min(i + self.size, length)) for i in begins]


def run(
  step: Callable[[Any, jax.Array], tuple[Any, jax.Array]],
  past: dict[str, Any],
  x: jax.Array,
  height: Axis,
  width: Axis,
) -> tuple[dict[str, Any], jax.Array]:
  """Run a step over each tile and join what comes out.

  Tiles of one size go one after the other through one program.

  Args:
    step: (past, x) -> (past, y) of a tile [B, F, h, w, C].
    past: what this returned for the frames before; {} at first.
    x: input [B, F, H, W, C].
    height: tiles along H.
    width: tiles along W.

  Returns:
    The new past, and the output.
  """
  rows, columns = height.spans(x.shape[2]), width.spans(x.shape[3])
  groups: dict[str, dict[tuple[int, int], jax.Array]] = {}
  for i, (y0, y1) in enumerate(rows):
    for j, (x0, x1) in enumerate(columns):
      group = groups.setdefault(f"{y1 - y0}x{x1 - x0}", {})
      group[i, j] = x[:, :, y0:y1, x0:x1]
  new, done = {}, {}
  for size, group in groups.items():
    inputs = past.get(size, {}), jnp.stack(list(group.values()))
    new[size], y = jax.lax.map(lambda args: step(*args), inputs)
    done |= dict(zip(group, y, strict=True))
  return new, _join(done, len(rows), len(columns), height, width)


def _join(done, rows, columns, height, width):
  """Blend tiles with those above and to the left, crop and join them.

  A neighbour is blended itself before a tile is blended with it.
  """
  joined = []
  for i in range(rows):
    row = []
    for j in range(columns):
      y = done[i, j]
      y = _blend(done[i - 1, j], y, 2, height.blend) if i else y
      y = _blend(done[i, j - 1], y, 3, width.blend) if j else y
      done[i, j] = y
      row.append(y[:, :, : height.keep, : width.keep])
    joined.append(jnp.concatenate(row, axis=3))
  return jnp.concatenate(joined, axis=2)


def _blend(before, y, axis, extent):
  """Fade along an axis from the end of `before` into the begin of y."""
  extent = min(before.shape[axis], y.shape[axis], extent)
  shape = [extent if i == axis else 1 for i in range(y.ndim)]
  weight = (jnp.arange(extent) / max(extent, 1)).reshape(shape)
  end = before.shape[axis]
  tail = jax.lax.slice_in_dim(before, end - extent, end, axis=axis)
  head = jax.lax.slice_in_dim(y, 0, extent, axis=axis)
  rest = jax.lax.slice_in_dim(y, extent, y.shape[axis], axis=axis)
  return jnp.concatenate([tail * (1 - weight) + head * weight, rest], axis)
