"""Tensors in files, and the safetensors format, without torch.

A file is looked at, whole and strictly, before any tensor of it is read; a
tensor is read when it is asked for, one at a time. The format is eight bytes
of the header's length, the header (JSON: dtype, shape and place of each
tensor), then the tensors without a gap. The safetensors package reads local
files alone and writes from a dict of all tensors at once; a folder may be
gs://, and a checkpoint is converted a tensor at a time, so it is not used.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from etils import epath

from vdit_jax import inputs, schema, writing

DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "U16": np.dtype(np.uint16),
  "I16": np.dtype(np.int16),
  "U32": np.dtype(np.uint32),
  "I32": np.dtype(np.int32),
  "U64": np.dtype(np.uint64),
  "I64": np.dtype(np.int64),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes; a header of 100,000 tensors. The safetensors package takes 5 times as
# many, of which JSON could make several GB.
_LONGEST_HEADER = 20_000_000
_MOST_AXES = 64  # numpy's limit
_METADATA = "__metadata__"  # the header's entry that is no tensor
_ALIGNMENT = 8  # of the first tensor, by padding the header with spaces


class Readable(Protocol):
  """What has a dtype and a shape at once and its values when asked."""

  dtype: np.dtype
  shape: tuple[int, ...]

  def read(self) -> np.ndarray:
    """Return the values, of that dtype and shape."""
    ...


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that lies in a file.

  Attributes:
    path: of the file.
    offset: of its first element, in bytes.
    dtype, shape: of the array.
    strides: between elements along each axis, in elements; None is C order.
  """

  path: epath.Path
  offset: int
  dtype: np.dtype
  shape: tuple[int, ...]
  strides: tuple[int, ...] | None = None

  def read(self) -> np.ndarray:
    """Return the array, read-only.

    A local file is mapped, so that only what is used of the array is read,
    and its memory is the page cache's; a remote one's bytes are fetched.
    """
    length = span(self.shape, self.strides)
    if not length:
      return np.zeros(self.shape, self.dtype)
    flat = self._flat(length)
    if self.strides is None:
      return flat.reshape(self.shape)
    strides = [n * self.dtype.itemsize for n in self.strides]
    return np.lib.stride_tricks.as_strided(
      flat, self.shape, strides, writeable=False
    )

  def _flat(self, length: int) -> np.ndarray:
    if "://" not in str(self.path):
      return np.memmap(self.path, self.dtype, "r", self.offset, (length,))
    with self.path.open("rb") as file:
      file.seek(self.offset)
      data = file.read(length * self.dtype.itemsize)
    return np.frombuffer(data, self.dtype)


def span(shape: Iterable[int], strides: Iterable[int] | None = None) -> int:
  """Elements from the first to the last of an array, both counted."""
  shape = tuple(shape)
  if strides is None or 0 in shape:
    return math.prod(shape)
  return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def read(path: epath.PathLike) -> dict[str, Tensor]:
  """Find the tensors of a safetensors file, by name; read none.

  Raises:
    ValueError: if the file is not a whole, true safetensors file: cut, with
      bytes beyond its tensors, or a header that says what cannot be.
  """
  path = inputs.check_file(path)
  header, start = _header(path)
  header.pop(_METADATA, None)
  spans = {name: _span(path, name, entry) for name, entry in header.items()}
  _check_dense(path, spans, path.stat().length - start)
  return {
    name: Tensor(
      path, start + spans[name][0], DTYPES[e["dtype"]], tuple(e["shape"])
    )
    for name, e in header.items()
  }


def metadata(path: epath.PathLike) -> dict[str, str]:
  """Read what a safetensors file says of itself, strings by name."""
  path = inputs.check_file(path)
  found = _header(path)[0].get(_METADATA, {})
  if not isinstance(found, dict) or not all(
    isinstance(value, str) for value in found.values()
  ):
    raise inputs.damaged(
      path, f"its metadata are not strings by name: {schema.quote(found)}"
    )
  return found


def aligned(tensors: Mapping[str, Readable]) -> dict[str, Readable]:
  """Order tensors as they are written: the wider dtypes first."""
  return dict(sorted(tensors.items(), key=lambda x: -x[1].dtype.itemsize))


def write(
  path: epath.PathLike,
  tensors: Mapping[str, Readable],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Write a safetensors file, holding one tensor at a time.

  Args:
    path: the file.
    tensors: by name.
    metadata: what the file says of itself beside its format; None is nothing.
  """
  tensors = aligned(tensors)
  header: dict[str, Any] = {_METADATA: {"format": "pt", **(metadata or {})}}
  end = 0
  for name in tensors:
    begin, end = end, end + num_bytes(tensors[name])
    header[name] = {
      "dtype": _name(name, tensors[name].dtype),
      "shape": list(tensors[name].shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % _ALIGNMENT)
  with writing.opened(path) as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in tensors:
      file.write(_bytes(name, tensors[name]))


def num_bytes(tensor: Readable) -> int:
  """Return the bytes of a tensor's values."""
  return math.prod(tensor.shape) * tensor.dtype.itemsize


def _header(path: epath.Path) -> tuple[dict[str, Any], int]:
  """Read a file's header, and where its tensors begin."""
  size = path.stat().length
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
      raise inputs.damaged(
        path, f"its header would have {length} bytes, the file has {size}"
      )
    return _parse(path, file.read(length)), 8 + length


def _parse(path: epath.Path, text: bytes) -> dict[str, Any]:
  twice = []

  def unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
      twice.append(found)
    return found

  header = inputs.parse_json(path, text, object_pairs_hook=unique)
  if not isinstance(header, dict):
    raise inputs.damaged(path, "its header is not a JSON object")
  if twice:
    raise inputs.damaged(path, "its header has a name twice")
  return header


def _span(path: epath.Path, name: str, entry: Any) -> tuple[int, int]:
  """Return where a tensor begins and ends, after checking its entry."""
  wanted, said = ("data_offsets", "dtype", "shape"), schema.quote(entry)
  name = schema.quote(name)
  if not isinstance(entry, dict) or sorted(entry) != list(wanted):
    raise inputs.damaged(
      path, f"{name} does not say {', '.join(wanted)}: {said}"
    )
  if entry["dtype"] not in tuple(DTYPES):
    raise ValueError(
      f"{path}: {name} is of dtype {schema.quote(entry['dtype'])}, which is "
      f"not read; store it as one of {', '.join(DTYPES)}"
    )
  shape, offsets = entry["shape"], entry["data_offsets"]
  if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
    raise inputs.damaged(path, f"{name} has no such shape and place: {said}")
  size = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
  if offsets[1] - offsets[0] != size:
    raise inputs.damaged(
      path,
      f"{name}, {entry['dtype']} {shape}, takes {size} bytes, but its place "
      f"{offsets} has {offsets[1] - offsets[0]}",
    )
  return offsets[0], offsets[1]


def _counts(value: Any) -> bool:
  """Whether a value is a short list of whole numbers from 0 up."""
  return (
    isinstance(value, list)
    and len(value) <= _MOST_AXES
    and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
  )


def _check_dense(
  path: epath.Path, spans: Mapping[str, tuple[int, int]], size: int
) -> None:
  """Refuse tensors that overlap, leave a gap, or do not fill the file."""
  end, before = 0, "the header"
  for name in sorted(spans, key=spans.__getitem__):
    begin = spans[name][0]
    if begin != end:
      what = "overlaps" if begin < end else "leaves a gap behind"
      names = schema.quote(name), schema.quote(before)
      raise inputs.damaged(path, f"{names[0]} {what} {names[1]}")
    end, before = spans[name][1], name
  if end != size:
    what = "is cut" if end > size else "is too long"
    raise inputs.damaged(
      path, f"it {what}: its tensors take {end} bytes, the file has {size}"
    )


def _name(name: str, dtype: np.dtype) -> str:
  if dtype not in _NAMES:
    raise ValueError(
      f"{name} is {dtype}, for which safetensors has no name; cast it to one "
      f"of {', '.join(map(str, _NAMES))}"
    )
  return _NAMES[dtype]


def _bytes(name: str, tensor: Readable) -> memoryview:
  values = tensor.read()
  if (values.dtype, values.shape) != (tensor.dtype, tuple(tensor.shape)):
    raise ValueError(
      f"{name} was said to be {tensor.dtype} {tensor.shape}, but is "
      f"{values.dtype} {values.shape}"
    )
  return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
