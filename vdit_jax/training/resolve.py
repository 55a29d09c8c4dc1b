"""A run's config, completed once: what follows from data, folders and mesh.

  config as given, Source, workdir --complete--> the config that the run keeps

Nothing else changes a config. What it lacks is read here: the autoencoder that
made the latents, the text encoders and the released weights that the run begins
from, each with the fingerprint by which another is refused later; the
tokenizer's size; by how many clips the batches of buckets differ.
"""

import hashlib

import ml_collections
from etils import epath

from vdit_jax import checkpoint
from vdit_jax.data import reading
from vdit_jax.models import families
from vdit_jax.nn import lora
from vdit_jax.text import tokenizer as tokenizers
from vdit_jax.training import captions, learner
from vdit_jax.weights import autoencoder as autoencoders
from vdit_jax.weights import base_model, run_config
from vdit_jax.weights import frame_encoder as frame_encoders
from vdit_jax.weights import text_encoder as text_encoders
from vdit_jax.weights import workdir as workdirs


def complete(
  config: ml_collections.ConfigDict,
  source: reading.Source,
  workdir: epath.PathLike,
  parts: int = 1,
) -> ml_collections.ConfigDict:
  """Return the config that a run keeps; refuse what cannot work, early.

  Args:
    config: of a file in configs/.
    source: of the records that it trains on.
    workdir: of the run, which may have begun.
    parts: that the mesh splits a batch into.
  """
  config, workdir = _copy(config), epath.Path(workdir)
  learner.check_task(config)
  config = for_batches(config, source, workdir, parts)
  if config.task == "autoencoder":
    if source.kind == "latents":
      raise ValueError(
        f"data.name={source.name!r} holds latents; an autoencoder trains on a "
        "dataset of videos"
      )
    return config
  _check_latents(config, source)
  config.init_fingerprint = base_model.check(
    config, begins=not checkpoint.has_begun(workdir)
  )
  if "lora" in config and config.lora.rank:
    adapters = lora.of(config)
    config.lora.alpha = adapters.scale * adapters.rank
  low, high = base_model.times(config)
  goal = config.objective
  goal.t_low = low if goal.t_low is None else goal.t_low
  goal.t_high = high if goal.t_high is None else goal.t_high
  _complete_frame_encoders(config, source)
  _complete_text(config, source, workdir)
  if config.samples.prompts and learner.needs(config):
    raise ValueError(
      "samples.prompts must be empty for an image-to-video denoiser, whose "
      "samples need an image; sample the workdir with sample.py --image"
    )
  return config


def for_batches(
  config: ml_collections.ConfigDict,
  source: reading.Source,
  workdir: epath.PathLike | None,
  parts: int,
) -> ml_collections.ConfigDict:
  """Return a config as complete as the plan of its batches needs it.

  Args:
    config, source, parts: see `complete`.
    workdir: None is of no run.
  """
  config = _copy(config)
  wanted = learner.wanted(config)
  reading.check_options(source, wanted.options, wanted.cond)
  if config.data.flip:
    reading.check_sides(source)
  if config.task == "denoiser":
    config.autoencoder = autoencoders.read_config(
      config.autoencoder_workdir, config.autoencoder.dtype
    )
  return with_buckets(config, workdir, parts)


def stands_on(
  config: ml_collections.ConfigDict,
  source: reading.Source,
  workdir: epath.PathLike,
) -> dict[str, str]:
  """Name by its content what a run stands on and does not train.

  What the config names by its content already is left to it.

  Args:
    config: completed.
    source: of the records.
    workdir: of the run.
  """
  index = source.index
  found = {"records": str(len(index)), "index of records": index.digest()}
  if config.task == "autoencoder":
    return found
  if not config.text_encoder_dir:
    content = (epath.Path(workdir) / workdirs.TOKENIZER_FILE).read_bytes()
    found["tokenizer"] = hashlib.sha256(content).hexdigest()[:16]
  return found | autoencoders.names(config.autoencoder_workdir)


def with_buckets(
  config: ml_collections.ConfigDict,
  workdir: epath.PathLike | None,
  parts: int,
) -> ml_collections.ConfigDict:
  """Return a config that says by how many clips the batches of buckets differ.

  A run keeps what it began with, so that on another mesh its batches are the
  same. See `for_batches`.
  """
  config = _copy(config)
  group = config.data.buckets
  if group.max_tokens and not group.multiple_of:
    kept = 0  # in a run that was begun without buckets too
    if workdir is not None and checkpoint.has_begun(workdir):
      kept = run_config.read(workdir).data.buckets.multiple_of
    group.multiple_of = kept or parts * config.accumulate
  return config


def _copy(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  fields = config.copy_and_resolve_references().to_dict()
  return ml_collections.ConfigDict(run_config.upgrade(fields))


def _check_latents(config, source: reading.Source) -> None:
  """Refuse latents that another autoencoder made, or without images."""
  if source.kind != "latents":
    return
  for what, ours in autoencoders.names(config.autoencoder_workdir).items():
    made_by = source.metadata.get(what, "none")
    if made_by != ours:
      raise ValueError(
        f"data.name={source.name!r} holds latents of {what} {made_by}, but "
        f"that of autoencoder_workdir={config.autoencoder_workdir!r} is "
        f"{ours}; make them again with python -m vdit_jax.cache"
      )
  n, held = learner.takes(config), source.metadata.get("stills", 0)
  if n and held != n:
    raise ValueError(
      f"data.name={source.name!r} holds latents without those of each frame "
      f"alone, which denoiser.given={n} is shown; make them again with python "
      "-m vdit_jax.cache --stills, or name a dataset of videos"
    )
  wanted, held = list(learner.needs(config)), source.metadata.get("given", [])
  if wanted and held != wanted:
    raise ValueError(
      f"data.name={source.name!r} holds latents and frames {held} of their "
      f"clips, but this denoiser is given frames {wanted}; make them again "
      "with python -m vdit_jax.cache and --text_encoder of the whole pipeline, "
      "or name a dataset of videos"
    )


def _complete_frame_encoders(config, source: reading.Source) -> None:
  """Name what encodes given frames; refuse a cache of another's."""
  system, folder = (
    families.system(config.denoiser.name),
    config.frame_encoder_dir,
  )
  for name in frame_encoders.names(config, system):
    found = frame_encoders.fingerprint(folder, name)
    made_by = source.metadata.get(name, "none")
    if source.kind == "latents" and made_by != found:
      raise ValueError(
        f"data.name={source.name!r} holds what {name} {made_by} made of given "
        f"frames, but that of frame_encoder_dir={folder!r} is {found}; make "
        "them again with python -m vdit_jax.cache"
      )
    network, cfg = frame_encoders.describe(folder, name, config[name].dtype)
    config[name] = run_config.network(network, cfg)
    config[f"{name}_fingerprint"] = found


def _complete_text(config, source: reading.Source, workdir) -> None:
  """Complete the groups of the text encoders.

  One that is not trained is that of its folder, and computes as it did for the
  dataset.
  """
  system = families.system(config.denoiser.name)
  for name in system.text:
    if not config.text_encoder_dir:
      tokenizer = tokenizers.load(workdir / workdirs.TOKENIZER_FILE)
      config[name].vocab_size = tokenizer.vocab_size
      continue
    folder, dtype = config.text_encoder_dir, config[name].dtype
    made_by = text_encoders.fingerprint(folder, name)
    if source.kind == "latents":
      captions.check_embeds(config, source, name, made_by)
      dtype = source.metadata[f"{name}_dtype"]
    network, cfg = text_encoders.describe(folder, dtype, name)
    if len(system.text) == 1 and cfg.width != config.denoiser.text_width:
      raise ValueError(
        f"denoiser.text_width is {config.denoiser.text_width}, but embeddings "
        f"of text_encoder_dir={folder!r} are {cfg.width} wide; set "
        f"denoiser.text_width={cfg.width}"
      )
    config[name] = run_config.network(network, cfg)
    config[f"{name}_fingerprint"] = made_by
