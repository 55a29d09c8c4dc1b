"""How fast clips come from files to devices, and how fast they have to.

  python -m benchmarks.input_pipeline --json=work/input.json
  python -m benchmarks.input_pipeline --only=stages --workers=0,8,32 \
    --data=mine/clips --data_dir=work/data --shape=17,256,256 --fps=16
  python -m benchmarks.input_pipeline --only=needs --config=configs/vdit.py:5b

  stages    clips and megapixels a second of one thread, stage by stage: read,
            decode, crop and resize, what else a batch takes, to the device
  loader    the same of the loader as a whole, by number of worker processes,
            and through to batches on the device
  training  the loader alone over what a step of configs/digits.py takes, and
            the share of its training that is spent waiting for data
  needs     clips a second that slices of TPUs train on, and the processor
            threads of this machine that would read them as fast

Of repeated times the least is kept, since other work on the machine only
adds. Megapixels are those of the batch's clips.
"""

import dataclasses
import functools
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from benchmarks import sizes
from configs import digits
from configs import vdit as configs
from vdit_jax import checkpoint, pipeline, sharding
from vdit_jax.cache import dataset
from vdit_jax.cost import chips
from vdit_jax.data import clips, moving_digits, plan, reading
from vdit_jax.data import records as forms
from vdit_jax.data.build import dataset as clips_dataset
from vdit_jax.data.build import jobs
from vdit_jax.media import formats
from vdit_jax.models.vdit import denoiser as vdit
from vdit_jax.text import tokenizer
from vdit_jax.training import feed, journal, learner, loop, optim
from vdit_jax.training import state as states

_PARTS = ("stages", "loader", "training", "needs")

_JSON = flags.DEFINE_string("json", None, "File to write.")
_ONLY = flags.DEFINE_multi_enum("only", _PARTS, _PARTS, "Parts to run.")
_DATA = flags.DEFINE_string(
  "data", None, "Dataset to read; by default some are written."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS folder of --data.")
_SHAPE = flags.DEFINE_list(
  "shape", [], "Frames, height, width of the clips of --data."
)
_FPS = flags.DEFINE_float("fps", 0.0, "Of the clips of --data; 0: their own.")
_WORKERS = flags.DEFINE_list("workers", ["0", "1", "2"], "Of the loader.")
_THREADS = flags.DEFINE_integer("threads", 2, "Of each process.", 1)
_BATCH = flags.DEFINE_integer("batch", 16, "Clips of a batch.", 1)
_SECONDS = flags.DEFINE_float("seconds", 3.0, "That a rate is taken over.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Times it is taken.", 1)
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Of the needs; by default the sizes of configs/vdit.py."
)
_SLICES = flags.DEFINE_list(
  "slices", ["v5e:256", "v5p:512", "v6e:256"], "TPU slices: kind, chips."
)
_UTILISATION = flags.DEFINE_float(
  "utilisation", 0.5, "Share of the peak that training is taken to reach."
)

_STORED, _MP4 = 1_000, 200  # least clips a second through to the device
_AHEAD = 10  # least times as fast as training that the loader is
_WAITING = 0.02  # most of a step
_CLIPS = 256  # of the datasets that are written
_MEASURED = 64  # of them whose stages are timed
_ENDLESS = 10**6  # steps
_LENGTH = 64  # tokens of a caption
_ALL = "all of these"


@dataclasses.dataclass(frozen=True)
class Case:
  """A dataset, the shape (F, H, W) to read it in, least clips a second."""

  name: str
  source: reading.Source
  shape: tuple[int, int, int]
  options: reading.Options
  target: float | None

  @property
  def megapixels(self) -> float:
    """Of a clip."""
    return math.prod(self.shape) / 1e6


def main(argv):
  """Run the parts, print their tables and write their rows."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)
  tfds.disable_progress_bar()
  wanted = _ONLY.value
  if set(wanted) - {"needs"}:
    with tempfile.TemporaryDirectory() as folder:
      rows = _measure(wanted, epath.Path(folder))
  else:
    rows = {}
  if "needs" in wanted:
    rows["needs"] = _needs(rows.get("stages", []))
  for name, found in rows.items():
    print(f"\n{name}\n{_table(found)}")
  if _JSON.value:
    report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    text = json.dumps(report | rows, indent=2)
    epath.Path(_JSON.value).write_text(text + "\n")


def _measure(wanted: list[str], folder: epath.Path) -> dict[str, list]:
  """Run the parts that read data."""
  mesh = sharding.make_mesh(sharding.MeshShape(data=1), jax.devices()[:1])
  rows = {}
  with jax.set_mesh(mesh):
    if {"stages", "loader"} & set(wanted):
      cases = [_given()] if _DATA.value else _written(folder)
      words = _words(cases[0].source, folder)
    if "stages" in wanted:
      rows["stages"] = [r for c in cases for r in _stages(c, words, mesh)]
    if "loader" in wanted:
      rows["loader"] = [r for c in cases for r in _loader(c, words, mesh)]
    if "training" in wanted:
      rows["training"] = _training(folder, mesh)
  return rows


def _given() -> Case:
  """The flags' dataset."""
  source = reading.open_source(_DATA.value, "train", _DATA_DIR.value)
  shape = tuple(map(int, _SHAPE.value)) or (source.shape or ())[:3]
  if len(shape) != 3:
    raise ValueError(
      f"shape must be frames, height, width, as clips of {_DATA.value} are of "
      f"many, got {_SHAPE.value}; try --shape=17,256,256"
    )
  return Case(_DATA.value, source, shape, reading.Options(fps=_FPS.value), None)


def _written(folder: epath.Path) -> list[Case]:
  """Datasets of the same clips of 16x64x64, and of larger mp4s."""
  small = 16, 64, 64
  stored = _digits(folder, "stored", small)
  mp4 = _mp4(folder, "mp4", stored)
  large = _mp4(folder, "large", stored, joined=4, enlarge=4)
  options = reading.Options()
  name = "mp4 of 64x256x256, read as 17x96x96"
  return [
    Case("stored 16x64x64", stored, small, options, _STORED),
    Case("mp4 of 16x64x64", mp4, small, options, _MP4),
    Case(name, large, (17, 96, 96), options, None),
  ]


def _digits(folder, name: str, shape: tuple[int, int, int]) -> reading.Source:
  """Write moving digits as arrays."""
  num_frames, height, width = shape
  config = moving_digits.MovingDigitsConfig(
    name=name,
    num_frames=num_frames,
    height=height,
    width=width,
    digit_size=height // 3,
    speeds=(0.5, 1.0),
    clips={"train": _CLIPS},
  )
  moving_digits.MovingDigits(
    config=config, data_dir=folder, file_format="array_record"
  ).download_and_prepare()
  return reading.open_source(f"moving_digits/{name}", "train", folder)


def _words(source: reading.Source, folder: epath.Path) -> tokenizer.Tokenizer:
  few = range(min(source.num_records, 1_000))
  captions = sorted({r["caption"] for r in reading.records(source, few)})
  return tokenizer.train(captions, folder / "tokenizer.model")


def _mp4(
  folder: epath.Path,
  name: str,
  pixels: reading.Source,
  joined: int = 1,
  enlarge: int = 1,
) -> reading.Source:
  """Write clips of arrays, some of them joined to one, as a dataset of mp4."""
  files, rows = folder / f"{name}_files", []
  records = reading.records(pixels)
  while some := list(itertools.islice(records, joined)):
    file = f"{some[0]['key']}.mp4"
    video = np.concatenate([record["video"] for record in some])
    formats.write(files / file, video, 8.0, enlarge=enlarge)
    row = {"file": file, "caption": some[0]["caption"]}
    rows.append(json.dumps(row) + "\n")
  captions = folder / f"{name}.jsonl"
  captions.write_text("".join(rows))
  spec = jobs.Spec(str(files), str(captions), validation=0.0)
  clips_dataset.build(spec, folder, f"clips/{name}", workers=0)
  return reading.open_source(f"clips/{name}", "train", folder)


def _wanted(words, options, length: int = _LENGTH) -> reading.Wanted:
  words = reading.Words(words, length)
  return reading.Wanted({"text_encoder": words}, options)


def _stages(case: Case, words, mesh) -> list[dict[str, Any]]:
  """Time what happens to clips, one stage after another, in one thread."""
  source, shape, options = case.source, case.shape, case.options
  long = reading.long_enough(source, shape[0], options.fps)
  positions = long[np.arange(_MEASURED) % len(long)]
  read = lambda: [source.data_source[int(p)] for p in positions]
  pairs = list(zip(read(), positions.tolist(), strict=True))
  decode = lambda: [_decode(case, *pair) for pair in pairs]
  decoded, view = decode(), clips.View(shape, options.fps)
  wanted = _wanted(words, options)
  load = lambda: reading.load(source, wanted, positions, shape, None)
  batch, placed = load().batch, sharding.batch_sharding(mesh)
  runs = {
    "read": read,
    "decode": decode,
    "crop and resize": lambda: [clips.arrange(*d, view) for d in decoded],
    "all of a batch": load,
    "to device": lambda: jax.block_until_ready(loop.put(batch, placed)),
  }
  if source.shape and source.shape[:3] == shape:
    del runs["crop and resize"]  # nor does the loader
  seconds = _race(runs)
  whole = seconds.pop("all of a batch")
  device = seconds.pop("to device")
  rest = max(whole - sum(seconds.values()), 1e-9)
  seconds |= {"batch, captions": rest, _ALL: whole}
  return [
    _rate(case, len(positions) / taken, stage=name)
    for name, taken in (seconds | {"to device": device}).items()
  ]


def _decode(case: Case, data: bytes, position: int) -> tuple[np.ndarray, float]:
  """Decode what a clip shows of a record, in the record's own size."""
  source, index = case.source, case.source.index
  example = forms.parse(data)
  record = forms.read(source.form, source.features, example, source.form.arrays)
  (stored,) = record.arrays.values()
  if source.kind != "clips":
    return stored, record.numbers.get("fps", 0.0)
  size = int(index.height[position]), int(index.width[position])
  view = clips.View((case.shape[0], *size), case.options.fps)
  return clips.read(stored, view)


def _race(runs: dict[str, Callable]) -> dict[str, float]:
  """Least seconds of each run, timed in turns after one call of each."""
  seconds = dict.fromkeys(runs, float("inf"))
  for turn in range(_REPEATS.value + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      if turn:
        seconds[name] = min(seconds[name], time.perf_counter() - start)
  return seconds


def _loader(case: Case, words, mesh) -> list[dict[str, Any]]:
  """Time the loader by its workers, alone and through to the device."""
  place = functools.partial(loop.put, sharding=sharding.batch_sharding(mesh))
  rows = []
  for workers in map(int, _WORKERS.value):
    for to, put in (("host", lambda batch: batch), ("device", place)):
      rates = [
        _sustained(_batches(case, words, workers), put)
        for _ in range(_REPEATS.value)
      ]
      how = {"workers": workers, "threads": _THREADS.value, "to": to}
      row = _rate(case, max(rates), **how)
      if case.target and to == "device":
        met = row["clips_per_second"] >= case.target
        row |= {"target": case.target, "met": met}
      rows.append(row)
  return rows


def _batches(case: Case, words, workers: int) -> Iterator:
  """Batches of a case's records, one after another, as training reads them."""
  long = reading.long_enough(case.source, case.shape[0], case.options.fps)
  bucket = plan.Bucket(case.shape, long, _BATCH.value)
  return reading.batches(
    case.source,
    _wanted(words, case.options),
    range(_ENDLESS),
    seed=0,
    planned=functools.partial(plan.batch, plan.Plan(0, (bucket,))),
    workers=workers,
    threads=_THREADS.value,
  )


def _sustained(batches: Iterator, place: Callable) -> float:
  """Clips a second, once what was read ahead is used up."""
  with feed.Feed(batches, place) as fed:
    for _ in range(4 * _THREADS.value):
      next(fed)
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < _SECONDS.value:
      batch, _ = next(fed)
      jax.block_until_ready(batch)
      count += len(batch.weight)
    return count / passed


def _training(folder: epath.Path, mesh) -> list[dict[str, Any]]:
  """Time the loader alone, and in the training of both digits configs."""
  videos = _digits(folder, "train", (9, 32, 32))
  words = _words(videos, folder)
  dataset.build(
    pipeline.RELEASE, videos.name, folder, "latents/train", ["train"]
  )
  latents = reading.open_source("latents/train", "train", folder)
  vae, dit = digits.get_config("vae"), digits.get_config("dit")
  dit.text_encoder.vocab_size = words.vocab_size
  return [
    _time_training("vae, stored clips", vae, videos, None, mesh, folder),
    _time_training(
      "vae, mp4", vae, _mp4(folder, "train", videos), None, mesh, folder
    ),
    _time_training("dit, latents", dit, latents, words, mesh, folder),
  ]


def _time_training(name, config, source, words, mesh, folder) -> dict:
  """Time a config's batches, then its loop, which tells how long it waits."""
  alone = max(
    _sustained(_of_config(config, source, words, _ENDLESS), lambda b: b)
    for _ in range(_REPEATS.value)
  )
  learned = learner.make(config)
  tx, rate = optim.make(optim.Optim(**config.optim))
  state, placed = states.create(learned.init, tx, mesh, config.seed)
  step = learner.make_step(config, learned.loss, tx, rate)
  workdir = folder / name.replace(" ", "_")
  steps = 60 * _REPEATS.value
  loop.run(
    # The first row's rates hold the compilation; the last one's do not.
    loop.Schedule(2 * steps, steps, checkpoint_every=0, hooks={}),
    loop.Program(
      states.jit_step(step, placed), {}, sharding.batch_sharding(mesh)
    ),
    state,
    _of_config(config, source, words, 2 * steps),
    loop.Outputs(
      checkpoint.manager(workdir, 1, None), journal.MetricWriter(workdir)
    ),
  )
  text = (workdir / "metrics.jsonl").read_text()
  rates = json.loads(text.splitlines()[-1])
  ahead, waiting = alone / rates["clips_per_second"], rates["data_wait_share"]
  return {
    "training": name,
    "loader_clips_per_second": alone,
    "training_clips_per_second": rates["clips_per_second"],
    "times_as_fast": ahead,
    "waiting": waiting,
    "target": f"{_AHEAD} times, waiting under {_WAITING:.0%}",
    "met": ahead >= _AHEAD and waiting < _WAITING,
  }


def _of_config(config, source, words, steps: int) -> Iterator:
  shape = source.shape[:3] if source.shape else (9, 32, 32)
  planned = plan.of_one_shape(
    config.seed, source.num_records, config.batch_size, shape
  )
  return reading.batches(
    source,
    _wanted(words, reading.Options(), config.data.max_length),
    range(steps),
    seed=config.seed,
    planned=functools.partial(plan.batch, planned),
    workers=config.data.workers,
    threads=config.data.threads,
  )


def _needs(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Clips a second that slices train on, and the threads that read as many."""
  if _CONFIG.value:
    named = {"of the flags": _CONFIG.value}
  else:
    names = [n for n in vdit.VARIANTS if n != "digits"]
    named = {name: configs.get_config(name) for name in names}
  rows = []
  for name, config in named.items():
    _, flops = sizes.cost(config)
    for text in _SLICES.value:
      chip, number = _slice(text)
      rate = number * chip.peak_flops * _UTILISATION.value / flops
      row = {
        "config": name,
        "clip": "x".join(map(str, _size(config))),
        "slice": text,
        "utilisation": _UTILISATION.value,
        "petaflops_a_clip": flops / 1e15,
        "clips_per_second": rate,
        "clips_per_second_and_chip": rate / number,
        "cached_megabytes_per_second": rate * _latent_bytes(config) / 1e6,
      }
      megapixels = rate * math.prod(_size(config)) / 1e6
      for measured in stages:
        if "mp4" in measured["records"] and measured["stage"] == _ALL:
          threads = megapixels / measured["megapixels_per_second"]
          row[f"threads reading {measured['records']}"] = threads
      rows.append(row)
  return rows


def _size(config) -> tuple[int, int, int]:
  clip = config.sampling
  return clip.num_frames, clip.height, clip.width


def _latent_bytes(config: ml_collections.ConfigDict) -> int:
  """Bytes of a clip's record in a cache, float16."""
  config = config.copy_and_resolve_references()
  config.batch_size = 1
  batch = learner.batch(config, *_size(config))
  arrays = [*batch.moments, *(c.embeds for c in batch.captions.values())]
  return 2 * sum(x.size for x in arrays if x is not None)


def _slice(text: str) -> tuple[chips.Chip, int]:
  """Read "v5e:256": a chip and how many."""
  kinds = {chip.name: chip for chip in chips.CHIPS.values()}
  name, _, number = text.partition(":")
  if name not in kinds or not number.isdigit():
    raise ValueError(
      f"slices must be a kind of {sorted(kinds)} and chips, got {text!r}; try "
      "v5e:256"
    )
  return kinds[name], int(number)


def _rate(case: Case, rate: float, **more) -> dict[str, Any]:
  return {
    "records": case.name,
    **more,
    "clips_per_second": rate,
    "megapixels_per_second": rate * case.megapixels,
  }


def _verdict(rate: float, target: float) -> dict[str, Any]:
  return {"target": target, "met": rate >= target}


def _table(rows: list[dict[str, Any]]) -> str:
  """Write rows as a table in Markdown."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  lines = ["| " + " | ".join(n.replace("_", " ") for n in names) + " |"]
  lines.append("|---" * len(names) + "|")
  for row in rows:
    cells = [_cell(row[name]) if name in row else "" for name in names]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _cell(value: Any) -> str:
  if isinstance(value, bool):
    return "yes" if value else "NO"
  return f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
  app.run(main)
