"""From clips of many sizes to steps: buckets, their order, their training."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl import flags

from configs import digits
from vdit_jax import checkpoint, sharding, train
from vdit_jax.data import index, plan, reading
from vdit_jax.data.build import dataset, jobs
from vdit_jax.media import formats
from vdit_jax.models import networks
from vdit_jax.text import tokenizer
from vdit_jax.training import batching, learner, loop, resolve, tasks
from vdit_jax.weights import workdir as workdirs

# Ten sizes and lengths: frames, height, width, files; at 8 frames a second.
FILES = [
  (9, 36, 36, 10),
  (12, 40, 48, 10),
  (16, 64, 64, 6),
  (17, 32, 32, 8),
  (24, 48, 40, 8),
  (9, 32, 64, 8),
  (11, 48, 90, 8),
  (1, 32, 32, 20),
  (1, 64, 48, 20),
  (1, 50, 90, 16),
]
# Tokens of a clip: 48, 80, 72, 16.
SHAPES = ((9, 32, 32), (17, 32, 32), (9, 32, 48), (1, 32, 32))
SIZES = {48: 12, 80: 8, 72: 8, 16: 40}  # clips of a batch
MAX_TOKENS, PARTS = 640, 4
WORDS = ("red", "green", "blue", "small", "large", "fast", "slow", "still")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A data folder with clips/mixed, of files of ten sizes and lengths."""
  folder = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  rows = []
  for number, (frames, height, width, files) in enumerate(FILES):
    for i in range(files):
      suffix = "png" if frames == 1 else "mp4"
      name = f"{number}_{i}.{suffix}"
      grey = rng.integers(0, 256, (frames, 4, 4, 3), np.uint8)
      image = np.kron(grey, np.ones((1, height // 4 + 1, width // 4 + 1, 1)))
      video = image[:, :height, :width].astype(np.uint8)
      if frames == 1:
        formats.write_image(folder / "files" / name, video[0])
      else:
        formats.write(folder / "files" / name, video, 8.0)
      rows.append({"video": name, "caption": " ".join(rng.choice(WORDS, 3))})
  (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
  spec = jobs.Spec(
    str(folder / "files"), str(folder / "captions.jsonl"), validation=0.1
  )
  dataset.build(spec, folder, "clips/mixed", workers=0)
  return folder


@pytest.fixture(scope="module")
def source(data_dir):
  return reading.open_source("clips/mixed", "train", data_dir)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
  """A workdir of an autoencoder that is tiny and not trained."""
  workdir = tmp_path_factory.mktemp("autoencoder")
  config = digits.get_config("vae")
  config.autoencoder.channels = (8, 8, 16)
  module = networks.build_module(config.autoencoder, "autoencoder")
  boxed = jax.jit(lambda: networks.init(module, jax.random.key(0)))()
  weights = workdir / workdirs.AUTOENCODER_FILE
  checkpoint.save_release(weights, nn.meta.unbox(boxed), {}, np.float32)
  checkpoint.prepare_workdir(workdir, config)
  return workdir


def make_config(data_dir, autoencoder=""):
  """The digits' denoiser, made tiny, on buckets."""
  config = digits.get_config("dit")
  config.autoencoder_workdir = str(autoencoder)
  config.denoiser.update({"width": 32, "depth": 2, "heads": 2})
  config.denoiser.update({"mlp_width": 64, "unroll": 1, "text_width": 16})
  config.text_encoder.update({"width": 16, "depth": 1, "mlp_width": 16})
  config.optim.update({"total_steps": 8, "warmup_steps": 1})
  config.update({"log_every": 1})
  config.checkpoint.every = 4
  config.validation.update({"every": 0, "clips": 4})
  config.samples.every, config.sampling.steps = 0, 1
  config.samples.prompts = ("red",)
  config.data.update({"name": "clips/mixed", "data_dir": str(data_dir)})
  config.data.fps = 8.0
  config.data.buckets.update(
    {"max_tokens": MAX_TOKENS, "shapes": SHAPES, "small": "move"}
  )
  return config


def make_plan(config, source, parts=PARTS):
  config.data.buckets.multiple_of = parts
  modules = learner.make(config).modules
  return batching.make(config, source, modules)


@pytest.fixture(scope="module")
def planned(data_dir, source):
  return make_plan(make_config(data_dir), source)[0]


def keys(source, planned, steps, host=0, num_hosts=1, workers=0):
  """Keys of the records of some steps, a list for each."""
  read = reading.batches(
    source,
    reading.Wanted(options=reading.Options(fps=8.0)),
    steps,
    seed=0,
    planned=functools.partial(plan.batch, planned),
    share=(host, num_hosts),
    workers=workers,
  )
  found = []
  for step, (batch, names) in zip(steps, read, strict=True):
    shape, positions = plan.batch(planned, step)
    assert batch.video.shape[1:4] == shape and batch.weight.all()
    assert len(names) * num_hosts == len(positions)
    found.append(names)
  return found


def test_order_is_one_sequence_however_it_is_read(source, planned):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  steps = range(8)
  whole = keys(source, planned, steps)
  shown = [plan.batch(planned, step)[1].tolist() for step in steps]
  assert whole == [[source.index.keys[i] for i in row] for row in shown]
  assert keys(source, planned, steps, workers=2) == whole
  for hosts in (2, 4):
    shares = [keys(source, planned, steps, h, hosts) for h in range(hosts)]
    joined = [sum(parts, []) for parts in zip(*shares, strict=True)]
    assert joined == whole
  for stop in steps:  # neither repeat nor gap
    assert keys(source, planned, range(stop, 8)) == whole[stop:]


def test_every_record_is_in_the_bucket_that_the_report_says(source, data_dir):
  planned, report = make_plan(make_config(data_dir), source)
  assert [row.shape for row in report.rows] == list(SHAPES)
  for row in report.rows:
    assert row.used and row.batch_size == SIZES[row.tokens]
  assert sum(row.records for row in report.rows) == source.num_records
  images = report.rows[3]
  assert images.records == images.images == np.sum(source.index.num_frames == 1)
  stored = json.loads(batching.file(report)["buckets.json"])
  assert stored["rows"][0]["shape"] == [9, 32, 32] and stored["dropped"] == []


@pytest.fixture(scope="module")
def run(data_dir, source, autoencoder, tmp_path_factory):
  """A training run: its workdir, batches, compilations of the step."""
  workdir = tmp_path_factory.mktemp("run")
  captions = [r["caption"] for r in reading.records(source)]
  tokenizer.train(sorted(set(captions)), workdir / workdirs.TOKENIZER_FILE)
  compiled, shapes = [], []

  def note(event, seconds, **kwargs):
    if event.endswith("backend_compile_duration"):
      compiled.append(kwargs["fun_name"])

  def put(batch, sharding):
    shapes.append((batch.video.shape, batch.weight))
    return place(batch, sharding)

  def without_samples(*args):
    task = make_task(*args)
    validation = {"validation": task.hooks["validation"]}
    return dataclasses.replace(task, hooks=validation)

  place, make_task = loop.put, tasks.make
  jax.monitoring.register_event_duration_secs_listener(note)
  with pytest.MonkeyPatch.context() as patch:
    make = functools.partial(sharding.make_mesh, devices=jax.devices()[:PARTS])
    patch.setattr(sharding, "make_mesh", make)
    patch.setattr(loop, "put", put)
    patch.setattr(tasks, "make", without_samples)
    train.run(make_config(data_dir, autoencoder), workdir)
  steps = sum(name in ("step", "jit_step", "jit(step)") for name in compiled)
  return workdir, shapes, steps


@pytest.mark.slow
def test_each_bucket_is_compiled_once_and_trained_on(run, planned):
  workdir, shapes, compiled = run
  assert compiled == len(planned.buckets) == 4
  assert len(shapes) == 8
  assert {shape[1:4] for shape, _ in shapes} == set(SHAPES)
  text = (workdir / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  losses = [row["loss"] for row in rows if "loss" in row]
  assert len(losses) == 8 and np.isfinite(losses).all()
  assert all(0 < row["grad_norm"] for row in rows if "loss" in row)
  assert "validation_loss" in rows[-1]


@pytest.mark.slow
def test_each_step_has_about_the_same_tokens(run):
  _, shapes, _ = run
  for (B, F, H, W, _), weight in shapes:
    filled = B * ((F - 1) // 4 + 1) * (H // 8) * (W // 8)
    assert 0.85 * MAX_TOKENS <= filled <= MAX_TOKENS
    assert weight.all()


@pytest.mark.slow
def test_rates_are_of_the_clips_and_tokens_of_each_step(run, planned):
  workdir, _, _ = run
  text = (workdir / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  for row in rows:
    if "loss" in row:
      shape, positions = plan.batch(planned, row["step"] - 1)
      clips = row["clips_per_second"] / row["steps_per_second"]
      tokens = row["tokens_per_second"] / row["steps_per_second"]
      assert clips == pytest.approx(len(positions))
      assert SIZES[round(tokens / clips)] == len(positions)


@pytest.mark.slow
def test_a_run_keeps_its_buckets_on_another_mesh(run, data_dir):
  workdir, _, _ = run
  stored = json.loads((workdir / "config.json").read_text())
  assert stored["data"]["buckets"]["multiple_of"] == PARTS
  assert json.loads((workdir / "buckets.json").read_text())["rows"]
  for parts in (1, 2):
    config = resolve.with_buckets(make_config(data_dir), workdir, parts)
    assert config.data.buckets.multiple_of == PARTS
  config = make_config(data_dir)
  config.accumulate = 2
  config = resolve.with_buckets(config, workdir / "other", 3)
  assert config.data.buckets.multiple_of == 6


def test_what_does_not_divide_names_its_bucket(planned):
  mesh = jax.make_mesh((8,), ("data",))
  placed = jax.NamedSharding(mesh, jax.P("data"))
  with pytest.raises(ValueError, match="bucket 9x32x32: batch_size=12 .*16"):
    batching.share(placed, planned, 1)
  mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
  placed = jax.NamedSharding(mesh, jax.P("data"))
  assert batching.share(placed, planned, 4) == (0, 1)
  with pytest.raises(ValueError, match="bucket 9x32x32: .* accumulate=8"):
    batching.share(placed, planned, 8)


def test_sizes_that_the_networks_do_not_take_are_refused(source, data_dir):
  for shape, message in (
    ((10, 32, 32), "num_frames must be 4n.1, got 10"),
    ((9, 36, 32), "height 36 gives 9 latents"),
  ):
    config = make_config(data_dir)
    config.data.buckets.shapes = (shape,)
    with pytest.raises(ValueError, match=message):
      make_plan(config, source)


def test_made_shapes_are_those_that_the_networks_take(source, data_dir):
  config = make_config(data_dir)
  config.data.buckets.update(
    {"shapes": (), "frames": (1, 9), "areas": (1024,), "aspects": (1.0, 1.5)}
  )
  config.data.buckets.max_tokens = 576
  planned, report = make_plan(config, source)
  assert [row.shape for row in report.rows] == [
    (1, 32, 32), (1, 24, 40), (9, 32, 32), (9, 24, 40)
  ]  # fmt: skip


def test_ways_of_reading_that_records_do_not_have_are_refused(source, data_dir):
  for key, value in (
    ("data.number_templates", ("{beauty:.1f}.",)),
    ("denoiser.cond", ("beauty",)),
  ):
    config = make_config(data_dir)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=r"\['beauty'\]"):
      resolve.complete(config, source, data_dir)


def test_validation_without_such_clips_is_refused_early(source, data_dir):
  config = make_config(data_dir)
  planned, _ = make_plan(config, source)
  assert batching.evaluation_shape(config, planned) == (9, 32, 48)
  config.data.shape = (9, 32, 32)
  assert batching.evaluation_shape(config, planned) == (9, 32, 32)
  config.data.shape = (97, 32, 32)
  with pytest.raises(ValueError, match="num_frames=97 at fps=8"):
    batching.evaluation_shape(config, planned)
  config.validation.split = "test"
  with pytest.raises(ValueError, match="split must be one of .*'test'"):
    batching.evaluation_shape(config, planned)


def test_latents_are_planned_as_their_clips(source, data_dir):
  """The same keys in every step, in the shapes that the cache has."""
  config = make_config(data_dir)
  config.data.buckets.small = "drop"
  pixels, _ = make_plan(config, source)
  module = learner.make(config).modules.autoencoder
  encoded = {s: module.latent_shape(*s)[:3] for s in SHAPES}
  rows = np.concatenate([bucket.positions for bucket in pixels.buckets])
  sizes = [[encoded[b.shape]] * len(b.positions) for b in pixels.buckets]
  sizes = np.concatenate(sizes).T
  cached = dataclasses.replace(
    source,
    form=dataclasses.replace(source.form, kind="latents"),
    index=index.Index(source.index.keys[rows], *sizes, source.index.fps[rows]),
    metadata={"shapes": SHAPES},
  )
  config.data.fps = 0.0
  planned, _ = make_plan(config, cached)
  for step in range(30):
    shape, positions = plan.batch(pixels, step)
    other, at = plan.batch(planned, step)
    assert other == encoded[shape]
    keys = cached.index.keys[at].tolist()
    assert keys == source.index.keys[positions].tolist()
  config.data.buckets.small = "move"
  with pytest.raises(ValueError, match="move needs clips"):
    make_plan(config, cached)
  config.data.buckets.shapes = SHAPES[:2]
  with pytest.raises(ValueError, match="holds latents of .* but data.buckets"):
    make_plan(config, cached)
  config.data.buckets.max_tokens = 0
  with pytest.raises(ValueError, match="but data.shape or data.buckets give"):
    make_plan(config, cached)
