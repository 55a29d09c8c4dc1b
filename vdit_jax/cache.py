"""Encode a dataset once, so that a denoiser trains without its autoencoder.

  python -m vdit_jax.cache --autoencoder=work/vae --data=moving_digits/one \
    --data_dir=work/data --name=latents/one

writes a TFDS dataset whose records hold the posterior's mean and log-variance
(so that a training step still samples it), caption and key, and whose metadata
name the autoencoder. `data.name=latents/one` then trains from it.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags, logging
from etils import epath

from vdit_jax import checkpoint, pipeline
from vdit_jax.data import reading
from vdit_jax.training import tasks

_BATCH = 32


class Latents(tfds.core.GeneratorBasedBuilder):
  """Posteriors of a dataset's clips."""

  VERSION = tfds.core.Version("1.0.0")
  url_infos = None  # nothing is downloaded; spares TFDS a search for a list

  def __init__(self, encode, sources, made_by: str, **kwargs):
    """Take encode(video) -> (mean, logvar) and a source for each split."""
    self._encode, self._sources, self._made_by = encode, sources, made_by
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    source = next(iter(self._sources.values()))
    video = jax.ShapeDtypeStruct((1, *source.shape), np.uint8)
    mean, _ = jax.eval_shape(self._encode, video)
    tensor = tfds.features.Tensor(
      shape=mean.shape[1:],
      dtype=np.float16,
      encoding=tfds.features.Encoding.BYTES,
    )
    text = tfds.features.Text()
    features = {"mean": tensor, "logvar": tensor, "caption": text, "key": text}
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(
        autoencoder=self._made_by, data=source.name
      ),
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager  # nothing to download
    return {k: self._generate_examples(v) for k, v in self._sources.items()}

  def _generate_examples(self, source) -> Iterator[tuple[int, dict[str, Any]]]:
    records = reading.records(source)
    index = 0
    while chunk := list(itertools.islice(records, _BATCH)):
      video = np.stack([record["video"] for record in chunk])
      fill = [(0, _BATCH - len(chunk))] + [(0, 0)] * 4
      moments = self._encode(np.pad(video, fill))  # one shape, compiled once
      for row, record in enumerate(chunk):
        mean, logvar = (np.asarray(x[row], np.float16) for x in moments)
        text = {name: record[name] for name in ("caption", "key")}
        yield index, text | {"mean": mean, "logvar": logvar}
        index += 1


def make_encoder(workdir: epath.Path):
  """Load a trained autoencoder: (encode(video) -> moments, fingerprint)."""
  weights = workdir / pipeline.AUTOENCODER_FILE
  params, _ = checkpoint.load_release(weights)
  config = checkpoint.read_config(workdir)
  module = pipeline.build_module(config.autoencoder, "Autoencoder")

  @jax.jit
  def encode(video):
    video = pipeline.to_float(video)
    return module.apply({"params": params}, video, method="moments")

  return encode, tasks.fingerprint(weights.read_bytes())


def build(
  autoencoder: epath.PathLike,
  data: str,
  data_dir: epath.PathLike,
  name: str,
  splits: Sequence[str],
) -> None:
  """Write the latents of a dataset's splits, unless they are there.

  Args:
    autoencoder: workdir of a trained autoencoder.
    data: dataset to encode.
    data_dir: TFDS data directory, of both datasets; local.
    name: dataset to write, NAME/CONFIG.
    splits: to encode.
  """
  encode, made_by = make_encoder(epath.Path(autoencoder))
  sources = {
    split: reading.open_source(data, split, data_dir) for split in splits
  }
  Latents.name, _, config = name.partition("/")
  builder = Latents(
    encode,
    sources,
    made_by,
    data_dir=data_dir,
    config=tfds.core.BuilderConfig(name=config or "all"),
  )
  if builder.is_prepared():
    _check_same(name, data_dir, made_by)
  builder.download_and_prepare()
  logging.info("written: %s", builder.data_path)


def main(argv):
  """Encode the flags' dataset."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  tfds.disable_progress_bar()  # one of ours is enough
  v = flags.FLAGS
  build(v.autoencoder, v.data, v.data_dir, v.name, v.splits)


def _check_same(name: str, data_dir: str, made_by: str) -> None:
  """Refuse to take the latents of another autoencoder for this one's."""
  found = reading.open_source(name, "train", data_dir).metadata["autoencoder"]
  if found != made_by:
    raise ValueError(
      f"name={name!r} in {data_dir} was made by autoencoder {found}, not by "
      f"{made_by}; remove it or give another --name"
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
  app.run(main)
