"""A checkpoint is read by blocks of rows to the bit, or refused."""

import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vdit_jax import sharding, trees
from vdit_jax.convert import checkpoints

SHAPES = {
  "stack/kernel": (5, 24, 40),  # layers, of which no chunk holds two
  "stack/bias": (5, 4),
  "table": (46, 40),  # 46 rows are no whole number of blocks
  "matrix": (32, 8),
  "scalar": (),
}
SPECS = {
  "stack/kernel": P(None, "fsdp", "tensor"),
  "stack/bias": P(None, "tensor"),
  "table": P(None, "fsdp"),
  "matrix": P(("data", "fsdp"), "tensor"),
  "scalar": P(),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
  """Let blocks be of a few chunks, and chunks of a few numbers."""
  monkeypatch.setattr(checkpoints, "_CHUNK_BYTES", 1000)
  monkeypatch.setattr(checkpoints, "_BLOCK_BYTES", 1500)


@pytest.fixture(params=["bfloat16", "float32"])
def written(request, tmp_path):
  """A checkpoint, and what it holds by path."""
  rng, dtype = np.random.default_rng(0), jnp.dtype(request.param)
  flat = {k: rng.standard_normal(s).astype(dtype) for k, s in SHAPES.items()}
  path = epath.Path(tmp_path / "params")
  checkpoints.write(path, trees.unflatten(jax.tree.map(jnp.asarray, flat)))
  return path, flat


def _like(path, dtype=None, mesh=None):
  return {
    name: jax.ShapeDtypeStruct(
      tuple(x.shape),
      x.dtype if dtype is None else jnp.dtype(dtype),
      sharding=None if mesh is None else NamedSharding(mesh, SPECS[name]),
    )
    for name, x in checkpoints.stored(path).items()
  }


def _mesh():
  return sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, tensor=2))


@pytest.fixture
def reads(monkeypatch):
  """Bytes of each reading, by the shape of the array or block read of."""
  log = []
  get = checkpoints._Array.__getitem__

  def logged(self, index):
    values = get(self, index)
    log.append((self.shape, values.nbytes))
    return values

  monkeypatch.setattr(checkpoints._Array, "__getitem__", logged)
  return log


@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_read_is_what_was_written(written, sharded):
  path, flat = written
  like = _like(path, mesh=_mesh() if sharded else None)
  found = checkpoints.read(path, like)
  assert found.keys() == flat.keys()
  for name, x in flat.items():
    assert found[name].dtype == x.dtype
    np.testing.assert_array_equal(found[name], x, name)
    if sharded:
      assert found[name].sharding == like[name].sharding


@pytest.mark.parametrize("sharded", [False, True])
def test_blocks_are_small_and_all_is_read_once(written, sharded, reads):
  path, flat = written
  checkpoints.read(path, _like(path, mesh=_mesh() if sharded else None))
  assert sum(size for _, size in reads) == sum(x.nbytes for x in flat.values())
  row = 24 * 40 * flat["table"].itemsize
  assert max(size for _, size in reads) <= max(row, 1500)
  blocks = {shape for shape, _ in reads}
  assert (1, 24, 40) in blocks and SHAPES["stack/kernel"] not in blocks
  assert SHAPES["table"] not in blocks


def test_a_part_is_read_alone(written, reads):
  """Half of the width is not read of where no device here wants it."""
  path, flat = written
  row = flat["stack/kernel"][0].nbytes
  checkpoints.read(path, _like(path, mesh=_mesh()))
  assert {n for s, n in reads if s == (1, 24, 40)} == {row // 4}


@pytest.mark.parametrize("saved, chunks", [(True, 1), (False, 5)])
def test_however_it_was_cut_it_is_read_right(
  saved, chunks, tmp_path, monkeypatch, reads
):
  """Layers in chunks of their own, or all in one; the mesh of another run."""
  monkeypatch.setattr(checkpoints, "_CHUNK_BYTES", 1000 if saved else 10**6)
  x = np.arange(5 * 24 * 40, dtype=np.float32).reshape(5, 24, 40)
  placed = jax.device_put(x, NamedSharding(_mesh(), P(None, "tensor", "fsdp")))
  path = epath.Path(tmp_path / "params")
  checkpoints.write(path, {"stack": {"kernel": placed}})
  found = checkpoints.read(path, _like(path))
  np.testing.assert_array_equal(found["stack/kernel"], x)
  assert {shape[0] for shape, _ in reads} == {chunks}


def test_a_cast_is_of_each_number(written):
  path, flat = written
  for dtype in ("float32", "bfloat16", "float16"):
    for name, x in checkpoints.read(path, _like(path, dtype)).items():
      assert x.dtype == jnp.dtype(dtype)
      np.testing.assert_array_equal(x, flat[name].astype(dtype), name)


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path):
  x = np.ones((46, 12), ml_dtypes.bfloat16)
  x[45, 11] = 70144
  path = epath.Path(tmp_path / "params")
  checkpoints.write(path, {"table": jnp.asarray(x)})
  with pytest.raises(ValueError, match="table has 70144, float16 ends"):
    checkpoints.read(path, _like(path, "float16"))


def _data(path):
  """Files of the store, the longest first."""
  files = [p for p in pathlib.Path(path).rglob("d/*") if p.is_file()]
  return sorted(files, key=lambda p: -p.stat().st_size)


@pytest.mark.parametrize("harm", ["cut", "gone", "empty"])
@pytest.mark.parametrize("sharded", [False, True])
def test_lost_bytes_are_told(written, harm, sharded):
  path, _ = written
  like = _like(path, mesh=_mesh() if sharded else None)
  file = _data(path)[0]
  if harm == "gone":
    file.unlink()
  else:
    file.write_bytes(file.read_bytes()[: 100 if harm == "cut" else 0])
  with pytest.raises(ValueError, match="params cannot be read .* convert aga"):
    checkpoints.read(path, like)


def test_every_array_is_counted(written):
  path, flat = written
  calls = []
  checkpoints.read(path, _like(path), lambda: calls.append(1))
  assert len(calls) == len(flat)
