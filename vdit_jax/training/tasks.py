"""What a run trains: the networks, loss, hooks and files of each task.

`make(config, ...)` turns `config.task` into a `Task` for `train.py`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from vdit_jax import checkpoint, pipeline, sharding, types
from vdit_jax.data import buckets, plan, reading
from vdit_jax.media import formats, sheets
from vdit_jax.metrics import frames
from vdit_jax.models import networks
from vdit_jax.nn import lora
from vdit_jax.text import tokenizer as tokenizers
from vdit_jax.training import (
  autoencoder,
  batching,
  captions,
  denoiser,
  loop,
)
from vdit_jax.training import learner as learners
from vdit_jax.training import state as states
from vdit_jax.weights import autoencoder as autoencoders
from vdit_jax.weights import base_model
from vdit_jax.weights import workdir as workdirs

_BATCH = 32  # clips of validation, and of measuring latents, at once
_SHEET = 6  # clips of a contact sheet
_MEASURED = 1_024  # clips whose latents are measured


@dataclasses.dataclass(frozen=True)
class Task:
  """A run's parts that depend on what is trained.

  Attributes:
    config: fully resolved.
    plan: of the batches.
    report: which records they have.
    init: key -> params, boxed with logical axes.
    start: reads params to begin from in place of `init`'s; None: those.
    loss: see `training.state`.
    frozen: weights that the loss uses and does not train.
    tokenizer: of the captions; None where they are not used, or read as
      embeddings.
    hooks: see `loop.Schedule`.
    files: to be in the workdir before training, name -> bytes.
    finish: called with the last state.
  """

  config: ml_collections.ConfigDict
  plan: plan.Plan
  report: buckets.Report
  init: Callable[[jax.Array], Any]
  start: Callable[[], Any] | None
  loss: Callable
  frozen: Any
  tokenizer: tokenizers.Tokenizer | None
  hooks: dict[str, tuple[int, loop.Hook]]
  files: dict[str, bytes]
  finish: Callable[[states.TrainState], None]


def make(
  config: ml_collections.ConfigDict,
  source: reading.Source,
  workdir: epath.PathLike,
) -> Task:
  """Make the task that a config names; refuse what cannot work, early."""
  config = ml_collections.ConfigDict(config).unlock()
  workdir = epath.Path(workdir)
  batching.check(config, source)
  if config.task == "autoencoder":
    return _autoencoder(config, source, workdir)
  return _denoiser(config, source, workdir)


def _autoencoder(config, source, workdir: epath.Path) -> Task:
  learner = learners.make(config)
  module = learner.modules.autoencoder
  if source.kind == "latents":
    raise ValueError(
      f"data.name={source.name!r} holds latents; an autoencoder trains on a "
      "dataset of videos"
    )
  planned, report = batching.make(config, source, learner.modules)
  clips = batching.evaluation(config, planned)

  def validate(state: states.TrainState, step: int) -> dict[str, float]:
    batches = _validation(config, None, clips)
    return _reconstruction(module, state.ema, batches, workdir, step)

  def finish(state: states.TrainState) -> None:
    batches = reading.evaluation_batches(source, None, _BATCH, 1, **clips)
    few = itertools.islice((b for b, _ in batches), _MEASURED // _BATCH)
    mean, std = autoencoder.measure_latents(module, state.ema, few)
    logging.info("latents: mean %s, std %s", mean, std)
    params = state.ema | {"latent_mean": mean, "latent_std": std}
    checkpoint.save_release(
      workdir / autoencoders.FILE,
      params,
      {"config": config.autoencoder.to_json()},
      dtype=jnp.float32,
    )

  return Task(
    config=config,
    plan=planned,
    report=report,
    init=learner.init,
    start=None,
    loss=learner.loss,
    frozen={},
    tokenizer=None,
    hooks={"validation": (config.validation.every, validate)},
    files={},
    finish=finish,
  )


def _denoiser(config, source, workdir: epath.Path) -> Task:
  folder = config.autoencoder_workdir
  _check_source(config, source)
  config.autoencoder = autoencoders.read_config(
    folder, config.autoencoder.dtype
  )
  base_model.resolve(config)
  tokenizer = captions.resolve(config, source, workdir)
  learner = learners.make(config)
  planned, report = batching.make(config, source, learner.modules)
  clips = batching.evaluation(config, planned)
  prompts = list(config.samples.prompts)
  if prompts and "image" in config:
    raise ValueError(
      "samples.prompts must be empty for an image-to-video denoiser, whose "
      "samples need an image; sample the workdir with sample.py --image"
    )
  text, frozen = None, {}
  if config.text_encoder_dir:
    text, frozen = captions.encode(config, prompts, tokenizer is not None)
  with jax.set_mesh(sharding.make_mesh(sharding.MeshShape(**config.mesh))):
    frozen["autoencoder"] = autoencoders.load(folder)
    if lora.of(config).rank:
      frozen["denoiser"] = base_model.load(config, config.lora.base_dtype)
  frozen = jax.tree.map(jnp.asarray, frozen)
  run = _Run(config, learner.modules, frozen, tokenizer, clips, workdir)
  hooks = {"validation": (config.validation.every, _validate(run))}
  if prompts:
    hooks["samples"] = config.samples.every, _sample(run, prompts, text)
  files = {}
  if not autoencoders.is_released(folder):
    weights = epath.Path(folder) / autoencoders.FILE
    files[autoencoders.FILE] = weights.read_bytes()
  return Task(
    config=config,
    plan=planned,
    report=report,
    init=learner.init,
    start=_start(config, workdir),
    loss=learner.loss,
    frozen=frozen,
    tokenizer=tokenizer,
    hooks=hooks,
    files=files,
    finish=lambda state: None,
  )


@dataclasses.dataclass(frozen=True)
class _Run:
  """What the hooks of a denoiser's run need."""

  config: ml_collections.ConfigDict
  modules: networks.Modules
  frozen: dict[str, Any]
  tokenizer: tokenizers.Tokenizer | None
  clips: dict[str, Any]  # of `batching.evaluation`
  workdir: epath.Path


def _sample(
  run: _Run, prompts: list[str], text: types.Text | None
) -> loop.Hook:
  """Make the hook that samples the config's prompts."""

  def sample(state: states.TrainState, step: int) -> dict[str, float]:
    whole = pipeline.Pipeline(
      modules=run.modules,
      params=state.ema | run.frozen,
      tokenizer=run.tokenizer,
      recipe=workdirs.recipe(run.config),
      max_length=run.config.data.max_length,
    )
    videos = whole.generate(prompts, text=text)
    _write_sheet(run.workdir, step, videos, prompts)
    return {}

  return sample


def _validate(run: _Run) -> loop.Hook:
  """Make the hook that measures the loss at fixed levels."""
  config = run.config
  goal, levels = learners.objective(config), config.validation.levels
  check = jax.jit(
    denoiser.make_validation(
      run.modules, goal, levels, **learners.options(config)
    )
  )

  def validate(state: states.TrainState, step: int) -> dict[str, float]:
    total, count = jnp.zeros(len(levels)), jnp.zeros(())
    for seed, batch in enumerate(_validation(config, run.tokenizer, run.clips)):
      losses, clips = check(state.ema, run.frozen, batch, seed)
      total, count = total + losses, count + clips
    losses = np.asarray(total / count)
    named = zip(levels, losses, strict=True)
    rows = {f"validation_loss_t{level:g}": float(x) for level, x in named}
    return {"validation_loss": float(losses.mean())} | rows

  return validate


def _start(
  config: ml_collections.ConfigDict, workdir: epath.Path
) -> Callable[[], Any] | None:
  """Read the weights to fine-tune."""
  if not config.init_from or lora.of(config).rank:
    return None
  if base_model.is_released(config):
    return lambda: {"denoiser": base_model.load(config, jnp.float32)}
  captions.check_same(config, workdir)

  def read() -> Any:
    _, _, params = workdirs.load(config.init_from)
    return {k: v for k, v in params.items() if k != "autoencoder"}

  return read


def reconstruct(
  module: Any, params: Any, video: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Pass video through the autoencoder: output, PSNR [B], SSIM [B]."""
  variables = {"params": params}
  latents = module.apply(variables, video, method="encode")
  output = module.apply(variables, latents, method="decode")
  output = jnp.clip(output, -1, 1)
  return output, frames.psnr(output, video), frames.ssim(output, video)


def _reconstruction(module, params, clips, workdir, step):
  """Measure PSNR and SSIM, and draw originals above reconstructions."""
  run = jax.jit(
    lambda p, v: reconstruct(module, p, pipeline.to_float(v)),
    out_shardings=jax.sharding.PartitionSpec(),  # every process has it all
  )
  rows, weight = [], []
  for batch in clips:
    output, *scores = run(params, batch.video)
    if not rows:
      pairs = np.stack([pipeline.to_float(batch.video), output], axis=1)
      sheet = pairs[:_SHEET].reshape(-1, *output.shape[1:])
      names = ["original", "reconstruction"] * (len(sheet) // 2)
      _write_sheet(workdir, step, sheet, names)
    rows.append(np.stack(scores))
    weight.append(batch.weight)
  means = np.average(np.concatenate(rows, 1), 1, np.concatenate(weight))
  return {"psnr": float(means[0]), "ssim": float(means[1])}


def _validation(config, tokenizer, clips) -> Iterator[types.Batch]:
  """Read the validation split's first clips, whatever training's buckets."""
  batch = min(_BATCH, config.batch_size)
  source = batching.open_source(config, config.validation.split)
  batches = reading.evaluation_batches(
    source, tokenizer, batch, config.data.max_length, **clips
  )
  number = -(-config.validation.clips // batch)
  return (batch for batch, _ in itertools.islice(batches, number))


def _write_sheet(workdir, step, videos, titles) -> None:
  if jax.process_index() == 0:
    image = sheets.draw(np.asarray(videos), titles, factor=3)
    formats.write_image(workdir / "samples" / f"step_{step:07d}.png", image)


def _check_source(config, source: reading.Source) -> None:
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
  if "image" in config:
    raise ValueError(
      f"data.name={source.name!r} holds latents, but an image-to-video "
      "denoiser is shown the first frame's pixels; name a dataset of videos"
    )
