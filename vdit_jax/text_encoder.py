"""A released text encoder that is not trained, with its tokenizer.

  captions -> tokens -> T5 -> embeds, mask

`cache` encodes a dataset's captions with it, once; training the prompts of its
samples; `pipeline` those of a caller. A folder is an encoder's in the layout
of transformers, with its spiece.model beside it, in `tokenizer/` or in
`../tokenizer/`; or a diffusers pipeline with `text_encoder/` and `tokenizer/`.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from vdit_jax import convert, sharding, types
from vdit_jax.convert import folders
from vdit_jax.convert import t5 as tables
from vdit_jax.data import tokenizer as tokenizers
from vdit_jax.models import t5

_TOKENIZER = "spiece.model"
_BLOCK, _STRIDE = 2**16, 2**24  # bytes; see `fingerprint`


@dataclasses.dataclass(frozen=True)
class Frozen:
  """A text encoder with its weights and tokenizer."""

  module: t5.TextEncoder
  params: Any = dataclasses.field(repr=False)
  tokenizer: tokenizers.Released = dataclasses.field(repr=False)

  def encode(self, captions: list[str], max_length: int) -> types.Text:
    """Encode captions under the mesh that is set, or on one device.

    A token sees the tokens of its caption alone, as in T5's own training, and
    not the padding: what a caption gives does not depend on `max_length`,
    unless it is cut.

    Args:
      captions: B texts.
      max_length: tokens of a text with its end token, M.

    Returns:
      Arrays of numpy, of all captions in each process: embeds float32
      [B, M, E], and the mask.
    """
    fill = -len(captions) % sharding.mesh_size("batch")
    tokens, mask = self.tokenizer.encode([*captions, *[""] * fill], max_length)
    embeds = _to_host(_apply(self.module, self.params, tokens, mask))
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
  loaded = convert.load(_encoder(path), param_dtype=dtype, dtype=dtype)
  tokenizer = tokenizers.load_released(_tokenizer(path))
  return Frozen(loaded.module, loaded.params, tokenizer)


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

  It is a SHA-256 of spiece.model, config.json and, of each file of weights,
  its size and the first 64 KiB of every 16 MiB. The whole of an XXL, 10 to 19
  GB, would take minutes to read from gs://; its matrices are of 32 MiB and
  more, so each of them is looked at.
  """
  folder = _encoder(path)
  config = folder / folders.CONFIG
  folders.read_config(folder)  # refuses a folder that is not there
  digest = hashlib.sha256()
  for file in (_tokenizer(path) / _TOKENIZER, config):
    digest.update(hashlib.sha256(file.read_bytes()).digest())
  for file in _weights(folder):
    size = file.stat().length
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as opened:
      for start in range(0, size, _STRIDE):
        opened.seek(start)
        digest.update(opened.read(_BLOCK))
  return digest.hexdigest()[:16]


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


def _weights(folder: epath.Path) -> list[epath.Path]:
  """List the files of an encoder's weights, in whichever layout, in order."""
  if convert.is_orbax(folder):
    return list(_files(folder / "params"))
  return sorted({x.path for x in folders.read_tensors(folder).values()})


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()):
    yield from _files(path) if path.is_dir() else (path,)


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, params, tokens, mask):
  tokens = sharding.constrain(tokens, "batch", None)
  embeds = module.apply({"params": params}, tokens, mask)
  return sharding.constrain(embeds, "batch", None, None)


def _to_host(x: jax.Array) -> np.ndarray:
  if x.is_fully_addressable:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)
