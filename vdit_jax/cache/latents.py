"""Datasets of latents: which clips are encoded, and their files of records.

  Source, View --plan--> Task --read, encode--> write --> shards.finish

A task is one file of records of clips of one shape. What tasks there are does
not depend on who does them, so any number of processes, each with devices of
its own, shares them, and one that was killed leaves its finished files.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from etils import epath

from vdit_jax import sharding, types
from vdit_jax.data import buckets, reading, records, shards
from vdit_jax.models import frame_positions
from vdit_jax.text import escapes

_BATCH = 32  # clips at once, and at least one a device
_PIXELS = 2**24  # of all clips at once, if one is not larger
_SHARD = 2**28  # bytes of a file of records, about
_BATCHES = 64  # of a file of records at most: so much a kill costs
_THREADS = 4  # that read clips
_AHEAD = 2  # batches that are read before they are needed

_HALF = np.finfo(np.float16)
_BYTES = tfds.features.Encoding.BYTES

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Words:
  """How a text encoder's embeddings are made.

  Attributes:
    encode: captions -> Text.
    width: E of the Text.
    max_length: most tokens of one, M.
    pooled: E of its pooled embedding; 0 for none.
  """

  encode: Callable[[list[str]], types.Text]
  width: int
  max_length: int
  pooled: int = 0


@dataclasses.dataclass(frozen=True)
class Given:
  """What is kept of the frames that a denoiser must, or may, be given.

  Attributes:
    positions: of the frames that are kept as they are; see `System.needs`.
    encode: uint8 [B, F, H, W, 3] -> what networks make of frames [B, n, ...],
      by the network's name.
  """

  positions: tuple[int, ...]
  encode: Callable[[np.ndarray], dict[str, jax.Array]]

  def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shapes of what networks make of a clip of (F, H, W), by name."""
    video = jax.ShapeDtypeStruct((1, *shape, 3), np.uint8)
    encoded = jax.eval_shape(self.encode, video)
    return {name: x.shape[1:] for name, x in encoded.items()}

  def of(self, video: np.ndarray) -> np.ndarray:
    """Take the frames of a clip, uint8 [n, H, W, 3]."""
    return video[frame_positions.resolve(self.positions, len(video))]


@dataclasses.dataclass(frozen=True)
class Encoders:
  """What makes a record's arrays.

  Attributes:
    video: uint8 [B, F, H, W, 3] -> mean and logvar, [B, f, h, w, c].
    text: by the text encoder's name; empty encodes no captions.
    made_by: what the dataset's metadata say of the encoders.
    given: None for a denoiser that is given no frames.
  """

  video: Callable[[np.ndarray], tuple[jax.Array, jax.Array]]
  text: Mapping[str, Words]
  made_by: dict[str, Any]
  given: Given | None = None


@dataclasses.dataclass(frozen=True)
class View:
  """How clips are shown to the autoencoder: their first frames' centre.

  Attributes:
    shapes: (F, H, W), of which each record has the one that `buckets.assign`
      chooses. (): that of the records, where all have one.
    enlarge: see `buckets.Options`.
    options: of reading.
  """

  shapes: tuple[Shape, ...] = ()
  enlarge: float = 1.0
  options: reading.Options = reading.Options(crop="centre")


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A file of records to write.

  Attributes:
    path: of the file, without suffix.
    source: of the clips.
    shape: (F, H, W) that they are shown in.
    positions: of their records.
  """

  path: epath.Path
  source: reading.Source
  shape: Shape
  positions: np.ndarray


def settle(source: reading.Source, view: View) -> View:
  """Give a view without shapes that of the records; refuse what can't be."""
  reading.check_options(source, view.options, ())
  if source.kind == "latents":
    raise ValueError(f"data={source.name!r} holds latents; name that of clips")
  if view.shapes:
    return view
  if source.shape is None:
    raise ValueError(
      f"shapes must be given, as clips of data={source.name!r} are of many; "
      "try 17x256x256"
    )
  return dataclasses.replace(view, shapes=(source.shape[:3],))


def features(
  encoders: Encoders, view: View, numbers: Sequence[str]
) -> tfds.features.FeaturesDict:
  """Give the features of records.

  Args:
    encoders: that make their arrays.
    view: settled.
    numbers: names of what is known of a clip.
  """
  text, number = tfds.features.Text(), tfds.features.Scalar(np.float32)
  shapes = {latent_shape(encoders, shape) for shape in view.shapes}
  # Of several shapes, each record tells its own.
  several = None, None, None, min(shapes)[3]
  latents = _tensor(shapes.pop() if len(shapes) == 1 else several)
  found = {"mean": latents, "logvar": latents}
  for name, words in encoders.text.items():
    embeds = tfds.features.Sequence(_tensor((None, words.width)))
    found[records.embeds_of(name)] = embeds
    if words.pooled:
      pooled = tfds.features.Sequence(_tensor((words.pooled,)))
      found[records.pooled_of(name)] = pooled
  found |= _given_features(encoders, view)
  found |= {"captions": tfds.features.Sequence(text), "key": text}
  return tfds.features.FeaturesDict(found | {name: number for name in numbers})


def _given_features(encoders: Encoders, view: View) -> dict[str, Any]:
  """Give the features of what is kept of given frames."""
  if encoders.given is None:
    return {}
  every = [encoders.given.shapes(shape) for shape in view.shapes]
  found = {
    records.given_of(name): _tensor(_common([shapes[name] for shapes in every]))
    for name in every[0]
  }
  if n := len(encoders.given.positions):
    frames = _common([(n, *shape[1:], 3) for shape in view.shapes])
    found[records.GIVEN_FRAMES] = _tensor(frames, np.uint8)
  return found


def _common(shapes: Sequence[tuple[int, ...]]) -> tuple[int | None, ...]:
  """The one shape of arrays, None where they differ."""
  sides = [set(side) for side in zip(*shapes, strict=True)]
  return tuple(side.pop() if len(side) == 1 else None for side in sides)


def numbers_of(source: reading.Source) -> tuple[str, ...]:
  """Name what is known of a clip when it is shown."""
  shown = "fps", "height", "width"
  own = set(source.form.numbers) - {"num_frames", *shown}
  return *shown, *sorted(own)


def latent_shape(encoders: Encoders, shape: Shape) -> tuple[int, int, int, int]:
  """Give the shape (f, h, w, c) of a clip's latents."""
  batch = (batch_size(shape), *shape, 3)
  mean, _ = jax.eval_shape(
    encoders.video, jax.ShapeDtypeStruct(batch, np.uint8)
  )
  return mean.shape[1:]


def batch_size(shape: Shape) -> int:
  """Count the clips that are encoded at once: as many for each device."""
  clips = min(max(_PIXELS // math.prod(shape), 1), _BATCH)
  return clips + -clips % sharding.mesh_size("batch")


def plan(
  folder: epath.Path, source: reading.Source, encoders: Encoders, view: View
) -> list[Task]:
  """List a split's files of records, in their order: shape by shape.

  Args:
    folder: to write to.
    source: of the split.
    encoders: that make the records.
    view: settled.

  Raises:
    ValueError: no record has one of the shapes.
  """
  tasks, one = [], len(view.shapes) == 1
  numbers = buckets.assign(
    source.index,
    view.shapes,
    view.options.fps,
    # What all are shown in, the smaller ones are too: see `reading`.
    math.inf if one else view.enlarge,
  )
  for number, shape in enumerate(view.shapes):
    positions = np.flatnonzero(numbers == number)
    step = _step(encoders, shape)
    for start in range(0, len(positions), step):
      some = positions[start : start + step]
      name = f"{source.split}-{number:03d}-{start:09d}-{start + len(some):09d}"
      tasks.append(Task(folder / name, source, shape, some))
  if not tasks:
    raise ValueError(
      f"shapes={view.shapes} are none of the {source.num_records} records of "
      f"{source.name}/{source.split}; give shorter or smaller ones, or allow "
      "more by enlarge"
    )
  return tasks


def write(task: Task, encoders: Encoders, view: View) -> shards.Shard:
  """Write a task's file of records, unless it is there.

  Its note has the index's columns, in latents, and what could not be read.
  """
  if done := shards.read(task.path):
    return done
  numbers = numbers_of(task.source)
  serialize = shards.serializer(features(encoders, view, numbers))
  known, lost = shards.Columns(), []

  def serialized() -> Iterator[bytes]:
    for example in _examples(task, encoders, view, lost):
      fps = example["fps"] if example["fps"] > 0 else 0.0  # NaN is not known
      known.add(example["key"], *example["mean"].shape[:3], fps)  # pyright: ignore[reportCallIssue]
      yield serialize(example)

  def note() -> dict[str, Any]:
    return {"index": known.values, "lost": lost}

  return shards.write(task.path, serialized(), note)


def _step(encoders: Encoders, shape: Shape) -> int:
  """Count the clips of a file of records.

  Not by the batches that are encoded here: other devices may go on.
  """
  numbers = 2 * math.prod(latent_shape(encoders, shape))
  for words in encoders.text.values():
    numbers += words.max_length * words.width + words.pooled
  if encoders.given:  # frames of a byte, and what is encoded
    numbers += len(encoders.given.positions) * math.prod(shape[1:]) * 3 // 2
    numbers += sum(map(math.prod, encoders.given.shapes(shape).values()))
  batches = _SHARD // (_BATCH * numbers * _HALF.dtype.itemsize)
  return min(max(batches, 1), _BATCHES) * _BATCH


def _examples(
  task: Task, encoders: Encoders, view: View, lost: list[str]
) -> Iterator[dict[str, Any]]:
  """Encode a task's clips; what can't be read is added to `lost`."""
  size, before = batch_size(task.shape), None
  # While one batch is encoded, the next ones are read.
  for read in _batches(task, view, size, lost):
    video = np.zeros((size, *task.shape, 3), np.uint8)
    video[: len(read)] = [clip.arrays["video"] for clip in read]
    moments = encoders.video(video)
    encoded = encoders.given.encode(video) if encoders.given else {}
    if before:
      yield from _finish(encoders, *before, size, numbers_of(task.source))
    before = read, moments, encoded
  if before:
    yield from _finish(encoders, *before, size, numbers_of(task.source))


def _batches(
  task: Task, view: View, size: int, lost: list[str]
) -> Iterator[list[reading.Clip]]:
  """Read a task's clips in threads, some batches ahead."""
  begun, starts = collections.deque(), range(0, len(task.positions), size)

  def read(position: int) -> tuple[reading.Clip, str]:
    return reading.read_clip(
      task.source, position, task.shape, None, view.options
    )

  with (
    tqdm.tqdm(total=len(task.positions), desc=task.path.name) as bar,
    concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
  ):
    for start in (*starts, *[None] * _AHEAD):
      if start is not None:
        some = task.positions[start : start + size].tolist()
        begun.append([pool.submit(read, position) for position in some])
      if len(begun) > _AHEAD or (start is None and begun):
        found = [future.result() for future in begun.popleft()]
        bar.update(len(found))
        for _, error in found:
          if error:
            logging.warning("%s: unreadable %s", task.source.name, error)
            lost.append(error)
        if len(lost) > view.options.max_unreadable:
          raise RuntimeError(
            f"{task.source.name} has more than {view.options.max_unreadable} "
            f"unreadable records, the last one {lost[-1]}; build it again"
          )
        if good := [clip for clip, error in found if not error]:
          yield good


def _finish(
  encoders: Encoders,
  read: list[reading.Clip],
  moments: tuple[jax.Array, jax.Array],
  encoded: Mapping[str, jax.Array],
  size: int,
  numbers: Sequence[str],
) -> Iterator[dict[str, Any]]:
  """Give the examples of a batch of clips that is encoded."""
  mean, logvar = (np.asarray(x) for x in moments)
  given = {records.given_of(k): np.asarray(x) for k, x in encoded.items()}
  texts = {
    name: _texts(words, read, size) for name, words in encoders.text.items()
  }
  for row, clip in enumerate(read):
    example = {
      "mean": half("mean", clip.key, mean[row]),
      "logvar": half("logvar", clip.key, logvar[row]),
      "captions": list(clip.captions),
      "key": clip.key,
    }
    if encoders.given and encoders.given.positions:
      example[records.GIVEN_FRAMES] = encoders.given.of(clip.arrays["video"])
    for name, values in given.items():
      example[name] = half(name, clip.key, values[row])
    for name, rows in texts.items():
      some = list(itertools.islice(rows, len(clip.captions)))
      feature = records.embeds_of(name)
      example[feature] = [half(feature, clip.key, x) for x, _ in some]
      if encoders.text[name].pooled:
        feature = records.pooled_of(name)
        example[feature] = [half(feature, clip.key, x) for _, x in some]
    yield example | {n: clip.numbers.get(n, math.nan) for n in numbers}


def _texts(
  words: Words, read: list[reading.Clip], size: int
) -> Iterator[tuple[Any, Any]]:
  """Encode all captions of clips in batches always alike.

  Each gives its embeds [n, E] and pooled [E], None where there is none.
  """
  captions = [text for clip in read for text in clip.captions]
  for start in range(0, len(captions), size):
    some = captions[start : start + size]
    text = words.encode(some + [""] * (size - len(some)))
    for row in range(len(some)):
      pooled = None if text.pooled is None else text.pooled[row]
      yield text.embeds[row, text.mask[row]], pooled


def half(name: str, key: str, values: np.ndarray) -> np.ndarray:
  """Cast to float16; refuse what it can't hold."""
  limit = float(_HALF.max)
  beyond = ~(np.abs(values) <= limit)
  if beyond.any():
    raise ValueError(
      f"{name} of record {escapes.escape(key)} has "
      f"{float(values[beyond][0]):g}, but a cache holds float16, up to "
      f"{limit:g}; use another encoder, or this one in "
      "float32 (--text_dtype) if its numbers are not finite"
    )
  return values.astype(np.float16)


def _tensor(
  shape: tuple[int | None, ...], dtype: Any = np.float16
) -> tfds.features.Tensor:
  return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=_BYTES)
