"""PyTorch's .bin and .pt files, without torch and without running them.

Such a file is a zip: `data.pkl` is a pickled dict whose tensors name storages,
and `data/<n>` are the storages' bytes, not compressed. A pickle may call
anything that it can name, so here it can name a few things only: an ordered
dict, the function that makes a tensor of a storage, and the storages' types.
Those are stood in for by records of ours. Tensors stay in the file until they
are asked for, as those of `files` do.
"""

import collections
import io
import math
import pickle
import pickletools
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from vdit_jax import inputs, schema
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
# Names and shapes, no values: a tensor takes some 200 bytes and 40 opcodes.
_LARGEST_PICKLE = 20_000_000  # bytes
_MOST_OPCODES = 250_000
_DEEPEST = 100  # values within values; a state dict has eight
_MOST_AXES = 64  # numpy's limit
_FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
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
  path = inputs.check_file(path)
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
      reason = str(error)[:200] or type(error).__name__
      raise ValueError(
        f"{path} cannot be read: {reason}; only a state dict of tensors is; "
        "save it as safetensors with torch, if you trust it"
      ) from error
  bad = [
    f"{schema.quote(key)}: {type(value).__name__}"
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
    data = archive.read(pickled[0])
    _check_opcodes(data)
    found = _Unpickler(io.BytesIO(data), file, folder, members).load()
  if not isinstance(found, dict):
    raise ValueError(f"it holds a {type(found).__name__}, not a dict")
  return dict(found)


def _check_opcodes(data: bytes) -> None:
  """Refuse a pickle that is long or nests deeply, before it is run.

  To hash a tuple, as a key is, C goes through all that is in it, and beyond
  its stack: a few kB, packed, can end the process. So depths alone are put on
  a stack here, as the opcodes would put values.
  """
  stack: list[int] = []
  marks: list[int] = []  # where on the stack
  memo: dict[int, int] = {}
  for count, (op, arg, _) in enumerate(pickletools.genops(data)):
    if count == _MOST_OPCODES:
      raise ValueError(f"its {_PICKLE} has over {_MOST_OPCODES} opcodes")
    if op.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
      memo[len(memo) if arg is None else arg] = stack[-1]
      continue
    if op.name == "MARK":
      marks.append(len(stack))
      continue
    taken = _take(stack, marks, op)
    depth = 1 + max(taken, default=0)
    if op.name in _FILLS:  # what is filled stays where it is
      depth = max(taken[0], 1 + max(taken[1:], default=0))
    elif op.name in ("GET", "BINGET", "LONG_BINGET"):
      depth = memo[arg]
    if depth > _DEEPEST:
      raise ValueError(f"its {_PICKLE} nests values over {_DEEPEST} deep")
    stack += [depth] * len(op.stack_after)


def _take(
  stack: list[int], marks: list[int], op: pickletools.OpcodeInfo
) -> list[int]:
  """Take from a pickle's stack what an opcode does, the lowest first."""
  names = [kind.name for kind in op.stack_before]
  count = len(names)
  if "mark" in names:
    count = len(stack) - marks.pop() + names.index("mark")
  elif op.name == "POP" and marks and marks[-1] == len(stack):
    del marks[-1]
    return []
  taken = stack[len(stack) - count :]
  del stack[len(stack) - count :]
  return taken


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
      raise ValueError(f"it names {schema.quote(pid)}, which is not a storage")
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
    raise inputs.damaged(
      path,
      f"{schema.quote(key)} is no tensor of a storage: {schema.quote(view)}",
    )
  if view.offset + files.span(size, stride) > storage.length:
    raise inputs.damaged(
      path,
      f"{schema.quote(key)} does not lie in its storage of {storage.length} "
      f"elements: {schema.quote(view[1:])}",
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
  """Whether a value is a short tuple of whole numbers from 0 up."""
  return (
    type(value) is tuple
    and len(value) <= _MOST_AXES
    and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
  )
