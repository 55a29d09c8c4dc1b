"""Encode a dataset once, so that a denoiser trains without its autoencoder.

  python -m vdit_jax.cache --autoencoder=work/vae --data=moving_digits/one \
    --data_dir=work/data --name=latents/one

writes a TFDS dataset whose records hold the posterior's mean and log-variance
(so that a training step still samples it), caption and key, and whose metadata
name the autoencoder. `data.name=latents/one` then trains from it.

With --text_encoder=DIR (see `vdit_jax.text_encoder`) they hold the embeddings
of the caption's tokens too, at most --max_length, and a denoiser of a config
with `text_encoder_dir` trains from them.

All devices of the machine work, and share the text encoder's weights. Files
are written one by one, each from memory, and the dataset appears when it is
whole: what is broken off starts again.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags, logging
from etils import epath

from vdit_jax import checkpoint, pipeline, sharding, types
from vdit_jax import text_encoder as text_encoders
from vdit_jax.data import reading
from vdit_jax.training import tasks

_BATCH = 32  # clips at once, and at least one a device
_SHARD = 2**28  # bytes of a file, about; TFDS holds them in memory

_HALF = np.finfo(np.float16)


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


class Latents(tfds.core.ShardBasedBuilder):
  """Posteriors of a dataset's clips, and embeddings of their captions."""

  VERSION = tfds.core.Version("1.0.0")
  url_infos = None  # nothing is downloaded; spares TFDS a search for a list

  def __init__(self, encoders: Encoders, sources, **kwargs):
    """Take the encoders and a source for each split."""
    self._encoders, self._sources = encoders, sources
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    source = next(iter(self._sources.values()))
    video = jax.ShapeDtypeStruct((_batch_size(), *source.shape), np.uint8)
    mean, _ = jax.eval_shape(self._encoders.video, video)
    text = tfds.features.Text()
    latents = _feature(mean.shape[1:])
    features = {"mean": latents, "logvar": latents}
    if self._encoders.text:
      features["embeds"] = _feature((None, self._encoders.text_width))
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(
        features | {"caption": text, "key": text}
      ),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(
        data=source.name, **self._encoders.made_by
      ),
    )

  def _shard_iterators_per_split(self, dl_manager) -> dict[str, list]:
    del dl_manager  # nothing to download
    numbers = 2 * math.prod(self.info.features["mean"].shape)
    numbers += self._encoders.max_length * self._encoders.text_width
    batches = _SHARD // (_batch_size() * numbers * _HALF.dtype.itemsize)
    step = max(batches, 1) * _batch_size()
    return {
      split: [
        functools.partial(self._records, source, start, start + step)
        for start in range(0, source.num_records, step)
      ]
      for split, source in self._sources.items()
    }

  def _records(
    self, source: reading.Source, start: int, stop: int
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    positions = range(start, min(stop, source.num_records))
    records, index = reading.records(source, positions), start
    while chunk := list(itertools.islice(records, _batch_size())):
      for example in _encode(self._encoders, chunk):
        yield index, example
        index += 1


def make_encoder(workdir: epath.Path):
  """Load a trained autoencoder: (encode(video) -> moments, fingerprint)."""
  weights = workdir / pipeline.AUTOENCODER_FILE
  params, _ = checkpoint.load_release(weights)
  config = checkpoint.read_config(workdir)
  module = pipeline.build_module(config.autoencoder, "Autoencoder")

  @jax.jit
  def encode(video):
    video = sharding.constrain(video, *["batch", *[None] * 4])
    video = pipeline.to_float(video)
    return module.apply({"params": params}, video, method="moments")

  return encode, tasks.fingerprint(weights.read_bytes())


def make_encoders(
  autoencoder: epath.PathLike,
  text_encoder: epath.PathLike | None,
  max_length: int,
  text_dtype: str,
) -> Encoders:
  """Load both encoders under the mesh that is set; see `build`."""
  video, name = make_encoder(epath.Path(autoencoder))
  made_by = {"autoencoder": name}
  if text_encoder is None:
    return Encoders(video, None, 0, 0, made_by)
  made_by |= {
    "text_encoder": text_encoders.fingerprint(text_encoder),
    "text_encoder_dtype": text_dtype,
    "max_length": max_length,
  }
  frozen = text_encoders.load(text_encoder, text_dtype)
  encode = functools.partial(frozen.encode, max_length=max_length)
  width = frozen.module.cfg.width
  return Encoders(video, encode, width, max_length, made_by)


def build(
  autoencoder: epath.PathLike,
  data: str,
  data_dir: epath.PathLike,
  name: str,
  splits: Sequence[str],
  text_encoder: epath.PathLike | None = None,
  max_length: int = 226,
  text_dtype: str = "bfloat16",
) -> None:
  """Write the latents of a dataset's splits, unless they are there.

  Args:
    autoencoder: workdir of a trained autoencoder.
    data: dataset to encode.
    data_dir: TFDS data directory, of both datasets; local.
    name: dataset to write, NAME/CONFIG.
    splits: to encode.
    text_encoder: folder of a released text encoder; None encodes no captions.
    max_length: tokens of a caption that are encoded.
    text_dtype: that the text encoder computes in.
  """
  sources = {
    split: reading.open_source(data, split, data_dir) for split in splits
  }
  Latents.name, _, config = name.partition("/")
  mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=-1))
  with jax.set_mesh(mesh):
    encoders = make_encoders(autoencoder, text_encoder, max_length, text_dtype)
    builder = Latents(
      encoders,
      sources,
      data_dir=data_dir,
      config=tfds.core.BuilderConfig(name=config or "all"),
    )
    if builder.is_prepared():
      _check_same(name, splits[0], data_dir, encoders.made_by)
    builder.download_and_prepare()
  logging.info("written: %s", builder.data_path)


def main(argv):
  """Encode the flags' dataset."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  tfds.disable_progress_bar()  # one of ours is enough
  v = flags.FLAGS
  build(
    v.autoencoder,
    v.data,
    v.data_dir,
    v.name,
    v.splits,
    v.text_encoder,
    v.max_length,
    v.text_dtype,
  )


def _batch_size() -> int:
  """Clips at once: the same number for each device."""
  return _BATCH + -_BATCH % sharding.mesh_size("batch")


def _feature(shape: tuple[int | None, ...]) -> tfds.features.Tensor:
  encoding = tfds.features.Encoding.BYTES
  return tfds.features.Tensor(shape=shape, dtype=np.float16, encoding=encoding)


def _encode(
  encoders: Encoders, records: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
  """Encode at most a batch of records, in arrays that are always alike."""
  fill = _batch_size() - len(records)
  video = np.stack([record["video"] for record in records])
  video = np.pad(video, [(0, fill)] + [(0, 0)] * 4)
  moments = [np.asarray(x) for x in encoders.video(video)]
  if encoders.text:
    captions = [record["caption"] for record in records] + [""] * fill
    text = encoders.text(captions)
  for row, record in enumerate(records):
    arrays = {"mean": moments[0][row], "logvar": moments[1][row]}
    if encoders.text:
      arrays["embeds"] = text.embeds[row, text.mask[row]]
    halves = {k: _half(k, record["key"], x) for k, x in arrays.items()}
    yield halves | {name: record[name] for name in ("caption", "key")}


def _half(name: str, key: str, values: np.ndarray) -> np.ndarray:
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


def _check_same(
  name: str, split: str, data_dir: epath.PathLike, made_by: dict[str, Any]
) -> None:
  """Refuse to take what other encoders made for these ones'."""
  found = reading.open_source(name, split, data_dir).metadata
  for what, wanted in made_by.items():
    value = found[what] if what in found else "none"
    if value != wanted:
      raise ValueError(
        f"name={name!r} in {data_dir} was made by {what} {value}, not by "
        f"{wanted}; remove it or give another --name"
      )


if __name__ == "__main__":
  flags.DEFINE_string(
    "autoencoder", None, "Workdir of a trained autoencoder.", required=True
  )
  flags.DEFINE_string("data", None, "Dataset to encode.", required=True)
  flags.DEFINE_string(
    "data_dir", None, "TFDS data directory; local.", required=True
  )
  flags.DEFINE_string("name", None, "Dataset to write.", required=True)
  flags.DEFINE_list("splits", ["train", "validation"], "Splits to encode.")
  flags.DEFINE_string(
    "text_encoder", None, "Folder of a released text encoder; default: none."
  )
  flags.DEFINE_integer("max_length", 226, "Tokens of a caption.", 1)
  flags.DEFINE_enum(
    "text_dtype",
    "bfloat16",
    ["bfloat16", "float32"],
    "Of the text encoder's weights and computations.",
  )
  app.run(main)
