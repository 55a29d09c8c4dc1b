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

from vdit_jax import checkpoint, encoding, sharding, types
from vdit_jax.convert import placement
from vdit_jax.data import buckets, plan, reading
from vdit_jax.metrics import frames
from vdit_jax.models.system import Modules
from vdit_jax.nn import lora
from vdit_jax.training import (
  autoencoder,
  batching,
  captions,
  denoiser,
  loop,
  samples,
)
from vdit_jax.training import learner as learners
from vdit_jax.training import state as states
from vdit_jax.weights import autoencoder as autoencoders
from vdit_jax.weights import base_model, frame_encoder
from vdit_jax.weights import workdir as workdirs

_BATCH = 32  # clips of validation, and of measuring latents, at once
_SHEET = 6  # clips of a contact sheet
_MEASURED = 1_024  # clips whose latents are measured


@dataclasses.dataclass(frozen=True)
class Task:
  """A run's parts that depend on what is trained.

  Attributes:
    plan: of the batches.
    report: which records they have.
    wanted: how records become batches.
    init: key -> params, boxed with logical axes.
    start: reads params to begin from in place of `init`'s; None: those.
    loss: see `training.state`.
    frozen: weights that the loss uses and does not train.
    hooks: see `loop.Schedule`.
    files: to be in the workdir before training, name -> bytes.
    finish: called with the last state.
  """

  plan: plan.Plan
  report: buckets.Report
  wanted: reading.Wanted
  init: Callable[[jax.Array], Any]
  start: Callable[[], Any] | None
  loss: Callable
  frozen: Any
  hooks: dict[str, tuple[int, loop.Hook]]
  files: dict[str, bytes]
  finish: Callable[[states.TrainState], None]


def make(
  config: ml_collections.ConfigDict,
  source: reading.Source,
  workdir: epath.PathLike,
) -> Task:
  """Make the task that a config names; refuse what cannot work, early.

  Args:
    config: completed by `resolve.complete`.
    source: of the records.
    workdir: of the run.
  """
  task = _autoencoder if config.task == "autoencoder" else _denoiser
  return task(config, source, epath.Path(workdir))


def _autoencoder(config, source, workdir: epath.Path) -> Task:
  learner = learners.make(config)
  module = learner.modules.autoencoder
  planned, report = batching.make(config, source, learner.modules)
  shape, wanted = (
    batching.evaluation_shape(config, planned),
    learners.wanted(config),
  )

  def validate(state: states.TrainState, step: int) -> dict[str, float]:
    batches = _validation(config, wanted, shape)
    return _reconstruction(module, state.ema, batches, workdir, step)

  def finish(state: states.TrainState) -> None:
    batches = reading.evaluation_batches(source, wanted, _BATCH, shape)
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
    plan=planned,
    report=report,
    wanted=wanted,
    init=learner.init,
    start=None,
    loss=learner.loss,
    frozen={},
    hooks={"validation": (config.validation.every, validate)},
    files={},
    finish=finish,
  )


def _denoiser(config, source, workdir: epath.Path) -> Task:
  learner = learners.make(config)
  words = captions.words(config, source, workdir)
  samples.check(config, learner.modules, words)
  planned, report = batching.make(config, source, learner.modules)
  shape = batching.evaluation_shape(config, planned)
  prompts, text, frozen = list(config.samples.prompts), None, {}
  if config.text_encoder_dir:
    stay = any(each.tokenizer for each in words.values())
    text, frozen = captions.encode(config, prompts, stay)
  folder = config.autoencoder_workdir
  with jax.set_mesh(sharding.make_mesh(sharding.MeshShape(**config.mesh))):
    frozen["autoencoder"] = autoencoders.load(folder)
    if source.kind != "latents":  # which have what these make
      frozen |= frame_encoder.load_all(config)
    if adapters := learners.adapters_of(config):
      frozen["denoiser"] = base_model.load(config, adapters.base_dtype)
  frozen = jax.tree.map(jnp.asarray, frozen)
  run = _Run(
    config,
    learner.modules,
    frozen,
    learners.wanted(config, words),
    shape,
    workdir,
  )
  hooks = {"validation": (config.validation.every, _validate(run))}
  if prompts:
    shown = samples.make_hook(
      config, learner.modules, frozen, words, text, workdir
    )
    hooks["samples"] = config.samples.every, shown
  files = {}
  if not autoencoders.is_released(folder):
    weights = epath.Path(folder) / autoencoders.FILE
    files[autoencoders.FILE] = weights.read_bytes()
  return Task(
    plan=planned,
    report=report,
    wanted=run.wanted,
    init=learner.init,
    start=_start(config, learner, workdir),
    loss=learner.loss,
    frozen=frozen,
    hooks=hooks,
    files=files,
    finish=lambda state: None,
  )


@dataclasses.dataclass(frozen=True)
class _Run:
  """What the hooks of a denoiser's run need."""

  config: ml_collections.ConfigDict
  modules: Modules
  frozen: dict[str, Any]
  wanted: reading.Wanted
  shape: reading.Shape  # of the clips of an evaluation
  workdir: epath.Path


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
    batches = _validation(config, run.wanted, run.shape)
    for seed, batch in enumerate(batches):
      losses, clips = check(state.ema, run.frozen, batch, seed)
      total, count = total + losses, count + clips
    losses = np.asarray(total / count)  # NaN without clips
    named = zip(levels, losses, strict=True)
    rows = {f"validation_loss_t{level:g}": float(x) for level, x in named}
    return {"validation_loss": float(losses.mean())} | rows

  return validate


def _start(
  config: ml_collections.ConfigDict,
  learner: learners.Learner,
  workdir: epath.Path,
) -> Callable[[], Any] | None:
  """Read the weights to fine-tune, in a run that has not begun."""
  if checkpoint.has_begun(workdir):
    return None
  if adapters := learners.adapters_of(config):
    return _start_adapters(config, learner, adapters)
  if not config.init_from:
    return None
  if base_model.is_released(config):
    return lambda: {"denoiser": base_model.load(config, jnp.float32)}
  captions.check_same(config, workdir)

  def read() -> Any:
    _, _, params = workdirs.load(config.init_from)
    return {k: v for k, v in params.items() if k != "autoencoder"}

  return read


def _start_adapters(
  config: ml_collections.ConfigDict,
  learner: learners.Learner,
  adapters: lora.Lora,
) -> Callable[[], Any] | None:
  """Read the adapters to train on; None begins from new ones."""
  logging.info(
    "adapters: rank %d, alpha %g, so their product counts %g times",
    *(adapters.rank, adapters.scale * adapters.rank, adapters.scale),
  )
  if not adapters.init_from:
    return None

  def read() -> Any:
    fresh = placement.unboxed(learner.init(jax.random.key(config.seed)))
    found = base_model.load_adapters(config)
    return {lora.PARAMS: lora.begin(fresh[lora.PARAMS], found, adapters)}

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
    lambda p, v: reconstruct(module, p, encoding.to_float(v)),
    out_shardings=jax.sharding.PartitionSpec(),  # every process has it all
  )
  rows, weight = [], []
  for batch in clips:
    output, *scores = run(params, batch.video)
    if not rows:
      pairs = np.stack([encoding.to_float(batch.video), output], axis=1)
      sheet = pairs[:_SHEET].reshape(-1, *output.shape[1:])
      names = ["original", "reconstruction"] * (len(sheet) // 2)
      samples.write_sheet(workdir, step, sheet, names)
    rows.append(np.stack(scores))
    weight.append(batch.weight)
  weight = np.concatenate(weight)
  sums, count = np.concatenate(rows, 1) @ weight, weight.sum()
  means = sums / count if count else np.full(2, np.nan)
  return {"psnr": float(means[0]), "ssim": float(means[1])}


def _validation(
  config, wanted: reading.Wanted, shape: reading.Shape
) -> Iterator[types.Batch]:
  """Read the validation split's first clips, whatever training's buckets."""
  batch = min(_BATCH, config.batch_size)
  source = batching.open_source(config, config.validation.split)
  batches = reading.evaluation_batches(source, wanted, batch, shape)
  number = -(-config.validation.clips // batch)
  return (batch for batch, _ in itertools.islice(batches, number))
