"""Released text encoders that are not trained, with their tokenizers.

  captions -> tokens -> encoder -> embeds, mask, pooled

`cache` encodes a dataset's captions with one, once; training the prompts of its
samples; `pipeline` those of a caller. A folder is an encoder's in the layout
of transformers, with its tokenizer's file beside it, in `tokenizer/` or in
`../tokenizer/`; or a pipeline's folder, which has one `text_encoder/` and
`tokenizer/`, or several (`text_encoder_2/` and `tokenizer_2/`), or has them
where the layout of its family says.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from vdit_jax import sharding, types, writing
from vdit_jax.convert import folders
from vdit_jax.models import system as systems
from vdit_jax.text import padding as paddings
from vdit_jax.text import tokenizer as tokenizers
from vdit_jax.weights import component, diffusers_folder

NAME = "text_encoder"  # of a system's only one, or its first


def names(path: epath.PathLike) -> list[str]:
  """Name the text encoders that a folder has: one, or a pipeline's."""
  path, found = writing.absolute(path), [NAME]
  if own := diffusers_folder.own(path):
    return list(own.tokenizers)
  while (path / f"{NAME}_{len(found) + 1}" / folders.CONFIG).exists():
    found.append(f"{NAME}_{len(found) + 1}")
  return found


@dataclasses.dataclass(frozen=True)
class Frozen:
  """A text encoder with its weights and tokenizer."""

  module: nn.Module
  params: Any = dataclasses.field(repr=False)
  tokenizer: tokenizers.Tokenizer = dataclasses.field(repr=False)

  def encode(
    self, captions: list[str], max_length: int, padding: str = "masked"
  ) -> types.Text:
    """Encode captions under the mesh that is set, or on one device.

    Args:
      captions: B texts.
      max_length: tokens of a text with its end token, M.
      padding: one of `text.padding.KINDS`. Masked, what a caption gives does
        not depend on `max_length`, unless it is cut.

    Returns:
      Arrays of numpy, of all captions in each process: embeds float32
      [B, M, E], the mask and, where the encoder has one, pooled [B, E].
    """
    fill = -len(captions) % sharding.mesh_size("batch")
    tokens, mask = self.tokenizer.encode([*captions, *[""] * fill], max_length)
    seen = paddings.for_encoder(padding, mask)
    output = apply(self.module, self.params, tokens, seen)
    text = systems.text_of(jax.tree.map(_to_host, output), mask)
    text = paddings.for_denoiser(padding, text)
    return jax.tree.map(lambda x: np.asarray(x)[: len(captions)], text)


def load(
  path: epath.PathLike,
  dtype: str,
  made_by: str | None = None,
  name: str = NAME,
) -> Frozen:
  """Load a text encoder onto the mesh that is set, or the default device.

  Args:
    path: see the module's docstring.
    dtype: of the weights and of computations; see `System.not_float16`.
    made_by: fingerprint that it must have; None takes any.
    name: of which of a pipeline's.
  """
  path = writing.absolute(path)
  if made_by is not None:
    _check_same(path, made_by, name)
  describe(path, dtype, name)  # refuses what is no text encoder
  words = load_tokenizer(path, name)
  folder = _encoder(path, name)
  loaded = component.load(folder, param_dtype=dtype, dtype=dtype)
  return Frozen(loaded.module, loaded.params, words)


def load_tokenizer(
  path: epath.PathLike, name: str = NAME
) -> tokenizers.Tokenizer:
  """Load the tokenizer of a text encoder's folder; see `load`."""
  network, _ = describe(path, "float32", name)
  clean = tokenizers.as_it_is
  if system := _system(writing.absolute(path)):
    clean = system.text[name].clean
  return network.read_tokenizer(_tokenizer(path, name), clean)


def describe(
  path: epath.PathLike, dtype: str, name: str = NAME
) -> tuple[systems.Network, Any]:
  """Tell what a text encoder is; nothing but its config.json is read."""
  return component.describe(_encoder(path, name), "text_encoder", dtype)


def fingerprint(path: epath.PathLike, name: str = NAME) -> str:
  """Name a text encoder and its tokenizer by their content.

  See `component.fingerprint`, to which the tokenizer is the first file.
  """
  folder = _encoder(path, name)
  folders.read_config(folder)  # refuses a folder that is not there
  network, _ = describe(path, "float32", name)
  tokenizer = network.find_tokenizer(_tokenizer(path, name))
  return component.fingerprint(folder, tokenizer)


def made(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Bring a cache's metadata up to date: padding and tokens by encoder."""
  found = dict(metadata)
  seen = found.pop("sees_padding", False)
  padding = found.pop("padding", "seen" if seen else "masked")
  length = found.pop("max_length", None)
  for key in metadata:
    name = key.removesuffix("_dtype")
    if name != key and name.startswith(NAME):
      found.setdefault(f"{name}_padding", padding)
      found.setdefault(f"{name}_max_length", length)
  return found


@functools.partial(jax.jit, static_argnums=0)
def apply(
  module: nn.Module, params: Any, tokens: jax.Array, mask: jax.Array
) -> Any:
  """Give what the module does of tokens [B, M], split over the mesh."""
  tokens = sharding.constrain(tokens, "batch", None)
  output = module.apply({"params": params}, tokens, mask)
  return jax.tree.map(
    lambda x: sharding.constrain(x, "batch", *[None] * (x.ndim - 1)), output
  )


def _check_same(path: epath.Path, made_by: str, name: str) -> None:
  found = fingerprint(path, name) if path.exists() else "not there"
  if found != made_by:
    raise ValueError(
      f"text_encoder_dir must be of text encoder {made_by}, but {path} is "
      f"{found}; put that one there, or write its folder as text_encoder_dir "
      "in the run's config.json"
    )


def _system(path: epath.Path) -> systems.System | None:
  """Find the system of a pipeline, or of one of its folders; None of none."""
  for folder in (path, path.parent):
    if diffusers_folder.is_one(folder):
      return diffusers_folder.system_of(folder)
  return None


def _encoder(path: epath.PathLike, name: str) -> epath.Path:
  path = writing.absolute(path)
  if own := diffusers_folder.own(path):
    return own.networks[name]
  inside = path / name
  return inside if (inside / folders.CONFIG).exists() else path


def _tokenizer(path: epath.PathLike, name: str) -> epath.Path:
  """Find the folder of an encoder's tokenizer."""
  if own := diffusers_folder.own(path):
    return own.tokenizers[name]
  encoder = _encoder(path, name)
  network, _ = describe(path, "float32", name)
  folder = name.replace(NAME, "tokenizer")
  places = (encoder, encoder / folder, encoder.parent / folder)
  for place in places:
    if network.find_tokenizer(place):
      return place
  raise ValueError(
    f"{encoder} has no {network.said_tokenizer_files}, nor has {places[1]} or "
    f"{places[2]}; put there that of the encoder's original release"
  )


def _to_host(x: jax.Array) -> np.ndarray:
  if x.is_fully_addressable:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)
