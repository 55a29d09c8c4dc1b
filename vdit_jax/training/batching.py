"""Which batches a run trains on: all of one shape, or of buckets.

  config, Source --make--> plan.Plan, buckets.Report

Shapes that cannot be are refused here, before anything is compiled. To see what
a config would train on:

  python -m vdit_jax.training.batching --config=configs/digits.py:dit \
    --config.data.buckets.max_tokens=4096 ...

For another mesh than this machine's, give config.data.buckets.multiple_of.
"""

import dataclasses
import math

import jax
import ml_collections
import numpy as np
from absl import flags, logging

from vdit_jax import config_flag, sharding, strict_json, tool
from vdit_jax.data import buckets, plan, reading
from vdit_jax.models.system import Modules
from vdit_jax.training import fields, learner, loop, resolve

FILE = "buckets.json"  # of the workdir

_SIDE = 1024  # pixels that every autoencoder's compression divides


def make(
  config: ml_collections.ConfigDict,
  source: reading.Source,
  modules: Modules,
) -> tuple[plan.Plan, buckets.Report]:
  """Plan the batches of a config that is settled.

  Args:
    config: of the run.
    source: of its records.
    modules: that are trained on them.

  Raises:
    ValueError: for shapes that the networks or the records do not have, and
      buckets that do not suit; see `buckets.make`.
  """
  wanted = buckets.Options(**config.data.buckets)
  run = {"seed": config.seed, "fps": config.data.fps}
  if source.kind == "latents":
    wanted, shape = _in_latents(config, wanted, source, modules)
  else:
    shape = tuple(config.data.shape) or (source.shape or ())[:3]
  if not wanted.max_tokens:
    if len(shape) != 3:
      raise ValueError(
        f"data.shape must be (frames, height, width) of the clips, as those of "
        f"data.name={source.name!r} are of many, got {config.data.shape}; try "
        "(17, 256, 256), or set data.buckets"
      )
    count = tokens(modules, source.kind, shape)
    return buckets.make_one(
      source.index, shape, config.batch_size, count, **run
    )
  return buckets.make(
    source.index,
    wanted,
    lambda *shape: tokens(modules, source.kind, shape),
    unit=_unit(modules),
    multiple_of=wanted.multiple_of,
    **run,
  )


def _unit(modules: Modules) -> tuple[int, int]:
  """Give the pixels by which height and width may differ."""
  latents = modules.autoencoder.latent_shape(1, _SIDE, _SIDE)
  patch = modules.denoiser.cfg.patch[1:] if modules.denoiser else (1, 1)
  return tuple(_SIDE // latents[1] * side for side in patch)  # pyright: ignore[reportReturnType]


def _in_latents(
  config: ml_collections.ConfigDict,
  wanted: buckets.Options,
  source: reading.Source,
  modules: Modules,
) -> tuple[buckets.Options, tuple[int, ...]]:
  """Give the buckets, and the one shape, of a cache: in latents.

  Both are of the config, in pixels, as for the clips that were encoded.

  Raises:
    ValueError: they are not those that the cache has.
  """

  def encoded(shape) -> tuple[int, ...]:
    return modules.autoencoder.latent_shape(*shape)[:3]

  index, several = source.index, bool(wanted.max_tokens)
  sizes = np.stack([index.num_frames, index.height, index.width], 1)
  held = {tuple(row) for row in np.unique(sizes, axis=0).tolist()}
  if several:
    shapes = buckets.make_shapes(wanted, _unit(modules))
    asked = [encoded(shape) for shape in shapes]
    wanted = dataclasses.replace(
      wanted, shapes=tuple(asked), frames=(), areas=(), enlarge=1.0
    )
  elif tuple(config.data.shape):
    asked = [encoded(config.data.shape)]
  else:
    asked = [source.shape[:3]] if source.shape else []
  if not held <= set(asked):
    more = "data.buckets" if several else "data.shape or data.buckets"
    raise ValueError(
      f"data.name={source.name!r} holds latents of {sorted(held)}, but {more} "
      f"give {asked}; set it to what they were made with, "
      f"{source.metadata.get('shapes')} in pixels"
    )
  if several and wanted.small == "move":
    raise ValueError(
      "buckets.small=move needs clips, as latents have the shape that they "
      "have; set it to drop"
    )
  return wanted, asked[0] if asked else ()


def tokens(modules: Modules, kind: str, shape: tuple[int, int, int]) -> int:
  """Count the tokens of a clip of a shape; refuse one that does not fit.

  Args:
    modules: that are trained.
    kind: of the records; those of latents have their shape in latents.
    shape: (num_frames, height, width).
  """
  if kind == "latents":
    return learner.tokens(modules, shape)
  if modules.denoiser is None:
    latents = modules.autoencoder.latent_shape(*shape)
  else:
    latents = modules.system.latent_shape(modules, *shape)
  return learner.tokens(modules, latents)


def share(
  placed: jax.sharding.NamedSharding, planned: plan.Plan, accumulate: int
) -> tuple[int, int]:
  """Tell which share of every batch this process feeds, of how many.

  Args:
    placed: sharding of a batch's leading axis.
    planned: the run's batches.
    accumulate: parts in which each is taken.

  Raises:
    ValueError: a batch does not divide over the mesh, or into the parts;
      names its bucket.
  """
  for bucket in planned.buckets:
    name = f"bucket {buckets.name(bucket.shape)}"
    try:
      found = loop.share(placed, bucket.batch_size)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error
    if bucket.batch_size % accumulate:
      raise ValueError(
        f"{name}: batch_size={bucket.batch_size} does not divide by "
        f"accumulate={accumulate}; set accumulate to a divisor of it"
      )
  return found


def evaluation_shape(
  config: ml_collections.ConfigDict, planned: plan.Plan
) -> reading.Shape:
  """Say in which shape the clips of an evaluation are read.

  Always the same: `data.shape`, or that of the bucket with most pixels.

  Raises:
    ValueError: the split of validation is not there, or has no such clip.
  """
  largest = max(
    planned.buckets, key=lambda b: len(b.positions) * math.prod(b.shape)
  )
  source = open_source(config, config.validation.split)
  if source.kind == "latents":  # which data.shape, in pixels, does not name
    return largest.shape
  shape = tuple(config.data.shape) or largest.shape
  reading.long_enough(source, shape[0], config.data.fps)
  return shape


def open_source(
  config: ml_collections.ConfigDict, split: str
) -> reading.Source:
  """Open a split of a config's dataset."""
  return reading.open_source(config.data.name, split, config.data.data_dir)


def file(report: buckets.Report) -> dict[str, bytes]:
  """Write a report as a file of the workdir: name -> content."""
  text = strict_json.dumps(dataclasses.asdict(report), indent=2)
  return {FILE: text.encode() + b"\n"}


def main(argv: list[str]) -> None:
  """Report on the batches of the flags' config."""
  tool.no_arguments(argv)
  logging.set_verbosity(logging.INFO)
  config = flags.FLAGS.config
  fields.check(config)
  source = open_source(config, config.data.split)
  mesh = sharding.make_mesh(sharding.MeshShape(**config.mesh))
  parts = loop.number_of_parts(sharding.batch_sharding(mesh))
  config = resolve.for_batches(config, source, None, parts)
  _, report = make(config, source, learner.make(config).modules)
  logging.info("batches of %s:\n%s", source.name, report)


if __name__ == "__main__":
  config_flag.define()
  tool.run(main)
