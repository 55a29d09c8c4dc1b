"""A made-up network goes in and out: to the bit, where it should lie, or not
at all."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from jax.sharding import NamedSharding

from vdit_jax import sharding, trees
from vdit_jax.convert import __main__ as command
from vdit_jax.convert import checkpoints, configs, files, placement, rules
from vdit_jax.models import families, system
from vdit_jax.nn import linear
from vdit_jax.weights import component

CONFIG = {"_class_name": "Tiny", "width": 8, "layers": 3, "eps": 1e-6}
TABLE = configs.Table(
  {
    "width": configs.size(),
    "layers": configs.layers(),
    "eps": configs.number(1e-6),
  },
  strict=False,
)
STEM = "diffusion_pytorch_model"


@dataclasses.dataclass(frozen=True)
class Config:
  width: int
  layers: int
  dtype: str


class Block(nn.Module):
  cfg: Config

  @nn.compact
  def __call__(self, x, _):
    dtype, width = jnp.dtype(self.cfg.dtype), self.cfg.width
    axes = ("embed", "mlp")
    h = linear.dense(2 * width, axes, name="in", dtype=dtype)(x)
    out = linear.dense(width, axes[::-1], name="out", dtype=dtype, bias=False)
    return x + out(nn.silu(h)), None


class Tiny(nn.Module):
  """A patch embedding, some blocks, a scale: [B, h, w, 3] -> [B, h, w, D]."""

  cfg: Config

  @nn.compact
  def __call__(self, x):
    init = sharding.boxed(linear.LECUN, (None, None, None, "conv_out"))
    kernel = self.param("patch", init, (1, 1, 3, self.cfg.width))
    x = jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0]).astype(self.cfg.dtype)
    blocks = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.cfg.layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x, _ = blocks(self.cfg, name="blocks")(x, None)
    init = sharding.boxed(linear.ZEROS, (None,))
    return x * self.param("scale", init, (self.cfg.width,))


def _config(config, dtype):
  return Config(config["width"], config["layers"], dtype.name)


def _example(cfg):
  return (jnp.zeros((1, 2, 2, 3)),)


def _rules(module):
  del module
  block = r"transformer.blocks.(\d+)"
  return (
    rules.Rule("proj.weight", "patch", rules.CONV2D),
    rules.Rule(f"{block}.fc1.weight", "blocks/in/kernel", rules.LINEAR, 1),
    rules.Rule(f"{block}.fc1.bias", "blocks/in/bias", layer=1),
    rules.Rule(f"{block}.fc2.weight", "blocks/out/kernel", rules.LINEAR, 1),
    rules.Rule("norm.weight", "scale"),
  )


@pytest.fixture(autouse=True)
def _known(monkeypatch):
  """A family of one network, known while a test runs."""
  tiny = rules.Component(
    Tiny, TABLE, _config, _example, _rules, (r"rope\.inv_freq",)
  )
  network = system.Network(
    "tiny", "tiny", Tiny, Config, {}, _example, {"Tiny": tiny}
  )
  monkeypatch.setitem(families.ENCODERS, "tiny", network)


def _state(dtype=torch.bfloat16, layers=3):
  """The checkpoint as torch has it, no two numbers alike."""
  generator = torch.Generator().manual_seed(0)
  shapes = {"proj.weight": (8, 3, 1, 1), "norm.weight": (8,)}
  for i in range(layers):
    shapes[f"transformer.blocks.{i}.fc1.weight"] = (16, 8)
    shapes[f"transformer.blocks.{i}.fc1.bias"] = (16,)
    shapes[f"transformer.blocks.{i}.fc2.weight"] = (8, 16)
  return {
    k: torch.randn(*s, generator=generator).to(dtype) for k, s in shapes.items()
  }


def _folder(path, state, config=CONFIG, kind="safetensors"):
  path.mkdir()
  (path / "config.json").write_text(json.dumps(config))
  if kind == "safetensors":
    safetensors.torch.save_file(state, path / f"{STEM}.safetensors")
  else:
    torch.save(state, path / f"{STEM}.bin")
  return path


def _numpy(x):
  bits = x.contiguous().view(torch.int16)
  return bits.numpy().view(ml_dtypes.bfloat16)


def _assert_same_bits(found, expected):
  assert sorted(found) == sorted(expected)
  for key, x in expected.items():
    assert (found[key].dtype, found[key].shape) == (x.dtype, x.shape), key
    assert torch.equal(found[key].view(torch.int16), x.view(torch.int16)), key


def _mesh():
  return sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_params_are_the_checkpoint(tmp_path, kind):
  state = _state()
  loaded = component.load(_folder(tmp_path / "a", state, kind=kind))
  assert loaded.config == CONFIG
  assert loaded.module.cfg == Config(8, 3, "bfloat16")
  flat = trees.flatten(loaded.params)
  assert {x.dtype for x in flat.values()} == {jnp.dtype(jnp.bfloat16)}
  for i in range(3):
    expected = _numpy(state[f"transformer.blocks.{i}.fc1.weight"]).T
    np.testing.assert_array_equal(flat["blocks/in/kernel"][i], expected)
    expected = _numpy(state[f"transformer.blocks.{i}.fc1.bias"])
    np.testing.assert_array_equal(flat["blocks/in/bias"][i], expected)
  patch = _numpy(state["proj.weight"]).transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(flat["patch"], patch)
  np.testing.assert_array_equal(flat["scale"], _numpy(state["norm.weight"]))
  y = loaded.module.apply({"params": loaded.params}, jnp.ones((1, 2, 2, 3)))
  assert y.shape == (1, 2, 2, 8)


def test_params_outlive_the_files(tmp_path):
  folder = _folder(tmp_path / "a", _state())
  loaded = component.load(folder)
  before = jax.tree.map(np.array, loaded.params)
  path = folder / f"{STEM}.safetensors"
  path.write_bytes(bytes(path.stat().st_size))
  jax.tree.map(np.testing.assert_array_equal, loaded.params, before)


@pytest.mark.parametrize("bound", [component.MAX_SHARD_BYTES, 600])
def test_there_and_back_to_the_bit(tmp_path, bound):
  state = _state()
  loaded = component.load(_folder(tmp_path / "a", state))
  component.save(loaded, tmp_path / "b", max_shard_bytes=bound)
  found = {}
  for path in (tmp_path / "b").glob(f"{STEM}*.safetensors"):
    found |= safetensors.torch.load_file(path)
  _assert_same_bits(found, state)
  assert json.loads((tmp_path / "b" / "config.json").read_text()) == CONFIG
  index = tmp_path / "b" / f"{STEM}.safetensors.index.json"
  assert index.exists() == (bound == 600)
  again = component.load(tmp_path / "b")
  jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_a_mesh_gets_its_parts(tmp_path):
  state = _state()
  folder = _folder(tmp_path / "a", state)
  whole = component.load(folder)
  with jax.set_mesh(_mesh()):
    loaded = component.load(folder)
    wanted = sharding.shardings(
      _mesh(), families.component("Tiny").abstract(loaded.module)
    )
    component.save(loaded, tmp_path / "b")
  for name, x in trees.flatten(loaded.params).items():
    assert isinstance(x.sharding, NamedSharding)
    assert x.sharding.is_equivalent_to(trees.flatten(wanted)[name], x.ndim)
  kernel = loaded.params["blocks"]["in"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 4, 8)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, whole.params)
  found = safetensors.torch.load_file(tmp_path / "b" / f"{STEM}.safetensors")
  _assert_same_bits(found, state)


def test_through_orbax_to_the_bit(tmp_path):
  state = _state()
  command.run(_folder(tmp_path / "a", state), tmp_path / "b")
  assert component.is_orbax(tmp_path / "b")
  assert not component.is_orbax(tmp_path / "a")
  with jax.set_mesh(_mesh()):
    loaded = component.load(tmp_path / "b")
    kernel = loaded.params["blocks"]["in"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 4, 8)
  command.run(tmp_path / "b", tmp_path / "c")
  found = safetensors.torch.load_file(tmp_path / "c" / f"{STEM}.safetensors")
  _assert_same_bits(found, state)
  wide = component.load(tmp_path / "b", param_dtype="float32")
  direct = component.load(tmp_path / "a", param_dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, wide.params, direct.params)


def test_dtypes(tmp_path):
  folder = _folder(tmp_path / "a", _state(torch.float32))
  loaded = component.load(folder, param_dtype=jnp.bfloat16)
  assert loaded.params["scale"].dtype == jnp.bfloat16
  assert loaded.module.cfg.dtype == "bfloat16"
  loaded = component.load(folder, dtype="bfloat16")
  assert loaded.params["scale"].dtype == jnp.float32
  assert loaded.module.cfg.dtype == "bfloat16"
  with pytest.raises(ValueError, match="param_dtype must be a floating"):
    component.load(folder, param_dtype="int8")


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path):
  state = _state(torch.float32)
  state["norm.weight"][3] = 70000
  folder = _folder(tmp_path / "a", state)
  with pytest.raises(ValueError, match="norm.weight has 70000, float16 ends"):
    component.load(folder, param_dtype="float16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, dtype):
  state, bad = _state(dtype), {"norm.weight": "nan"}
  bad["transformer.blocks.1.fc1.weight"] = "-inf"
  for key, value in bad.items():
    state[key].reshape(-1)[-1] = float(value)
  folder = _folder(tmp_path / "a", state)
  for param_dtype in (None, "float16"):
    with pytest.raises(ValueError, match="infinite, in 2 places") as error:
      component.load(folder, param_dtype=param_dtype)
    said = str(error.value)
    assert str(folder) in said and all(key in said for key in bad)
  with pytest.raises(ValueError, match=r"blocks.1.fc1.weight"):
    command.run(folder, tmp_path / "b")
  assert not (tmp_path / "b").exists()


def test_a_checkpoint_that_is_not_finite_is_refused_by_name(tmp_path):
  loaded = component.load(_folder(tmp_path / "a", _state()))
  params = loaded.params | {"scale": loaded.params["scale"].at[2].set(jnp.nan)}
  bad = dataclasses.replace(loaded, params=params)
  component.save_orbax(bad, tmp_path / "b")
  with pytest.raises(
    ValueError, match="NaN or infinite, in 1 places:\n *scale"
  ):
    component.load(tmp_path / "b")


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_float64_is_not_narrowed_in_silence(tmp_path):
  folder = _folder(tmp_path / "a", _state(torch.float64))
  with pytest.raises(ValueError, match="stored as float64"):
    component.load(folder)
  assert component.load(folder, param_dtype="float32").params["scale"].size == 8


def test_dtype_of_the_config_follows_the_weights(tmp_path):
  config = {"architectures": ["Tiny"], "torch_dtype": "float32"}
  config |= {"width": 8, "layers": 3}
  folder = _folder(tmp_path / "a", _state(torch.float32), config)
  (folder / f"{STEM}.safetensors").rename(folder / "model.safetensors")
  component.save(component.load(folder), tmp_path / "b")
  assert json.loads((tmp_path / "b" / "config.json").read_text()) == config
  loaded = component.load(folder, param_dtype="bfloat16")
  component.save(loaded, tmp_path / "c")
  found = json.loads((tmp_path / "c" / "config.json").read_text())
  assert found == config | {"torch_dtype": "bfloat16"}
  assert (tmp_path / "c" / "model.safetensors").exists()


def _counted(monkeypatch):
  """Count the tensors that are read."""
  log = []
  read = files.Tensor.read
  monkeypatch.setattr(
    files.Tensor, "read", lambda self: log.append(self) or read(self)
  )
  return log


def test_what_does_not_fit_is_listed_before_anything_is_read(
  tmp_path, monkeypatch
):
  state = _state()
  del state["norm.weight"]
  state["extra"] = torch.ones(2)
  state["rope.inv_freq"] = torch.ones(2)
  state["proj.weight"] = torch.ones(8, 3, 1, 1, dtype=torch.int32)
  folder = _folder(tmp_path / "a", state)
  log = _counted(monkeypatch)
  with pytest.raises(ValueError, match="in 3 places") as error:
    command.run(folder, tmp_path / "b")
  for line in (
    "missing: norm.weight",
    "left over: extra",
    "dtype: proj.weight",
  ):
    assert line in str(error.value)
  assert not log
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_each_tensor_is_read_once(tmp_path, monkeypatch):
  folder = _folder(tmp_path / "a", _state())
  log = _counted(monkeypatch)
  with jax.set_mesh(_mesh()):
    component.load(folder)
  assert len(log) == len(_state()) == len(set(log))


def _harmed(path, harm):
  """A folder with something wrong in its weights."""
  state = _state()
  if harm == "code":
    class_ = type("Code", (), {"__reduce__": lambda _: (os.system, ("true",))})
    return _folder(path, state | {"norm.weight": class_()}, kind="bin")
  folder = _folder(path, state)
  if harm == "shard":
    loaded = component.load(folder)
    shutil.rmtree(folder)
    component.save(loaded, folder, max_shard_bytes=600)
    sorted(folder.glob(f"{STEM}-*"))[1].unlink()
  elif harm == "store":
    component.save_orbax(component.load(folder), path.with_name("orbax"))
    shutil.rmtree(folder)
    path.with_name("orbax").rename(folder)
    values = [p for p in folder.rglob("d/*") if p.is_file()]
    max(values, key=lambda p: p.stat().st_size).write_bytes(b"")
  else:
    file = folder / f"{STEM}.safetensors"
    data = file.read_bytes()
    lie = data.replace(b'"shape":[8]', b'"shape":[9]')
    file.write_bytes({"cut": data[:-1], "header": lie}[harm])
  return folder


@pytest.mark.parametrize(
  "harm, message",
  [
    ("cut", "is damaged: it is cut"),
    ("header", "'norm.weight', BF16 .9., takes 18 bytes"),
    ("shard", "names files that are missing: .*-00002-of-"),
    ("code", "names posix.system, which is not allowed"),
    ("store", "cannot be read"),
  ],
)
def test_of_a_bad_source_nothing_is_written(tmp_path, harm, message):
  folder = _harmed(tmp_path / "a", harm)
  with pytest.raises(ValueError, match=message):
    command.run(folder, tmp_path / "b")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, to):
  loaded = component.load(_folder(tmp_path / "a", _state()))

  def fail(*args, **kwargs):
    raise OSError("disk full")

  write = {"orbax": (checkpoints, "write"), "safetensors": (files, "_bytes")}
  monkeypatch.setattr(*write[to], fail)
  save = component.save_orbax if to == "orbax" else component.save
  with pytest.raises(OSError, match="disk full"):
    save(loaded, tmp_path / "b")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_target_that_is_there_is_refused_at_once(tmp_path, monkeypatch):
  folder = _folder(tmp_path / "a", _state())
  log = _counted(monkeypatch)
  with pytest.raises(ValueError, match="not an empty folder"):
    command.run(folder, folder)
  assert not log


def test_params_of_another_module_are_refused(tmp_path):
  loaded = component.load(_folder(tmp_path / "a", _state()))
  params = {**loaded.params, "scale": np.ones(9)}
  other = dataclasses.replace(loaded, params=params)
  for save in (component.save, component.save_orbax):
    with pytest.raises(ValueError, match="loaded.params does not match"):
      save(other, tmp_path / "b")


def test_numpy_params_are_saved_too(tmp_path):
  state = _state()
  loaded = component.load(_folder(tmp_path / "a", state))
  params = jax.tree.map(np.asarray, loaded.params)
  component.save(dataclasses.replace(loaded, params=params), tmp_path / "b")
  found = safetensors.torch.load_file(tmp_path / "b" / f"{STEM}.safetensors")
  _assert_same_bits(found, state)


def test_an_orbax_folder_that_does_not_fit_is_refused(tmp_path):
  command.run(_folder(tmp_path / "a", _state()), tmp_path / "b")
  config = tmp_path / "b" / "config.json"
  config.write_text(json.dumps(CONFIG | {"layers": 4}))
  with pytest.raises(ValueError, match="layers must be .* from 1 to 3, got 4"):
    component.load(tmp_path / "b")
  config.write_text(json.dumps(CONFIG))
  for path in (tmp_path / "b" / "params").rglob("d/*"):
    path.write_bytes(path.read_bytes()[:40])
  with pytest.raises(ValueError, match="cannot be read"):
    component.load(tmp_path / "b")


def test_an_unknown_class_is_refused(tmp_path):
  config = {"_class_name": "Unheard"}
  folder = _folder(tmp_path / "a", _state(), config)
  with pytest.raises(ValueError, match="class 'Unheard', .* known are .*Tiny"):
    component.load(folder)


def test_known_classes():
  assert {"CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX"} <= set(
    families.classes()
  )
  assert families.classes("text_encoder")[:1] == ["MT5EncoderModel"]


def test_a_stack_is_filled_in_place():
  stack = jnp.zeros((4, 256, 256))
  at = stack.unsafe_buffer_pointer()
  stack = placement._set_row(stack, jnp.ones((256, 256)), 2)
  assert stack.unsafe_buffer_pointer() == at


def test_torch_is_not_imported():
  code = (
    "import sys, vdit_jax.convert.__main__; assert 'torch' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_refuses_other_arguments():
  run = subprocess.run(
    [sys.executable, "-m", "vdit_jax.convert", "only_one"],
    capture_output=True,
    text=True,
  )
  assert run.returncode != 0
  assert "give two folders, SRC and DST" in run.stdout + run.stderr
