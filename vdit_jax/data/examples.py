"""One record as a clip, several of them as a share of a batch.

  Source, positions --load--> Loaded(types.Batch, keys, what was wrong)

What is drawn for a record (crop, caption) is a function of its seed alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from vdit_jax import types
from vdit_jax.data import captions as texts
from vdit_jax.data import clips, sources
from vdit_jax.data import records as forms
from vdit_jax.schema import Field
from vdit_jax.text import escapes
from vdit_jax.text import tokenizer as tokenizers

FILL = -1  # position of no record: fills up a batch

FIELDS = {  # of `Options`
  "fps": Field(float, 0, 1e4),
  "crop": Field(str, choices=clips.CROPS),
  "max_unreadable": Field(int, 0, 2 * 10**9),
}

Source = sources.Source
Shape = tuple[int, int, int]


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


@dataclasses.dataclass(frozen=True)
class Words:
  """How a text encoder's captions are read.

  Attributes:
    tokenizer: of the encoder; None reads the captions' embeddings or, where
      there are none, no captions, M = 0.
    max_length: tokens of a caption, M; longer ones are cut.
  """

  tokenizer: tokenizers.Tokenizer | None = None
  max_length: int = 1


@dataclasses.dataclass(frozen=True)
class Wanted:
  """How records become a batch.

  Attributes:
    words: how captions are read, by the text encoder's name; empty reads none.
    options: how records become clips and texts.
    cond: numbers that go into `Batch.cond`: "fps", "size" or scalars that the
      records have; () reads none.
    given: whether `Batch.frames` and `Batch.encoded` are read beside latents.
  """

  words: Mapping[str, Words] = dataclasses.field(default_factory=dict)
  options: Options = Options()
  cond: tuple[str, ...] = ()
  given: bool = False


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


class Clip(NamedTuple):
  """One row of a batch, `text` one of its captions; of an unreadable, key."""

  key: str = ""
  text: str = ""
  captions: Sequence[str] = ()
  arrays: dict[str, Any] = {}
  numbers: dict[str, float] = {}


def load(
  source: Source,
  wanted: Wanted,
  positions: np.ndarray,
  shape: Shape | None,
  seeds: Sequence[np.random.SeedSequence] | None,
) -> Loaded:
  """Read a share of one batch.

  Args:
    source: what to read.
    wanted: how records become a batch.
    positions: of the records, [B]; -1 fills up with weight 0.
    shape: (F, H, W) of the clips; None is the records' own, where all have
      one. Latents have no other.
    seeds: of what is drawn for each record, `plan.record_seed`; None draws
      nothing: first frames, centre, first caption, as evaluation has it.
  """
  shape = check_shape(source, shape)
  names = ("video",) if source.kind != "latents" else source.form.arrays
  full = *shape, source.form.shape[3] if source.kind == "latents" else 3
  dtype = np.float32 if source.kind == "latents" else np.uint8
  size: Any = (len(positions), *full)
  arrays = {n: np.zeros(size, np.dtype(dtype)) for n in names}
  read = [Clip() for _ in positions]
  weight, errors = np.zeros(len(positions), np.float32), []
  for row, position in enumerate(positions.tolist()):
    if position == FILL:
      continue
    rng = None if seeds is None else np.random.default_rng(seeds[row])
    clip, error = read_clip(source, position, shape, rng, wanted.options)
    read[row] = clip
    if error:
      errors.append(error)
      continue
    weight[row] = 1
    for name in names:
      arrays[name][row] = clip.arrays[name]
  captions, cut = {}, 0
  for name, words in wanted.words.items():
    captions[name], lost = _encode(source, name, words, read)
    cut = max(cut, lost)
  batch = types.Batch(
    **_pixels_or_moments(arrays),
    captions=captions,
    weight=weight,
    cond=_cond(read, wanted.cond),
    **(_given(source, read, shape) if wanted.given else {}),
  )
  return Loaded(batch, [clip.key for clip in read], errors, cut)


def read_clip(
  source: Source, position: int, shape: Shape, rng, options: Options
) -> tuple[Clip, str]:
  """Read a record as a clip of a batch: the clip, what is wrong with it."""
  key, record, error = read_record(source, position)
  if error:
    return Clip(key), error
  if options.flip and rng is not None:
    texts.refuse_sides(record.captions, key)
  crop, flip = options.crop, options.flip
  view = clips.draw_view(shape, options.fps, rng, crop, flip)
  try:
    arrays, numbers = _show(source, record, view)
  except forms.UNREADABLE as error:
    return Clip(key), _complaint(key, error)
  said = texts_of(source, record, numbers, options)
  drawn: Any = texts.draw(range(len(said)), rng)
  for name in source.form.encoded:
    arrays = arrays | {name: arrays[name][drawn]}
  return Clip(key, said[drawn], said, arrays, numbers), ""


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


def texts_of(source: Source, record, numbers, options: Options) -> list[str]:
  """Write the texts of a record's captions."""
  said = record.captions
  if not source.form.captions:
    said = [texts.of_label(options.caption_template, said[0])]
  templates = options.number_templates
  return [texts.with_numbers(text, templates, numbers) for text in said]


def _encode(
  source: Source, name: str, words: Words, read: list[Clip]
) -> tuple[types.Captions, int]:
  """Give the batch's texts for an encoder, and how many of them were cut."""
  tokenizer, max_length = words.tokenizer, words.max_length
  feature = forms.embeds_of(name)
  if tokenizer is None and name in source.text_widths:
    embeds = [clip.arrays.get(feature, ()) for clip in read]
    said, cut = _pad(embeds, source.text_widths[name], max_length)
    return said.replace(pooled=_pooled(source, name, read)), cut
  if tokenizer is None:
    shape = len(read), 0
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    return types.Captions(mask=mask, tokens=tokens), 0
  captions = [clip.text for clip in read]
  tokens, mask = tokenizer.encode(captions, max_length)
  full = np.flatnonzero(mask[:, -1])  # only these can have been cut
  cut = sum(bool(tokenizer.cut(captions[row], max_length)) for row in full)
  return types.Captions(mask=mask, tokens=tokens), cut


def _pad(
  written: list[np.ndarray | tuple], width: int, max_length: int
) -> tuple[types.Captions, int]:
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
  return types.Captions(mask=mask, embeds=embeds), cut


def _pooled(source: Source, name: str, read: list[Clip]) -> np.ndarray | None:
  """Give the batch's pooled embeddings [B, E]; zeros where none was read."""
  width = source.form.pooled_widths.get(name)
  if width is None:
    return None
  feature, none = forms.pooled_of(name), np.zeros(width, np.float16)
  return np.stack([clip.arrays.get(feature, none) for clip in read])


def _pixels_or_moments(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  if "video" in arrays:
    return arrays
  return {"video": None, "moments": (arrays["mean"], arrays["logvar"])}


def _given(source: Source, read: list[Clip], shape: Shape) -> dict[str, Any]:
  """Gather given frames and what was encoded of them; zeros of unreadable.

  Args:
    source: of the records.
    read: records of one batch.
    shape: of their latents, (f, h, w).
  """
  found, stride = {}, source.metadata.get("given_stride", 1)
  f, h, w = shape
  several = {  # of latents of several shapes
    forms.GIVEN_FRAMES: (None, h * stride, w * stride, None),
    forms.STILLS: ((f - 1) * source.metadata.get("stills", 1) + 1, h, w, None),
  }
  for name, known in source.form.given.items():
    own: Any = several.get(name, known)
    size: Any = tuple(a or b for a, b in zip(known, own, strict=True))
    dtype: Any = source.features[name].np_dtype
    none = np.zeros(size, dtype)
    found[name] = np.stack([clip.arrays.get(name, none) for clip in read])
  frames = found.pop(forms.GIVEN_FRAMES, None)
  return {
    "frames": frames,
    "encoded": {forms.network_of(name): x for name, x in found.items()},
  }


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


def read_record(
  source: Source, position: int
) -> tuple[str, forms.Record | None, str]:
  """Read a record: its key, itself, and what is wrong with it."""
  key = f"{source.split}[{position}]"
  try:
    example = forms.parse(source.data_source[position])
    key = forms.read_key(example, key)
    form = source.form
    names = *form.arrays, *form.encoded, *form.given
    return key, forms.read(source.form, source.features, example, names), ""
  except forms.UNREADABLE as error:
    return key, None, _complaint(key, error)


def _complaint(key: str, error: Exception) -> str:
  said = escapes.escape(f"{type(error).__name__}: {error}")
  return f"{escapes.escape(key)}: {said}"


def check_shape(source: Source, shape: Shape | None) -> Shape:
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
  found: Any = shape or own
  return tuple(found)
