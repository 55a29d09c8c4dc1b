"""Reads batches from TFDS datasets of array_record files.

  TFDS records --(shape, positions) of a step--> types.Batch, keys

What records there can be is told in `records`. Which of them make up a step's
batch, and in which shape, is a pure function of (seed, step); what is drawn
for one of them (crop, caption) is one of (seed, step, place in the batch):
starting at a step continues an earlier run exactly, on any number of hosts,
workers and threads.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
import tqdm
from absl import logging

from vdit_jax import types
from vdit_jax.data import captions as texts
from vdit_jax.data import clips, plan, sources
from vdit_jax.data import records as forms

_FILL = -1  # position of no record: fills up a batch
_LOOKED_AT = 256  # records whose captions are looked at before a flip
_CUT_SECONDS = 600  # between two words about captions that were cut

# A dataset is opened where it is read.
Source = sources.Source
open_source = sources.open_source

Shape = tuple[int, int, int]
Batches = Iterator[tuple[types.Batch, list[str]]]


@dataclasses.dataclass(frozen=True)
class Options:
  """How records become clips and captions.

  Attributes:
    fps: frames a second of every clip; 0 takes frames as they are stored.
    crop: of training clips, one of `clips.CROPS`.
    flip: mirror every second training clip; refused where a caption tells
      left from right.
    caption_template: caption of a clip that has only a class `{label}`, or
      nothing.
    number_templates: texts that are appended to captions, of numbers that are
      known of a clip ("fps", "height", "width", the record's scalars):
      "motion score: {motion_score:.1f}.".
    max_unreadable: records of one run that may be unreadable before the data
      counts as broken.
  """

  fps: float = 0.0
  crop: str = "random"
  flip: bool = False
  caption_template: str = "a video of {label}"
  number_templates: tuple[str, ...] = ()
  max_unreadable: int = 100

  def __post_init__(self):
    if self.crop not in clips.CROPS:
      raise ValueError(f"crop must be one of {clips.CROPS}, got {self.crop!r}")
    if not (np.isfinite(self.fps) and self.fps >= 0):
      raise ValueError(
        f"fps must be a rate, or 0 for each clip's own, got {self.fps}; try 8"
      )
    if isinstance(self.number_templates, str):
      raise ValueError(
        "number_templates must be a tuple of texts, got "
        f"{self.number_templates!r}; write ({self.number_templates!r},)"
      )


class Loaded(NamedTuple):
  """A share of a batch, as it was read.

  Attributes:
    batch: of numpy arrays.
    keys: of its records; "" of what fills it up.
    errors: what was wrong with records that have weight 0.
    cut: how many captions lost their end.
  """

  batch: types.Batch
  keys: list[str]
  errors: list[str]
  cut: int


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


class Clip(NamedTuple):
  """One row of a batch, `text` one of its captions; of an unreadable, key."""

  key: str = ""
  text: str = ""
  captions: Sequence[str] = ()
  arrays: dict[str, Any] = {}
  numbers: dict[str, float] = {}


def load(
  source: Source,
  tokenizer,
  positions: np.ndarray,
  shape: Shape | None,
  seeds: Sequence[np.random.SeedSequence] | None,
  max_length: int,
  options: Options | None = None,
  cond: tuple[str, ...] = (),
) -> Loaded:
  """Read a share of one batch.

  Args:
    source: what to read.
    tokenizer: see `batches`.
    positions: of the records, [B]; -1 fills up with weight 0.
    shape: (F, H, W) of the clips; None is the records' own, where all have
      one. Latents have no other.
    seeds: of what is drawn for each record, `plan.record_seed`; None draws
      nothing: first frames, centre, first caption, as evaluation has it.
    max_length: see `batches`.
    options, cond: see `batches`.
  """
  options = options or Options()
  shape = _check_shape(source, shape)
  names = ("video",) if source.kind != "latents" else source.form.arrays
  full = *shape, source.form.shape[3] if source.kind == "latents" else 3
  dtype = np.float32 if source.kind == "latents" else np.uint8
  arrays = {n: np.zeros((len(positions), *full), dtype) for n in names}  # pyright: ignore[reportCallIssue]
  read = [Clip() for _ in positions]
  weight, errors = np.zeros(len(positions), np.float32), []
  for row, position in enumerate(positions.tolist()):
    if position == _FILL:
      continue
    rng = None if seeds is None else np.random.default_rng(seeds[row])
    clip, error = read_clip(source, position, shape, rng, options)
    read[row] = clip
    if error:
      errors.append(error)
      continue
    weight[row] = 1
    for name in names:
      arrays[name][row] = clip.arrays[name]
  written, cut = _encode(source, tokenizer, read, max_length)
  batch = types.Batch(
    **_pixels_or_moments(arrays),
    **written,
    weight=weight,
    cond=_cond(read, cond),
  )
  return Loaded(batch, [clip.key for clip in read], errors, cut)


def batches(
  source: Source,
  tokenizer,
  *,
  seed: int,
  start_step: int,
  num_steps: int,
  max_length: int,
  batch_size: int | None = None,
  planned: Callable[[int], tuple[Shape | None, np.ndarray]] | None = None,
  options: Options | None = None,
  cond: tuple[str, ...] = (),
  tally: Tally | None = None,
  host: int = 0,
  num_hosts: int = 1,
  workers: int = 0,
  threads: int = 4,
) -> Batches:
  """Yield this host's share of the batch of every step, in order.

  A record that can't be read keeps its place with weight 0 and is logged.

  Args:
    source: what to read.
    tokenizer: `tokenizer.Tokenizer`; None reads the captions' embeddings
      or, where there are none, no captions, M = 0.
    seed: of the order of records, and of what is drawn for each.
    start_step: first step, as if all before it had been read.
    num_steps: steps to yield.
    max_length: tokens of a caption, M; longer ones are cut.
    batch_size: of the global batch, over all hosts, of all records in their
      own shape; None if `planned` says.
    planned: step -> the shape of its clips, and the positions of its records
      [global batch]; None is `plan.batch_indices`.
    options: how records become clips and captions; None is as `Options`.
    cond: numbers that go into `Batch.cond`: "fps", "size" or scalars that the
      records have; () reads none.
    tally: counts what was read, for whoever asks it; None counts alone.
    host, num_hosts: whose share to read.
    workers: processes that read; 0 reads in threads of this process. They
      need absl's flags to be parsed.
    threads: batches that are read at once.

  Returns:
    Pairs of a `types.Batch` of numpy arrays and its records' keys.
  """
  options = options or Options()
  check_options(source, options, cond)

  def one_shape(step: int):
    positions = plan.batch_indices(seed, step, source.num_records, batch_size)
    return None, positions

  planned = planned or one_shape
  shape, positions = planned(start_step)  # refuses sizes before reading
  plan.host_slice(positions, host, num_hosts)
  _check_shape(source, shape)

  def load_step(step: int) -> Loaded:
    shape, positions = planned(step)
    share = plan.host_slice(positions, host, num_hosts)
    places = range(host * len(share), (host + 1) * len(share))
    seeds = [plan.record_seed(seed, step, place) for place in places]
    return load(
      source, tokenizer, share, shape, seeds, max_length, options, cond
    )

  steps = grain.MapDataset.range(start_step, start_step + num_steps)
  reading = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=2 * threads
  )
  loaded = steps.map(load_step).to_iter_dataset(reading)
  if workers:
    loaded = loaded.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers)
    )
  return _counted(source, loaded, options, tally or Tally())


def evaluation_batches(
  source: Source,
  tokenizer,
  batch_size: int,
  max_length: int,
  shape: Shape | None = None,
  options: Options | None = None,
  cond: tuple[str, ...] = (),
) -> Batches:
  """Yield every record once, in order; the last batch is filled up.

  Clips show their first frames' centre, and their first caption. Those that
  are shorter than `shape` are left out.

  Args:
    source: what to read.
    tokenizer: see `batches`.
    batch_size: of every batch; what fills up has weight 0 and key "".
    max_length: see `batches`.
    shape: (F, H, W); None is the records' own, where all have one.
    options, cond: see `batches`.

  Returns:
    Pairs of a `types.Batch` of numpy arrays and its records' keys.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}")
  options = options or Options()
  check_options(source, options, cond)
  kept = _fitting(source, _check_shape(source, shape), options.fps)
  fill = np.full(-len(kept) % batch_size, _FILL)
  rows = np.concatenate([kept, fill]).reshape(-1, batch_size)
  loaded = (
    load(source, tokenizer, row, shape, None, max_length, options, cond)
    for row in rows
  )
  return _counted(source, loaded, options, Tally())


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
    key, record, error = _read(source, position)
    if error:
      logging.warning("%s: unreadable %s", description, error)
      continue
    said = _texts(source, record, record.numbers, options)
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
    options, cond: see `batches`.
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
    key, record, _ = _read(source, position)
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
        batch.mask.shape[1],
      )
    yield batch, keys


def read_clip(
  source: Source, position: int, shape: Shape, rng, options: Options
) -> tuple[Clip, str]:
  """Read a record as a clip of a batch: the clip, what is wrong with it."""
  key, record, error = _read(source, position)
  if error:
    return Clip(key), error
  if options.flip and rng is not None:
    texts.refuse_sides(record.captions, key)
  crop, flip = options.crop, options.flip
  view = clips.draw_view(shape, options.fps, rng, crop, flip)
  try:
    arrays, numbers = _show(source, record, view)
  except forms.UNREADABLE as error:
    return Clip(key), _said(key, error)
  said = _texts(source, record, numbers, options)
  drawn = texts.draw(range(len(said)), rng)
  if "embeds" in arrays:
    arrays = arrays | {"embeds": arrays["embeds"][drawn]}
  return Clip(key, said[drawn], said, arrays, numbers), ""  # pyright: ignore[reportCallIssue]


def _show(source: Source, record: forms.Record, view: clips.View):
  """Give the batch's arrays of a record, and the numbers known of them."""
  if source.kind == "latents":
    return record.arrays, record.numbers
  (stored,) = record.arrays.values()
  fps = record.numbers.get("fps", 0.0)
  if source.kind == "clips":
    video, fps = clips.read(stored, view)
  elif source.kind == "frames" or not _is_whole(view, stored, fps):
    video, fps = clips.arrange(stored, fps, view)
  else:
    video = stored[:, :, ::-1] if view.mirrored else stored
  shown = {"fps": fps or np.nan, "height": video.shape[1]}
  return {"video": video}, record.numbers | shown | {"width": video.shape[2]}


def _is_whole(view: clips.View, stored: np.ndarray, fps: float) -> bool:
  """Whether a view of a clip is all of it, pixel by pixel."""
  resampled = view.fps and fps and view.fps != fps
  return view.shape == stored.shape[:3] and not resampled


def _texts(source: Source, record, numbers, options: Options) -> list[str]:
  """Write the texts of a record's captions."""
  said = record.captions
  if not source.form.captions:
    said = [texts.of_label(options.caption_template, said[0])]
  templates = options.number_templates
  return [texts.with_numbers(text, templates, numbers) for text in said]


def _encode(
  source: Source, tokenizer, read: list[Clip], max_length: int
) -> tuple[dict[str, Any], int]:
  """Give the batch's fields of its texts, and how many of them were cut."""
  if tokenizer is None and source.text_width is not None:
    embeds = [clip.arrays.get("embeds", ()) for clip in read]
    return _pad(embeds, source.text_width, max_length)
  if tokenizer is None:
    shape = len(read), 0
    return {
      "tokens": np.zeros(shape, np.int32),
      "mask": np.zeros(shape, bool),
    }, 0
  captions = [clip.text for clip in read]
  tokens, mask = tokenizer.encode(captions, max_length)
  full = np.flatnonzero(mask[:, -1])  # only these can have been cut
  cut = sum(bool(tokenizer.cut(captions[row], max_length)) for row in full)
  return {"tokens": tokens, "mask": mask}, cut


def _pad(
  written: list[np.ndarray | tuple], width: int, max_length: int
) -> tuple[dict[str, Any], int]:
  """Join embeddings [n, E], cut or padded with zeros; () stands for none."""
  embeds = np.zeros((len(written), max_length, width), np.float16)
  mask = np.zeros(embeds.shape[:2], bool)
  cut = 0
  for row, text in enumerate(written):
    length = min(len(text), max_length)
    if length < len(text):
      cut += 1
      logging.log_first_n(
        logging.WARNING,
        "embeddings of %d tokens are cut to data.max_length=%d, the end token "
        "among them; others will be too, and are not logged",
        1,
        len(text),
        max_length,
      )
    if length:
      embeds[row, :length], mask[row, :length] = text[:length], True
  return {"tokens": None, "embeds": embeds, "mask": mask}, cut


def _pixels_or_moments(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  if "video" in arrays:
    return arrays
  return {"video": None, "moments": (arrays["mean"], arrays["logvar"])}


def _cond(read: list[Clip], names: tuple[str, ...]) -> types.Cond | None:
  """Gather the numbers that go to the denoiser; NaN where not known."""
  if not names:
    return None

  def columns(*names: str) -> np.ndarray:
    rows = [[clip.numbers.get(n, np.nan) for n in names] for clip in read]
    return np.array(rows, np.float32).reshape(len(read), len(names))

  scores = [name for name in names if name not in ("fps", "size")]
  return types.Cond(
    fps=columns("fps")[:, 0] if "fps" in names else None,
    size=columns("height", "width") if "size" in names else None,
    scores=columns(*scores) if scores else None,
  )


def _read(
  source: Source, position: int
) -> tuple[str, forms.Record | None, str]:
  """Read a record: its key, itself, and what is wrong with it."""
  key = f"{source.split}[{position}]"
  try:
    example = forms.parse(source.data_source[position])
    key = forms.read_key(example, key)
    names = source.form.arrays
    if source.text_width is not None:
      names = (*names, "embeds")
    return key, forms.read(source.form, source.features, example, names), ""
  except forms.UNREADABLE as error:
    return key, None, _said(key, error)


def _said(key: str, error: Exception) -> str:
  return f"{key}: {type(error).__name__}: {error}"


def _check_shape(source: Source, shape: Shape | None) -> Shape:
  """Give the shape in which to read; refuse one that cannot be."""
  own = source.shape and source.shape[:3]
  if shape is None and own is None:
    raise ValueError(
      f"shape must be given, (frames, height, width): {source.name} has clips "
      "of many"
    )
  if shape is not None and (len(shape) != 3 or min(shape) < 1):
    raise ValueError(f"shape must be (frames, height, width), got {shape}")
  fixed = own if source.kind == "latents" else None
  if fixed and shape is not None and tuple(shape) != own:
    raise ValueError(f"shape must be that of the latents, {own}, got {shape}")
  return tuple(shape or own)  # pyright: ignore[reportReturnType]
