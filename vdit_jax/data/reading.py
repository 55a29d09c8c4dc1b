"""Reads batches from TFDS datasets of array_record files.

  TFDS records --(shape, positions) of a step--> types.Batch, keys

What records there can be is told in `records`. Which of them make up a step's
batch, and in which shape, is a pure function of (seed, step); what is drawn
for one of them (crop, caption) is one of (seed, step, place in the batch):
starting at a step continues an earlier run exactly, on any number of hosts,
workers and threads.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import numpy as np
import tqdm
from absl import logging

from vdit_jax import types
from vdit_jax.data import captions as texts
from vdit_jax.data import clips, examples, plan, sources

_LOOKED_AT = 256  # records whose captions are looked at before a flip
_CUT_SECONDS = 600  # between two words about captions that were cut

# A dataset is opened where it is read, and its records are of `examples`.
Source = sources.Source
open_source = sources.open_source
Clip = examples.Clip
Loaded = examples.Loaded
Options = examples.Options
Wanted = examples.Wanted
Words = examples.Words
check_shape = examples.check_shape
load = examples.load
read_clip = examples.read_clip

Shape = tuple[int, int, int]
Batches = Iterator[tuple[types.Batch, list[str]]]


@dataclasses.dataclass
class Tally:
  """Counts, since the run began, what a process read.

  Attributes:
    clips: that could be read.
    unreadable: records that could not.
    cut: captions that lost their end.
  """

  clips: int = 0
  unreadable: int = 0
  cut: int = 0

  def add(self, clips: int, unreadable: int, cut: int) -> None:
    """Count a share of a batch."""
    self.clips += clips
    self.unreadable += unreadable
    self.cut += cut

  def metrics(self) -> dict[str, float]:
    """Give the counts as a run's metrics."""
    return {
      "unreadable_records": float(self.unreadable),
      "captions_cut_share": self.cut / max(self.clips, 1),
    }


def batches(
  source: Source,
  wanted: Wanted,
  steps: range,
  *,
  seed: int,
  batch_size: int | None = None,
  planned: Callable[[int], tuple[Shape | None, np.ndarray]] | None = None,
  share: tuple[int, int] = (0, 1),
  workers: int = 0,
  threads: int = 4,
  tally: Tally | None = None,
) -> Batches:
  """Yield this host's share of the batch of every step, in order.

  A record that can't be read keeps its place with weight 0 and is logged.

  Args:
    source: what to read.
    wanted: how records become a batch.
    steps: to yield, as if all before them had been read.
    seed: of the order of records, and of what is drawn for each.
    batch_size: of the global batch, over all hosts, of all records in their
      own shape; None if `planned` says.
    planned: step -> the shape of its clips, and the positions of its records
      [global batch]; None is `plan.batch_indices`.
    share: which host this is, of how many.
    workers: processes that read; 0 reads in threads of this process. They
      need absl's flags to be parsed.
    threads: batches that are read at once.
    tally: counts what was read, for whoever asks it; None counts alone.

  Returns:
    Pairs of a `types.Batch` of numpy arrays and its records' keys.
  """
  check_options(source, wanted.options, wanted.cond)
  if planned is None:
    planned = functools.partial(_one_shape, source, seed, batch_size)
  shape, positions = planned(steps.start)  # refuses sizes before reading
  plan.host_slice(positions, *share)
  check_shape(source, shape)

  def load_step(step: int) -> Loaded:
    shape, positions = planned(step)
    mine = plan.host_slice(positions, *share)
    places = range(share[0] * len(mine), (share[0] + 1) * len(mine))
    seeds = [plan.record_seed(seed, step, place) for place in places]
    return load(source, wanted, mine, shape, seeds)

  ahead = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=2 * threads
  )
  every = grain.MapDataset.range(steps.start, steps.stop)
  loaded = every.map(load_step).to_iter_dataset(ahead)
  if workers:
    loaded = loaded.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers)
    )
  return _counted(source, loaded, wanted.options, tally or Tally())


def _one_shape(source: Source, seed: int, batch_size: int, step: int):
  """Plan a step whose records have their own shape."""
  positions = plan.batch_indices(seed, step, source.num_records, batch_size)
  return None, positions


def evaluation_batches(
  source: Source, wanted: Wanted, batch_size: int, shape: Shape | None = None
) -> Batches:
  """Yield every record once, in order; the last batch is filled up.

  Clips show their first frames' centre, and their first caption. Those that
  are shorter than `shape` are left out.

  Args:
    source: what to read.
    wanted: how records become a batch.
    batch_size: of every batch; what fills up has weight 0 and key "".
    shape: (F, H, W); None is the records' own, where all have one.

  Returns:
    Pairs of a `types.Batch` of numpy arrays and its records' keys.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}")
  check_options(source, wanted.options, wanted.cond)
  kept = _fitting(source, check_shape(source, shape), wanted.options.fps)
  fill = np.full(-len(kept) % batch_size, examples.FILL)
  rows = np.concatenate([kept, fill]).reshape(-1, batch_size)
  loaded = (load(source, wanted, row, shape, None) for row in rows)
  return _counted(source, loaded, wanted.options, Tally())


def _fitting(source: Source, shape: Shape, fps: float) -> np.ndarray:
  """Find the records that can be shown in a shape: positions [n]."""
  if source.kind != "latents" or source.form.uniform:
    return long_enough(source, shape[0], fps)
  own = source.index.num_frames, source.index.height, source.index.width
  kept = np.flatnonzero((np.stack(own, 1) == shape).all(1))
  if not len(kept):
    raise ValueError(f"shape={shape} is that of no record of {source.name}")
  return kept


def long_enough(source: Source, num_frames: int, fps: float) -> np.ndarray:
  """Find the records of at least so many frames at a rate: positions [n].

  Raises:
    ValueError: if there is none.
  """
  index = source.index
  frames = clips.available(index.num_frames, index.fps, fps)
  kept = np.flatnonzero(frames >= num_frames)
  if not len(kept):
    raise ValueError(
      f"num_frames={num_frames} at fps={fps:g} is more than any record of "
      f"{source.name}/{source.split} has, {frames.max(initial=0)} at most; ask "
      "for fewer"
    )
  return kept


def records(
  source: Source,
  positions: range | None = None,
  options: Options | None = None,
) -> Iterator[dict[str, Any]]:
  """Yield the readable records, in order, as they are stored.

  Each has its key, the texts of its captions ("captions", and the first one
  as "caption"), and its arrays by their features' names: numpy arrays; of
  clips "mp4", bytes; of encoded frames a list of bytes.

  Args:
    source: what to read.
    positions: of the records; None are all.
    options: of the texts; None is as `Options`.
  """
  options = options or Options()
  description = f"{source.name}/{source.split}"
  if positions is None:
    positions = range(source.num_records)
  else:
    description += f" {positions.start}.. of {source.num_records}"
  for position in tqdm.tqdm(positions, desc=description):
    key, record, error = examples.read_record(source, position)
    if error:
      logging.warning("%s: unreadable %s", description, error)
      continue
    said = examples.texts_of(source, record, record.numbers, options)
    yield {
      "key": key,
      "caption": said[0],
      "captions": said,
      **record.arrays,
    }


def check_options(
  source: Source, options: Options, cond: tuple[str, ...] = ()
) -> None:
  """Refuse what does not go with a dataset, before anything is read.

  Args:
    source: of the records.
    options: of the records.
    cond: names of numbers, as of `Wanted`.
  """
  form, name = source.form, source.name
  template = options.caption_template
  wanted = ["label"] if form.label else []
  if not form.captions and texts.fields(template) != wanted:
    held = "a class label" if form.label else "neither captions nor labels"
    text = "a video of {label}" if form.label else "a short video"
    raise ValueError(
      f"caption_template is {template!r}, but {name} has {held}; try {text!r}"
    )
  known = {"fps", "height", "width", *form.numbers}
  named = {n for t in options.number_templates for n in texts.fields(t)}
  named |= set(cond) - {"size"}
  if source.kind == "latents":
    known = set(form.numbers)
    named |= {"height", "width"} if "size" in cond else set()
    if options.fps or options.flip:
      raise ValueError(
        f"{name} holds latents, whose frames are as they are; set fps=0 and "
        "flip=False, and cache latents of such clips"
      )
  if missing := sorted(named - known):
    raise ValueError(
      f"number_templates and cond name {missing}, which records of {name} do "
      f"not have; they have {sorted(known)}"
    )


def check_sides(source: Source) -> None:
  """Look in some records for captions that a flip makes false.

  All are looked at when they are read; this says so before training.

  Raises:
    ValueError: names the first such caption.
  """
  step = -(-source.num_records // _LOOKED_AT)
  for position in range(0, source.num_records, step):
    key, record, _ = examples.read_record(source, position)
    if record:
      texts.refuse_sides(record.captions, key)


def _counted(
  source: Source, loaded: Iterable[Loaded], options: Options, tally: Tally
) -> Batches:
  """Give out batches; log and count what was wrong with them."""
  name, limit = f"{source.name}/{source.split}", options.max_unreadable
  said = -np.inf  # when captions that were cut were last spoken of
  for batch, keys, errors, cut in loaded:
    for error in errors:
      logging.warning("%s: unreadable %s", name, error)
    tally.add(int(np.count_nonzero(batch.weight)), len(errors), cut)
    if tally.unreadable > limit:
      raise RuntimeError(
        f"{name} has more than {limit} unreadable records, the last one "
        f"{errors[-1]}; build it again, or allow more by max_unreadable"
      )
    if cut and time.monotonic() - said > _CUT_SECONDS:
      said = time.monotonic()
      logging.warning(
        "%s: %d of %d captions lost their end to data.max_length=%d",
        name,
        tally.cut,
        tally.clips,
        max(c.mask.shape[1] for c in batch.captions.values()),
      )
    yield batch, keys
