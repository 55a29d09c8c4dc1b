"""An autoencoder that is not trained any more: ours or a released one.

`cache` encodes a dataset with it and `training` the clips of a batch. Ours
lies in the workdir of its run, or beside the denoiser that was trained on it;
a released one is a folder in the layout of diffusers (`vae/` of a pipeline).
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from vdit_jax import checkpoint, trees
from vdit_jax.convert import folders
from vdit_jax.models.cogvideox import keys as cogvideox
from vdit_jax.weights import component

FILE = "autoencoder.safetensors"  # ours, in a workdir

# Files of models/ whose autoencoders are released, by the class of their
# config.json.
_RELEASED = {"AutoencoderKLCogVideoX": "cogvideox_vae"}


def is_released(path: epath.PathLike) -> bool:
  """Tell whether a folder is of a released autoencoder."""
  config = folders.absolute(path) / folders.CONFIG
  return config.exists() and "_class_name" in folders.read_config(config.parent)


def read_config(path: epath.PathLike, dtype: str) -> ml_collections.ConfigDict:
  """Read an autoencoder's group of a config; no weights are read.

  Args:
    path: workdir of ours, or a released one's folder.
    dtype: that a released one is to compute in; ours knows its own.

  Raises:
    ValueError: if there is none, or of a class that is not known.
  """
  if not is_released(path):
    _weights(path)  # refuses one that is not trained
    return checkpoint.read_config(path).autoencoder
  folder = folders.absolute(path)
  config = folders.read_config(folder)
  name = folders.class_name(config)
  if name not in _RELEASED:
    raise ValueError(
      f"{folder} is of class {name!r}, which is no known autoencoder; give the "
      f"folder of one of {', '.join(sorted(_RELEASED))}"
    )
  cfg = cogvideox.autoencoder_config(config, dtype)
  fields = {"name": _RELEASED[name], **dataclasses.asdict(cfg)}
  return ml_collections.ConfigDict(fields)


def load(path: epath.PathLike) -> dict[str, Any]:
  """Load an autoencoder's weights onto the mesh that is set, in float32.

  Args:
    path: workdir or release with ours, or a released one's folder.
  """
  if is_released(path):
    return component.load(path, param_dtype=jnp.float32).params
  return checkpoint.load_release(_weights(path))[0]


def names(path: epath.PathLike) -> dict[str, str]:
  """Name an autoencoder's weights, and apart from them its normalisation.

  Returns:
    "autoencoder" and "normalisation", by their content: of ours the weights
    but `latent_mean` and `latent_std`, and these two; of a released one its
    files, and the scale of its config.json.
  """
  if is_released(path):
    scale = read_config(path, "float32").scale
    name = component.fingerprint(path)
    return {"autoencoder": name, "normalisation": f"scale {scale:g}"}
  weights = trees.flatten(load(path))
  statistics = {n: weights.pop(n) for n in ("latent_mean", "latent_std")}
  return {
    "autoencoder": _digest(weights),
    "normalisation": _digest(statistics),
  }


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
