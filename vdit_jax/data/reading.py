"""Reads batches from TFDS datasets of array_record files.

  TFDS records --plan.batch_indices(seed, step)--> types.Batch, keys

Two forms of records are read, told apart by their features:

  video    video uint8 [F, H, W, 3], caption, key, fps
  latents  mean and logvar float16 or float32 [f, h, w, c], caption, key;
           and, if `vdit_jax.cache` was given a text encoder, the embeddings
           of the caption's tokens: embeds float16 [n, E]

The plan makes a batch a pure function of (seed, step): starting at a step
continues an earlier run exactly, on any number of hosts, workers and threads.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from etils import epath
from google.protobuf import message
from tensorflow_datasets.core import constants, read_only_builder
from tensorflow_datasets.proto import tf_example_pb2

from vdit_jax import types
from vdit_jax.data import plan

# Records of one run that may be unreadable before the data counts as broken.
MAX_UNREADABLE = 100

_FILL = -1  # position of no record: fills up a batch

_FORMS = {
  "video": ("video", "caption", "key", "fps"),
  "latents": ("mean", "logvar", "caption", "key"),
}

_ARRAYS = {"video": ("video",), "latents": ("mean", "logvar")}

_DTYPES = {"video": (np.uint8,), "latents": (np.float16, np.float32)}

# What a damaged file, proto or array raises on its way to numpy.
_UNREADABLE = (
  message.DecodeError,
  AttributeError,
  IndexError,
  KeyError,
  OSError,
  RuntimeError,
  ValueError,
)

Batches = Iterator[tuple[types.Batch, list[str]]]


@dataclasses.dataclass(frozen=True)
class Source:
  """A split of a dataset, open for random access.

  Attributes:
    name, split: of the dataset.
    kind: "video" or "latents".
    shape: of the record's arrays, (F, H, W, 3) or (f, h, w, c).
    text_width: E of the captions' embeddings; None if it holds none.
    num_records: records of the split.
    metadata: what the dataset says of itself; {} if nothing.
    features: TFDS features that decode a record.
    data_source: position -> a record's bytes.
  """

  name: str
  split: str
  kind: str
  shape: tuple[int, int, int, int]
  text_width: int | None
  num_records: int
  metadata: dict[str, Any]
  features: tfds.features.FeaturesDict = dataclasses.field(repr=False)
  data_source: Sequence[bytes] = dataclasses.field(repr=False)

  @property
  def num_frames(self) -> int:
    return self.shape[0]

  @property
  def height(self) -> int:
    return self.shape[1]

  @property
  def width(self) -> int:
    return self.shape[2]


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
  kind = _kind(name, builder.info.features)
  try:
    data_source = builder.as_data_source(
      split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
  except NotImplementedError as error:
    raise ValueError(
      f"{name} is stored as {builder.info.file_format.value}, which has no "
      "random access; prepare it with file_format='array_record'"
    ) from error
  return Source(
    name=name,
    split=split,
    kind=kind,
    shape=_shape(name, builder.info.features, kind),
    text_width=_text_width(name, builder.info.features, kind),
    num_records=len(data_source),
    metadata=dict(builder.info.metadata or {}),
    features=builder.info.features,
    data_source=data_source,
  )


def batches(
  source: Source,
  tokenizer,
  *,
  seed: int,
  start_step: int,
  num_steps: int,
  batch_size: int,
  max_length: int,
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
    seed: of the order of records.
    start_step: first step, as if all before it had been read.
    num_steps: steps to yield.
    batch_size: of the global batch, over all hosts.
    max_length: tokens of a caption, M; longer embeddings are cut.
    host, num_hosts: whose share to read.
    workers: processes that read; 0 reads in threads of this process. They
      need absl's flags to be parsed.
    threads: batches that are read at once.

  Returns:
    Pairs of a `types.Batch` of numpy arrays and its records' keys.
  """
  indices = plan.batch_indices(seed, 0, source.num_records, batch_size)
  plan.host_slice(indices, host, num_hosts)  # refuses sizes before reading

  def load(step: int):
    indices = plan.batch_indices(seed, step, source.num_records, batch_size)
    share = plan.host_slice(indices, host, num_hosts)
    return _load(source, tokenizer, share, max_length)

  steps = grain.MapDataset.range(start_step, start_step + num_steps)
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=2 * threads
  )
  loaded = steps.map(load).to_iter_dataset(options)
  if workers:
    loaded = loaded.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers)
    )
  return _batches(source, loaded)


def evaluation_batches(
  source: Source, tokenizer, batch_size: int, max_length: int
) -> Batches:
  """Yield every record once, in order; the last batch is filled up.

  Args:
    source: what to read.
    tokenizer: see `batches`.
    batch_size: of every batch; what fills up has weight 0 and key "".
    max_length: see `batches`.

  Returns:
    Pairs of a `types.Batch` of numpy arrays and its records' keys.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}")
  starts = range(0, source.num_records, batch_size)
  positions = np.arange(len(starts) * batch_size).reshape(-1, batch_size)
  positions[positions >= source.num_records] = _FILL
  loaded = (_load(source, tokenizer, row, max_length) for row in positions)
  return _batches(source, loaded)


def records(
  source: Source, positions: range | None = None
) -> Iterator[dict[str, Any]]:
  """Yield the readable records, in order: key, caption and their arrays.

  Args:
    source: what to read.
    positions: of the records; None are all.
  """
  description = f"{source.name}/{source.split}"
  names = _ARRAYS[source.kind]
  if source.text_width is not None:
    names = (*names, "embeds")
  if positions is None:
    positions = range(source.num_records)
  else:
    description += f" {positions.start}.. of {source.num_records}"
  for position in tqdm.tqdm(positions, desc=description):
    record, error = _read(source, position, names)
    if error:
      logging.warning("%s: unreadable %s", description, error)
    else:
      yield record


def _batches(source: Source, loaded) -> Batches:
  unreadable = 0
  for arrays, keys, errors in loaded:
    for error in errors:
      logging.warning("%s/%s: unreadable %s", source.name, source.split, error)
    unreadable += len(errors)
    if unreadable > MAX_UNREADABLE:
      raise RuntimeError(
        f"{source.name}/{source.split} has more than {MAX_UNREADABLE} "
        f"unreadable records, the last one {errors[-1]}; build it again"
      )
    yield types.Batch(**arrays), keys


def _load(source: Source, tokenizer, positions: np.ndarray, max_length: int):
  """Read records into the arrays of a batch, with their keys and errors."""
  names, text = _ARRAYS[source.kind], "caption"
  if tokenizer is None and source.text_width is not None:
    text = "embeds"
  dtype = np.uint8 if source.kind == "video" else np.float32
  shape = (len(positions), *source.shape)
  arrays = {name: np.zeros(shape, dtype) for name in names}
  weight = np.zeros(len(positions), np.float32)
  texts, keys, errors = [""] * len(positions), [""] * len(positions), []
  for row, position in enumerate(positions.tolist()):
    if position == _FILL:
      continue
    record, error = _read(source, position, {*names, text} - {"caption"})
    keys[row] = record["key"]
    if error:
      errors.append(error)
      continue
    for name in names:
      arrays[name][row] = record[name]
    texts[row], weight[row] = record[text], 1
  if text == "embeds":
    fields = _pad(texts, source.text_width, max_length)
  else:
    fields = _encode(tokenizer, texts, max_length)
  fields |= {"weight": weight}
  return fields | _pixels_or_moments(arrays), keys, errors


def _encode(tokenizer, texts: list[str], max_length: int) -> dict[str, Any]:
  if tokenizer is None:
    shape = len(texts), 0
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
  else:
    tokens, mask = tokenizer.encode(texts, max_length)
  return {"tokens": tokens, "mask": mask}


def _pad(
  texts: list[np.ndarray | str], width: int, max_length: int
) -> dict[str, Any]:
  """Join embeddings [n, E], cut or padded with zeros; "" stands for none."""
  embeds = np.zeros((len(texts), max_length, width), np.float16)
  mask = np.zeros(embeds.shape[:2], bool)
  for row, text in enumerate(texts):
    length = min(len(text), max_length)
    if length < len(text):
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
  return {"tokens": None, "embeds": embeds, "mask": mask}


def _pixels_or_moments(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  if "video" in arrays:
    return arrays
  return {"video": None, "moments": (arrays["mean"], arrays["logvar"])}


def _read(
  source: Source, position: int, names: Iterable[str]
) -> tuple[dict[str, Any], str]:
  """Read key, caption and the named arrays of a record.

  Of an unreadable one, its key and what is wrong.
  """
  record = {"key": f"{source.split}[{position}]"}
  try:
    # TFDS's own decoding of a whole example takes four times as long.
    raw = source.data_source[position]
    example = tf_example_pb2.Example.FromString(raw).features.feature
    for name in ("key", "caption"):
      record[name] = example[name].bytes_list.value[0].decode()
    for name in names:
      value = example[name].bytes_list.value[0]
      record[name] = source.features[name].decode_example_np(value)
  except _UNREADABLE as error:
    return record, f"{record['key']}: {type(error).__name__}: {error}"
  return record, ""


def _builder(name: str, data_dir) -> tfds.core.DatasetBuilder:
  try:
    return read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    where = data_dir or constants.DATA_DIR
    raise ValueError(
      f"name={name!r} is not prepared in {where}; {_remedy(name, where)}"
    ) from error


def _remedy(name: str, data_dir) -> str:
  base, _, config = name.partition("/")
  if not (epath.Path(__file__).parent / f"{base}.py").exists():
    return (
      "build it with its TFDS builder and file_format='array_record', or as "
      "latents with python -m vdit_jax.cache (features.Video needs "
      "vdit_jax[tf])"
    )
  return (
    f"build it with python -m vdit_jax.data.{base} "
    f"--config={config or 'CONFIG'} --data_dir={data_dir}"
  )


def _kind(name: str, features) -> str:
  for kind, wanted in _FORMS.items():
    if all(feature in features for feature in wanted):
      return kind
  missing = {
    kind: [feature for feature in wanted if feature not in features]
    for kind, wanted in _FORMS.items()
  }
  raise ValueError(
    f"{name} has features {sorted(features)}; as video it lacks "
    f"{missing['video']}, as latents {missing['latents']}; build it with those"
  )


def _shape(name: str, features, kind: str) -> tuple[int, int, int, int]:
  """Give the shape that all arrays of all records have; refuse others."""
  shape = features[_ARRAYS[kind][0]].shape
  for array in _ARRAYS[kind]:
    feature = features[array]
    as_bytes = feature.get_serialized_info().shape == ()
    fixed = len(feature.shape) == 4 and None not in feature.shape
    if not (as_bytes and fixed and feature.shape == shape):
      raise ValueError(
        f"{name} has a feature {array!r} of shape {feature.shape}, got "
        f"{feature}; it must be a Tensor of four fixed dims, the same in all "
        "arrays, with encoding=Encoding.BYTES"
      )
    if feature.np_dtype not in _DTYPES[kind]:
      wanted = " or ".join(np.dtype(dtype).name for dtype in _DTYPES[kind])
      raise ValueError(
        f"{name} has a feature {array!r} of type {feature.np_dtype}; store it "
        f"as {wanted}"
      )
  return tuple(shape)


def _text_width(name: str, features, kind: str) -> int | None:
  """Give the width of the captions' embeddings, if there are any."""
  if kind != "latents" or "embeds" not in features:
    return None
  feature = features["embeds"]
  as_bytes = feature.get_serialized_info().shape == ()
  listed = len(feature.shape) == 2 and feature.shape[0] is None
  if not (as_bytes and listed and feature.np_dtype == np.float16):
    raise ValueError(
      f"{name} has a feature 'embeds', got {feature}; it must be a Tensor of "
      "shape (None, E) and float16, with encoding=Encoding.BYTES"
    )
  return feature.shape[1]
