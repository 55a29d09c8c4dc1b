"""Adapters of a pipeline's networks: which file is of which, and how much."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from etils import epath

from tests.models.toy import system as toy
from vdit_jax import pipeline, sharding, trees
from vdit_jax.convert import files
from vdit_jax.models import families
from vdit_jax.nn import linear, lora
from vdit_jax.weights import adapters, diffusers_folder, tiny

NETWORKS = "denoiser", "denoiser_2", "text_encoder", "text_encoder_2"
SIZE = {"num_frames": 3, "height": 32, "width": 32, "steps": 2}
PROMPTS = ["a red seven moving left"]


@pytest.fixture(scope="module", autouse=True)
def row():
  """The row of the family that these tests bring along."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(families.SYSTEMS, "toy", toy.SYSTEM)
    yield


@pytest.fixture(scope="module")
def folder(row, tmp_path_factory):
  """A pipeline of two denoisers and two text encoders."""
  path = tmp_path_factory.mktemp("toy") / "pipe"
  tiny.write(path, "toy:small2")
  return path


@pytest.fixture(scope="module")
def parts(folder):
  """What the folder has."""
  return diffusers_folder.read(folder)


def _factors(base, seed=0, rank=2):
  """Random adapters of all dense layers of a network."""
  rng = np.random.default_rng(seed)
  flat = {}
  for slot in base.layers.values():
    *stack, fan_in, out = base.shapes[slot.path].shape
    layer = slot.path.removesuffix("/kernel")
    for name, shape in (("a", (fan_in, rank)), ("b", (rank, out))):
      x = 0.5 * rng.standard_normal((*stack, *shape))
      flat[f"{layer}/{name}"] = x.astype(np.float32)
  return trees.unflatten(flat)


@pytest.fixture(scope="module")
def factors(parts):
  """Adapters of each network."""
  bases = adapters.bases(toy.SYSTEM, parts.networks)
  assert tuple(sorted(bases)) == NETWORKS
  return {name: _factors(bases[name], i) for i, name in enumerate(NETWORKS)}


@pytest.fixture(scope="module")
def written(parts, factors, tmp_path_factory):
  """The folder of a file with all of them."""
  path = tmp_path_factory.mktemp("written") / "lora"
  adapters.write(path, toy.SYSTEM, parts.networks, factors)
  return path


def _equal(one, two):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), one, two)


def test_each_network_has_its_own(parts, factors, written):
  tensors = files.read(written / adapters.FILE)
  folders = {parts.system.places[name].folder for name in NETWORKS}
  assert {key.partition(".")[0] for key in tensors} == folders
  _equal(adapters.read(written, toy.SYSTEM, parts.networks), factors)


def test_a_pipeline_computes_with_all_of_them(folder, factors, written):
  """As with merged weights, which are not touched."""
  pipe = pipeline.load(folder, adapters=f"{written}:0.8")
  for name in NETWORKS:
    flat = trees.flatten(pipe.params[name])
    assert any(path.endswith("/a") for path in flat)
  plain = pipeline.load(folder)
  merged = dict(plain.params)
  for name, tree in factors.items():
    merged[name] = lora.merge(merged[name], tree, 0.8)
  whole = dataclasses.replace(plain, params=merged, sequential=False)
  noise = np.random.default_rng(0).standard_normal(
    (1, *plain.latent_shape(3, 32, 32))
  )
  latents = {}
  for kind, each in (("a", pipe), ("m", whole), ("p", plain)):
    text = each.encode_text(PROMPTS)
    how = each.settings(steps=2)
    found = each.sample(text, noise=noise.astype(np.float32), how=how)
    latents[kind] = np.asarray(found)
  np.testing.assert_allclose(latents["a"], latents["m"], atol=1e-4)
  assert np.abs(latents["a"] - latents["p"]).max() > 1e-2


def test_files_add_up_and_so_does_one_given_twice(parts, factors, written):
  read = lambda given: adapters.read(given, toy.SYSTEM, parts.networks)
  product = lambda tree: tree["q"]["a"] @ tree["q"]["b"]
  one = product(factors["denoiser"])
  for given, times in (
    (written, 1.0),
    (f"{written}:0.8", 0.8),
    (f"{written}:1/256", 1 / 256),
    (f"{written}:0.5,{written}", 1.5),
    ([f"{written}:0.5", adapters.File(written, -0.25)], 0.25),
    ([written, written], 2.0),
  ):
    found = product(read(given)["denoiser"])
    np.testing.assert_allclose(found, times * one, rtol=1e-4, atol=1e-6)


def _renamed(written, path, rename):
  tensors = files.read(written / adapters.FILE)
  found = {rename(key): x for key, x in tensors.items() if rename(key)}
  files.write(path, found)
  return path


def _first(to, dots="."):
  """Rename the first denoiser's keys, and leave out the others'."""

  def rename(key):
    if not key.startswith("transformer."):
      return ""
    layer, _, side = key.removeprefix("transformer.").rpartition(".lora_")
    return f"{to}{layer.replace('.', dots)}.lora_{side}"

  return rename


@pytest.mark.parametrize(
  "rename",
  [_first(""), _first("diffusion_model."), _first("lora_unet_", "_")],
)
def test_a_file_that_does_not_say_of_which_denoiser_is_told(
  rename, parts, factors, written, tmp_path
):
  file = _renamed(written, tmp_path / "x.safetensors", rename)
  read = lambda given: adapters.read(given, toy.SYSTEM, parts.networks)
  with pytest.raises(
    ValueError, match="of which network. .*; write FILE:transformer or FILE:tr"
  ):
    read(file)
  for name in NETWORKS[:2]:
    place = toy.SYSTEM.places[name].folder
    found = read(f"{file}:0.5:{place}")
    assert list(found) == [name]
    _equal(found[name], lora.scaled(factors["denoiser"], 0.5))


def test_a_file_of_the_first_denoiser_may_be_put_into_another(
  parts, factors, written, tmp_path
):
  file = _renamed(written, tmp_path / "x.safetensors", _first("transformer."))
  read = lambda given: adapters.read(given, toy.SYSTEM, parts.networks)
  assert list(read(file)) == ["denoiser"]
  found = read(f"{file}:transformer_2")
  assert list(found) == ["denoiser_2"]
  _equal(found["denoiser_2"], factors["denoiser"])
  with pytest.raises(ValueError, match="no such dense layer: 'text_encoder"):
    read(f"{written}:transformer_2")


@pytest.mark.parametrize(
  "rename, name",
  [
    (
      lambda key: key.replace("transformer.x.to_", "diffusion_model.net.attn."),
      "denoiser",
    ),
    (
      lambda key: key.replace("transformer.x.to_q", "lora_unet_net_attn_q"),
      "denoiser",
    ),
    (
      lambda key: key.replace("text_encoder_2.pool", "lora_te2_pool"),
      "text_encoder_2",
    ),
    (
      lambda key: key.replace(
        "text_encoder_2.pool", "lora_text_encoder_2_pool"
      ),
      "text_encoder_2",
    ),
  ],
)
def test_other_layouts_names_are_known_by_the_row(
  rename, name, parts, factors, written, tmp_path
):
  changed = lambda key: rename(key) if rename(key) != key else ""
  file = _renamed(written, tmp_path / "x.safetensors", changed)
  alone = {k: v for k, v in parts.networks.items() if k != "denoiser_2"}
  found = adapters.read(file, toy.SYSTEM, alone)
  assert list(found) == [name]
  for layer, pair in found[name].items():
    _equal(pair, factors[name][layer])


@pytest.mark.parametrize(
  "given, wanted",
  [
    ("x", [("x", 1.0, "")]),
    ("x:0.8", [("x", 0.8, "")]),
    ("x:-2e-1", [("x", -0.2, "")]),
    ("x:1/256", [("x", 1 / 256, "")]),
    ("x:transformer_2", [("x", 1.0, "transformer_2")]),
    ("x:0.5:transformer_2", [("x", 0.5, "transformer_2")]),
    ("gs://b/x", [("gs://b/x", 1.0, "")]),
    ("gs://b/x:2", [("gs://b/x", 2.0, "")]),
    ("x:0.8,y", [("x", 0.8, ""), ("y", 1.0, "")]),
    (["x:0.8", "y"], [("x", 0.8, ""), ("y", 1.0, "")]),
    (epath.Path("x"), [("x", 1.0, "")]),
    ([adapters.File("x", 2.0)], [("x", 2.0, "")]),
  ],
)
def test_files_are_given_with_a_scale_and_a_network(given, wanted):
  found = adapters.parse(given)
  assert [(str(f.path), f.scale, f.network) for f in found] == wanted


def test_a_file_whose_name_looks_like_a_scale_is_one(tmp_path):
  file = tmp_path / "x:0.5"
  file.touch()
  assert adapters.parse(f"{file}") == [adapters.File(str(file))]
  assert adapters.parse(f"{file}:2") == [adapters.File(str(file), 2.0)]


@pytest.mark.parametrize(
  "given, match",
  [
    ("x:nan", "lora x: scale must be a finite number, got nan"),
    ("x:inf", "scale must be a finite number, got inf"),
    ("x:1/0", "scale must be a finite number, got inf"),
    ("x:", "lora must be FILE, FILE:SCALE or FILE:SCALE:NETWORK, got 'x:'"),
    (":0.5", "lora must be FILE.*got ':0.5'"),
    ("", "lora must be FILE.*got ''"),
    ("x,,y", "lora must be FILE.*got ''"),
  ],
)
def test_what_is_no_file_with_a_scale_is_refused(given, match):
  with pytest.raises(ValueError, match=match):
    adapters.parse(given)


def test_an_unknown_network_is_refused_with_those_there_are(parts, written):
  with pytest.raises(
    ValueError, match=r"'tranformer_2' is no number and no network; did"
  ):
    adapters.read(f"{written}:tranformer_2", toy.SYSTEM, parts.networks)
  with pytest.raises(ValueError, match="vdit takes no adapters"):
    adapters.bases(families.OURS, {})


def _cases():
  for system in (*families.SYSTEMS.values(), toy.SYSTEM):
    if system.adapters and system.tiny:
      yield pytest.param(system, id=system.name)


@pytest.mark.parametrize("system", list(_cases()))
def test_every_layer_that_may_have_adapters_computes_them(system, tmp_path):
  """Else they would be read, and change nothing."""
  write_rest = next(iter(system.tiny.values()))
  for part, config in write_rest(tmp_path, PROMPTS).items():
    (tmp_path / part).mkdir(exist_ok=True)
    (tmp_path / part / "config.json").write_text(json.dumps(config))
  folder_of = {
    name: tmp_path / place.folder
    for name, place in system.places.items()
    if (tmp_path / place.folder).exists()
  }
  for name, base in adapters.bases(system, folder_of).items():
    seen = set()

    def record(call, args, kwargs, context, seen=seen):
      if isinstance(context.module, linear.Dense):
        seen.add("/".join(context.module.path))
      return call(*args, **kwargs)

    module = base.component.build(base.config, np.dtype(np.float32))
    inputs = base.component.example(module.cfg)
    with nn.intercept_methods(record):
      jax.eval_shape(module.init, jax.random.key(0), *inputs)
    paths = {x.path.removesuffix("/kernel") for x in base.layers.values()}
    assert paths and paths <= seen, name


def test_factors_lie_where_their_kernels_do():
  mesh = sharding.make_mesh(sharding.MeshShape(fsdp=2, tensor=2, data=2))
  spec, named = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
  kernel = jax.device_put(
    np.zeros((3, 8, 4), np.float32), named(mesh, spec(None, "fsdp", "tensor"))
  )
  pair = {"a": np.ones((3, 8, 5)), "b": np.ones((3, 5, 4))}
  found = adapters.attach({"q": {"kernel": kernel}}, {"q": pair})["q"]
  assert found["a"].sharding.spec == spec(None, "fsdp", None)
  assert found["b"].sharding.spec == spec(None, None, "tensor")
