"""The released denoiser that a run begins from.

`config.init_from` is a pipeline's folder in the layout of diffusers, or that
of its `transformer/` alone. Full fine-tuning begins from its weights; adapters
(`vdit_jax.nn.lora`) are trained beside them and need them ever after.
"""

import dataclasses
from typing import Any

import ml_collections
from etils import epath

from vdit_jax.convert import folders
from vdit_jax.models.cogvideox import denoiser as network
from vdit_jax.models.cogvideox import keys as cogvideox
from vdit_jax.nn import lora
from vdit_jax.weights import component

_INDEX, _PART = "model_index.json", "transformer"
_NAME = "cogvideox"  # file of models/ whose denoisers are released
# Fields of a denoiser's config that say how to compute, and not what.
_HOW = ("kernel", "context", "remat", "unroll", "dtype")


def is_released(config: ml_collections.ConfigDict) -> bool:
  """Tell whether a run begins from a released denoiser."""
  return config.denoiser.name == _NAME and bool(config.init_from)


def folder_of(path: epath.PathLike) -> epath.Path:
  """Return the denoiser's folder of a pipeline, or the folder itself."""
  path = folders.absolute(path)
  return path / _PART if (path / _INDEX).exists() else path


def read_config(path: epath.PathLike, dtype: str) -> network.Config:
  """Read the shape of a released denoiser; no weights are read.

  Args:
    path: of a pipeline or of the denoiser.
    dtype: that it is to compute in.
  """
  folder = folder_of(path)
  config = folders.read_config(folder)
  name = folders.class_name(config)
  known = component.COMPONENTS.get(name)
  if known is not cogvideox.TRANSFORMER:
    raise ValueError(
      f"{folder} is of class {name!r}, which is no denoiser that can be "
      "trained here; give a CogVideoX pipeline's folder"
    )
  return cogvideox.transformer_config(config, dtype)


def resolve(config: ml_collections.ConfigDict) -> None:
  """Note which weights a run begins from; refuse those of another shape."""
  if not is_released(config):
    if lora.of(config).rank:
      raise ValueError(
        f"lora.rank={config.lora.rank} needs a released denoiser to adapt; "
        "set init_from to its folder, or lora.rank=0"
      )
    return
  found = dataclasses.asdict(read_config(config.init_from, "float32"))
  other = [
    f"{k}={config.denoiser[k]!r}, there it is {found[k]!r}"
    for k in sorted(found)
    if k not in _HOW and config.denoiser[k] != found[k]
  ]
  if other:
    raise ValueError(
      f"init_from={config.init_from!r} is of another denoiser than the "
      f"config's: {'; '.join(other)}; take --config=configs/cogvideox.py:"
      f"{config.init_from}"
    )
  config.init_fingerprint = component.fingerprint(folder_of(config.init_from))


def load(config: ml_collections.ConfigDict, dtype: Any) -> dict[str, Any]:
  """Load the weights that a run begins from onto the mesh that is set.

  Args:
    config: of the run, resolved.
    dtype: of the weights.
  """
  folder = folder_of(config.init_from)
  found = component.fingerprint(folder)
  if found != config.init_fingerprint:
    raise ValueError(
      f"init_from={config.init_from!r} is of weights {found}, but the run "
      f"began from {config.init_fingerprint}; put those there, or write their "
      "folder as init_from in the run's config.json"
    )
  return component.load(folder, param_dtype=dtype).params


def trained(
  config: ml_collections.ConfigDict, params: dict[str, Any], dtype: Any
) -> Any:
  """Return the weights of the denoiser that a run trained.

  Args:
    config: of the run, resolved.
    params: that it trained.
    dtype: of the weights that adapters are merged with; None is as stored.
  """
  if lora.PARAMS not in params:
    return params["denoiser"]
  weights, scale = load(config, dtype), lora.of(config).scale
  return lora.merge(weights, params[lora.PARAMS], scale)
