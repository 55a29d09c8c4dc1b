"""Numbers that our denoiser is told of a clip: fps, size, scores.

fields of its Config, values by name --cond_of--> Cond --gather--> [B, n]
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vdit_jax import types


def names(fields: tuple[str, ...]) -> set[str]:
  """Names of the numbers that the network takes, "size" as two."""
  size = {"height", "width"} if "size" in fields else set()
  return set(fields) - {"size"} | size


def cond_of(
  fields: tuple[str, ...], B: int, values: Mapping[str, float]
) -> types.Cond:
  """Tell of B clips the same numbers, by name; the others are left open.

  Args:
    fields: `Config.cond` of the denoiser.
    B: clips.
    values: "fps", "height", "width" and scores.

  Raises:
    ValueError: for a number that the denoiser takes none of.
  """
  scores = [name for name in fields if name not in ("fps", "size")]
  if unknown := sorted(set(values) - names(fields)):
    raise ValueError(
      f"numbers must be of {sorted(names(fields))}, which the denoiser was "
      f"told in training, got {unknown}; leave them out"
    )

  def rows(*columns: str) -> jax.Array:
    return jnp.array([[values.get(name, jnp.nan) for name in columns]] * B)

  return types.Cond(
    fps=rows("fps")[:, 0] if "fps" in fields else None,
    size=rows("height", "width") if "size" in fields else None,
    scores=rows(*scores) if scores else None,
  )


def gather(
  fields: tuple[str, ...], cond: types.Cond | None, B: int
) -> jax.Array:
  """Gather the named numbers, NaN where not known: [B, n]."""
  cond = cond or types.Cond()
  scores = len(set(fields) - {"fps", "size"})
  columns = []
  for name, width in (("fps", 1), ("size", 2), ("scores", scores)):
    if name in fields or (name == "scores" and scores):
      value = getattr(cond, name)
      shape = (B, width)
      value = jnp.full(shape, jnp.nan) if value is None else value
      if value.size != B * width:
        raise ValueError(
          f"cond.{name} must be {shape}, as denoiser.cond={fields} says, got "
          f"{value.shape}"
        )
      columns.append(value.reshape(shape).astype(jnp.float32))
  return jnp.concatenate(columns, axis=1)
