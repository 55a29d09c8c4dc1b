"""Which files hold the weights, and that they are just those of the index."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from vdit_jax import writing
from vdit_jax.convert import files, folders

STEM = "diffusion_pytorch_model"


def _write(path, **tensors):
  tensors = tensors or {"a": 1.0}
  tensors = {k: torch.full((2,), float(v)) for k, v in tensors.items()}
  if path.suffix == ".safetensors":
    safetensors.torch.save_file(tensors, path)
  else:
    torch.save(tensors, path)


def _index(path, **place):
  path.write_text(json.dumps({"metadata": {}, "weight_map": place}))


def _sharded(folder, kind="safetensors"):
  _write(folder / f"model-1.{kind}", a=1, b=2)
  _write(folder / f"model-2.{kind}", c=3)
  first, second = (f"model-{i}.{kind}" for i in (1, 2))
  _index(folder / f"model.{kind}.index.json", a=first, b=first, c=second)


@pytest.mark.parametrize(
  "names, chosen",
  [
    ([f"{STEM}.safetensors"], 0),
    ([f"{STEM}.bin", "model.safetensors"], 1),
    ([f"{STEM}.fp16.safetensors", f"{STEM}.safetensors"], 1),
    ([f"{STEM}.fp16.safetensors", f"{STEM}.bin"], 0),
    (["pytorch_model.fp16.bin", "pytorch_model.bin"], 1),
    (["model.pt", "other.safetensors"], 0),
  ],
)
def test_the_file_that_is_read(tmp_path, names, chosen):
  for i, name in enumerate(names):
    _write(tmp_path / name, a=i)
  (tensor,) = folders.read_tensors(tmp_path).values()
  np.testing.assert_array_equal(tensor.read(), [chosen, chosen])


def test_two_of_a_kind_are_refused(tmp_path):
  for name in ("model.safetensors", f"{STEM}.safetensors"):
    _write(tmp_path / name)
  with pytest.raises(ValueError, match="more than once: .*model.safetensors"):
    folders.read_tensors(tmp_path)


@pytest.mark.parametrize("names", [[], ["model-00001-of-00002.safetensors"]])
def test_no_weights_are_refused(tmp_path, names):
  for name in ["README.md", *names]:
    (tmp_path / name).write_text("")
  with pytest.raises(ValueError, match="no weights and no index.*README.md"):
    folders.read_tensors(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read(tmp_path, kind):
  _sharded(tmp_path, kind)
  found = folders.read_tensors(tmp_path)
  assert {k: x.read()[0] for k, x in found.items()} == {"a": 1, "b": 2, "c": 3}


def test_a_shard_that_is_missing_is_named(tmp_path):
  _sharded(tmp_path)
  (tmp_path / "model-2.safetensors").unlink()
  with pytest.raises(ValueError, match="missing: 'model-2.safetensors"):
    folders.read_tensors(tmp_path)


def test_all_keys_in_which_index_and_shards_differ_are_listed(tmp_path):
  _sharded(tmp_path)
  _write(tmp_path / "model-1.safetensors", a=1, c=9)
  with pytest.raises(ValueError, match="differ; .* in 2 places") as error:
    folders.read_tensors(tmp_path)
  assert "not in model-1.safetensors: b" in str(error.value)
  assert "only in model-1.safetensors: c" in str(error.value)


@pytest.mark.parametrize(
  "text",
  [
    "{",
    "[]",
    "{}",
    '{"weight_map": ["a"]}',
    '{"weight_map": {"a": 3}}',
    '{"weight_map": {"a": "../other/model.safetensors"}}',
    '{"weight_map": {"a": "/etc/model.bin"}}',
    '{"weight_map": {"a": "notes.txt"}}',
  ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
  (tmp_path / "model.safetensors.index.json").write_text(text)
  with pytest.raises(ValueError, match="index.json is damaged"):
    folders.read_tensors(tmp_path)


@pytest.mark.parametrize("bound, shards", [(8, 3), (16, 2), (24, 1), (1, 3)])
def test_shards_hold_at_most_their_size(tmp_path, bound, shards):
  source = tmp_path / "source.safetensors"
  _write(source, a=1, b=2, c=3)
  folders.write_tensors(tmp_path, "model", files.read(source), bound)
  names = sorted(p.name for p in tmp_path.glob("model*.safetensors"))
  source.unlink()
  if shards == 1:
    assert names == ["model.safetensors"]
    assert not list(tmp_path.glob("*.json"))
  else:
    assert names[0] == f"model-00001-of-{shards:05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 24}
  assert len(names) == shards
  found = folders.read_tensors(tmp_path)
  assert {k: x.read()[0] for k, x in found.items()} == {"a": 1, "b": 2, "c": 3}


def test_the_config_is_read(tmp_path):
  config = {"_class_name": "Tiny", "sizes": [1, 2], "eps": 1e-6}
  folders.write_config(tmp_path, config)
  assert folders.read_config(tmp_path) == config


def test_a_folder_without_config_says_what_it_is(tmp_path):
  with pytest.raises(ValueError, match="does not exist; .*hf download"):
    folders.read_config(writing.absolute("THUDM/CogVideoX-2b"))
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(ValueError, match="has no config.json, it holds 'notes"):
    folders.read_config(writing.absolute(tmp_path))
  (tmp_path / "model_index.json").write_text("{}")
  (tmp_path / "vae").mkdir()
  (tmp_path / "vae" / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="pipeline; give one .*: 'vae"):
    folders.read_config(writing.absolute(tmp_path))


@pytest.mark.parametrize(
  "config, name",
  [
    ({"_class_name": "A"}, "A"),
    ({"architectures": ["B"]}, "B"),
    ({"architectures": ["B"], "model_type": "b"}, "B"),
    ({"model_type": "b"}, "b"),
    ({}, None),
    ({"architectures": ["A", "B"]}, None),
    ({"architectures": []}, None),
    ({"_class_name": ["A"]}, None),
    ({"model_type": 3}, None),
  ],
)
def test_the_class_of_a_config(config, name):
  if name:
    assert folders.class_name(config) == name
    assert folders.is_component(config)
  else:
    with pytest.raises(ValueError, match="neither _class|must be"):
      folders.class_name(config)


def test_a_folder_appears_when_it_is_whole(tmp_path):
  target = tmp_path / "deep" / "out"
  with folders.replacing(target) as folder:
    (folder / "a").write_text("1")
    assert not target.exists()
  assert [p.name for p in target.iterdir()] == ["a"]
  assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_an_empty_folder_may_be_replaced(tmp_path):
  (tmp_path / "out").mkdir()
  with folders.replacing(tmp_path / "out") as folder:
    (folder / "a").write_text("1")
  assert (tmp_path / "out" / "a").exists()


def test_what_failed_leaves_nothing(tmp_path):
  for error in (KeyError, KeyboardInterrupt):
    with pytest.raises(error), folders.replacing(tmp_path / "out") as folder:
      (folder / "a").write_text("1")
      raise error
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_touched(tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("1")
  with pytest.raises(ValueError, match="not an empty folder; remove it"):
    with folders.replacing(tmp_path / "out"):
      raise AssertionError
  assert (tmp_path / "out" / "mine").read_text() == "1"
