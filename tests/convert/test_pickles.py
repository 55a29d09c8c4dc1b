"""A torch file gives the tensors that torch gives, and runs nothing."""

import collections
import os
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch

from vdit_jax.convert import pickles


def _state():
  generator = torch.Generator().manual_seed(0)
  base = torch.randn(6, 8, generator=generator)
  state = collections.OrderedDict(
    float32=base,
    bfloat16=base.to(torch.bfloat16),
    half=base.half(),
    double=base.double(),
    int64=torch.arange(5),
    int32=torch.arange(5, dtype=torch.int32),
    int16=torch.arange(5, dtype=torch.int16),
    int8=torch.arange(5, dtype=torch.int8),
    uint8=torch.arange(5, dtype=torch.uint8),
    bools=torch.tensor([True, False, True]),
    scalar=torch.tensor(2.5),
    empty=torch.zeros(0, 3),
    parameter=torch.nn.Parameter(base[0].clone()),
  )
  # Views of one storage: transposed, sliced, spread.
  state["transposed"] = base.T
  state["sliced"] = base[1:5:2, 3:]
  state["column"] = base[:, 2]
  state["spread"] = base[0].expand(3, 8)
  state["tied"] = base
  return state


@pytest.mark.parametrize("kind", ["plain", "module"])
def test_equal_to_torch(tmp_path, kind):
  path = tmp_path / "a.bin"
  if kind == "plain":
    state = _state()
  else:  # carries an attribute, _metadata
    state = torch.nn.Sequential(torch.nn.Linear(3, 4)).state_dict()
  torch.save(state, path)
  found = pickles.read(path)
  assert list(found) == list(state)
  for name, tensor in found.items():
    expected = state[name].detach()
    values = np.array(tensor.read(), order="C")
    assert values.shape == tensor.shape == tuple(expected.shape)
    assert str(values.dtype) == str(expected.dtype).removeprefix("torch.")
    bits = expected.contiguous().reshape(-1).view(torch.uint8).numpy()
    assert values.tobytes() == bits.tobytes()


class _Call:
  """Pickles as a call of a function."""

  def __init__(self, function, *args):
    self._call = (function, args)

  def __reduce__(self):
    return self._call


def _repack(path, data):
  """Put another pickle into a torch file."""
  with zipfile.ZipFile(path) as old:
    members = {name: old.read(name) for name in old.namelist()}
  with zipfile.ZipFile(path, "w") as new:
    for name, content in members.items():
      new.writestr(name, data if name.endswith("/data.pkl") else content)


@pytest.mark.parametrize(
  "function, args, name",
  [
    (os.system, ("touch {}",), "posix.system"),
    (eval, ("open('{}', 'w')",), "__builtin__.eval"),
    (torch.load, ("{}",), "torch.serialization.load"),
    (pickle.loads, (b"",), "pickle.loads"),
    (torch.device, ("cpu",), "torch.device"),
  ],
)
def test_a_pickle_with_code_is_refused_by_name(tmp_path, function, args, name):
  path, ran = tmp_path / "a.bin", tmp_path / "ran"
  args = [a.format(ran) if isinstance(a, str) else a for a in args]
  torch.save({"a": torch.ones(2), "b": _Call(function, *args)}, path)
  with pytest.raises(ValueError, match=f"names {name}, which") as error:
    pickles.read(path)
  assert str(path) in str(error.value)
  assert not ran.exists()


@pytest.mark.parametrize(
  "text",
  [
    b"cos\nsystem\n(S'true'\ntR.",
    b"ccollections\nOrderedDict.fromkeys\n.",
    b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
    b"ctorch\nload\n.",
    b"ctorch._utils\n_rebuild_tensor\n.",
    b"itorch\nload\n.",
    b"\x80\x02\x82\x01.",  # a class by number
  ],
)
def test_names_beside_the_list_are_refused(tmp_path, text):
  path = tmp_path / "a.bin"
  torch.save({"a": torch.ones(2)}, path)
  _repack(path, text)
  with pytest.raises(ValueError, match="cannot be read"):
    pickles.read(path)


def _bomb(path, data):
  """A torch file of a few kB whose pickle is large, as deflate packs it."""
  torch.save({"a": torch.ones(2)}, path)
  with zipfile.ZipFile(path) as old:
    members = {name: old.read(name) for name in old.namelist()}
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
    for name, content in members.items():
      new.writestr(name, data if name.endswith("/data.pkl") else content)


# Opcodes: ( mark, t tuple, \x85 tuple of one, l list, } dict, s set item.
@pytest.mark.parametrize(
  "data, message",
  [
    (b"}N" + b"\x85" * 10**7 + b"Ns.", "nests values over 100 deep"),
    (b"}" + b"(" * 10**5 + b"t" * 10**5 + b"Ns.", "nests values over 100"),
    (b"N" * 4 * 10**5 + b"(t0" * 10**6 + b".", "over 250000 opcodes"),
    (b"}" + b"(0" * 10**6 + b".", "over 250000 opcodes"),
    (b"(" * 200 + b"l" * 200 + b".", "nests values over 100 deep"),
    (b"}N" + b"\x85q\0h\0" * 200 + b"Ns.", "nests values over 100 deep"),
    (b"}" + b"K\1K\1s" * 10**6 + b".", "over 250000 opcodes"),
    (b"}" + b"N0" * 10**6 + b".", "over 250000 opcodes"),
    (b"}" + b" " * 10**8 + b".", "over 20000000 bytes"),
    (b"}\x8b\xff\xff\xff\x7f.", "cannot be read"),
    (b"}I" + b"9" * 10**6 + b"\nNs.", "cannot be read"),
    (b"}s.", "cannot be read"),
    (b"t.", "cannot be read"),
    (b"h\5.", "cannot be read"),
  ],
)
def test_a_pickle_that_is_a_bomb_is_refused_at_once(tmp_path, data, message):
  path = tmp_path / "a.bin"
  _bomb(path, data)
  begun = time.process_time()
  with pytest.raises(ValueError, match=message) as error:
    pickles.read(path)
  assert time.process_time() - begun < 4  # 2 of a free processor
  assert str(path) in str(error.value) and len(str(error.value)) < 1000


def test_a_tensor_of_very_many_axes_is_refused_at_once(tmp_path):
  path = tmp_path / "a.bin"
  torch.save({"a": torch.arange(4.0)}, path)
  _repack(path, _pickled((1,) * 60_000, (1,) * 60_000))
  with pytest.raises(ValueError, match="no tensor of a storage"):
    pickles.read(path)


def _pickled(size, stride, offset=0, length=4, key="0"):
  """The pickle of one float32 tensor, said to be such."""
  call = b"ctorch._utils\n_rebuild_tensor_v2\n(("
  storage = b"S'storage'\nctorch\nFloatStorage\nS'%s'\nS'cpu'\nI%d\ntQ" % (
    key.encode(),
    length,
  )
  rest = "I{}\n({}t({}tI00\n".format(
    offset, *("".join(f"I{n}\n" for n in x) for x in (size, stride))
  ).encode()
  head = b"(dS'a'\n"
  return head + call + storage + rest + b"ccollections\nOrderedDict\n)RtRs."


def test_the_pickle_of_these_tests_is_read(tmp_path):
  path = tmp_path / "a.bin"
  torch.save({"a": torch.arange(4.0)}, path)
  _repack(path, _pickled((2, 2), (1, 2)))
  values = pickles.read(path)["a"].read()
  np.testing.assert_array_equal(values, [[0, 2], [1, 3]])


@pytest.mark.parametrize(
  "kwargs",
  [
    {"size": (5,), "stride": (1,)},
    {"size": (2,), "stride": (4,)},
    {"size": (4,), "stride": (1,), "offset": 1},
    {"size": (4,), "stride": (1,), "offset": -1},
    {"size": (2,), "stride": (-1,), "offset": 3},
    {"size": (-2,), "stride": (1,)},
    {"size": (2,), "stride": (1, 1)},
    {"size": (5,), "stride": (1,), "length": 5},
    {"size": (4,), "stride": (1,), "key": "1"},
    {"size": (4,), "stride": (1,), "key": "../data.pkl"},
  ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, kwargs):
  path = tmp_path / "a.bin"
  torch.save({"a": torch.arange(4.0)}, path)
  _repack(path, _pickled(**kwargs))
  with pytest.raises(ValueError, match="a.bin"):
    pickles.read(path)


def test_what_a_pickle_has_made_cannot_be_changed(tmp_path):
  path = tmp_path / "a.bin"
  torch.save({"a": torch.arange(4.0)}, path)
  made = _pickled((4,), (1,))
  assert made.endswith(b"tRs.")
  for state in (b"(dS'size'\n(I9\nts", b"(N(dS'size'\n(I9\ntst"):
    _repack(path, made[:-2] + state + b"bs.")
    with pytest.raises(ValueError, match="attribute"):
      pickles.read(path)


@pytest.mark.parametrize(
  "value, message",
  [
    ([torch.ones(2)], "a list, not a dict"),
    ({"state_dict": {"a": torch.ones(2)}}, "'state_dict': dict"),
    ({"a": torch.ones(2), "epoch": 3}, "'epoch': int"),
    ({3: torch.ones(2)}, "3: _View"),
  ],
)
def test_what_is_not_a_state_dict_is_refused(tmp_path, value, message):
  path = tmp_path / "a.pt"
  torch.save(value, path)
  with pytest.raises(ValueError, match=message):
    pickles.read(path)


def test_the_old_format_is_refused(tmp_path):
  path = tmp_path / "a.bin"
  torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
  with pytest.raises(ValueError, match="before 1.6"):
    pickles.read(path)


def test_every_cut_is_refused(tmp_path):
  path = tmp_path / "a.bin"
  torch.save({"a": torch.ones(2)}, path)
  data = path.read_bytes()
  for size in range(0, len(data), 7):
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match="a.bin"):
      pickles.read(path)


def test_a_compressed_file_is_refused(tmp_path):
  path = tmp_path / "a.bin"
  torch.save({"a": torch.ones(99)}, path)
  with zipfile.ZipFile(path) as old:
    members = {name: old.read(name) for name in old.namelist()}
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
    for name, content in members.items():
      new.writestr(name, content)
  with pytest.raises(ValueError, match="storage 0 has"):
    pickles.read(path)
