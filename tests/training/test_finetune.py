"""Released models fine-tuned: whole, and by adapters that diffusers loads.

Tiny pipelines in diffusers' layout, every parameter random; digits as clips.
"""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import cogvideox as configs
from vdit_jax import checkpoint, export, pipeline, train, trees, types
from vdit_jax.cache import dataset
from vdit_jax.data import moving_digits, reading
from vdit_jax.models import families, networks
from vdit_jax.models.cogvideox import autoencoder
from vdit_jax.nn import lora
from vdit_jax.training import denoiser, images, learner, resolve, tasks
from vdit_jax.weights import adapters, component, run_config, tiny
from vdit_jax.weights import text_encoder as text_encoders
from vdit_jax.weights import workdir as workdirs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

DIGITS, LATENTS = "moving_digits/tiny", "latents/padded"
STEPS, RANK = 20, 3
PROMPTS = ("a red seven moving left", "a blue two standing still")

tfds.disable_progress_bar()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A data folder with a few clips."""
  folder = tmp_path_factory.mktemp("data")
  moving_digits.MovingDigits(
    config="tiny", data_dir=folder, file_format="array_record"
  ).download_and_prepare()
  return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  """Folders of two pipelines, by variant."""
  folder = tmp_path_factory.mktemp("released")
  names = "2b", "1_5_5b_i2v"
  for name in names:
    tiny.write(folder / name, name)
  return {name: folder / name for name in names}


@pytest.fixture(scope="module")
def latents(data_dir, released):
  """The clips' latents and captions, encoded by the first pipeline."""
  folder = released["2b"]
  dataset.build(
    folder / "vae",
    DIGITS,
    data_dir,
    LATENTS,
    ["train", "validation"],
    text=dataset.TextOptions(folder, dtype="float32", padding="seen"),
    dtype="float32",
  )
  return reading.open_source(LATENTS, "train", data_dir)


def _config(data_dir, folder, name=LATENTS, steps=STEPS, rank=RANK):
  config = configs.get_config(str(folder))
  config.data.update({"name": name, "data_dir": str(data_dir)})
  for group in (config.denoiser, config.autoencoder, config.text_encoder):
    group.dtype = "float32"
  config.lora.update({"rank": rank, "alpha": 6.0, "base_dtype": "float32"})
  config.mesh.fsdp, config.batch_size, config.log_every = 1, 8, 5
  config.optim.update({"lr": 1e-2, "total_steps": steps, "warmup_steps": 1})
  config.checkpoint.every = steps // 2
  config.validation.update({"every": 0, "clips": 8, "levels": (0.3, 0.8)})
  config.sampling.update({"steps": 2, "num_frames": 9})
  config.sampling.update({"height": 32, "width": 32})
  return config


@pytest.fixture(scope="module")
def lora_dir(latents, data_dir, released, tmp_path_factory):
  """The workdir of adapters that were trained."""
  workdir = tmp_path_factory.mktemp("lora")
  config = _config(data_dir, released["2b"])
  config.samples.prompts = PROMPTS
  train.run(config, workdir)
  return workdir


@pytest.fixture(scope="module")
def exported(lora_dir, tmp_path_factory):
  """The adapters as a file, and merged."""
  folder = tmp_path_factory.mktemp("exported")
  export.export(lora_dir, folder / "lora")
  export.export(lora_dir, folder / "merged", merge=True)
  return folder


def _inputs(channels):
  rng = np.random.default_rng(0)
  draw = lambda *s: rng.standard_normal(s).astype(np.float32)
  return draw(2, 3, 4, 4, channels), np.array([999, 357]), draw(2, 226, 16)


@torch.no_grad()
def _run_torch(model):
  x_t, n, embeds = (torch.tensor(x) for x in _inputs(4))
  return model(x_t.movedim(-1, 2), embeds, n).sample.movedim(2, -1).numpy()


def _run_ours(module, variables):
  x_t, n, embeds = _inputs(4)
  text = types.Text(embeds=embeds, mask=np.ones(embeds.shape[:2], bool))
  t = jnp.asarray(n / 1000, jnp.float32)
  return np.asarray(jax.jit(module.apply)(variables, x_t, t, text))


def test_diffusers_loads_the_adapters_and_gives_the_same(
  lora_dir, exported, released
):
  """And each differs from what was there before."""
  params = checkpoint.restore_params(lora_dir, "ema")
  assert set(params) == {"denoiser_lora"}  # nothing else is in a checkpoint
  base = component.load(released["2b"] / "transformer")
  factors = params["denoiser_lora"]
  assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(factors))
  variables = {"params": base.params}
  before = _run_ours(base.module, variables)
  attached = lora.attach(base.params, factors, 6.0 / RANK)
  ours = _run_ours(base.module, {"params": attached})
  assert np.abs(ours - before).max() > 0.05
  pipe = diffusers.CogVideoXPipeline.from_pretrained(released["2b"])
  np.testing.assert_allclose(_run_torch(pipe.transformer), before, atol=1e-4)
  pipe.load_lora_weights(exported / "lora")
  np.testing.assert_allclose(_run_torch(pipe.transformer), ours, atol=1e-4)
  read = _adapters(exported / "lora", released["2b"])
  again = _run_ours(base.module, {"params": lora.attach(base.params, read)})
  np.testing.assert_allclose(again, ours, atol=1e-5)
  merged = component.load(exported / "merged")
  whole = _run_ours(merged.module, {"params": merged.params})
  np.testing.assert_allclose(whole, ours, atol=1e-4)
  model = diffusers.CogVideoXTransformer3DModel.from_pretrained(
    exported / "merged"
  )
  np.testing.assert_allclose(_run_torch(model), ours, atol=1e-4)
  _, _, loaded = workdirs.load(lora_dir)
  jax.tree.map(np.testing.assert_array_equal, loaded["denoiser"], attached)


def _adapters(path, pipe):
  system, folder = families.system("cogvideox"), pipe / "transformer"
  return adapters.read(path, system, {"denoiser": folder})["denoiser"]


def test_merging_with_bfloat16_weights_gives_float32(
  lora_dir, released, tmp_path
):
  """Which keeps the adapters; in bfloat16 they are kept on the average."""
  base = component.load(released["2b"] / "transformer", param_dtype="bfloat16")
  component.save(base, tmp_path / "half")
  shutil.copytree(lora_dir, tmp_path / "run")
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["init_from"] = str(tmp_path / "half")
  config["init_fingerprint"] = component.fingerprint(tmp_path / "half")
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  factors = checkpoint.restore_params(lora_dir, "ema")["denoiser_lora"]
  float32 = jax.tree.map(lambda x: x.astype(jnp.float32), base.params)
  want = lora.merge(float32, factors, 6.0 / RANK)
  for dtype, near in ((None, 1e-6), ("bfloat16", 2.0**-7)):
    out = tmp_path / f"out_{dtype}"
    export.export(tmp_path / "run", out, merge=True, param_dtype=dtype)
    found = component.load(out).params
    assert {str(x.dtype) for x in jax.tree.leaves(found)} == {
      dtype or "float32"
    }
    for a, b in zip(
      *(jax.tree.leaves(tree["blocks"]) for tree in (found, want)), strict=True
    ):
      a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
      np.testing.assert_allclose(a, b, rtol=near, atol=1e-6)


def test_training_goes_on_from_a_file_of_adapters(
  latents, lora_dir, exported, data_dir, released, tmp_path
):
  """Of a higher rank, and what does not fit is refused before a step."""
  config = _config(data_dir, released["2b"], rank=RANK + 2)
  config.lora.alpha = None
  config.lora.init_from = f"{exported / 'lora'}:0.5"
  task, _, resolved = _task(config, tmp_path)
  assert resolved.lora.alpha == RANK + 2
  begun = jax.tree.map(np.asarray, task.start()["denoiser_lora"])
  read = _adapters(exported / "lora", released["2b"])
  product = lambda tree: {
    path: trees.flatten(tree)[f"{path}/a"] @ trees.flatten(tree)[f"{path}/b"]
    for path in lora.paths(tree)
  }
  want = jax.tree.map(lambda x: 0.5 * x, product(read))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    product(begun),
    want,
  )
  shapes = jax.eval_shape(task.init, jax.random.key(0))["denoiser_lora"]
  trees.check_match(component.placement.unboxed(shapes), begun, "begun")
  for field, value, match in (
    ("rank", RANK - 1, f"rank must be at least {RANK}"),
    ("targets", ("blocks/attention/q",), "targets must have all layers of"),
    ("targets", ("blocks/attention/qq",), "is no layer; did you mean"),
    ("init_from", str(tmp_path / "none"), "does not exist; give the file"),
    ("rank", -1, "config.lora: rank must be a whole number"),
  ):
    wrong = config.copy_and_resolve_references()
    with wrong.unlocked():
      wrong.lora[field] = value
    with pytest.raises(ValueError, match=match):
      _task(wrong, tmp_path)
  checkpoint.prepare_workdir(tmp_path / "begun", resolved)
  (tmp_path / "begun" / "checkpoints" / "2").mkdir()  # what a run leaves
  with config.unlocked():
    config.lora.init_from = str(tmp_path / "gone since")
  _task(config, tmp_path / "begun")


@pytest.mark.slow
def test_workdir_and_adapters_sample_the_same(lora_dir, exported, released):
  """By the run's own hook, from its workdir, and merged into the release."""
  assert list((lora_dir / "samples").glob("*.png"))
  size = {"num_frames": 9, "height": 32, "width": 32, "steps": 2}
  ours = pipeline.load(lora_dir).generate(list(PROMPTS))
  paths = {"adapters": exported / "lora"}, {}
  with_them, without = (
    pipeline.load(released["2b"], **path).generate(list(PROMPTS), **size)
    for path in paths
  )
  np.testing.assert_allclose(ours, with_them, atol=1e-4)
  assert np.abs(with_them - without).max() > 0.05
  with pytest.raises(ValueError, match="is of another model.*positions"):
    pipeline.load(released["1_5_5b_i2v"], adapters=exported / "lora")
  with pytest.raises(ValueError, match="adapters are for released pipelines"):
    pipeline.load(lora_dir, adapters=exported / "lora")


@pytest.mark.slow
def test_resumed_adapters_equal_the_unbroken_run_s(
  lora_dir, data_dir, released, tmp_path, monkeypatch
):
  config, save = _config(data_dir, released["2b"]), checkpoint.save
  config.samples.prompts = PROMPTS

  def stop(manager, step, state):
    save(manager, step, state)
    checkpoint.wait(manager)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
      train.run(config, tmp_path)
  manager = checkpoint.manager(tmp_path)
  assert checkpoint.latest_step(manager) == STEPS // 2
  train.run(config, tmp_path)
  for which in ("params", "ema"):
    jax.tree.map(
      np.testing.assert_array_equal,
      checkpoint.restore_params(lora_dir, which),
      checkpoint.restore_params(tmp_path, which),
    )


@pytest.mark.slow
def test_all_weights_train_from_the_released_ones(
  latents, data_dir, released, tmp_path
):
  config = _config(data_dir, released["2b"], steps=2, rank=0)
  train.run(config, tmp_path / "work")
  export.export(tmp_path / "work", tmp_path / "out")
  begun = component.load(released["2b"] / "transformer")
  ended = component.load(tmp_path / "out")
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), begun.params, ended.params
  )
  assert all(0 < x < 0.1 for x in jax.tree.leaves(moved))
  model = diffusers.CogVideoXTransformer3DModel.from_pretrained(
    tmp_path / "out"
  )
  ours = _run_ours(ended.module, {"params": ended.params})
  np.testing.assert_allclose(_run_torch(model), ours, atol=1e-4)


def _task(config, workdir):
  data = config.data
  source = reading.open_source(data.name, "train", data.data_dir)
  config = resolve.complete(config, source, workdir)
  return tasks.make(config, source, workdir), source, config


@pytest.mark.parametrize(
  "name", ["2b", pytest.param("1_5_5b_i2v", marks=pytest.mark.slow)]
)
def test_loss_of_pixels_and_captions_is_pytorch_s(
  name, released, data_dir, tmp_path
):
  folder = released[name]
  task, source, config = _task(_config(data_dir, folder, DIGITS), tmp_path)
  batch, _ = next(reading.evaluation_batches(source, task.wanted, 2))
  modules = learner.make(config).modules
  goal = learner.objective(config)
  extra = learner.options(config)
  check = denoiser.make_validation(modules, goal, (0.357,), **extra)
  params = task.init(jax.random.key(0))
  params = nn.meta.unbox(params)
  (ours,), _ = jax.jit(check)(params, task.frozen, batch, 0)
  theirs = _torch_loss(folder, batch, 357)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@torch.no_grad()
def _torch_loss(folder, batch, n):
  """The loss as diffusers' and CogVideo's own training scripts have it."""
  load = lambda kind, part: kind.from_pretrained(folder / part)
  vae = load(diffusers.AutoencoderKLCogVideoX, "vae")
  model = load(diffusers.CogVideoXTransformer3DModel, "transformer")
  text = load(transformers.T5EncoderModel, "text_encoder")
  scheduler = load(diffusers.CogVideoXDDIMScheduler, "scheduler")
  video = torch.tensor(batch.video) / 127.5 - 1
  video = video.movedim(-1, 1)  # [B, C, F, H, W]
  scale = vae.config.scaling_factor
  x0 = vae.encode(video).latent_dist.mode() * scale
  image = vae.encode(video[:, :, :1]).latent_dist.mode()
  image = image / scale if vae.config.invert_scale_latents else image * scale
  p_f = model.config.patch_size_t or 1
  copies = -x0.shape[2] % p_f
  x0 = torch.cat([x0[:, :, :1]] * copies + [x0], 2).movedim(1, 2)
  eps = jax.random.normal(jax.random.key(0), x0.movedim(2, -1).shape)
  eps = torch.tensor(np.asarray(eps)).movedim(-1, 2)
  steps = torch.full((len(x0),), n)
  x_t = scheduler.add_noise(x0, eps, steps)
  rotary, ofs = None, None
  if model.config.in_channels > x0.shape[2]:
    shown = torch.zeros_like(x0)
    shown[:, :1] = image.movedim(1, 2)
    x_t, ofs = torch.cat([x_t, shown], 2), torch.full((1,), 2.0)
    grid = x_t.shape[1] // p_f, x_t.shape[3] // 2, x_t.shape[4] // 2
    rotary = diffusers.models.embeddings.get_3d_rotary_pos_embed(
      embed_dim=model.config.attention_head_dim,
      crops_coords=None,
      grid_size=grid[1:],
      temporal_size=grid[0],
      grid_type="slice",
      max_size=(model.config.sample_height, model.config.sample_width),
    )
  tokens = batch.captions["text_encoder"].tokens
  embeds = text(torch.tensor(tokens).long()).last_hidden_state
  out = model(x_t, embeds, steps, ofs=ofs, image_rotary_emb=rotary).sample
  v = scheduler.get_velocity(x0, eps, steps)
  return ((out - v) ** 2).mean((1, 2, 3, 4)).sum().item()


@pytest.mark.slow
def test_a_dropped_caption_is_the_empty_one(released, data_dir, tmp_path):
  folder = released["1_5_5b_i2v"]
  task, source, config = _task(_config(data_dir, folder, DIGITS), tmp_path)
  batch, _ = next(reading.evaluation_batches(source, task.wanted, 4))
  config.image.update({"noise_mean": -50.0, "noise_std": 0.0})
  params = nn.meta.unbox(task.init(jax.random.key(0)))

  @jax.jit
  def errors(batch, keep):
    loss = learner.make(config).loss
    drawn = loss.draw(batch, jax.random.key(1))
    drawn["keep"] = keep[:, None]
    return loss.terms(params, task.frozen, batch, drawn)["loss"]

  words = batch.captions["text_encoder"]
  tokenizer = task.wanted.words["text_encoder"].tokenizer
  tokens, _ = tokenizer.encode([""] * 4, 226)
  unsaid = {"text_encoder": words.replace(tokens=tokens)}
  kept = jnp.array([True, False, True, False])
  mixed = errors(batch, kept)
  whole = errors(batch, jnp.ones(4, bool))
  empty = errors(batch.replace(captions=unsaid), jnp.ones(4, bool))
  np.testing.assert_allclose(mixed, jnp.where(kept, whole, empty), rtol=1e-5)
  assert np.abs(whole - empty).min() > 1e-4


class _Thinned:
  """Stands in for an autoencoder: every eighth pixel; 1 more if sampled."""

  cfg = autoencoder.Config()

  @staticmethod
  def video_frames(latents):
    return 4 * latents - 3

  @staticmethod
  def apply(variables, video, noise, method):
    assert method == "encode_condition" and video.shape[1] == 1
    latents = jnp.repeat(video[:, :, ::8, ::8, :1], 4, -1)
    if noise is None:
      return latents
    assert 0.8 < np.std(noise) < 1.2
    return latents + jnp.ones_like(noise)


def test_images_are_noised_and_sometimes_dropped(released):
  folder = released["1_5_5b_i2v"] / "transformer"
  modules = networks.gather(
    {"autoencoder": _Thinned, "denoiser": component.load(folder).module}
  )
  video = np.full((64, 9, 32, 32, 3), 255, np.uint8)
  video[:, 1:] = 0
  batch = types.Batch(video=video, weight=np.ones(64))
  keys = jax.random.split(jax.random.key(0), 64)
  how = types.Image(noise_mean=-2.0, noise_std=0.5, dropout=0.4)
  args = modules, how, {"autoencoder": None}, batch, 3
  noised, clean = (images.show(*args, k).cond.latents for k in (keys, None))
  assert noised.shape == (64, 4, 4, 4, 4)
  assert not noised[:, 1:].any() and not clean[:, 1:].any()
  np.testing.assert_array_equal(clean[:, 0], 1)
  dropped = ~noised[:, 0].any((1, 2, 3))
  assert 12 < dropped.sum() < 40
  noise = (noised - clean - 1)[~dropped, 0, :, :, 0]
  logarithms = np.log(np.std(noise, axis=(1, 2)))
  np.testing.assert_allclose(np.mean(logarithms), -2, atol=0.25)
  assert 0.3 < np.std(logarithms) < 0.8
  still = dataclasses.replace(how, noise_mean=-50.0, dropout=0.0)
  args = (
    modules,
    still,
    {"autoencoder": None},
    batch.replace(frames=video[:, :1]),
  )
  again = images.show(*args, 3, keys).cond.latents
  np.testing.assert_array_equal(again[:, 0], 2)
  for changes in (dict(dropout=1.0), dict(noise_std=-1.0)):
    with pytest.raises(ValueError, match="image"):
      types.Image(**changes)


@pytest.mark.slow
def test_image_to_video_trains_adapters_from_pixels(
  released, data_dir, tmp_path
):
  config = _config(data_dir, released["1_5_5b_i2v"], DIGITS, steps=2)
  train.run(config, tmp_path)
  assert set(checkpoint.restore_params(tmp_path, "params")) == {"denoiser_lora"}
  rows = [
    json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
  ]
  assert any("validation_loss" in row for row in rows)


def test_what_does_not_belong_together_is_refused(
  latents, released, data_dir, tmp_path
):
  run = lambda config: train.run(config, tmp_path / "work")
  config = _config(data_dir, released["2b"])
  config.init_from = str(released["1_5_5b_i2v"])
  with pytest.raises(ValueError, match="latents of autoencoder|of another den"):
    run(config)
  config = _config(data_dir, released["1_5_5b_i2v"])
  config.autoencoder_workdir = str(released["2b"] / "vae")
  with pytest.raises(ValueError, match=r"this denoiser is given frames \[0\]"):
    run(config)
  config = _config(data_dir, released["2b"])
  config.denoiser.depth = 5
  with pytest.raises(ValueError, match="depth=5, there it is 2; take --config"):
    run(config)
  config = _config(data_dir, released["2b"])
  config.init_from = ""
  config.autoencoder_workdir = str(released["2b"] / "vae")
  config.text_encoder_dir = str(released["2b"])
  with pytest.raises(ValueError, match="rank=3 needs a released denoiser"):
    run(config)
  config = _config(data_dir, released["2b"])
  config.data.max_length = 100
  with pytest.raises(ValueError, match="whose padding is seen, of 226"):
    run(config)
  with pytest.raises(ValueError, match="does not exist.*hf download"):
    configs.get_config("zai-org/CogVideoX-2b")
  with pytest.raises(ValueError, match="needs what to fine-tune.*2b"):
    configs.get_config("")
  assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", ["2b", "5b", "5b_i2v", "1_5_5b", "1_5_5b_i2v"])
def test_variants_have_configs(name):
  config = configs.get_config(name)
  config.init_from = "elsewhere"
  assert config.autoencoder_workdir == "elsewhere"
  assert config.text_encoder_dir == "elsewhere"
  assert ("image" in config) == name.endswith("_i2v")
  assert config.objective.schedule.snr_shift == (3.0 if name == "2b" else 1.0)
  assert run_config.recipe(config).negative_prompt == ""


def test_cached_captions_are_the_whole_of_them(latents, released):
  """Padding too, and encoded with it seen."""
  record = next(reading.records(latents))
  [embeds] = record["embeds"]
  assert embeds.shape == (226, 16)
  frozen = text_encoders.load(released["2b"], "float32")
  masked = frozen.encode([record["caption"]], 226)
  assert np.abs(embeds - masked.embeds[0]).max() > 1e-2
  model = transformers.T5EncoderModel.from_pretrained(
    released["2b"] / "text_encoder"
  )
  tokens, _ = frozen.tokenizer.encode([record["caption"]], 226)
  with torch.no_grad():
    want = model(torch.tensor(tokens).long()).last_hidden_state[0]
  np.testing.assert_allclose(embeds, want, atol=4e-3)
