"""A released text encoder that is not trained, with its tokenizer.

  captions -> tokens -> T5 -> embeds, mask

`cache` encodes a dataset's captions with it, once; training the prompts of its
samples; `pipeline` those of a caller. A folder is an encoder's in the layout
of transformers, with its spiece.model beside it, in `tokenizer/` or in
`../tokenizer/`; or a diffusers pipeline with `text_encoder/` and `tokenizer/`.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from vdit_jax import sharding, types
from vdit_jax.convert import folders
from vdit_jax.models.t5 import encoder as t5
from vdit_jax.models.t5 import keys as tables
from vdit_jax.text import tokenizer as tokenizers
from vdit_jax.weights import component

_TOKENIZER = "spiece.model"


@dataclasses.dataclass(frozen=True)
class Frozen:
  """A text encoder with its weights and tokenizer."""

  module: t5.TextEncoder
  params: Any = dataclasses.field(repr=False)
  tokenizer: tokenizers.Released = dataclasses.field(repr=False)

  def encode(
    self, captions: list[str], max_length: int, sees_padding: bool = False
  ) -> types.Text:
    """Encode captions under the mesh that is set, or on one device.

    A token sees the tokens of its caption alone, as in T5's own training, and
    not the padding: what a caption gives does not depend on `max_length`,
    unless it is cut. CogVideoX was trained otherwise: with `sees_padding`
    every token sees the padding too, and all M embeddings are the caption's.

    Args:
      captions: B texts.
      max_length: tokens of a text with its end token, M.
      sees_padding: whether padding counts as tokens.

    Returns:
      Arrays of numpy, of all captions in each process: embeds float32
      [B, M, E], and the mask.
    """
    fill = -len(captions) % sharding.mesh_size("batch")
    tokens, mask = self.tokenizer.encode([*captions, *[""] * fill], max_length)
    mask = mask | sees_padding
    embeds = _to_host(apply(self.module, self.params, tokens, mask))
    return types.Text(
      embeds=embeds[: len(captions)], mask=mask[: len(captions)]
    )


def load(
  path: epath.PathLike, dtype: str, made_by: str | None = None
) -> Frozen:
  """Load a text encoder onto the mesh that is set, or the default device.

  Args:
    path: see the module's docstring.
    dtype: of the weights and of computations. T5's are not for float16: their
      activations are beyond its largest number.
    made_by: fingerprint that it must have; None takes any.
  """
  path = folders.absolute(path)
  if made_by is not None:
    _check_same(path, made_by)
  read_config(path, dtype)  # refuses what is no text encoder
  loaded = component.load(_encoder(path), param_dtype=dtype, dtype=dtype)
  tokenizer = load_tokenizer(path)
  return Frozen(loaded.module, loaded.params, tokenizer)


def load_tokenizer(path: epath.PathLike) -> tokenizers.Released:
  """Load the tokenizer of a text encoder's folder; see `load`."""
  return tokenizers.load_released(_tokenizer(path))


def read_config(path: epath.PathLike, dtype: str) -> t5.Config:
  """Read the shape of a text encoder; nothing but its config.json is read."""
  folder = _encoder(path)
  config = folders.read_config(folder)
  name = folders.class_name(config)
  if name not in tables.COMPONENTS:
    raise ValueError(
      f"{folder} is of class {name!r}, which is no text encoder; give the "
      f"folder of one of {', '.join(sorted(tables.COMPONENTS))}"
    )
  return tables.COMPONENTS[name].build(config, dtype).cfg


def fingerprint(path: epath.PathLike) -> str:
  """Name a text encoder and its tokenizer by their content.

  See `component.fingerprint`, to which spiece.model is the first file.
  """
  folder = _encoder(path)
  folders.read_config(folder)  # refuses a folder that is not there
  return component.fingerprint(folder, [_tokenizer(path) / _TOKENIZER])


@functools.partial(jax.jit, static_argnums=0)
def apply(
  module: t5.TextEncoder, params: Any, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
  """Encode tokens [B, M], split over the mesh's devices: [B, M, E]."""
  tokens = sharding.constrain(tokens, "batch", None)
  embeds = module.apply({"params": params}, tokens, mask)
  return sharding.constrain(embeds, "batch", None, None)


def _check_same(path: epath.Path, made_by: str) -> None:
  found = fingerprint(path) if path.exists() else "not there"
  if found != made_by:
    raise ValueError(
      f"text_encoder_dir must be of text encoder {made_by}, but {path} is "
      f"{found}; put that one there, or write its folder as text_encoder_dir "
      "in the run's config.json"
    )


def _encoder(path: epath.PathLike) -> epath.Path:
  path = folders.absolute(path)
  inside = path / "text_encoder"
  return inside if (inside / folders.CONFIG).exists() else path


def _tokenizer(path: epath.PathLike) -> epath.Path:
  """Find the folder of an encoder's spiece.model."""
  encoder = _encoder(path)
  places = (encoder, encoder / "tokenizer", encoder.parent / "tokenizer")
  for place in places:
    if (place / _TOKENIZER).exists():
      return place
  raise ValueError(
    f"{encoder} has no {_TOKENIZER}, nor has {places[1]} or {places[2]}; put "
    "there that of the encoder's original release"
  )


def _to_host(x: jax.Array) -> np.ndarray:
  if x.is_fully_addressable:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)
