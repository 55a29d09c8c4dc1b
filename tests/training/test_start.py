"""A start that cannot work leaves nothing; one that goes on may differ."""

import json

import jax
import numpy as np
import pytest

from tests import test_train
from tests.training import test_batching
from vdit_jax import checkpoint, train
from vdit_jax.training import lock, resume

data_dir, autoencoder = test_train.data_dir, test_batching.autoencoder


def _config(data_dir, **changed):
  config = test_train._config("vae", data_dir).unlock()
  with config.ignore_type():
    config.update_from_flattened_dict(changed)
  return config


def _rows(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _run_to(workdir, config, step):
  """Train to a checkpoint, as if the process had ended there."""
  manager = checkpoint.manager
  with pytest.MonkeyPatch.context() as patch:
    stop = lambda *a, **k: test_train._StopAt(manager(*a, **k), step)
    patch.setattr(checkpoint, "manager", stop)
    with pytest.raises(KeyboardInterrupt):
      train.run(config, workdir)


@pytest.mark.slow
def test_after_a_nan_the_same_command_goes_on_with_a_lower_rate(
  data_dir, autoencoder, tmp_path, monkeypatch
):
  """As the message advises."""
  test_train._use_devices(monkeypatch, 1)  # compiles faster than for eight
  test_train._with_tokenizer(tmp_path, data_dir)
  config = test_train._config("dit", data_dir, autoencoder)
  config.samples.prompts = ()
  usual = config.optim.lr
  _run_to(tmp_path, config, 2)
  config.optim.lr = 1e30
  with pytest.raises(FloatingPointError) as stopped:
    train.run(config, tmp_path)
  assert "the same command after lowering config.optim.lr" in str(stopped.value)
  assert checkpoint.steps(tmp_path) == [2]
  config.optim.lr = usual
  train.run(config, tmp_path)
  starts = json.loads((tmp_path / resume.FILE).read_text())
  assert [start["changed"] for start in starts] == [
    {},
    {"optim.lr": [2e-3, 1e30]},
    {"optim.lr": [1e30, 2e-3]},
  ]
  assert [row["step"] for row in _rows(tmp_path)] == [2, 4]
  config.optim.total_steps = 2
  with pytest.raises(ValueError, match="total_steps must be at least 4"):
    train.run(config, tmp_path)
  assert checkpoint.read_config(tmp_path).optim.total_steps == 4


@pytest.mark.slow
def test_a_run_goes_on_with_other_batches_steps_and_clipping(
  data_dir, tmp_path
):
  train.run(_config(data_dir, **{"optim.total_steps": 2}), tmp_path)
  changed = {
    "optim.schedule": "constant",
    "optim.clip_norm": 0.0,
    "optim.total_steps": 6,
    "batch_size": 16,
    "validation.clips": 8,
    "log_every": 1,
  }
  train.run(_config(data_dir, **changed), tmp_path)
  assert checkpoint.steps(tmp_path)[-1] == 6
  assert checkpoint.read_config(tmp_path).batch_size == 16
  rows = _rows(tmp_path)
  assert [row["step"] for row in rows] == [2, 3, 4, 5, 6]
  assert all(np.isfinite(row["loss"]) for row in rows)
  assert "psnr" in rows[0] and "psnr" in rows[-1]
  starts = json.loads((tmp_path / resume.FILE).read_text())
  assert [start["step"] for start in starts] == [0, 2]
  assert starts[1]["changed"]["batch_size"] == [8, 16]
  assert starts[0]["stands_on"] == starts[1]["stands_on"]


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"optim.lr": float("nan")}, "optim.lr must be"),
    ({"batch_size": 10**12}, "batch_size must be"),
    ({"validation.split": "tset"}, "split must be one of"),
    ({"optim.warmup_steps": 4}, "warmup_steps must be in"),
    ({"data.split": "train[:0%]"}, "'train.:0%.' of .* has no records"),
    ({"autoencoder.channels": (10**6, 8, 8)}, "GiB of every device"),
    ({"data.split": "train[:x]"}, "split must be such as train or train"),
    ({"mesh.data": 3}, "takes 3 devices"),
  ],
)
def test_a_start_that_cannot_work_leaves_nothing(
  data_dir, tmp_path, changed, message
):
  with pytest.raises(ValueError, match=message):
    train.run(_config(data_dir, **changed), tmp_path / "a" / "run")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"sampling.steps": 0}, "sampling.steps must be"),
    ({"sampling.sampler": "plms"}, "sampling.sampler must be one of"),
    ({"sampling.height": 33}, "sampling.height must be a multiple"),
    ({"sampling.num_frames": 10}, "sampling.num_frames must be 4n"),
    (
      {"sampling.sampler_options": {"eta": 2.0}},
      "sampling.sampler_opt",
    ),
    ({"sampling.spacing": {"kid": 1}}, "sampling has options .*'kid'"),
    ({"sampling.guidance_kind": "some"}, "guidance_kind must be one of"),
    ({"validation.levels": (2.0,)}, "validation.levels must be"),
  ],
)
def test_what_would_end_a_run_later_is_refused_at_its_start(
  data_dir, autoencoder, tmp_path, changed, message
):
  test_train._with_tokenizer(tmp_path, data_dir)
  before = sorted(tmp_path.iterdir())
  config = test_train._config("dit", data_dir, autoencoder).unlock()
  with config.ignore_type():
    config.update_from_flattened_dict(changed)
    if "sampling.sampler_options" in changed:
      config.sampling.sampler_options = {"eta": 2.0}
  with pytest.raises(ValueError, match=message):
    train.run(config, tmp_path)
  assert sorted(tmp_path.iterdir()) == before


def test_a_workdir_that_another_run_has_is_refused_at_once(data_dir, tmp_path):
  with (
    lock.held(tmp_path),
    pytest.raises(ValueError, match="in use by process"),
  ):
    train.run(_config(data_dir), tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_state_that_no_device_holds_is_refused(monkeypatch):
  from vdit_jax.training import state as states

  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = lambda n: jax.ShapeDtypeStruct((n, 2**20), "float32", sharding=one)
  states.check_memory({"a": like(4), "b": like(1)})
  with pytest.raises(ValueError, match="takes 4,194,304.0 GiB of every device"):
    states.check_memory({"a": like(2**30)})
