"""Encode a dataset once, so that a denoiser trains without its autoencoder.

  python -m vdit_jax.cache --autoencoder=work/vae --data=moving_digits/one \
    --data_dir=work/data --name=latents/one

writes a TFDS dataset whose records hold the posterior's mean and log-variance
(so that a training step still samples it), captions, key and what else is known
of a clip, and whose metadata name the autoencoder and its normalisation.
`data.name=latents/one` then trains from it. Clips of many sizes are shown in
--shapes=17x256x256,..., their first frames' centre, at --fps: the shapes of
the `data.buckets` that are to train from them.

With --text_encoder=DIR (see `vdit_jax.text_encoder`) they hold the embeddings
of each caption's tokens too, at most --max_length, and a denoiser of a config
with `text_encoder_dir` trains from them.

The devices of a process share a batch and the text encoder's weights. Of
several processes (the hosts of a TPU pod, or --coordinator, --num_processes
and --process_id) each writes files of its own, to a data_dir that all see. A
file that is whole stays: the same command goes on after a kill, with any
number of processes. The dataset appears when all its files are there.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tensorflow_datasets as tfds
import tqdm
from absl import app, flags, logging
from etils import epath
from jax.experimental import multihost_utils

from vdit_jax import autoencoder as autoencoders
from vdit_jax import latents, launch, networks, pipeline, sharding
from vdit_jax import text_encoder as text_encoders
from vdit_jax.data import reading, shards

_BEGUN = "cache.json"  # what an unfinished dataset is of


def make_encoder(path: epath.PathLike, dtype: str = "bfloat16"):
  """Load an autoencoder: (encode(video) -> moments, its names).

  Args:
    path: workdir of ours, or folder of a released one.
    dtype: that a released one computes in.
  """
  params = autoencoders.load(path)
  config = autoencoders.read_config(path, dtype)
  module = networks.build_module(config, "Autoencoder")

  @jax.jit
  def encode(video):
    video = sharding.constrain(video, *["batch", *[None] * 4])
    video = pipeline.to_float(video)
    return module.apply({"params": params}, video, method="moments")

  return encode, autoencoders.names(path)


def make_encoders(
  autoencoder: epath.PathLike,
  text_encoder: epath.PathLike | None,
  max_length: int,
  text_dtype: str,
  sees_padding: bool = False,
  dtype: str = "bfloat16",
) -> latents.Encoders:
  """Load both encoders under the mesh that is set; see `build`."""
  video, made_by = make_encoder(autoencoder, dtype)
  if text_encoder is None:
    return latents.Encoders(video, None, 0, 0, made_by)
  made_by |= {
    "text_encoder": text_encoders.fingerprint(text_encoder),
    "text_encoder_dtype": text_dtype,
    "max_length": max_length,
    "sees_padding": sees_padding,
  }
  frozen = text_encoders.load(text_encoder, text_dtype)
  encode = functools.partial(
    frozen.encode, max_length=max_length, sees_padding=sees_padding
  )
  width = frozen.module.cfg.width
  return latents.Encoders(video, encode, width, max_length, made_by)


def build(
  autoencoder: epath.PathLike,
  data: str,
  data_dir: epath.PathLike,
  name: str,
  splits: Sequence[str],
  text_encoder: epath.PathLike | None = None,
  max_length: int = 226,
  text_dtype: str = "bfloat16",
  sees_padding: bool = False,
  dtype: str = "bfloat16",
  view: latents.View | None = None,
) -> None:
  """Write the latents of a dataset's splits, unless they are there.

  Args:
    autoencoder: workdir of a trained autoencoder, or a released one's folder.
    data: dataset to encode.
    data_dir: TFDS data directory, of both datasets.
    name: dataset to write, NAME/CONFIG.
    splits: to encode.
    text_encoder: folder of a released text encoder; None encodes no captions.
    max_length: tokens of a caption that are encoded.
    text_dtype: that the text encoder computes in.
    sees_padding: whether captions are padded to max_length and the padding
      is seen, and kept (CogVideoX).
    dtype: that a released autoencoder computes in.
    view: how clips are shown to the autoencoder; None is as they are, where
      all have one shape.

  Raises:
    ValueError: for a dataset of this name that others made, or began.
  """
  place = shards.place(data_dir, name)
  sources = {
    split: reading.open_source(data, split, data_dir) for split in splits
  }
  view = view or latents.View()
  for source in sources.values():
    view = latents.settle(source, view)
  mesh = sharding.make_mesh(
    sharding.MeshShape(data=1, fsdp=-1), jax.local_devices()
  )
  with jax.set_mesh(mesh):
    encoders = make_encoders(
      autoencoder, text_encoder, max_length, text_dtype, sees_padding, dtype
    )
    records = {split: source.num_records for split, source in sources.items()}
    made = {"data": data, **encoders.made_by, "records": records}
    made |= json.loads(json.dumps(dataclasses.asdict(view)))
    if _is_there(place, name, made):
      logging.info("already there: %s", place.target)
      return
    planned = _write(place, sources, encoders, view)
    numbers = latents.numbers_of(sources[splits[0]])
    features = latents.features(encoders, view, numbers)
  _wait()
  if jax.process_index() == 0:
    _finish(place, planned, features, made)
  _wait()
  logging.info("written: %s", place.target)


def _write(
  place: shards.Place,
  sources: Mapping[str, reading.Source],
  encoders: latents.Encoders,
  view: latents.View,
) -> dict[str, list[latents.Task]]:
  """Write this process' files; give those of all, by split."""
  planned = {
    split: latents.plan(place.work, source, encoders, view)
    for split, source in sources.items()
  }
  every = [task for share in planned.values() for task in share]
  own = every[jax.process_index() :: jax.process_count()]
  for task in tqdm.tqdm(own, desc=place.dataset, unit="files"):
    latents.write(task, encoders, view)
  return planned


def _finish(
  place: shards.Place,
  planned: Mapping[str, Sequence[latents.Task]],
  features: tfds.features.FeaturesDict,
  made: Mapping[str, Any],
) -> None:
  """Make the dataset of its files, and say what it lacks of its source."""
  splits, left_out = {}, {}
  for split, share in planned.items():
    written = [shards.read(task.path) for task in share]
    lost = [error for shard in written for error in shard.note["lost"]]
    index = shards.read_index(written)
    unfit = made["records"][split] - len(index) - len(lost)
    left_out[split] = {"of no shape": unfit, "unreadable": len(lost)}
    logging.info(
      "%s: %d clips; left out: %s", split, len(index), left_out[split]
    )
    splits[split] = written, index
  description = "Posteriors of clips, and embeddings of their captions."
  metadata = dict(made) | {"left_out": left_out}
  shards.finish(place, features, splits, metadata, description)


def main(argv):
  """Encode the flags' dataset."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  v = flags.FLAGS
  launch.start(v.coordinator, v.num_processes, v.process_id)
  with launch.ending_together():
    build(
      v.autoencoder,
      v.data,
      v.data_dir,
      v.name,
      v.splits,
      v.text_encoder,
      v.max_length,
      v.text_dtype,
      v.sees_padding,
      v.dtype,
      latents.View(
        shapes=tuple(_shape(text) for text in v.shapes),
        enlarge=v.enlarge,
        options=reading.Options(
          fps=v.fps,
          crop="centre",
          caption_template=v.caption_template,
          number_templates=tuple(v.number_templates),
        ),
      ),
    )


def _is_there(place: shards.Place, name: str, made: Mapping[str, Any]) -> bool:
  """Tell whether the dataset is whole; refuse what others made or began."""
  finished = place.is_finished()
  path = place.target / "metadata.json" if finished else place.work / _BEGUN
  found = json.loads(path.read_text()) if path.exists() else None
  if found is None and not finished:
    path.parent.mkdir(parents=True, exist_ok=True)
    shards.write_text(path, json.dumps(made))
    return False
  for what, wanted in made.items():
    value = (found or {}).get(what, "none")
    if what == "sees_padding" and value == "none":
      value = False  # of before there was a choice
    if value != wanted:
      raise ValueError(
        f"name={name!r} was made by {what} {value}, not by {wanted}; remove "
        f"{path.parent} or give another --name"
      )
  return finished


def _wait() -> None:
  """Wait until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("cache")


def _shape(text: str) -> latents.Shape:
  """Read 17x256x256."""
  sides = text.split("x")
  if len(sides) != 3 or not all(side.isdecimal() for side in sides):
    raise ValueError(
      f"shapes must be FRAMESxHEIGHTxWIDTH, got {text!r}; try 17x256x256"
    )
  return tuple(map(int, sides))


if __name__ == "__main__":
  flags.DEFINE_string(
    "autoencoder", None, "Workdir, or a released one's folder.", required=True
  )
  flags.DEFINE_string("data", None, "Dataset to encode.", required=True)
  flags.DEFINE_string(
    "data_dir", None, "TFDS data directory; may be gs://.", required=True
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
  flags.DEFINE_bool(
    "sees_padding",
    False,
    "Keep captions' padding, and let it be seen (CogVideoX).",
  )
  flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["bfloat16", "float32"],
    "Of a released autoencoder's computations.",
  )
  flags.DEFINE_list(
    "shapes", [], "Of clips of many sizes: 17x256x256,1x256x256."
  )
  flags.DEFINE_float("enlarge", 1.0, "How much, to fill one of several shapes.")
  flags.DEFINE_float("fps", 0.0, "Frames a second; 0 is each clip's own.")
  template = reading.Options.caption_template
  flags.DEFINE_string(
    "caption_template", template, "Caption of a clip that has only a class."
  )
  flags.DEFINE_multi_string(
    "number_templates", [], "Appended to captions; see reading.Options."
  )
  flags.DEFINE_string(
    "coordinator", None, "host:port of process 0; not needed on TPU pods."
  )
  flags.DEFINE_integer(
    "num_processes", None, "Of the run; not needed on TPU pods.", 1
  )
  flags.DEFINE_integer(
    "process_id", None, "Which this is; not needed on TPU pods.", 0
  )
  app.run(main)
