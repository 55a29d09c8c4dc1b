"""Datasets of latents: encoded, checked against what is there, written.

Source, encoders, View --build--> a TFDS dataset; `vdit_jax.cache` is the tool
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from vdit_jax import encoding, inputs, sharding, strict_json, writing
from vdit_jax.cache import latents
from vdit_jax.convert import folders
from vdit_jax.data import reading, shards
from vdit_jax.models import families, networks
from vdit_jax.nn import stills
from vdit_jax.training import images
from vdit_jax.weights import autoencoder as autoencoders
from vdit_jax.weights import base_model, component, diffusers_folder
from vdit_jax.weights import frame_encoder as frame_encoders
from vdit_jax.weights import text_encoder as text_encoders

_BEGUN = "cache.json"  # what an unfinished dataset is of


@dataclasses.dataclass(frozen=True)
class TextOptions:
  """How captions are encoded.

  Attributes:
    folder: of a released text encoder, or of a pipeline with several.
    max_length: tokens of a caption that are encoded, at most.
    dtype: that the text encoder computes in.
    padding: who sees what is behind a caption, of `text.padding.KINDS`: as the
      system wants it that is to train on the cache. Seen, it is kept too. None
      is as a pipeline's system has it by encoder, or "masked".
  """

  folder: epath.PathLike
  max_length: int = 226
  dtype: str = "bfloat16"
  padding: str | None = None


def make_encoder(
  path: epath.PathLike, dtype: str = "bfloat16"
) -> tuple[Callable[..., Any], dict[str, Any]]:
  """Load an autoencoder: (encode(video) -> moments, its names).

  Args:
    path: workdir of ours, or folder of a released one.
    dtype: that a released one computes in.
  """
  module, params = _autoencoder(path, dtype)

  @jax.jit
  def encode(video):
    video = sharding.constrain(video, *["batch", *[None] * 4])
    video = encoding.to_float(video)
    return module.apply({"params": params}, video, method="moments")

  return encode, autoencoders.names(path)


def make_stills(
  path: epath.PathLike, dtype: str = "bfloat16"
) -> tuple[latents.Given, dict[str, Any]]:
  """Load what encodes each frame alone, for a denoiser that takes any.

  Args:
    path: workdir of ours, or folder of a released autoencoder.
    dtype: that a released one computes in.

  Returns:
    It, and what the metadata say of it.
  """
  module, params = _autoencoder(path, dtype)
  apply = functools.partial(module.apply, {"params": params})

  @jax.jit
  def encode(video):
    video = sharding.constrain(video, *["batch", *[None] * 4])
    return {"autoencoder": stills.encode(apply, encoding.to_float(video))}

  return latents.Given((), encode), {"stills": module.cfg.time_stride}


def _autoencoder(path: epath.PathLike, dtype: str) -> tuple[Any, Any]:
  """Load an autoencoder: module and params."""
  params = autoencoders.load(path)
  config = autoencoders.read_config(path, dtype)
  return networks.build_module(config, "autoencoder"), params


def make_encoders(
  autoencoder: epath.PathLike,
  text: TextOptions | None,
  dtype: str = "bfloat16",
  alone: bool = False,
) -> latents.Encoders:
  """Load the encoders under the mesh that is set; see `build`."""
  video, made_by = make_encoder(autoencoder, dtype)
  given, words = None, {}
  if alone:
    given, named = make_stills(autoencoder, dtype)
    made_by |= named
  for folder in (autoencoder, text and text.folder):
    if given is None and folder and _has_denoiser(folder):
      given, named = make_given(folder, dtype)
      made_by |= named
  if text is None:
    return latents.Encoders(video, {}, made_by, given)
  for name, (padding, length) in _rules(text).items():
    made_by[name] = text_encoders.fingerprint(text.folder, name)
    made_by[f"{name}_dtype"] = text.dtype
    frozen = text_encoders.load(text.folder, text.dtype, name=name)
    encode = functools.partial(
      frozen.encode,
      max_length=length,
      # What is zero need not be stored.
      padding="seen" if padding == "seen" else "masked",
    )
    like = encoding.describe_text(frozen.module, 1, length)
    width = like.embeds.shape[-1]
    pooled = 0 if like.pooled is None else like.pooled.shape[-1]
    words[name] = latents.Words(encode, width, length, pooled)
    made_by |= {f"{name}_max_length": length, f"{name}_padding": padding}
  return latents.Encoders(video, words, made_by, given)


def _has_denoiser(path: epath.PathLike) -> bool:
  """Tell whether a folder is a pipeline's, its denoiser there too."""
  if not diffusers_folder.is_one(path):
    return False
  denoiser = diffusers_folder.part(path, "denoiser")
  return (denoiser / folders.CONFIG).exists()


def make_given(
  path: epath.PathLike, dtype: str
) -> tuple[latents.Given | None, dict[str, Any]]:
  """Load what encodes the frames that a pipeline's denoiser must be given.

  Args:
    path: folder of the pipeline.
    dtype: that its networks compute in.

  Returns:
    It, None where no frames are needed, and what the metadata say of it.
  """
  folder, found = diffusers_folder.read(path), {}
  kept = frame_encoders.names(folder.networks, folder.system)
  for name in ("autoencoder", "denoiser", *kept):
    kind = networks.kind_of(name)
    network, cfg = component.describe(folder.networks[name], kind, dtype)
    found[name] = network.module(cfg)
  modules = networks.gather(found)
  if not modules.needs:
    return None, {}
  params = {name: frame_encoders.load(path, name, dtype) for name in kept}
  if kept:
    params["autoencoder"] = autoencoders.load(path)

  @jax.jit
  def encode(video):
    video = sharding.constrain(video, *["batch", *[None] * 4])
    return images.encode(modules, params, video) if kept else {}

  made_by = {n: frame_encoders.fingerprint(path, n) for n in kept}
  stride = modules.autoencoder.cfg.space_stride
  made_by |= {"given": list(modules.needs), "given_stride": stride}
  return latents.Given(modules.needs, encode), made_by


def _rules(text: TextOptions) -> dict[str, tuple[str, int]]:
  """Settle padding and most tokens of a caption, by text encoder."""
  names, known = text_encoders.names(text.folder), None
  if diffusers_folder.is_one(text.folder):
    index = writing.absolute(text.folder) / folders.PIPELINE
    name = folders.class_name(inputs.read_json(index), str(index))
    known = families.of_pipeline(name)
  if known is None:
    return {name: (text.padding or "masked", text.max_length) for name in names}
  cfg = None  # of which the lengths of several are
  if len(known.text) > 1:
    _, cfg = base_model.describe(text.folder, "float32")
  lengths = known.lengths(cfg, text.max_length)
  return {
    name: (text.padding or rule.padding, lengths[name])
    for name, rule in known.text.items()
  }


def build(
  autoencoder: epath.PathLike,
  data: str,
  data_dir: epath.PathLike,
  name: str,
  splits: Sequence[str],
  text: TextOptions | None = None,
  dtype: str = "bfloat16",
  view: latents.View | None = None,
  alone: bool = False,
) -> None:
  """Write the latents of a dataset's splits, unless they are there.

  Args:
    autoencoder: workdir of a trained autoencoder, or a released one's folder.
    data: dataset to encode.
    data_dir: TFDS data directory, of both datasets.
    name: dataset to write, NAME/CONFIG.
    splits: to encode.
    text: how captions are encoded; None encodes none.
    dtype: that a released autoencoder computes in.
    view: how clips are shown to the autoencoder; None is as they are, where
      all have one shape.
    alone: whether each frame is encoded alone too, for a denoiser that may be
      given any.

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
  shape = sharding.MeshShape(data=1, fsdp=-1)
  with jax.set_mesh(sharding.make_mesh(shape, jax.local_devices())):
    encoders = make_encoders(autoencoder, text, dtype, alone)
    made = _made(data, sources, encoders, view)
    if _is_there(place, name, made):
      if jax.process_index() == 0:
        shards.clear(place)
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


def _made(data: str, sources, encoders, view) -> dict[str, Any]:
  """Say of what a dataset is made, as its metadata do."""
  records = {split: source.num_records for split, source in sources.items()}
  made = {"data": data, **encoders.made_by, "records": records}
  return made | json.loads(strict_json.dumps(dataclasses.asdict(view)))


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


def _is_there(place: shards.Place, name: str, made: Mapping[str, Any]) -> bool:
  """Tell whether the dataset is whole; refuse what others made or began."""
  finished = place.is_finished()
  path = place.target / "metadata.json" if finished else place.work / _BEGUN
  found = json.loads(path.read_text()) if path.exists() else None
  if found is None and not finished:
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.write(path, strict_json.dumps(made))
    return False
  known = text_encoders.made(found or {})
  for what, wanted in made.items():
    value = known.get(what, "none")
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


def parse_shape(text: str) -> latents.Shape:
  """Read 17x256x256."""
  sides = text.split("x")
  if len(sides) != 3 or not all(side.isdecimal() for side in sides):
    raise ValueError(
      f"shapes must be FRAMESxHEIGHTxWIDTH, got {text!r}; try 17x256x256"
    )
  frames, height, width = map(int, sides)
  return frames, height, width
