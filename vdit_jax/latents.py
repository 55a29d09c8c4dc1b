"""Datasets of latents: which clips are encoded, and their files of records.

  Source --plan--> Task --read, encode--> write --> shards.finish

A task is one file of records. What tasks there are does not depend on who does
them, so any number of processes, each with devices of its own, shares them,
and one that was killed leaves its finished files.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from vdit_jax import sharding, types
from vdit_jax.data import reading, shards

_BATCH = 32  # clips at once, and at least one a device
_PIXELS = 2**24  # of all clips at once, if one is not larger
_SHARD = 2**28  # bytes of a file of records, about
_BATCHES = 64  # of a file of records at most: so much a kill costs

_HALF = np.finfo(np.float16)
_BYTES = tfds.features.Encoding.BYTES


@dataclasses.dataclass(frozen=True)
class Encoders:
  """What makes a record's arrays.

  Attributes:
    video: uint8 [B, F, H, W, 3] -> mean and logvar, [B, f, h, w, c].
    text: captions -> Text, of at most `max_length` tokens; None is not.
    text_width, max_length: E and M of the Text.
    made_by: what the dataset's metadata say of the encoders.
  """

  video: Callable[[np.ndarray], tuple[jax.Array, jax.Array]]
  text: Callable[[list[str]], types.Text] | None
  text_width: int
  max_length: int
  made_by: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A file of records to write.

  Attributes:
    path: of the file, without suffix.
    source: of the clips.
    positions: of their records.
  """

  path: epath.Path
  source: reading.Source
  positions: range


def features(
  encoders: Encoders, source: reading.Source
) -> tfds.features.FeaturesDict:
  """Give the features of records."""
  text = tfds.features.Text()
  latents = _tensor(latent_shape(encoders, source.shape[:3]))
  found = {"mean": latents, "logvar": latents}
  if encoders.text:
    found["embeds"] = _tensor((None, encoders.text_width))
  return tfds.features.FeaturesDict(found | {"caption": text, "key": text})


def latent_shape(
  encoders: Encoders, shape: tuple[int, int, int]
) -> tuple[int, int, int, int]:
  """Give the shape (f, h, w, c) of a clip's latents."""
  batch = (batch_size(shape), *shape, 3)
  mean, _ = jax.eval_shape(
    encoders.video, jax.ShapeDtypeStruct(batch, np.uint8)
  )
  return mean.shape[1:]


def batch_size(shape: tuple[int, int, int]) -> int:
  """Count the clips that are encoded at once: as many for each device."""
  clips = min(max(_PIXELS // math.prod(shape), 1), _BATCH)
  return clips + -clips % sharding.mesh_size("batch")


def plan(
  folder: epath.Path, source: reading.Source, encoders: Encoders
) -> list[Task]:
  """List a split's files of records, in their order.

  Args:
    folder: to write to.
    source: of the split.
    encoders: that make the records.
  """
  numbers = 2 * math.prod(latent_shape(encoders, source.shape[:3]))
  numbers += encoders.max_length * encoders.text_width
  batches = _SHARD // (_BATCH * numbers * _HALF.dtype.itemsize)
  # Not of the batches that are encoded here: other devices may go on.
  step = min(max(batches, 1), _BATCHES) * _BATCH
  tasks = []
  for start in range(0, source.num_records, step):
    some = range(start, min(start + step, source.num_records))
    name = f"{source.split}-{some.start:09d}-{some.stop:09d}"
    tasks.append(Task(folder / name, source, some))
  return tasks


def write(task: Task, encoders: Encoders) -> shards.Shard:
  """Write a task's file of records, unless it is there."""
  if done := shards.read(task.path):
    return done
  serialize = shards.serializer(features(encoders, task.source))
  examples = _examples(task, encoders)
  return shards.write(task.path, (serialize(example) for example in examples))


def _examples(task: Task, encoders: Encoders) -> Iterator[dict[str, Any]]:
  """Encode a task's clips: while one batch is encoded, the next is read."""
  records = reading.records(task.source, task.positions)
  size, before = batch_size(task.source.shape[:3]), None
  while chunk := list(itertools.islice(records, size)):
    video = np.zeros((size, *task.source.shape), np.uint8)
    video[: len(chunk)] = [record["video"] for record in chunk]
    moments = encoders.video(video)
    if before:
      yield from _finish(encoders, *before, size)
    before = chunk, moments
  if before:
    yield from _finish(encoders, *before, size)


def _finish(
  encoders: Encoders,
  records: list[dict[str, Any]],
  moments: tuple[jax.Array, jax.Array],
  size: int,
) -> Iterator[dict[str, Any]]:
  """Give the examples of a batch of records that is encoded."""
  mean, logvar = (np.asarray(x) for x in moments)
  if encoders.text:
    captions = [record["caption"] for record in records]
    text = encoders.text(captions + [""] * (size - len(captions)))
  for row, record in enumerate(records):
    arrays = {"mean": mean[row], "logvar": logvar[row]}
    if encoders.text:
      arrays["embeds"] = text.embeds[row, text.mask[row]]
    halves = {k: half(k, record["key"], x) for k, x in arrays.items()}
    yield halves | {name: record[name] for name in ("caption", "key")}


def half(name: str, key: str, values: np.ndarray) -> np.ndarray:
  """Cast to float16; refuse what it can't hold."""
  limit = float(_HALF.max)
  beyond = ~(np.abs(values) <= limit)
  if beyond.any():
    raise ValueError(
      f"{name} of record {key} has {float(values[beyond][0]):g}, but a cache "
      f"holds float16, up to {limit:g}; use another encoder, or this one in "
      "float32 (--text_dtype) if its numbers are not finite"
    )
  return values.astype(np.float16)


def _tensor(shape: tuple[int | None, ...]) -> tfds.features.Tensor:
  return tfds.features.Tensor(shape=shape, dtype=np.float16, encoding=_BYTES)
