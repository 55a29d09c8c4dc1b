"""Laws of the released denoiser that a run begins from."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cogvideox, digits
from vdit_jax import checkpoint
from vdit_jax.models import families
from vdit_jax.nn import lora
from vdit_jax.weights import base_model, component, tiny


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  path = tmp_path_factory.mktemp("released") / "pipe"
  tiny.write(path, "2b")
  return path


@pytest.fixture
def config(released):
  found = cogvideox.get_config(str(released))
  found.init_fingerprint = base_model.check(found)
  return found


def test_a_run_begins_from_a_pipeline_or_its_denoiser(released, config):
  assert base_model.is_released(config)
  assert base_model.folder_of(released) == released / "transformer"
  config.init_from = str(released / "transformer")
  assert base_model.is_released(config)
  assert base_model.folder_of(config.init_from) == released / "transformer"
  network, cfg = base_model.describe(config.init_from, "bfloat16")
  assert network is families.network("cogvideox", "denoiser")
  assert (cfg.depth, cfg.dtype) == (2, "bfloat16")


def test_a_run_of_ours_is_no_release(tmp_path):
  config = digits.get_config("dit")
  assert not base_model.is_released(config)  # from nothing
  checkpoint.prepare_workdir(tmp_path, config)
  config.init_from = str(tmp_path)
  assert not base_model.is_released(config)
  config.init_from = str(tmp_path / "gone")
  assert not base_model.is_released(config)
  config.denoiser.name = "cogvideox"
  assert base_model.is_released(config)  # to be refused where it is read


def test_its_weights_are_named_by_their_content(released, config, tmp_path):
  folder = released / "transformer"
  assert config.init_fingerprint == component.fingerprint(folder)
  shutil.copytree(folder, tmp_path / "copy")
  config.init_from = str(tmp_path / "copy")
  assert base_model.check(config) == config.init_fingerprint


def test_how_it_computes_may_differ_but_not_what_it_is(config):
  config.denoiser.update({"remat": "none", "dtype": "float32", "unroll": 2})
  assert base_model.check(config) == config.init_fingerprint
  config.denoiser.depth = 3
  message = "another denoiser .*depth=3, there it is 2; take --config=configs/"
  with pytest.raises(ValueError, match=message):
    base_model.check(config)


def test_adapters_need_a_release():
  config = digits.get_config("dit")
  assert base_model.check(config) == ""
  config.lora = {"rank": 4, "alpha": 4.0, "targets": ("q",)}
  with pytest.raises(ValueError, match="lora.rank=4 needs a released denoiser"):
    base_model.check(config)


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(targets=("x",)), "config.lora.targets: 'x' is no layer; there are"),
    (dict(rank="x"), "config.lora: rank must be a whole number"),
    (dict(alpha=-1.0), "config.lora: alpha must be a finite number"),
    (dict(init_from="none"), "lora .*none does not exist; give the file"),
  ],
)
def test_adapters_are_checked_before_a_run(config, changes, match):
  config.lora.rank = 2
  with config.unlocked(), config.ignore_type():
    config.lora.update(changes)
  with pytest.raises(ValueError, match=match):
    base_model.check(config)


def test_weights_are_those_of_the_folder_or_refused(released, config):
  got = base_model.load(config, jnp.float32)
  want = component.load(released / "transformer").params
  jax.tree.map(np.testing.assert_array_equal, got, want)
  config.init_fingerprint = "0123"
  with pytest.raises(
    ValueError, match="but the run began from 0123; put those"
  ):
    base_model.load(config, jnp.float32)


def test_trained_adapters_are_merged_and_whole_weights_are_taken(config):
  whole = {"a": np.ones(2)}
  assert base_model.trained(config, {"denoiser": whole}, None) is whole
  config.lora.update({"rank": 2, "alpha": 6.0})
  base = base_model.load(config, jnp.float32)
  before = base["blocks"]["attention"]["q"]["kernel"]
  rng = np.random.default_rng(0)
  depth, width, out = before.shape
  a = rng.standard_normal((depth, width, 2)).astype(np.float32)
  b = rng.standard_normal((depth, 2, out)).astype(np.float32)
  factors = {"blocks": {"attention": {"q": {"a": a, "b": b}}}}
  got = base_model.trained(config, {lora.PARAMS: factors}, jnp.float32)
  kernels = got["blocks"]["attention"]
  want = before + 3.0 * np.einsum("lir,lro->lio", a, b)
  np.testing.assert_allclose(kernels["q"]["kernel"], want, atol=1e-4)
  np.testing.assert_array_equal(
    kernels["k"]["kernel"], base["blocks"]["attention"]["k"]["kernel"]
  )
