"""The whole path at a tiny size: data, autoencoder, cache, denoiser, video."""

import functools
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import digits
from vdit_jax import checkpoint, export, pipeline, sharding, train
from vdit_jax.cache import dataset
from vdit_jax.data import moving_digits, reading
from vdit_jax.text import tokenizer
from vdit_jax.training import preemption
from vdit_jax.training import state as states
from vdit_jax.weights import workdir as workdirs

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A data folder with the tiny dataset."""
  folder = tmp_path_factory.mktemp("data")
  builder = moving_digits.MovingDigits(
    config="tiny", data_dir=folder, file_format="array_record"
  )
  builder.download_and_prepare()
  return folder


@pytest.fixture(scope="module")
def vae_dir(data_dir, tmp_path_factory):
  """A workdir with an autoencoder of a few steps."""
  workdir = tmp_path_factory.mktemp("vae")
  train.run(_config("vae", data_dir), workdir)
  return workdir


@pytest.fixture(scope="module")
def dit_dir(data_dir, vae_dir, tmp_path_factory):
  """A workdir with a denoiser of a few steps."""
  workdir = _with_tokenizer(tmp_path_factory.mktemp("dit"), data_dir)
  train.run(_config("dit", data_dir, vae_dir), workdir)
  return workdir


def _config(name, data_dir, vae_dir=None, steps=4):
  """A config of configs/digits.py, made tiny."""
  config = digits.get_config(name)
  config.data.name, config.data.data_dir = "moving_digits/tiny", str(data_dir)
  config.batch_size = 8
  config.optim.total_steps, config.optim.warmup_steps = steps, 1
  config.log_every = 2
  config.checkpoint.every = 2
  config.validation.update({"every": 0, "clips": 16})
  if name == "vae":
    config.autoencoder.channels = (8, 8, 16)
  else:
    config.autoencoder_workdir = str(vae_dir)
    config.denoiser.update({"width": 32, "depth": 2, "heads": 2})
    config.denoiser.update({"mlp_width": 64, "unroll": 1, "text_width": 16})
    config.text_encoder.update({"width": 16, "depth": 1, "mlp_width": 16})
    config.samples.every = 0
    config.sampling.steps = 2
  return config


def _with_tokenizer(workdir, data_dir):
  source = reading.open_source("moving_digits/tiny", "train", data_dir)
  captions = sorted({r["caption"] for r in reading.records(source)})
  tokenizer.train(captions, workdir / workdirs.TOKENIZER_FILE)
  return workdir


def _leaves(workdir):
  state = {w: checkpoint.restore_params(workdir, w) for w in ("params", "ema")}
  return jax.tree.leaves(state)


def test_autoencoder_run_leaves_weights_metrics_and_a_sheet(vae_dir):
  params, metadata = checkpoint.load_release(
    vae_dir / workdirs.AUTOENCODER_FILE
  )
  assert np.all(params["latent_std"] > 0) and "channels" in metadata["config"]
  rows = (vae_dir / "metrics.jsonl").read_text().splitlines()
  assert any("psnr" in json.loads(row) for row in rows)
  assert list((vae_dir / "samples").glob("*.png"))


def test_measured_statistics_normalise_the_latents(vae_dir, data_dir):
  encode, _ = dataset.make_encoder(vae_dir)
  source = reading.open_source("moving_digits/tiny", "train", data_dir)
  video = np.stack([r["video"] for r in reading.records(source)])
  mean, logvar = encode(video)
  variance = np.mean(mean**2 + np.exp(logvar), (0, 1, 2, 3))
  np.testing.assert_allclose(np.mean(mean, (0, 1, 2, 3)), 0, atol=1e-4)
  np.testing.assert_allclose(variance, 1, atol=1e-3)


def test_resumed_run_equals_the_unbroken_one(
  data_dir, vae_dir, dit_dir, tmp_path
):
  _with_tokenizer(tmp_path, data_dir)
  config = _config("dit", data_dir, vae_dir)
  manager = checkpoint.manager
  try:  # stop after two of the four steps, as if the process had ended
    checkpoint.manager = lambda *a, **k: _StopAt(manager(*a, **k), 2)
    with pytest.raises(KeyboardInterrupt):
      train.run(config, tmp_path)
  finally:
    checkpoint.manager = manager
  assert checkpoint.latest_step(manager(tmp_path)) == 2
  train.run(config, tmp_path)
  for a, b in zip(_leaves(dit_dir), _leaves(tmp_path), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "name", [pytest.param("vae", marks=pytest.mark.slow), "dit"]
)
def test_several_steps_a_call_are_those_of_single_calls(
  name, data_dir, vae_dir, dit_dir, tmp_path
):
  single = {"vae": vae_dir, "dit": dit_dir}[name]
  config = _config(name, data_dir, vae_dir if name == "dit" else None)
  config.steps_a_call = 2
  if name == "dit":
    _with_tokenizer(tmp_path, data_dir)
  manager = checkpoint.manager
  try:  # stop after the first of the two calls
    checkpoint.manager = lambda *a, **k: _StopAt(manager(*a, **k), 2)
    with pytest.raises(KeyboardInterrupt):
      train.run(config, tmp_path)
  finally:
    checkpoint.manager = manager
  train.run(config, tmp_path)
  # Convolutions lie otherwise in memory inside of a loop.
  far = {"vae": 1e-5, "dit": 0}[name]
  saved = [_everything(workdir) for workdir in (single, tmp_path)]
  for a, b in zip(*map(jax.tree.leaves, saved), strict=True):
    np.testing.assert_allclose(a, b, rtol=far, atol=far)
  rows = [_losses(workdir) for workdir in (single, tmp_path)]
  np.testing.assert_allclose(*rows, rtol=far)
  assert len(rows[0]) == 2


def _everything(workdir):
  """All arrays of the last checkpoint, the optimiser's too."""
  fields = "params", "ema", "opt_state"
  return [checkpoint.restore_params(workdir, which) for which in fields]


def _losses(workdir):
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  names = "step", "loss", "grad_norm", "learning_rate"
  return [[row[n] for n in names] for row in rows if "loss" in row]


def test_intervals_inside_of_a_call_are_refused_early(data_dir, tmp_path):
  config = _config("vae", data_dir)
  config.steps_a_call = 4
  message = "log_every 2, checkpoint.every 2; try steps_a_call=2"
  with pytest.raises(ValueError, match=message):
    train.run(config, tmp_path)
  assert not list(tmp_path.iterdir())


class _StopAt:
  """A checkpoint manager that interrupts the run once a step is saved."""

  def __init__(self, manager, step):
    self._manager, self._step = manager, step

  def __getattr__(self, name):
    return getattr(self._manager, name)

  def save(self, step, **kwargs):
    saved = self._manager.save(step, **kwargs)
    if step == self._step:
      self._manager.wait_until_finished()
      raise KeyboardInterrupt
    return saved


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(
  data_dir, vae_dir, dit_dir, tmp_path
):
  """kill -9 in the middle of training, then the same command again."""
  _with_tokenizer(tmp_path, data_dir)
  command = [sys.executable, "-c", _SCRIPT, str(tmp_path), str(data_dir)]
  command.append(str(vae_dir))
  environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
  process = subprocess.Popen(command, env=environment, cwd=ROOT)
  first = tmp_path / "checkpoints" / "2"
  deadline = time.time() + 120
  while not first.exists() and process.poll() is None:
    assert time.time() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  train.run(_config("dit", data_dir, vae_dir), tmp_path)
  for a, b in zip(_leaves(dit_dir), _leaves(tmp_path), strict=True):
    np.testing.assert_array_equal(a, b)


_SCRIPT = """
import sys, time
import test_train
from vdit_jax import train
from vdit_jax.training import state as states
jit_step = states.jit_step
def slow(*args):  # leaves time to be killed between two checkpoints
  step = jit_step(*args)
  return lambda *args: time.sleep(0.5) or step(*args)
states.jit_step = slow
_, workdir, data_dir, vae_dir = sys.argv
train.run(test_train._config("dit", data_dir, vae_dir), workdir)
"""


@pytest.fixture(scope="module")
def half_way(data_dir, vae_dir, tmp_path_factory):
  """A workdir of two of four steps, on a mesh of four devices."""
  workdir = _with_tokenizer(tmp_path_factory.mktemp("half"), data_dir)
  config = _config("dit", data_dir, vae_dir)
  config.mesh.update({"data": 1, "fsdp": 4})
  with pytest.MonkeyPatch.context() as patch:
    _use_devices(patch, 4)
    manager = checkpoint.manager
    patch.setattr(
      checkpoint, "manager", lambda *a, **k: _StopAt(manager(*a, **k), 2)
    )
    with pytest.raises(KeyboardInterrupt):
      train.run(config, workdir)
  return workdir


def _use_devices(patch, number):
  make = functools.partial(sharding.make_mesh, devices=jax.devices()[:number])
  patch.setattr(sharding, "make_mesh", make)


def _resume(patch, workdir, config, shape):
  """Take a run up again on another mesh: losses, keys of the records."""
  keys, batches = [], reading.batches

  def noted(*args, **kwargs):
    for batch, names in batches(*args, **kwargs):
      keys.append(names)
      yield batch, names

  patch.setattr(reading, "batches", noted)
  _use_devices(patch, math.prod(shape.values()))
  config.mesh.update(shape)
  config.log_every = 1
  train.run(config, workdir)
  text = (workdir / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  return {r["step"]: r["loss"] for r in rows if "loss" in r}, keys


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(half_way, data_dir, vae_dir, tmp_path):
  found = []
  for number, shape in enumerate(
    (
      {"data": 1, "fsdp": 4, "tensor": 1},
      {"data": 2, "fsdp": 1, "tensor": 2},
      {"data": 1, "fsdp": 1, "tensor": 1},
    )
  ):
    workdir = tmp_path / str(number)
    shutil.copytree(half_way, workdir)
    config = _config("dit", data_dir, vae_dir)
    with pytest.MonkeyPatch.context() as patch:
      found.append(_resume(patch, workdir, config, shape))
  (losses, keys), *others = found
  assert len(keys) == 2 and len(keys[0]) == 8
  for other_losses, other_keys in others:
    assert other_keys == keys
    np.testing.assert_allclose(other_losses[3], losses[3], rtol=1e-6)
    np.testing.assert_allclose(other_losses[4], losses[4], rtol=1e-4)


def test_a_run_that_is_asked_to_leave_goes_on_to_the_same_bits(
  data_dir, vae_dir, dit_dir, tmp_path, monkeypatch
):
  _with_tokenizer(tmp_path, data_dir)
  jit_step, steps = states.jit_step, itertools.count(1)

  def asking(*args):
    step = jit_step(*args)

    def asked(*args):
      if next(steps) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      return step(*args)

    return asked

  monkeypatch.setattr(states, "jit_step", asking)
  with pytest.raises(preemption.Preempted, match="saved step 3"):
    train.run(_config("dit", data_dir, vae_dir), tmp_path)
  train.run(_config("dit", data_dir, vae_dir), tmp_path)
  for a, b in zip(_leaves(dit_dir), _leaves(tmp_path), strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_cannot_be_guarded_or_traced_is_refused_early(data_dir, tmp_path):
  config = _config("vae", data_dir)
  config.profile.steps = "3"
  with pytest.raises(ValueError, match="profile.steps"):
    train.run(config, tmp_path)
  config = _config("vae", data_dir)
  config.guard.nonfinite = "hope"
  with pytest.raises(ValueError, match="guard.nonfinite"):
    train.run(config, tmp_path)
  config = _config("vae", data_dir)
  config.batch_size = 12
  with pytest.raises(ValueError, match="batch_size=12 .* try 16"):
    train.run(config, tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def latents(data_dir, vae_dir):
  """The tiny dataset's latents, cached beside it."""
  dataset.build(
    vae_dir, "moving_digits/tiny", data_dir, "latents/tiny", ["train"]
  )
  return reading.open_source("latents/tiny", "train", data_dir)


def test_cached_latents_equal_encoded_ones(latents, vae_dir, data_dir):
  encode, made_by = dataset.make_encoder(vae_dir)
  assert {k: latents.metadata[k] for k in made_by} == made_by
  source = reading.open_source("moving_digits/tiny", "train", data_dir)
  records = zip(reading.records(latents), reading.records(source), strict=True)
  for cached, record in list(records)[::16]:
    mean, logvar = encode(record["video"][None])
    assert cached["caption"] == record["caption"]
    np.testing.assert_allclose(cached["mean"], mean[0], atol=2e-3)
    np.testing.assert_allclose(cached["logvar"], logvar[0], atol=2e-2)


def test_latents_of_another_normalisation_are_refused(
  latents, vae_dir, data_dir, tmp_path
):
  other = tmp_path / "other"
  params, metadata = checkpoint.load_release(
    vae_dir / workdirs.AUTOENCODER_FILE
  )
  params["latent_std"] = params["latent_std"] * 2
  other.mkdir()
  (other / "config.json").write_text((vae_dir / "config.json").read_text())
  checkpoint.save_release(
    other / workdirs.AUTOENCODER_FILE, params, metadata, np.float32
  )
  config = _config("dit", data_dir, other)
  config.data.name = "latents/tiny"
  with pytest.raises(ValueError, match="holds latents of normalisation"):
    train.run(config, _with_tokenizer(tmp_path / "dit", data_dir))
  with pytest.raises(ValueError, match="was made by normalisation"):
    dataset.build(
      other, "moving_digits/tiny", data_dir, "latents/tiny", ["train"]
    )


def test_pipeline_of_a_workdir_generates_other_sizes(dit_dir):
  pipe = pipeline.load(dit_dir)
  for F, H, W in ((9, 32, 32), (17, 32, 48), (33, 48, 32)):
    video = pipe.generate(
      ["a red seven moving left"], num_frames=F, height=H, width=W
    )
    assert video.shape == (1, F, H, W, 3)
    assert np.isfinite(video).all() and np.abs(video).max() <= 1


def test_noise_and_text_decide_the_video(dit_dir):
  pipe = pipeline.load(dit_dir)
  prompts = ["a red seven moving left", "a blue two standing still"]
  both = pipe.generate(prompts, seed=1)
  np.testing.assert_array_equal(both, pipe.generate(prompts, seed=1))
  assert np.abs(both - pipe.generate(prompts, seed=2)).max() > 1e-3


def test_given_frames_stay(dit_dir):
  pipe = pipeline.load(dit_dir)
  frames = np.random.default_rng(0).uniform(-1, 1, (1, 9, 32, 32, 3))
  given = np.zeros((1, 9), bool)
  given[:, 0] = True
  args = {"frames": frames, "frame_mask": given}
  video = pipe.generate(["a red seven moving left"], **args)
  whole = pipe.decode(pipe.encode(frames))
  np.testing.assert_allclose(
    video[:, 0], np.clip(whole, -1, 1)[:, 0], atol=1e-4
  )
  assert np.abs(video[:, 1:] - whole[:, 1:]).max() > 1e-2


def test_strength_keeps_what_is_edited(dit_dir):
  pipe = pipeline.load(dit_dir)
  frames = np.random.default_rng(0).uniform(-1, 1, (1, 9, 32, 32, 3))
  whole = np.clip(pipe.decode(pipe.encode(frames)), -1, 1)
  prompts = ["a red seven moving left"]
  far, near = (
    np.abs(pipe.generate(prompts, frames=frames, strength=s) - whole).mean()
    for s in (1.0, 0.05)
  )
  assert near < far / 2


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"num_frames": 10}, "num_frames must be 4n\\+1, got 10; try 9"),
    ({"height": 30}, "height must be a multiple of 4, got 30"),
    ({"width": 36}, "width 36 gives 9 latents, .* try 32"),
    ({"steps": 0}, "steps must be at least 1"),
    ({"sampler": "plms"}, "sampler must be one of"),
    ({"strength": 0.5}, "need frames"),
    ({"negative_prompts": []}, "negative_prompts must be one a prompt"),
  ],
)
def test_generate_refuses(dit_dir, arguments, message):
  pipe = pipeline.load(dit_dir)
  with pytest.raises(ValueError, match=message):
    pipe.generate(["a red seven moving left"], **arguments)


def test_weights_of_another_config_are_listed(dit_dir, tmp_path):
  config = checkpoint.read_config(dit_dir).unlock()
  config.denoiser.depth = 1
  pipe = pipeline.load(dit_dir)
  params = {k: pipe.params[k] for k in ("denoiser", "text_encoder")}
  for name in (workdirs.TOKENIZER_FILE, workdirs.AUTOENCODER_FILE):
    (tmp_path / name).write_bytes((dit_dir / name).read_bytes())
  (tmp_path / "config.json").write_text(config.to_json())
  checkpoint.save_release(tmp_path / workdirs.RELEASE_FILE, params, {})
  with pytest.raises(ValueError, match="differs: denoiser/blocks"):
    pipeline.load(tmp_path)


def test_release_samples_what_the_workdir_does(dit_dir, tmp_path):
  export.export(dit_dir, tmp_path)
  prompts = ["a red seven moving left"]
  ours, released = (
    pipeline.load(path).generate(prompts) for path in (dit_dir, tmp_path)
  )
  np.testing.assert_allclose(released, ours, atol=2e-2)  # float16 weights


def test_truncated_release_is_refused(dit_dir, tmp_path):
  export.export(dit_dir, tmp_path)
  weights = tmp_path / workdirs.RELEASE_FILE
  weights.write_bytes(weights.read_bytes()[:-100])
  with pytest.raises(ValueError, match="is damaged: it is cut"):
    pipeline.load(tmp_path)


@pytest.mark.slow
def test_fine_tuning_begins_from_a_release(
  dit_dir, data_dir, vae_dir, tmp_path
):
  export.export(dit_dir, tmp_path / "release")
  config = _config("dit", data_dir, vae_dir, steps=2)
  config.init_from = str(tmp_path / "release")
  config.optim.lr = 1e-30  # leaves the weights where they begin
  config.optim.clip_norm = 0.0
  work = tmp_path / "work"
  work.mkdir()
  name = workdirs.TOKENIZER_FILE
  (work / name).write_bytes((dit_dir / name).read_bytes())
  train.run(config, work)
  begun, _ = checkpoint.load_release(
    tmp_path / "release" / workdirs.RELEASE_FILE
  )
  for which in ("params", "ema"):
    found = checkpoint.restore_params(work, which)
    jax.tree.map(np.testing.assert_array_equal, found, begun)


def test_weights_of_another_tokenizer_are_not_fine_tuned(
  dit_dir, data_dir, vae_dir, tmp_path
):
  config = _config("dit", data_dir, vae_dir)
  config.init_from = str(dit_dir)
  tokenizer.train(["a red seven"] * 9, tmp_path / workdirs.TOKENIZER_FILE)
  with pytest.raises(ValueError, match="another tokenizer"):
    train.run(config, tmp_path)


def test_weights_that_do_not_fit_are_not_fine_tuned(
  dit_dir, data_dir, vae_dir, tmp_path
):
  config = _config("dit", data_dir, vae_dir)
  config.init_from = str(dit_dir)
  config.denoiser.depth = 3
  name = workdirs.TOKENIZER_FILE
  (tmp_path / name).write_bytes((dit_dir / name).read_bytes())
  with pytest.raises(ValueError, match="differs: denoiser/blocks"):
    train.run(config, tmp_path)


def test_workdir_of_another_config_is_refused(dit_dir, data_dir, vae_dir):
  config = _config("dit", data_dir, vae_dir)
  config.seed = 1
  with pytest.raises(ValueError, match="seed: 0 there, 1 given"):
    train.run(config, dit_dir)


def test_autoencoder_workdir_cannot_sample(vae_dir):
  with pytest.raises(ValueError, match="workdir of an autoencoder"):
    pipeline.load(vae_dir)


def test_missing_dataset_names_the_command(tmp_path):
  config = _config("vae", tmp_path)
  with pytest.raises(ValueError, match="python -m vdit_jax.data.moving_digits"):
    train.run(config, tmp_path / "work")


def test_untrained_autoencoder_names_the_command(data_dir, tmp_path):
  config = _config("dit", data_dir, tmp_path / "none")
  with pytest.raises(ValueError, match="configs/digits.py:vae"):
    train.run(config, tmp_path / "work")


def test_unknown_config_is_refused():
  with pytest.raises(ValueError, match="'vit'"):
    digits.get_config("vit")


tfds.disable_progress_bar()
