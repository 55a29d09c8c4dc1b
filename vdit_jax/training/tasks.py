"""What a run trains: the networks, loss, hooks and files of each task.

`make(config, ...)` turns `config.task` into a `Task` for `train.py`.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from vdit_jax import checkpoint, media, pipeline, sheets, types, workdirs
from vdit_jax.data import buckets, plan, reading
from vdit_jax.data import tokenizer as tokenizers
from vdit_jax.metrics import frames
from vdit_jax.training import (
  autoencoder,
  batching,
  captions,
  denoiser,
  loop,
)
from vdit_jax.training import learner as learners
from vdit_jax.training import state as states

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
  if config.task == "autoencoder":
    return _autoencoder(config, source, workdir)
  return _denoiser(config, source, workdir)


def fingerprint(data: bytes) -> str:
  """Name the weights of an autoencoder's file by their content."""
  return hashlib.sha256(data).hexdigest()[:16]


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
      workdir / workdirs.AUTOENCODER_FILE,
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
  weights = epath.Path(config.autoencoder_workdir) / workdirs.AUTOENCODER_FILE
  if not weights.exists():
    raise ValueError(
      f"autoencoder_workdir has no {weights}; train the autoencoder to its "
      "last step first: python train.py --config=configs/digits.py:vae "
      f"--workdir={config.autoencoder_workdir}"
    )
  _check_cache(source, weights)
  trained = checkpoint.read_config(config.autoencoder_workdir)
  config.autoencoder = trained.autoencoder
  tokenizer = captions.resolve(config, source, workdir)
  learner = learners.make(config)
  modules = learner.modules
  planned, report = batching.make(config, source, modules)
  clips = batching.evaluation(config, planned)
  frozen = {"autoencoder": checkpoint.load_release(weights)[0]}
  frozen = jax.tree.map(jnp.asarray, frozen)
  prompts = list(config.samples.prompts)
  text = captions.encode(config, prompts) if tokenizer is None else None

  def sample(state: states.TrainState, step: int) -> dict[str, float]:
    whole = pipeline.Pipeline(
      modules=modules,
      params=state.ema | frozen,
      tokenizer=tokenizer,
      recipe=workdirs.recipe(config),
      max_length=config.data.max_length,
    )
    videos = whole.generate(prompts, text=text)
    _write_sheet(workdir, step, videos, prompts)
    return {}

  return Task(
    config=config,
    plan=planned,
    report=report,
    init=learner.init,
    start=_start(config, workdir),
    loss=learner.loss,
    frozen=frozen,
    tokenizer=tokenizer,
    hooks={
      "validation": (
        config.validation.every,
        _validate(config, modules, frozen, tokenizer, clips),
      ),
      "samples": (config.samples.every, sample),
    },
    files={workdirs.AUTOENCODER_FILE: weights.read_bytes()},
    finish=lambda state: None,
  )


def _validate(config, modules, frozen, tokenizer, shown) -> loop.Hook:
  """Make the hook that measures the loss at fixed levels."""
  goal = learners.objective(config)
  levels = config.validation.levels
  check = jax.jit(denoiser.make_validation(modules, goal, levels))

  def validate(state: states.TrainState, step: int) -> dict[str, float]:
    total, count = jnp.zeros(len(levels)), jnp.zeros(())
    for seed, batch in enumerate(_validation(config, tokenizer, shown)):
      losses, clips = check(state.ema, frozen, batch, seed)
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
  if not config.init_from:
    return None
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
  data = config.data
  source = reading.open_source(data.name, "validation", data.data_dir)
  batches = reading.evaluation_batches(
    source, tokenizer, _BATCH, data.max_length, **clips
  )
  number = -(-config.validation.clips // _BATCH)
  return (batch for batch, _ in itertools.islice(batches, number))


def _write_sheet(workdir, step, videos, titles) -> None:
  if jax.process_index() == 0:
    image = sheets.draw(np.asarray(videos), titles, factor=3)
    media.write_image(workdir / "samples" / f"step_{step:07d}.png", image)


def _check_cache(source: reading.Source, weights: epath.Path) -> None:
  """Refuse latents that another autoencoder made."""
  if source.kind != "latents":
    return
  made_by = source.metadata["autoencoder"]
  if made_by != (ours := fingerprint(weights.read_bytes())):
    raise ValueError(
      f"data.name={source.name!r} holds latents of autoencoder {made_by}, but "
      f"{weights} is {ours}; make them again with python -m vdit_jax.cache"
    )
