"""PyTorch's .bin and .pt files, without torch and without running them.

Such a file is a zip: `data.pkl` is a pickled dict whose tensors name storages,
and `data/<n>` are the storages' bytes, not compressed. A pickle may call
anything that it can name, so here it can name a few things only: an ordered
dict, the function that makes a tensor of a storage, and the storages' types.
Those are stood in for by records of ours. Tensors stay in the file until they
are asked for, as those of `files` do.
"""

import collections
import math
import pickle
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from vdit_jax.convert import files

_STORAGES = {
  "BoolStorage": np.dtype(np.bool_),
  "ByteStorage": np.dtype(np.uint8),
  "CharStorage": np.dtype(np.int8),
  "ShortStorage": np.dtype(np.int16),
  "IntStorage": np.dtype(np.int32),
  "LongStorage": np.dtype(np.int64),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "FloatStorage": np.dtype(np.float32),
  "DoubleStorage": np.dtype(np.float64),
}
_PICKLE = "data.pkl"
_LARGEST_PICKLE = 100_000_000  # bytes: names and shapes, no values
_LOCAL_HEADER = 30  # bytes of a zip member's header before name and extra


# A pickle may also change what it has made. These are tuples, which cannot be.
class _Storage(NamedTuple):
  """Elements of one type that lie in the file, at an offset in bytes."""

  offset: int
  dtype: np.dtype
  length: int


class _View(NamedTuple):
  """A tensor of a storage; not checked yet."""

  storage: Any
  offset: Any
  size: Any
  stride: Any


def read(path: epath.PathLike) -> dict[str, files.Tensor]:
  """Find the tensors of a file that torch.save wrote of a state dict.

  Raises:
    ValueError: if the file is not such a zip, is damaged, or its pickle names
      anything that is not allowed or holds anything but named tensors.
  """
  path = epath.Path(path)
  with path.open("rb") as file:
    if not zipfile.is_zipfile(file):
      raise ValueError(
        f"{path} is not a whole zip file: it is cut, or of a torch before 1.6; "
        "fetch it again, or save it as safetensors with torch"
      )
    try:
      found = _unpickle(file)
    # A damaged zip or pickle shows up as an error of any type.
    except Exception as error:
      reason = str(error) or type(error).__name__
      raise ValueError(
        f"{path} cannot be read: {reason}; only a state dict of tensors is; "
        "save it as safetensors with torch, if you trust it"
      ) from error
  bad = [
    f"{key!r}: {type(value).__name__}"
    for key, value in found.items()
    if not isinstance(key, str) or not isinstance(value, _View)
  ]
  if bad:
    raise ValueError(
      f"{path} holds what is not a tensor by name ({', '.join(bad[:20])}); "
      "save the state dict itself"
    )
  return {key: _tensor(path, key, view) for key, view in found.items()}


def _unpickle(file: Any) -> dict[Any, Any]:
  with zipfile.ZipFile(file) as archive:
    members = {info.filename: info for info in archive.infolist()}
    pickled = [name for name in members if name.split("/")[1:] == [_PICKLE]]
    if len(pickled) != 1:
      raise ValueError(f"it has {len(pickled)} files {_PICKLE}, not one")
    if members[pickled[0]].file_size > _LARGEST_PICKLE:
      raise ValueError(f"its {_PICKLE} is over {_LARGEST_PICKLE} bytes")
    folder = pickled[0].split("/")[0]
    order = f"{folder}/byteorder"
    if order in members and archive.open(order).read(9) != b"little":
      raise ValueError("its numbers are not little-endian")
    with archive.open(pickled[0]) as data:
      found = _Unpickler(data, file, folder, members).load()
  if not isinstance(found, dict):
    raise ValueError(f"it holds a {type(found).__name__}, not a dict")
  return dict(found)


class _Unpickler(pickle.Unpickler):
  """Unpickle tensors by name, and nothing else."""

  def __init__(self, data, file, folder, members):
    super().__init__(data)
    self._file, self._folder, self._members = file, folder, members

  def find_class(self, module: str, name: str) -> Any:
    """Return what stands for a name that is allowed; refuse others."""
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    # A function of this file would stay changed, if the pickle changed it.
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return lambda *args: _View(*args[:4])
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return lambda data, requires_grad, hooks: data
    if module == "torch" and name in _STORAGES:
      return name
    raise ValueError(f"it names {module}.{name}, which is not allowed")

  def persistent_load(self, pid: Any) -> _Storage:
    """Return the storage that a tensor's record names."""
    kind, name, key, _, length = pid
    if kind != "storage" or name not in _STORAGES or type(length) is not int:
      raise ValueError(f"it names {pid!r}, which is not a storage")
    dtype = _STORAGES[name]
    member = self._members[f"{self._folder}/data/{key}"]
    stored = member.compress_type == zipfile.ZIP_STORED
    if not stored or member.file_size != length * dtype.itemsize:
      raise ValueError(
        f"storage {key} has {member.file_size} bytes, for {length} {dtype}"
      )
    return _Storage(self._offset(member), dtype, length)

  def _offset(self, member: zipfile.ZipInfo) -> int:
    """Place of a member's bytes: after a header of a length of its own."""
    here = self._file.tell()
    self._file.seek(member.header_offset)
    header = self._file.read(_LOCAL_HEADER)
    end = self._file.seek(0, 2)
    self._file.seek(here)
    name, extra = (
      int.from_bytes(header[i : i + 2], "little") for i in (26, 28)
    )
    offset = member.header_offset + _LOCAL_HEADER + name + extra
    if header[:4] != b"PK\3\4" or offset + member.file_size > end:
      raise ValueError(f"{member.filename} does not lie in the file")
    return offset


def _tensor(path: epath.Path, key: str, view: _View) -> files.Tensor:
  """Place a tensor in the file, if it lies in its storage."""
  storage, size, stride = view.storage, view.size, view.stride
  whole = isinstance(storage, _Storage) and _counts(size) and _counts(stride)
  if not whole or not _counts((view.offset,)) or len(size) != len(stride):
    raise files.damaged(path, f"{key!r} is no tensor of a storage: {view}")
  if view.offset + files.span(size, stride) > storage.length:
    raise files.damaged(
      path,
      f"{key!r} at {view.offset}, sizes {size}, strides {stride}, does not "
      f"lie in its storage of {storage.length} elements",
    )
  dense = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
  return files.Tensor(
    path,
    storage.offset + view.offset * storage.dtype.itemsize,
    storage.dtype,
    size,
    None if stride == dense else stride,
  )


def _counts(value: Any) -> bool:
  """Whether a value is a tuple of whole numbers from 0 up."""
  return type(value) is tuple and all(type(n) is int and n >= 0 for n in value)
