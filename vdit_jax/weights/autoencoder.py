"""An autoencoder that is not trained any more: ours or a released one.

`cache` encodes a dataset with it and `training` the clips of a batch. Ours
lies in the workdir of its run, or beside the denoiser that was trained on it;
a released one is a folder of its own (`vae/` of a pipeline), or a pipeline's.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from vdit_jax import checkpoint, trees
from vdit_jax.convert import folders
from vdit_jax.models import networks
from vdit_jax.weights import component, diffusers_folder, run_config

FILE = "autoencoder.safetensors"  # ours, in a workdir


def is_released(path: epath.PathLike) -> bool:
  """Tell whether a folder is of a released autoencoder, or pipeline."""
  return folders.holds_component(_folder(path))


def read_config(path: epath.PathLike, dtype: str) -> ml_collections.ConfigDict:
  """Read an autoencoder's group of a config; no weights are read.

  Args:
    path: workdir of ours, a released one's folder, or its pipeline's.
    dtype: that a released one is to compute in; ours knows its own.

  Raises:
    ValueError: if there is none, or of a class that is not known.
  """
  if is_released(path):
    described = component.describe(_folder(path), "autoencoder", dtype)
    return run_config.network(*described)
  _weights(path)  # refuses one that is not trained
  return run_config.read(path).autoencoder


def load(path: epath.PathLike) -> dict[str, Any]:
  """Load an autoencoder's weights onto the mesh that is set, in float32.

  Args:
    path: workdir or release with ours, a released one's folder, or its
      pipeline's.
  """
  if is_released(path):
    return component.load(_folder(path), param_dtype=jnp.float32).params
  return checkpoint.load_release(_weights(path))[0]


def names(path: epath.PathLike) -> dict[str, str]:
  """Name an autoencoder's weights, and apart from them its normalisation.

  Returns:
    "autoencoder" and "normalisation", by their content: of ours the weights
    without what normalises, and that; of a released one its files, and what
    its config.json says of its scale.
  """
  group = read_config(path, "float32")
  module = networks.build_module(group, "autoencoder")
  if is_released(path):
    numbers = module.normalisation({})
    return {
      "autoencoder": component.fingerprint(_folder(path)),
      "normalisation": _name_numbers(numbers),
    }
  weights = load(path)
  numbers = module.normalisation(weights)
  rest = {k: x for k, x in trees.flatten(weights).items() if k not in numbers}
  return {"autoencoder": _digest(rest), "normalisation": _name_numbers(numbers)}


def _folder(path: epath.PathLike) -> epath.Path:
  return diffusers_folder.part(path, "autoencoder")


def _name_numbers(numbers: Mapping[str, Any]) -> str:
  """Name numbers: a few by themselves, vectors by their content."""
  if all(np.ndim(x) == 0 for x in numbers.values()):
    return " ".join(f"{name} {x:g}" for name, x in numbers.items())
  return _digest({name: np.asarray(x) for name, x in numbers.items()})


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for name, array in sorted(arrays.items()):
    digest.update(f"{name} {array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:16]


def _weights(path: epath.PathLike) -> epath.Path:
  weights = epath.Path(path) / FILE
  if not weights.exists():
    raise ValueError(
      f"autoencoder_workdir has no {weights}; train the autoencoder to its "
      "last step first: python train.py --config=configs/digits.py:vae "
      f"--workdir={path}; or give the vae/ folder of a released pipeline"
    )
  return weights
