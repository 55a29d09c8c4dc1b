"""Padding behind captions: who sees it.

  mask --for_encoder--> what the text encoder is told
  Text --for_denoiser--> what the denoiser is given

"masked": nobody sees padding, and a text is its tokens. "seen": the encoder
and the denoiser see it as they see tokens, so that M embeddings are the text.
"zeroed": the encoder does not see it, the denoiser sees zeros in its place.
Where it is not seen, a text without a token is none: the null that a denoiser
learns, whose pooled embedding is zeros, whatever an encoder gave.
"""

from typing import Any

import jax.numpy as jnp

from vdit_jax import types

KINDS = ("masked", "seen", "zeroed")


def check(padding: str) -> None:
  """Refuse what is none of `KINDS`."""
  if padding not in KINDS:
    raise ValueError(f"padding must be one of {KINDS}, got {padding!r}")


def for_encoder(padding: str, mask: Any) -> Any:
  """The mask [B, M] that a text encoder is told."""
  check(padding)
  return jnp.ones_like(mask) if padding == "seen" else mask


def for_denoiser(padding: str, text: types.Text) -> types.Text:
  """The Text of encoded captions, of which `mask` [B, M] says the tokens."""
  check(padding)
  embeds = text.embeds
  if padding != "seen" and text.pooled is not None:
    said = jnp.any(text.mask, -1, keepdims=True)
    text = text.replace(pooled=jnp.where(said, text.pooled, 0))
  if padding == "masked":
    return text
  if padding == "zeroed":
    embeds = jnp.where(text.mask[..., None], embeds, 0)
  return text.replace(embeds=embeds, mask=jnp.ones_like(text.mask))
