"""What is read back is what was written, or one error says why not."""

import dataclasses
import errno
import functools
import os
import pathlib
import shutil
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors.numpy
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from vdit_jax import checkpoint, trees
from vdit_jax.training import optim


@flax.struct.dataclass
class State:
  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any


def _state(step=0, width=8):
  keys = jax.random.split(jax.random.key(step), 3)
  params = {
    "blocks": {
      "kernel": jax.random.normal(keys[0], (2, 8, width)),
      "scale": jnp.ones((2, 8)),
    },
    "embedding": jax.random.normal(keys[1], (16, 8)).astype(jnp.bfloat16),
  }
  tx, _ = optim.make(optim.Optim(lr=1e-3, warmup_steps=2, total_steps=9))
  grads = jax.tree.map(lambda x: x * 0.1, params)
  _, opt_state = tx.update(grads, tx.init(params), params)
  ema = jax.tree.map(lambda x: x * 0.5, params)
  return State(jnp.int32(step), params, ema, opt_state)


def _abstract(state, sharding=None):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding or x.sharding
    ),
    state,
  )


def _assert_same_bits(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def manager(tmp_path):
  manager = checkpoint.manager(tmp_path)
  yield manager
  manager.close()


def _save_all(manager, *steps):
  for step in steps:
    checkpoint.save(manager, step, _state(step))
  checkpoint.wait(manager)


def _damage(directory, how):
  """Damage a checkpoint's metadata, or its arrays, as lost writes do."""
  if how == "metadata":
    path = directory / "state" / "_METADATA"
    os.truncate(path, os.path.getsize(path) // 2)
  elif how == "manifest":
    (directory / "state" / "manifest.ocdbt").unlink()
  else:
    for path in pathlib.Path(directory / "state").rglob("d/*"):
      os.truncate(path, path.stat().st_size // 2)


def test_restored_equals_saved_to_the_bit(manager):
  state = _state(3)
  assert checkpoint.save(manager, 3, state)
  assert not checkpoint.save(manager, 3, state)
  checkpoint.wait(manager)
  assert checkpoint.latest_step(manager) == 3
  found = checkpoint.restore(manager, _abstract(state))
  assert isinstance(found, State)
  _assert_same_bits(found, state)


def test_a_saved_state_may_be_donated_at_once(manager):
  state = _state(1)
  expected = jax.tree.map(np.array, state)
  abstract = _abstract(state)
  checkpoint.save(manager, 1, state)
  overwrite = functools.partial(jax.tree.map, lambda x: x * 0 + 7)
  jax.block_until_ready(jax.jit(overwrite, donate_argnums=0)(state))
  checkpoint.wait(manager)
  _assert_same_bits(checkpoint.restore(manager, abstract), expected)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_restored_onto_another_mesh(manager):
  _save_all(manager, 1)
  mesh = jax.make_mesh((8,), ("x",))
  sharding = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec(None, "x"))
  abstract = _abstract(_state(1), sharding)
  kernel = abstract.params["blocks"]["kernel"]
  abstract.params["blocks"]["kernel"] = jax.ShapeDtypeStruct(
    kernel.shape, kernel.dtype, sharding=split
  )
  found = checkpoint.restore(manager, abstract)
  assert found.params["blocks"]["kernel"].sharding == split
  _assert_same_bits(found, _state(1))


def test_another_tree_is_refused_in_one_error(manager):
  _save_all(manager, 1)
  state = _state(1, width=4)
  state.params["new"] = jnp.ones(2)
  del state.ema["embedding"]
  with pytest.raises(ValueError) as error:
    checkpoint.restore(manager, _abstract(state))
  message = str(error.value)
  assert "missing: params/new float32[2]" in message
  assert "left over: ema/embedding bfloat16[16,8]" in message
  for name in ("params/blocks/kernel", "opt_state/1/0/mu/blocks/kernel"):
    assert (
      f"differs: {name} expected float32[2,8,4], found float32[2,8,8]"
      in message
    )


# Orbax closes its event loop while other arrays are still being read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["metadata", "manifest", "arrays"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
  manager, monkeypatch, how
):
  _save_all(manager, 1, 2)
  _damage(manager.directory / "2", how)
  warnings = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: warnings.append(text % args)
  )
  found = checkpoint.restore(manager, _abstract(_state()))
  _assert_same_bits(found, _state(1))
  assert f"{manager.directory / '2'} cannot be read" in warnings[0]
  assert f"using {manager.directory / '1'}" in warnings[0]
  # The run comes by step 2 again, and its checkpoint is a good one.
  _save_all(manager, 2)
  again = checkpoint.restore(manager, _abstract(_state()))
  _assert_same_bits(again, _state(2))
  assert (manager.directory / "2.unreadable").exists()


# Bytes that are lost from any file of the newest checkpoint: either they were
# not needed, or the one before is read and a warning names the newest.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["removed", "emptied", "halved"])
def test_whatever_file_loses_bytes_a_whole_state_is_read(
  tmp_path, manager, monkeypatch, how
):
  _save_all(manager, 1, 2)
  files = [p for p in _local(manager.directory / "2").rglob("*") if p.is_file()]
  assert {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"} <= {
    path.name for path in files
  }
  fell_back = 0
  for number, path in enumerate(files):
    folder = tmp_path / f"copy{number}"
    shutil.copytree(manager.directory, folder / "checkpoints")
    _lose(folder / "checkpoints" / path.relative_to(manager.directory), how)
    warnings = []
    monkeypatch.setattr(
      logging, "warning", lambda text, *a, w=warnings: w.append(text % a)
    )
    with checkpoint.manager(folder) as again:
      found = checkpoint.restore(again, _abstract(_state()))
      aside = (again.directory / "2.unreadable").exists()
    _assert_same_bits(found, _state(1 if aside else 2))
    if aside:
      assert f"{again.directory / '2'} cannot be read" in warnings[0]
    fell_back += aside
  assert fell_back >= 3


def _local(path):
  return pathlib.Path(os.fspath(path))


def _lose(path, how):
  if how == "removed":
    path.unlink()
  else:
    os.truncate(path, path.stat().st_size // 2 if how == "halved" else 0)


def test_a_checkpoint_that_was_being_written_is_none(tmp_path, manager):
  _save_all(manager, 1, 2)
  half = manager.directory / "3.orbax-checkpoint-tmp"
  shutil.copytree(manager.directory / "2", half)
  with checkpoint.manager(tmp_path) as again:
    assert checkpoint.latest_step(again) == 2
    found = checkpoint.restore(again, _abstract(_state()))
  _assert_same_bits(found, _state(2))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_same_fallback_reads_params_and_renames_nothing(tmp_path, manager):
  _save_all(manager, 1, 2)
  _damage(manager.directory / "2", "arrays")
  found = checkpoint.restore_params(tmp_path)
  _assert_same_bits(found, _state(1).ema)
  assert (manager.directory / "2").exists()


def test_nothing_readable_is_an_error_that_moves_nothing(manager):
  _save_all(manager, 1, 2)
  for step in ("1", "2"):
    _damage(manager.directory / step, "metadata")
  with pytest.raises(ValueError, match="(?s)can be read.*/2: .*/1: "):
    checkpoint.restore(manager, _abstract(_state()))
  assert sorted(manager.all_steps()) == [1, 2]
  assert (manager.directory / "2").exists()


def test_a_step_is_read_by_number_or_refused(manager):
  with pytest.raises(ValueError, match="holds no checkpoint"):
    checkpoint.restore(manager, _abstract(_state()))
  _save_all(manager, 1, 2)
  found = checkpoint.restore(manager, _abstract(_state()), step=1)
  _assert_same_bits(found, _state(1))
  with pytest.raises(ValueError, match=r"step 5 is not in .*\[2, 1\]"):
    checkpoint.restore(manager, _abstract(_state()), step=5)


def test_saving_before_the_newest_step_is_refused(manager):
  _save_all(manager, 4)
  with pytest.raises(ValueError, match="step 3 is before step 4"):
    checkpoint.save(manager, 3, _state(3))


def test_the_newest_and_every_nth_checkpoint_are_kept(tmp_path):
  manager = checkpoint.manager(tmp_path, keep=2, keep_every=3)
  _save_all(manager, *range(1, 9))
  assert sorted(manager.all_steps()) == [3, 6, 7, 8]
  manager.close()


@pytest.mark.parametrize("which", ["ema", "params"])
def test_one_tree_of_the_state_is_read_alone(tmp_path, manager, which):
  _save_all(manager, 1)
  found = checkpoint.restore_params(tmp_path, which)
  _assert_same_bits(found, getattr(_state(1), which))


def test_an_unknown_tree_is_refused_with_those_there_are(tmp_path, manager):
  checkpoint.save(manager, 1, dataclasses.replace(_state(1), ema=None))
  checkpoint.wait(manager)
  with pytest.raises(ValueError, match="'ema' is not in .* opt_state, params"):
    checkpoint.restore_params(tmp_path)


def _config(**changes):
  config = {
    "optim": {"lr": 1e-4, "total_steps": 10},
    "size": (17, 64, 64),
    "note": None,
    "log": {"every": 5},
  }
  config = ml_collections.ConfigDict(config)
  config.update_from_flattened_dict(changes)
  return config


def test_config_round_trips_through_the_workdir(tmp_path):
  workdir = checkpoint.prepare_workdir(tmp_path / "new" / "run", _config())
  assert checkpoint.read_config(workdir) == _config()
  assert isinstance(checkpoint.read_config(workdir).size, tuple)
  checkpoint.prepare_workdir(workdir, _config())


def test_a_run_has_begun_with_its_first_checkpoint(tmp_path):
  assert checkpoint.steps(tmp_path) == []
  checkpoint.prepare_workdir(tmp_path, _config())
  assert not checkpoint.has_begun(tmp_path)
  with checkpoint.manager(tmp_path) as manager:
    _save_all(manager, 1, 2)
    (manager.directory / "3.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.steps(tmp_path) == [1, 2]
  assert checkpoint.has_begun(tmp_path)


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    ValueError("RESOURCE_EXHAUSTED: writing: [x=1]\nNo space left on device"),
  ],
)
def test_a_full_disk_is_said_in_a_line(manager, tmp_path, monkeypatch, error):
  _save_all(manager, 1)

  def fail(*_, **__):
    try:
      raise error
    except Exception as inner:
      raise RuntimeError("60 lines") from inner

  message = (
    f"no space left for checkpoint 2 in {manager.directory}: free some and run "
    "the same command"
  )
  with monkeypatch.context() as full:
    full.setattr(manager, "save", fail)
    with pytest.raises(ValueError) as refused:
      checkpoint.save(manager, 2, _state(2))
  assert str(refused.value) == message
  half = manager.directory / "2.orbax-checkpoint-tmp"
  half.mkdir()
  with monkeypatch.context() as full:
    full.setattr(manager, "wait_until_finished", fail)
    with pytest.raises(ValueError) as refused:
      checkpoint.wait(manager)
  assert str(refused.value) == message
  half.rmdir()
  usage = shutil.disk_usage(tmp_path)._replace(free=100)
  with monkeypatch.context() as full:  # nothing is begun then
    full.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError) as refused:
      checkpoint.save(manager, 2, _state(2))
  assert str(refused.value) == message
  monkeypatch.setattr(manager, "save", lambda *_, **__: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    checkpoint.save(manager, 2, _state(2))


def test_a_folder_that_is_no_workdir_is_refused(tmp_path):
  (tmp_path / "model.bin").touch()
  with pytest.raises(ValueError, match="no config.json, it holds: model.bin"):
    checkpoint.read_config(tmp_path)
  with pytest.raises(ValueError, match="it holds: nothing"):
    checkpoint.read_config(tmp_path / "absent")


def test_a_config_beyond_json_is_refused(tmp_path):
  config = ml_collections.ConfigDict({"dtype": jnp.float32})
  with pytest.raises(ValueError, match="no word for"):
    checkpoint.prepare_workdir(tmp_path, config)


def _release_params():
  kernel = jax.random.normal(jax.random.key(0), (64, 32))
  return {
    "dense": {"kernel": kernel, "view": np.asarray(kernel).T},
    "scale": jnp.float32(3.0),
    "ids": jnp.arange(5, dtype=jnp.int32),
  }


def test_a_release_round_trips_within_half_precision(tmp_path):
  path, params = tmp_path / "model.safetensors", _release_params()
  checkpoint.save_release(path, params, {"config": "{}", "license": "x"})
  found, metadata = checkpoint.load_release(path)
  assert metadata == {"config": "{}", "license": "x"}
  # float16 keeps 11 bits, so rounding is off by 2^-11 at most; below its
  # least normal number, 2^-14, by half a step of 2^-24.
  for name, x in trees.flatten(params).items():
    found_x = trees.flatten(found)[name]
    assert found_x.dtype == x.dtype
    np.testing.assert_allclose(found_x, x, rtol=2.0**-11, atol=2.0**-25)
  assert safetensors.numpy.load_file(path)["dense/kernel"].dtype == np.float16
  assert path.stat().st_size < 1000 + 2 * trees.count(params) + 2 * 5


def test_a_release_in_float32_round_trips_to_the_bit(tmp_path):
  path, params = tmp_path / "model.safetensors", _release_params()
  checkpoint.save_release(path, params, {}, dtype=jnp.float32)
  found, metadata = checkpoint.load_release(path)
  assert metadata == {}
  _assert_same_bits(found, params)


def test_a_release_refuses_numbers_that_do_not_fit(tmp_path):
  path = tmp_path / "model.safetensors"
  with pytest.raises(ValueError, match="70000 in a/kernel, float16 ends"):
    checkpoint.save_release(path, {"a": {"kernel": np.float32(7e4)}}, {})
  with pytest.raises(ValueError, match=r"\['steps'\] are not"):
    checkpoint.save_release(path, {}, {"steps": 1})
  with pytest.raises(ValueError, match="float16 or float32, got bfloat16"):
    checkpoint.save_release(path, {}, {}, dtype=jnp.bfloat16)
  assert not path.exists()


def test_a_release_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "model.safetensors"
  checkpoint.save_release(path, {"a": np.ones(3)}, {"version": "1"})

  def fail(_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(OSError, match="disk full"):
    checkpoint.save_release(path, {"a": np.zeros(3)}, {"version": "2"})
  found, metadata = checkpoint.load_release(path)
  assert metadata == {"version": "1"}
  np.testing.assert_array_equal(found["a"], 1.0)


@pytest.mark.parametrize("keep", [0, 4, 20, 0.5, 0.99])
def test_a_truncated_release_is_refused(tmp_path, keep):
  path = tmp_path / "model.safetensors"
  checkpoint.save_release(path, _release_params(), {"a": "b"})
  size = path.stat().st_size
  os.truncate(path, keep if isinstance(keep, int) else int(size * keep))
  with pytest.raises(ValueError, match="model.safetensors is damaged"):
    checkpoint.load_release(path)
  with pytest.raises(
    ValueError, match="absent must be a file, but does not exist"
  ):
    checkpoint.load_release(tmp_path / "absent")
