"""What torch writes we read, what we write it reads; a bad file is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from vdit_jax.convert import files

TORCH = {
  "BOOL": torch.bool,
  "U8": torch.uint8,
  "I8": torch.int8,
  "I16": torch.int16,
  "I32": torch.int32,
  "I64": torch.int64,
  "F8_E4M3": torch.float8_e4m3fn,
  "F8_E5M2": torch.float8_e5m2,
  "F16": torch.float16,
  "BF16": torch.bfloat16,
  "F32": torch.float32,
  "F64": torch.float64,
}


def _tensors():
  """A tensor of each dtype, of random bits where all bits are numbers."""
  generator = torch.Generator().manual_seed(0)
  bits = torch.randint(0, 2, (2, 3, 8), generator=generator, dtype=torch.uint8)
  made = {name: bits.to(dtype) for name, dtype in TORCH.items()}
  for name in ("BF16", "F32"):
    x = torch.randn(5, 7, generator=generator)
    made[f"random.{name}"] = x.to(TORCH[name])
  made["scalar"] = torch.tensor(3.5)
  made["empty"] = torch.zeros(0, 4)
  return made


def _bytes(x):
  if isinstance(x, torch.Tensor):
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
  return x.tobytes()


def test_torch_to_us(tmp_path):
  path = tmp_path / "a.safetensors"
  expected = _tensors()
  safetensors.torch.save_file(expected, path, metadata={"format": "pt"})
  found = files.read(path)
  assert sorted(found) == sorted(expected)
  for name, tensor in found.items():
    values = tensor.read()
    assert values.shape == tensor.shape == tuple(expected[name].shape)
    assert values.dtype == tensor.dtype
    assert _bytes(values) == _bytes(expected[name])
  for name in TORCH:
    assert found[name].dtype == files.DTYPES[name]


def test_us_to_torch(tmp_path):
  source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
  expected = _tensors()
  safetensors.torch.save_file(expected, source)
  files.write(target, files.read(source))
  found = safetensors.torch.load_file(target)
  assert sorted(found) == sorted(expected)
  for name, tensor in found.items():
    assert tensor.dtype == expected[name].dtype
    assert tensor.shape == expected[name].shape
    assert _bytes(tensor) == _bytes(expected[name])
  with safetensors.safe_open(target, "pt") as file:
    assert file.metadata() == {"format": "pt"}


def test_what_is_written_is_aligned(tmp_path):
  path = tmp_path / "a.safetensors"
  safetensors.torch.save_file(_tensors(), path)
  files.write(path, {k: _Copy(v) for k, v in files.read(path).items()})
  for tensor in files.read(path).values():
    assert tensor.offset % tensor.dtype.itemsize == 0


class _Copy:
  def __init__(self, tensor):
    self.dtype, self.shape = tensor.dtype, tensor.shape
    self._values = np.array(tensor.read())

  def read(self):
    return self._values


def test_one_tensor_is_read_at_a_time(tmp_path):
  log = []

  class Logged(_Copy):
    def read(self):
      log.append(self.shape)
      return super().read()

  path = tmp_path / "a.safetensors"
  safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(4)}, path)
  tensors = {k: Logged(v) for k, v in files.read(path).items()}
  assert not log
  files.write(tmp_path / "b.safetensors", tensors)
  assert sorted(log) == [(3,), (4,)]


def test_a_tensor_that_is_not_what_it_said_is_refused(tmp_path):
  path = tmp_path / "a.safetensors"
  safetensors.torch.save_file({"a": torch.ones(3)}, path)
  tensor = _Copy(files.read(path)["a"])
  tensor.dtype = np.dtype(ml_dtypes.bfloat16)
  with pytest.raises(ValueError, match="was said to be bfloat16"):
    files.write(tmp_path / "b.safetensors", {"a": tensor})


def test_a_dtype_without_a_name_is_refused(tmp_path):
  path = tmp_path / "a.safetensors"
  safetensors.torch.save_file({"a": torch.ones(3)}, path)
  tensor = _Copy(files.read(path)["a"])
  tensor.dtype = np.dtype(np.complex64)
  with pytest.raises(ValueError, match="complex64, for which"):
    files.write(tmp_path / "b.safetensors", {"a": tensor})


def _file(header, data=b"", length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  return length.to_bytes(8, "little") + text + data


def _entry(begin=0, end=8, shape=(2,), dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWO = {"a": _entry(), "b": _entry(8, 16)}


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "its header would have 0 bytes, the file has 0"),
    (b"\0\0\0", "the file has 3"),
    (_file(TWO, bytes(16))[:20], "its header would have"),
    (_file(TWO, bytes(15)), "it is cut: its tensors take 16 .* has 15"),
    (_file(TWO, bytes(17)), "it is too long"),
    (_file(TWO, bytes(16), 1 << 62), "its header would have 46116"),
    (_file(b"{'a': 1}"), "not JSON"),
    (_file(b"\xff\xfe"), "not JSON"),
    (_file(b"[" * 100_000), "not JSON"),
    (_file([1]), "not a JSON object"),
    (_file({"a": 3}), "'a' does not say"),
    (_file({"a": {"dtype": "F32"}}), "'a' does not say"),
    (_file({"a": _entry(dtype="F4")}, bytes(8)), "dtype 'F4', which is not"),
    (_file({"a": _entry(dtype=[])}, bytes(8)), r"dtype \[\], which is not"),
    (_file({"a": _entry(shape=3)}, bytes(8)), "'a' has no such shape"),
    (_file({"a": _entry(shape=[-2])}, bytes(8)), r"'a' has no such.*\[-2\]"),
    (_file({"a": _entry(shape=[2.0])}, bytes(8)), r"'a' has no such.*\[2.0\]"),
    (_file({"a": _entry(shape=[3])}, bytes(8)), "takes 12 bytes, but .* has 8"),
    (_file({"a": _entry(end=[])}, bytes(8)), "'a' has no such"),
    (_file({"a": _entry(shape=[1] * 65)}, bytes(4)), "'a' has no such"),
    (_file(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    (_file({"a": _entry(8, 0)}, bytes(8)), "takes 8 bytes, but .* has -8"),
    (_file({"a": _entry(1 << 40, (1 << 40) + 8)}, bytes(8)), "leaves a gap"),
    (_file({"a": _entry(), "b": _entry(4, 12)}, bytes(12)), "overlaps 'a'"),
    (_file({"a": _entry(), "b": _entry(9, 17)}, bytes(17)), "a gap behind 'a'"),
    (_file({"a": _entry(4, 12)}, bytes(12)), "a gap behind 'the header'"),
    (
      _file(b'{"a": 1, "a": ' + json.dumps(_entry()).encode() + b"}", bytes(8)),
      "a name twice",
    ),
  ],
)
def test_a_file_that_lies_is_refused(tmp_path, data, message):
  path = tmp_path / "bad.safetensors"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message) as error:
    files.read(path)
  assert str(path) in str(error.value)


def test_every_cut_is_refused(tmp_path):
  path = tmp_path / "a.safetensors"
  safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(2)}, path)
  data = path.read_bytes()
  for size in range(len(data)):
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match="is damaged"):
      files.read(path)


def test_read_is_lazy_and_read_only(tmp_path):
  path = tmp_path / "a.safetensors"
  safetensors.torch.save_file({"a": torch.ones(3)}, path)
  values = files.read(path)["a"].read()
  with pytest.raises(ValueError, match="read-only"):
    values[0] = 2
