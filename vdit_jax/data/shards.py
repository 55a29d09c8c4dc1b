"""Writes TFDS datasets file by file, so that a broken-off run goes on.

  records --write--> 1.0.0.unfinished/*.array_record, *.json --finish--> 1.0.0

TFDS's own builders start again from nothing. Here each file of records
appears whole, and then a note of what it has, in any order and by any process
of any machine; `finish` gives the files the names that TFDS reads and writes
what it says of a dataset, `features.json` last: without it there is none.
"""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath
from tensorflow_datasets.core import (
  dataset_info,
  example_serializer,
  file_adapters,
  naming,
)

from vdit_jax import strict_json, writing
from vdit_jax.data import index

VERSION = "1.0.0"

_DATASET = re.compile(r"[a-z][a-z0-9_]*")
_CONFIG = re.compile(r"[A-Za-z][\w.-]*")
_FORMAT = file_adapters.FileFormat.ARRAY_RECORD
_OPTIONS = "group_size:1"  # TFDS's: each record is read by itself
_FEATURES = "features.json"
_COLUMNS = [field.name for field in dataclasses.fields(index.Index)]


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a dataset is, or will be.

  Attributes:
    data_dir: TFDS data directory.
    dataset, config: names of the dataset; config "" if it has none.
  """

  data_dir: epath.Path
  dataset: str
  config: str

  @property
  def target(self) -> epath.Path:
    """Folder of the dataset."""
    return self.data_dir / self.dataset / self.config / VERSION

  @property
  def work(self) -> epath.Path:
    """Folder of its files until it is whole."""
    return self.target.with_name(f"{VERSION}.unfinished")

  def is_finished(self) -> bool:
    """Tell whether the dataset is there."""
    return (self.target / _FEATURES).exists()


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of records that is whole.

  Attributes:
    path: of the file, without suffix.
    num_records, num_bytes: of the file.
    note: what else is to be remembered of it, JSON.
  """

  path: epath.Path
  num_records: int
  num_bytes: int
  note: dict[str, Any]


class Columns:
  """Gathers the index of a file while its records are written."""

  def __init__(self):
    self.values = {name: [] for name in _COLUMNS}

  def add(
    self, key: str, num_frames: int, height: int, width: int, fps: float
  ) -> None:
    """Add the row of a record."""
    row = key, num_frames, height, width, fps
    for values, value in zip(self.values.values(), row, strict=True):
      values.append(value)


def place(data_dir: epath.PathLike, name: str) -> Place:
  """Give the place of a dataset NAME or NAME/CONFIG; refuse other names."""
  dataset, slash, config = name.partition("/")
  if not _DATASET.fullmatch(dataset) or (
    slash and not _CONFIG.fullmatch(config)
  ):
    raise ValueError(
      "name must be NAME or NAME/CONFIG, NAME of lower-case letters, digits "
      f"and _, got {name!r}; try mine/clips"
    )
  return Place(epath.Path(data_dir), dataset, config)


def serializer(
  features: tfds.features.FeaturesDict,
) -> Callable[[dict[str, Any]], bytes]:
  """Give the function that makes a record's bytes of an example.

  TFDS's own has an order of fields that differs from run to run.
  """
  inner = example_serializer.ExampleSerializer(features.get_serialized_info())

  def serialize(example: dict[str, Any]) -> bytes:
    made = inner.get_tf_example(features.encode_example(example))
    return made.SerializeToString(deterministic=True)

  return serialize


def write(
  path: epath.Path,
  records: Iterable[bytes],
  note: Callable[[], dict[str, Any]] = dict,
) -> Shard:
  """Write a file of records, and last the note that says it is whole.

  Args:
    path: of the file, without suffix.
    records: taken one by one.
    note: gives, when all are taken, what is to be remembered; JSON.

  Returns:
    What `read` of the same path does from now on.
  """
  path = epath.Path(path)
  file, count = _with(path, _FORMAT.file_suffix), 0
  # Of array_record's writer no file system but the machine's own is known.
  remote = writing.is_remote(file)
  folder = epath.Path(tempfile.gettempdir()) if remote else file.parent
  temporary = writing.beside(folder / file.name)
  writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), _OPTIONS)
  try:
    for record in records:
      writer.write(record)
      count += 1
    writer.close()
    num_bytes = temporary.stat().length
    if remote:
      writing.write(file, temporary.read_bytes())
    else:
      temporary.replace(file)
  finally:
    writer.close()
    temporary.unlink(missing_ok=True)
  shard = Shard(path, count, num_bytes, note())
  fields = {f.name: getattr(shard, f.name) for f in dataclasses.fields(Shard)}
  writing.write(
    _with(path, "json"), strict_json.dumps(fields | {"path": path.name})
  )
  return shard


def read(path: epath.Path) -> Shard | None:
  """Read of a file (without suffix) that is whole; else None."""
  path = epath.Path(path)
  if not _with(path, "json").exists():
    return None
  return Shard(**(json.loads(_with(path, "json").read_text()) | {"path": path}))


def read_index(written: Sequence[Shard]) -> index.Index:
  """Join the indices of files, which their notes have as "index"."""
  notes = [shard.note["index"] for shard in written]
  columns = {n: [x for note in notes for x in note[n]] for n in _COLUMNS}
  return index.Index(**columns)


def finish(
  place: Place,
  features: tfds.features.FeaturesDict,
  splits: Mapping[str, tuple[Sequence[Shard], index.Index | None]],
  metadata: Mapping[str, Any],
  description: str,
) -> None:
  """Make a dataset of files that are whole, and remove what else was left.

  Broken off it is done again, with the same arguments.

  Args:
    place: of the dataset, in whose work folder the files are.
    features: of the records.
    splits: the files of each, in order, and its index if it has one.
    metadata: what the dataset says of itself, JSON.
    description: what it is, in a sentence.
  """
  place.target.mkdir(parents=True, exist_ok=True)
  infos = []
  for split, (shards, known) in splits.items():
    template = naming.ShardedFileTemplate(
      data_dir=place.target,
      dataset_name=place.dataset,
      split=split,
      filetype_suffix=_FORMAT.file_suffix,
    )
    paths = template.sharded_filepaths(len(shards))
    for shard, path in zip(shards, paths, strict=True):
      _move(_with(shard.path, _FORMAT.file_suffix), path)
    if known is not None:
      index.write(place.target, split, known)
    lengths = [shard.num_records for shard in shards]
    num_bytes = sum(shard.num_bytes for shard in shards)
    infos.append(tfds.core.SplitInfo(split, lengths, num_bytes, template))
  info = tfds.core.DatasetInfo(
    builder=dataset_info.DatasetIdentity(
      name=place.dataset,
      version=tfds.core.Version(VERSION),
      data_dir=os.fspath(place.target),
      module_name="",
      config_name=place.config or None,
    ),
    description=description,
    features=features,
    disable_shuffling=True,
    metadata=tfds.core.MetadataDict(metadata),
  )
  info.set_file_format(_FORMAT)
  info.set_splits(tfds.core.splits.SplitDict(infos))  # pyright: ignore[reportAttributeAccessIssue]
  _write_info(info, place.target)
  clear(place)


def clear(place: Place) -> None:
  """Remove what a dataset that is finished was made of."""
  place.work.rmtree(missing_ok=True)


def _with(path: epath.Path, suffix: str) -> epath.Path:
  return path.with_name(f"{path.name}.{suffix}")


def _move(source: epath.Path, target: epath.Path) -> None:
  """Rename a file, unless a run that was broken off has."""
  if source.exists() or not target.exists():
    source.rename(target)


def _write_info(info: tfds.core.DatasetInfo, target: epath.Path) -> None:
  """Write what TFDS knows a dataset by, last that which it looks for."""
  with tempfile.TemporaryDirectory() as folder:
    info.write_to_directory(folder)
    files = sorted(epath.Path(folder).iterdir(), key=_is_last)
    for file in files:
      writing.write(target / file.name, file.read_bytes())


def _is_last(file: epath.Path) -> bool:
  return file.name == _FEATURES
