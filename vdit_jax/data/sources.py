"""Datasets, opened: a split's records by position, and what is known of them.

TFDS name, data_dir --open_source--> Source
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from etils import epath
from tensorflow_datasets.core import constants, read_only_builder
from tensorflow_datasets.core.utils import error_utils

from vdit_jax.data import declared, records
from vdit_jax.data import index as indices

_VIDEO = "video_feature.Video"  # as features.json spells features.Video


@dataclasses.dataclass(frozen=True)
class Source:
  """A split of a dataset, open for random access.

  Attributes:
    name, split: of the dataset.
    form: what its records hold.
    num_records: records of the split.
    metadata: what the dataset says of itself; {} if nothing.
    features: TFDS features that decode a record.
    data_source: position -> a record's bytes.
    index: lengths and sizes of the records.
  """

  name: str
  split: str
  form: records.Form
  num_records: int
  metadata: dict[str, Any]
  features: tfds.features.FeaturesDict = dataclasses.field(repr=False)
  data_source: Sequence[bytes] = dataclasses.field(repr=False)
  index: indices.Index = dataclasses.field(repr=False)

  @property
  def kind(self) -> str:
    """Kind of the records: "clips", "video", "frames" or "latents"."""
    return self.form.kind

  @property
  def shape(self) -> tuple[int, int, int, int] | None:
    """Shape of the arrays, (F, H, W, 3) or (f, h, w, c); None if it varies."""
    if not self.form.uniform:
      return None
    channels = 3 if self.kind == "frames" else self.form.shape[3]
    return (*self.form.shape[:3], channels)  # pyright: ignore[reportReturnType]

  @property
  def text_widths(self) -> dict[str, int]:
    """E of the captions' embeddings, by the text encoder's name."""
    return self.form.text_widths

  @property
  def num_frames(self) -> int:
    """F of all clips; refused where they are of many shapes."""
    return self._one_shape()[0]

  @property
  def height(self) -> int:
    """H of all clips; refused where they are of many shapes."""
    return self._one_shape()[1]

  @property
  def width(self) -> int:
    """W of all clips; refused where they are of many shapes."""
    return self._one_shape()[2]

  def _one_shape(self) -> tuple[int, int, int, int]:
    if self.shape is None:
      raise ValueError(
        f"{self.name} has clips of many shapes, where one is needed; name a "
        "dataset whose clips are alike"
      )
    return self.shape


def open_source(
  name: str, split: str, data_dir: epath.PathLike | None = None
) -> Source:
  """Open a split of a prepared dataset; its builder's code isn't needed.

  Args:
    name: TFDS name with its config, "moving_digits/one".
    split: "train", or a part such as "train[:10%]".
    data_dir: where TFDS data lie; None is TFDS's default.
  """
  builder = _builder(name, data_dir)
  if split.split("[")[0] not in builder.info.splits:
    raise ValueError(
      f"split must be one of {', '.join(builder.info.splits)} of {name}, "
      f"got {split!r}"
    )
  _check_part(name, split, builder.info.splits)
  form = records.form(name, builder.info.features)
  try:
    data_source = builder.as_data_source(
      split,  # pyright: ignore[reportCallIssue]
      deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
    )
  except NotImplementedError as error:
    raise ValueError(
      f"{name} is stored as {builder.info.file_format.value}, which has no "
      "random access; prepare it with file_format='array_record'"
    ) from error
  return Source(
    name=name,
    split=split,
    form=form,
    num_records=len(data_source),
    metadata=dict(builder.info.metadata or {}),
    features=builder.info.features,
    data_source=data_source,
    index=_index(builder, split, form, data_source),
  )


def _builder(name: str, data_dir) -> tfds.core.DatasetBuilder:
  """Open a dataset, once its folder has been looked at: see `declared`."""
  with error_utils.reraise_with_context(tfds.core.DatasetNotFoundError):
    folder = read_only_builder._find_builder_dir(name, data_dir=data_dir)
  if folder is None:
    where = data_dir or constants.DATA_DIR
    raise ValueError(
      f"name={name!r} is not prepared in {where}; {_remedy(name, where)}"
    )
  declared.check(folder)
  try:
    return read_only_builder.builder_from_directory(folder)
  # What TFDS cannot make anything of shows up as errors of any type.
  except Exception as error:
    _check_video(name, folder)
    reason = f"{type(error).__name__}: {str(error)[:200]}"
    raise ValueError(
      f"{folder} cannot be opened ({reason}); build the dataset again"
    ) from error


def _check_video(name: str, folder: epath.Path) -> None:
  """Say so where all that is missing is TensorFlow.

  TFDS cannot construct features.Video without it.
  """
  if importlib.util.find_spec("tensorflow") is not None:
    return
  if _VIDEO in (folder / declared.FEATURES).read_text():
    raise ValueError(
      f"name={name!r} has a features.Video, which TFDS cannot read without "
      "TensorFlow; pip install 'vdit_jax[tf]'"
    )


def _remedy(name: str, data_dir) -> str:
  base, _, config = name.partition("/")
  if base == "moving_digits":
    return (
      f"build it with python -m vdit_jax.data.{base} "
      f"--config={config or 'CONFIG'} --data_dir={data_dir}"
    )
  return (
    "build it of your clips with python -m vdit_jax.data.build, one of the "
    "catalogue with its TFDS builder and file_format='array_record' "
    "(features.Video needs vdit_jax[tf]), latents with python -m "
    "vdit_jax.cache"
  )


def _index(builder, split: str, form: records.Form, data_source):
  """Read a split's index; where there is none, make it."""
  base = split.split("[")[0]
  index = indices.read(builder.data_path, base)
  if index is not None and split != base:
    index = index.take(_positions(builder.info.splits, base, split))
  if index is None and form.uniform:
    fps = records.number(data_source[0], "fps") if len(data_source) else 0.0
    index = indices.uniform(len(data_source), *form.shape[:3], fps)  # pyright: ignore[reportCallIssue]
  if index is None:
    index = _scan(f"{builder.info.full_name} {split}", form, data_source)
    if split == base:
      _keep(builder.data_path, base, index)
  if len(index) != len(data_source):
    raise ValueError(
      f"{builder.data_path} has an index of {len(index)} records of {split}, "
      f"but files of {len(data_source)}; build the dataset again"
    )
  return index


def _check_part(name: str, split: str, splits) -> None:
  """Refuse a part of a split that is none, or has no records."""
  try:
    number = splits[split].num_examples
  except (AssertionError, KeyError, ValueError) as error:
    raise ValueError(
      f"split must be such as train or train[:10%], got {split!r} of {name}"
    ) from error
  if not number:
    raise ValueError(f"split {split!r} of {name} has no records; take more")


def _positions(splits, base: str, split: str) -> np.ndarray:
  """Find the positions in a split of the records of a part of it."""
  whole = splits[base]
  names = [epath.Path(name).name for name in whole.filenames]
  starts = np.cumsum([0, *whole.shard_lengths])[:-1]
  starts = dict(zip(sorted(names), starts.tolist(), strict=True))
  found = [np.zeros(0, np.int64)]
  for file in splits[split].file_instructions:
    start = starts[epath.Path(file.filename).name] + file.skip
    found.append(np.arange(start, start + file.take))
  return np.concatenate(found)


def _scan(name: str, form: records.Form, data_source) -> indices.Index:
  """Look at every record, as nobody wrote down its size; unreadable: 0."""
  rows = [
    records.size(form, data, f"{name}[{position}]")
    for position, data in enumerate(tqdm.tqdm(data_source, f"sizes of {name}"))
  ]
  return indices.Index(*zip(*rows, strict=True))


def _keep(folder: epath.Path, split: str, index: indices.Index) -> None:
  """Write an index beside its files, if they are where one may write."""
  try:
    indices.write(folder, split, index)
  except OSError as error:
    logging.warning("%s: its index is not kept (%s)", folder, error)
