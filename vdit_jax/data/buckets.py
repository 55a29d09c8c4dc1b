"""Buckets: in which shape each record is read, and how many make a batch.

  index.Index, Options, tokens of a shape --make--> plan.Plan, Report

A batch holds clips of one shape, as many as `max_tokens` lets it, so every
step costs about the same and each shape is compiled once. An image is a clip
of one frame. A record goes to the longest shape that its duration covers; of
these to the one whose aspect is nearest, and of those that are about as near
to the largest. All of it is settled before training, from the index alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from vdit_jax.data import clips, plan
from vdit_jax.data import index as indices
from vdit_jax.schema import Field
from vdit_jax.text import escapes

Shape = tuple[int, int, int]  # (num_frames, height, width) in pixels

LEAST_FILL = 0.85  # of max_tokens, by the tokens of a step

# What is done about a bucket that has fewer records than a batch.
SMALL = ("error", "drop", "move")

# Numbers of a record that is in no bucket, and why it is not.
_SHORT, _TINY, _FEW = -1, -2, -3
_REASONS = {
  _SHORT: "shorter than every shape, at the clips' fps",
  _TINY: "smaller than every shape that it is long enough for",
  _FEW: "of a bucket that has fewer records than a batch",
}

_SIDE = 2**16
_SIZES = Field(list, 0, 1000, each=Field(int, 1, _SIDE))
FIELDS = {  # of `Options`
  "max_tokens": Field(int, 0, 10**12),
  "shapes": Field(list, 0, 1000, each=Field(list, 3, 3, each=_SIZES.each)),
  "frames": _SIZES,
  "areas": Field(list, 0, 1000, each=Field(int, 1, 10**9)),
  "aspects": Field(list, 0, 1000, each=Field(float, 1e-3, 1e3)),
  "enlarge": Field(float, 0, 1e3),
  "small": Field(str, choices=SMALL),
  "multiple_of": Field(int, 0, 10**7),
}

_NEAR = math.log(1.05)  # aspects that differ by less are alike
_ROWS = 2**16  # records that are looked at at once
_NAMED = 3  # keys that a report gives of the records that are dropped


@dataclasses.dataclass(frozen=True)
class Options:
  """How records are put into buckets.

  Attributes:
    max_tokens: of a step, over all devices: the most, and in no bucket under
      85 % of it; 0 has no buckets but `batch_size` clips of one shape.
    shapes: (num_frames, height, width) of each bucket; () makes them of each
      of `frames`, `areas` and `aspects`.
    frames: of a clip; 1 is an image.
    areas: pixels of a frame.
    aspects: width over height.
    enlarge: how much a record may be enlarged to fill its shape; 1 is not.
    small: what is done about a bucket that has fewer records than a batch:
      "error", "drop" them, or "move" them to the next best bucket.
    multiple_of: clips by which batches differ; a multiple of mesh.data x
      mesh.fsdp, which 0 takes (times `accumulate`) when a run begins.
  """

  max_tokens: int = 0
  shapes: tuple[Shape, ...] = ()
  frames: tuple[int, ...] = ()
  areas: tuple[int, ...] = ()
  aspects: tuple[float, ...] = (9 / 16, 3 / 4, 1.0, 4 / 3, 16 / 9)
  enlarge: float = 1.0
  small: str = "error"
  multiple_of: int = 0

  def __post_init__(self):
    if self.small not in SMALL:
      raise ValueError(
        f"buckets.small must be one of {SMALL}, got {self.small!r}"
      )
    for name in ("max_tokens", "multiple_of", "enlarge"):
      if getattr(self, name) < 0:
        raise ValueError(
          f"buckets.{name} must be at least 0, got {getattr(self, name)}"
        )
    if not self.max_tokens:
      return
    made = bool(self.frames) + bool(self.areas)
    if bool(self.shapes) == (made == 2) or made == 1:
      raise ValueError(
        "buckets.max_tokens needs either buckets.shapes or both "
        f"buckets.frames and buckets.areas, got shapes={self.shapes}, "
        f"frames={self.frames}, areas={self.areas}; give "
        "shapes=((1,256,256),(17,256,256)), or frames=(1,17) and areas=(65536,)"
      )


@dataclasses.dataclass(frozen=True)
class Row:
  """What a report says of one shape.

  Attributes:
    shape: (num_frames, height, width).
    tokens: of a clip.
    batch_size: clips of a batch.
    fill: tokens of a batch over max_tokens.
    records: that it has.
    images: how many of them are images.
    used: whether it is a bucket; else it has fewer records than a batch.
  """

  shape: Shape
  tokens: int
  batch_size: int
  fill: float
  records: int
  images: int
  used: bool


@dataclasses.dataclass(frozen=True)
class Report:
  """Where the records went.

  Attributes:
    max_tokens: of a step.
    rows: of the shapes, those that are no buckets too.
    dropped: (reason, records, keys of some of them).
  """

  max_tokens: int
  rows: tuple[Row, ...]
  dropped: tuple[tuple[str, int, tuple[str, ...]], ...]

  def __str__(self) -> str:
    """Write it in Markdown."""
    lines = [
      "| bucket | tokens a clip | clips a batch | of max_tokens "
      f"{self.max_tokens:,} | records | images among them | batches an epoch |",
      "|---|---|---|---|---|---|---|",
    ]
    for row in self.rows:
      batches = f"{row.records / row.batch_size:.1f}"
      lines.append(
        f"| {name(row.shape)} | {row.tokens:,} | {row.batch_size:,} | "
        f"{row.fill:.1%} | {row.records:,} | {row.images:,} | "
        f"{batches if row.used else 'not used'} |"
      )
    lines.append(f"dropped: {sum(n for _, n, _ in self.dropped):,} records")
    for reason, number, keys in self.dropped:
      more = ", ..." if number > len(keys) else ""
      named = ", ".join(map(escapes.escape, keys))
      lines.append(f"  {number:,} {reason}: {named}{more}")
    return "\n".join(lines)


def name(shape: Shape) -> str:
  """Name a shape: 17x256x256."""
  return "x".join(map(str, shape))


def make(
  index: indices.Index,
  options: Options,
  tokens: Callable[..., int],
  *,
  seed: int,
  fps: float,
  unit: tuple[int, int],
  multiple_of: int,
) -> tuple[plan.Plan, Report]:
  """Put the records into buckets.

  Args:
    index: of the records.
    options: of the buckets.
    tokens: (num_frames, height, width) -> tokens of a clip; refuses a shape
      that the networks do not take.
    seed: of the run.
    fps: that clips are read at; 0 is each record's own.
    unit: pixels by which height and width may differ.
    multiple_of: clips by which batches may differ.

  Returns:
    The plan, and the report.

  Raises:
    ValueError: no batch of a shape fits max_tokens, or none fills enough of
      it; a bucket has fewer records than a batch and may not; none is left.
  """
  shapes = make_shapes(options, unit)
  counts = [tokens(*shape) for shape in shapes]
  sizes = _batch_sizes(shapes, counts, options.max_tokens, multiple_of)
  numbers, used = _settle(index, shapes, sizes, fps, options)
  sized = list(zip(shapes, counts, sizes, strict=True))
  return _plan(index, numbers, used, sized, options.max_tokens, seed)


def make_one(
  index: indices.Index,
  shape: Shape,
  batch_size: int,
  tokens: int,
  *,
  seed: int,
  fps: float,
) -> tuple[plan.Plan, Report]:
  """Read all records in one shape, however small, that are long enough.

  Args:
    index: of the records.
    shape: (num_frames, height, width).
    batch_size: of the global batch; may be more than there are records.
    tokens: of a clip.
    seed: of the run.
    fps: that clips are read at; 0 is each record's own.

  Returns:
    The plan, and the report.

  Raises:
    ValueError: no record is long enough.
  """
  numbers = assign(index, [shape], fps, math.inf)
  used = [0] if np.any(numbers == 0) else []
  sized = [(shape, tokens, batch_size)]
  return _plan(index, numbers, used, sized, tokens * batch_size, seed)


def _plan(
  index: indices.Index,
  numbers: np.ndarray,
  used: list[int],
  sized: list[tuple[Shape, int, int]],
  max_tokens: int,
  seed: int,
) -> tuple[plan.Plan, Report]:
  """Write down the numbers of the records, of (shape, tokens, batch size)."""
  rows, found = [], []
  for i, (shape, tokens, batch_size) in enumerate(sized):
    records = np.flatnonzero(numbers == i)
    if i in used:
      found.append(plan.Bucket(shape, records, batch_size))
    row = Row(
      shape=shape,
      tokens=tokens,
      batch_size=batch_size,
      fill=batch_size * tokens / max_tokens,
      records=len(records),
      images=int(np.sum(index.num_frames[records] == 1)),
      used=i in used,
    )
    rows.append(row)
  few = (numbers >= 0) & ~np.isin(numbers, used)
  dropped = _dropped(index, np.where(few, _FEW, numbers))
  report = Report(max_tokens, tuple(rows), dropped)
  if not found:
    raise ValueError(
      f"no bucket has any of the {len(index)} records; give shapes that are "
      f"shorter or smaller, or allow more by buckets.enlarge\n{report}"
    )
  return plan.Plan(seed, tuple(found)), report


def make_shapes(options: Options, unit: tuple[int, int]) -> list[Shape]:
  """List the options' shapes; made ones keep about their area and aspect.

  Args:
    options: of the buckets.
    unit: pixels by which height and width may differ.
  """
  if options.shapes:
    return list(dict.fromkeys(tuple(shape) for shape in options.shapes))  # pyright: ignore[reportReturnType]
  sizes = []
  for area in options.areas:
    for aspect in options.aspects:
      sides = math.sqrt(area / aspect), math.sqrt(area * aspect)
      pairs = zip(sides, unit, strict=True)
      sizes.append(tuple(max(round(x / u), 1) * u for x, u in pairs))
  return list(
    dict.fromkeys((F, *size) for F in options.frames for size in sizes)
  )


def assign(
  index: indices.Index,
  shapes: Sequence[Shape],
  fps: float,
  enlarge: float = 1.0,
) -> np.ndarray:
  """Choose a shape for each record.

  Args:
    index: of the records.
    shapes: to choose from.
    fps: that clips are read at; 0 is each record's own.
    enlarge: see `Options`.

  Returns:
    Numbers of shapes, int64 [R]; of a record that none fits, a negative one.
  """
  numbers = np.full(len(index), _SHORT)
  for start in range(0, len(index) if shapes else 0, _ROWS):
    some = slice(start, start + _ROWS)
    numbers[some] = _assign(index.take(some), shapes, fps, enlarge)
  return numbers


def _assign(index, shapes, fps, enlarge) -> np.ndarray:
  frames, heights, widths = np.array(shapes).T
  # A record whose size could not be read has 0, and no frames.
  height = np.maximum(index.height, 1)[:, None]
  width = np.maximum(index.width, 1)[:, None]
  covered = clips.available(index.num_frames, index.fps, fps)
  long = covered[:, None] >= frames  # [R, number of shapes]
  scale = np.maximum(heights / height, widths / width)
  fits = long & (scale <= enlarge + 1e-6)
  fits &= frames == np.max(np.where(fits, frames, 0), 1, keepdims=True)
  apart = np.abs(np.log(width / height) - np.log(widths / heights))
  apart = np.where(fits, apart, np.inf)
  fits &= apart <= np.min(apart, 1, keepdims=True) + _NEAR
  areas = np.where(fits, heights * widths, 0)
  fits &= areas == np.max(areas, 1, keepdims=True)
  best = np.argmin(np.where(fits, apart, np.inf), 1)
  why = np.where(long.any(1), _TINY, _SHORT)
  return np.where(fits.any(1), best, why)


def _batch_sizes(
  shapes: list[Shape], counts: list[int], max_tokens: int, multiple_of: int
) -> list[int]:
  """Fit each shape's batch into the tokens of a step."""
  units = [count * multiple_of for count in counts]  # tokens of the least batch
  sizes = [max_tokens // unit * multiple_of for unit in units]
  wrong = [
    f"{name(shape)} of {count:,} tokens: {size or multiple_of} clips are "
    f"{(size or multiple_of) * count:,}, {why}"
    for shape, count, size in zip(shapes, counts, sizes, strict=True)
    if (why := _misfit(size * count, max_tokens))
  ]
  if wrong:
    raise ValueError(
      f"buckets.max_tokens={max_tokens:,} does not suit batches of a multiple "
      f"of {multiple_of} clips (mesh.data x mesh.fsdp x accumulate):\n  "
      + "\n  ".join(wrong)
      + f"\ntry max_tokens={_suggest(units, max_tokens)}, fewer of those, or "
      "leave these shapes out"
    )
  return sizes


def _misfit(filled: int, max_tokens: int) -> str:
  if not filled:
    return "more than that"
  if filled < LEAST_FILL * max_tokens:
    share = f"{filled / max_tokens:.1%}"
    return f"{share} of it, and the least is {LEAST_FILL:.0%}"
  return ""


def _suggest(units: list[int], above: int) -> int:
  """Find the least max_tokens, from one on, that suits all batches."""
  enough = math.ceil(max(units) / (1 - LEAST_FILL))  # suits whatever the units
  tried = {
    n * unit for unit in units for n in range(above // unit, enough // unit + 1)
  }

  def fits(most: int) -> bool:
    return not any(_misfit(most // unit * unit, most) for unit in units)

  return min(filter(fits, {*tried, max(enough, above)} - {0}))


def _settle(index, shapes, sizes, fps, options) -> tuple[np.ndarray, list[int]]:
  """Choose the records' shapes, and those of enough records: their buckets."""
  left = list(range(len(shapes)))
  while True:
    numbers = assign(index, [shapes[i] for i in left], fps, options.enlarge)
    numbers = np.where(numbers < 0, numbers, np.array([*left, 0])[numbers])
    records = {i: int(np.sum(numbers == i)) for i in left}
    few = [i for i in left if records[i] < sizes[i]]
    if not few or options.small == "drop":
      return numbers, [i for i in left if i not in few]
    if options.small == "error":
      rows = [
        f"{name(shapes[i])}: {records[i]} records, {sizes[i]} clips a batch"
        for i in few
      ]
      raise ValueError(
        "buckets with fewer records than a batch:\n  "
        + "\n  ".join(rows)
        + "\nleave these shapes out, lower max_tokens, or set "
        "buckets.small=drop to leave out their records, =move to put them "
        "into the next best bucket"
      )
    left.remove(min(few, key=records.__getitem__))


def _dropped(index: indices.Index, numbers: np.ndarray):
  """Count what is in no bucket by its reason, with the keys of some."""
  found = []
  for number, reason in _REASONS.items():
    where = np.flatnonzero(numbers == number)
    if len(where):
      keys = [str(index.keys[i]) for i in where[:_NAMED]]
      found.append((reason, len(where), tuple(keys)))
  return tuple(found)
