"""A released pipeline's parts, its weights read when they are asked for.

  folder of diffusers -> networks, weights, tokenizer, recipe -> `pipeline.load`

A text encoder of 4.8 billion parameters, a denoiser and an autoencoder do not
fit one small device together, and need not: they run one after another.
"""

import collections.abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from etils import epath

from vdit_jax import types
from vdit_jax.models import networks
from vdit_jax.nn import lora
from vdit_jax.text import tokenizer as tokenizers
from vdit_jax.weights import component, diffusers_folder


class Weights(collections.abc.Mapping):
  """Params by network, read when first asked for and held until freed."""

  def __init__(self, readers: dict[str, Callable[[], Any]]):
    """Take what reads each network's params."""
    self._readers = readers
    self._held: dict[str, Any] = {}

  def __getitem__(self, name: str) -> Any:
    """Return a network's params; read them if they are not held."""
    if name not in self._held:
      self._held[name] = self._readers[name]()
    return self._held[name]

  def __iter__(self) -> Iterator[str]:
    """Go through the names."""
    return iter(self._readers)

  def __len__(self) -> int:
    """Count the networks."""
    return len(self._readers)

  @property
  def held(self) -> tuple[str, ...]:
    """Names of the networks whose params are in memory."""
    return tuple(self._held)

  def free(self, name: str) -> None:
    """Let go of a network's params, if they are held."""
    self._held.pop(name, None)


@dataclasses.dataclass(frozen=True)
class Parts:
  """What `pipeline.Pipeline` is made of; see there."""

  modules: networks.Modules
  params: Weights
  tokenizer: tokenizers.Released
  recipe: types.Recipe
  max_length: int


def read(
  path: epath.PathLike,
  *,
  param_dtype: Any = None,
  dtype: Any = None,
  adapters: epath.PathLike | None = None,
) -> Parts:
  """Check a pipeline's folder; no weights are read yet.

  Args:
    path: folder with model_index.json.
    param_dtype: of the weights; None is as stored, but bfloat16 for float16
      where `dtype` is None too.
    dtype: of computations, bfloat16 or float32; None is that of the weights.
    adapters: file of low-rank adapters, or its folder, that the denoiser's
      weights are merged with; None is none.

  Raises:
    ValueError: if the folder is not whole, of an unknown class, or its parts
      do not fit each other; or the adapters are of another model.
  """
  released = diffusers_folder.read(path)
  checked = {
    name: _check(folder, param_dtype, dtype)
    for name, folder in released.networks.items()
  }
  modules = networks.Modules(**{k: v.module for k, v in checked.items()})
  _check_match(modules, path)
  cfg = modules.denoiser.cfg
  recipe = networks.file(modules.denoiser).recipe(cfg)
  readers = {name: part.read for name, part in checked.items()}
  if adapters is not None:
    factors = component.load_lora(adapters, released.networks["denoiser"])
    read_base = readers["denoiser"]
    readers["denoiser"] = lambda: lora.merge(read_base(), factors, 1.0)
  return Parts(
    modules=modules,
    params=Weights(readers),
    tokenizer=tokenizers.load_released(released.tokenizer),
    recipe=dataclasses.replace(recipe, **released.sampling),
    max_length=cfg.text_tokens,
  )


def _check(
  folder: epath.Path, param_dtype: Any, dtype: Any
) -> component.Checked:
  """Check a network's folder, having settled its dtypes."""
  stored = component.stored_dtype(folder)
  if param_dtype is None and dtype is None and stored == jnp.float16:
    param_dtype = jnp.bfloat16
  dtype = next(x for x in (dtype, param_dtype, stored) if x is not None)
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
    raise ValueError(
      f"dtype must be bfloat16 or float32, got {jnp.dtype(dtype)}: T5's "
      "activations are beyond the largest float16"
    )
  return component.check(folder, param_dtype=param_dtype, dtype=dtype)


def _check_match(modules: networks.Modules, path: epath.PathLike) -> None:
  """Refuse networks of different systems."""
  denoiser, autoencoder = modules.denoiser.cfg, modules.autoencoder.cfg
  for what, ours, theirs in (
    (
      "latent channels of transformer and vae",
      denoiser.latent_channels,
      autoencoder.latent_channels,
    ),
    (
      "frames a latent frame of transformer and vae",
      denoiser.time_stride,
      autoencoder.time_stride,
    ),
    (
      "pixels a latent of transformer and vae",
      denoiser.space_stride,
      autoencoder.space_stride,
    ),
    (
      "widths of text of transformer and text_encoder",
      denoiser.text_width,
      modules.text_encoder.cfg.width,
    ),
  ):
    if ours != theirs:
      raise ValueError(
        f"the {what} in {path} must be equal, got {ours} and {theirs}; "
        "download the pipeline again"
      )
