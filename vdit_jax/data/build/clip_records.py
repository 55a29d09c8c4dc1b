"""Records of captioned clips: what they hold, and writing files of them.

The form is told in `build`, which makes datasets of it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from vdit_jax.data import shards
from vdit_jax.data.build import cuts, parts, probe
from vdit_jax.media import footage

_SIZES = ("num_frames", "height", "width", "fps")


@dataclasses.dataclass(frozen=True)
class Task:
  """A file of records to write, by any process.

  Attributes:
    path: of the file, without suffix.
    scores: names of all scores.
    length: of clips that videos are cut into; None keeps them whole.
    files: each with what probing it gave.
  """

  path: epath.Path
  scores: tuple[str, ...]
  length: cuts.Length | None
  files: Sequence[tuple[parts.File, probe.Clip]]


def features(scores: Sequence[str]) -> tfds.features.FeaturesDict:
  """Give the features of records with scores of these names."""
  text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
  rate = tfds.features.Scalar(np.float32)
  own = {
    "mp4": text,
    "captions": tfds.features.Sequence(tfds.features.Text()),
    "key": text,
    "fps": rate,
    "num_frames": number,
    "height": number,
    "width": number,
  }
  return tfds.features.FeaturesDict(own | {name: rate for name in scores})


def write(task: Task) -> bool:
  """Write a task's file of records, unless it is written; True then.

  Its note has the index's columns, and what was left out after all, since it
  was another file when it was probed.
  """
  if shards.read(task.path):
    return True
  serialize = shards.serializer(features(task.scores))
  known = shards.Columns()
  rejected: list[parts.Rejected] = []

  def records() -> Iterator[bytes]:
    for file, clip in task.files:
      try:
        for example in _examples(task, file, clip):
          known.add(example["key"], *(example[name] for name in _SIZES))
          yield serialize(example)
      except footage.FootageError as error:
        rejected.append(parts.reject(file, probe.reject(error)))

  def note() -> dict[str, Any]:
    left_out = [dataclasses.asdict(found) for found in rejected]
    return {"index": known.values, "rejected": left_out}

  shards.write(task.path, records(), note)
  return True


def _examples(
  task: Task, file: parts.File, clip: probe.Clip
) -> Iterator[dict[str, Any]]:
  """Give the records of a file; raises footage.FootageError."""
  scores = {name: file.scores.get(name, np.nan) for name in task.scores}
  own = scores | {"captions": list(file.captions)}
  if task.length is None or not clip.fps:
    yield own | _fields(clip, file.key, _content(file.path, clip))
    return
  for number, cut in enumerate(cuts.cut(file.path, clip, task.length)):
    yield own | _fields(cut, f"{file.key}#{number:04d}", cut.mp4)


def _fields(
  clip: probe.Clip | cuts.Cut, key: str, content: bytes
) -> dict[str, Any]:
  return {name: getattr(clip, name) for name in _SIZES} | {
    "key": key,
    "mp4": content,
  }


def _content(path: str, clip: probe.Clip) -> bytes:
  with footage.regular(path) as file:
    content = file.read()
  if len(content) != clip.num_bytes:
    detail = f"{clip.num_bytes} bytes when it was probed, now {len(content)}"
    raise footage.FootageError(footage.Fault.DAMAGED, detail)
  return content
