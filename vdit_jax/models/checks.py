"""What a denoiser cannot take is refused, naming the remedy; by shapes."""

from collections.abc import Mapping
from typing import Any

import jax

from vdit_jax import types


def latents(cfg: Any, x_t: jax.Array) -> None:
  """Refuse latents [B, f, h, w, c] of broken patches or other channels."""
  for axis, n, p in zip("fhw", x_t.shape[1:4], cfg.patch, strict=True):
    if n % p:
      raise ValueError(
        f"latent {axis}={n} must be a multiple of the patch's {p}; try "
        f"{n + -n % p}, which the system's `latent_shape` gives"
      )
  if x_t.shape[-1] != cfg.latent_channels:
    raise ValueError(
      f"latents have {x_t.shape[-1]} channels, the denoiser takes "
      f"{cfg.latent_channels}"
    )


def times(x_t: jax.Array, t: jax.Array) -> None:
  """Refuse times that are not of clips, nor of their latent frames."""
  if t.shape not in (x_t.shape[:1], x_t.shape[:2]):
    raise ValueError(
      f"t must be [B] or [B, f] = {x_t.shape[:1]} or {x_t.shape[:2]}, got "
      f"{t.shape}"
    )


def text(cfg: Any, given: types.Text) -> None:
  """Refuse a text of another encoder's width."""
  if given.embeds.shape[-1] != cfg.text_width:
    raise ValueError(
      f"text embeds are {given.embeds.shape[-1]} wide, but the denoiser's "
      f"text_width is {cfg.text_width}; use the text encoder it was trained "
      "with"
    )


def cond(
  who: str, given: types.Cond | None, shapes: Mapping[str, tuple[int, ...]]
) -> None:
  """Refuse a condition without an input, and an input without a condition.

  Args:
    who: takes it, for errors.
    given: what is given.
    shapes: of each field that is taken, all of which must be there.
  """
  fields = vars(given) if given is not None else {}
  found = {name: x for name, x in fields.items() if x is not None}
  if found.keys() != shapes.keys():
    raise ValueError(
      f"{who} takes the conditions {sorted(shapes)}, got {sorted(found)}; make "
      "them with `condition`"
    )
  for name, shape in shapes.items():
    if found[name].shape != shape:
      raise ValueError(
        f"cond.{name} must be {shape}, got {found[name].shape}; make them "
        "with `condition`"
      )
