"""What a run shows of itself: contact sheets of the config's prompts.

  EMA, prompts --pipeline--> videos --> samples/step_0001000.png

Whether it can is asked before the first step, of all of `config.sampling`.
"""

from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from vdit_jax import pipeline, sampling, types
from vdit_jax.diffusion import samplers, schedules, shifts
from vdit_jax.media import formats, sheets
from vdit_jax.models.system import Modules
from vdit_jax.nn import lora
from vdit_jax.training import captions, learner, loop
from vdit_jax.training import state as states
from vdit_jax.weights import run_config


def check(
  config: ml_collections.ConfigDict, modules: Modules, words: captions.Words
) -> None:
  """Refuse settings that could not be sampled; warn of prompts that are cut.

  Args:
    config: of the run, completed.
    modules: its networks.
    words: how captions are read.
  """
  try:
    _check_settings(config, modules)
  except ValueError as error:
    raise ValueError(f"sampling.{error}") from error
  except TypeError as error:  # options that what takes them does not know
    raise ValueError(
      f"sampling has options that fit nothing: {error}"
    ) from error
  for each in words.values():
    if each.tokenizer:
      prompts = list(config.samples.prompts)
      each.tokenizer.check(prompts, each.max_length, "samples.prompts")


def make_hook(
  config: ml_collections.ConfigDict,
  modules: Modules,
  frozen: dict[str, Any],
  words: captions.Words,
  text: types.Text | None,
  workdir: epath.Path,
) -> loop.Hook:
  """Make the hook that samples the config's prompts.

  Args:
    config: of the run, completed.
    modules: its networks.
    frozen: weights that are not trained.
    words: how captions are read.
    text: the prompts, where they are encoded already.
    workdir: of the run.
  """
  adapters = learner.adapters_of(config)
  prompts = list(config.samples.prompts)

  def sample(state: states.TrainState, step: int) -> dict[str, float]:
    params = state.ema | frozen
    if adapters:
      factors = params.pop(lora.PARAMS)
      params["denoiser"] = lora.attach(
        params["denoiser"], factors, adapters.scale
      )
    whole = pipeline.Pipeline(
      modules=modules,
      params=params,
      tokenizers={k: w.tokenizer for k, w in words.items() if w.tokenizer},
      recipe=run_config.recipe(config),
      max_lengths={name: each.max_length for name, each in words.items()},
    )
    videos = whole.generate(prompts, text=text)
    write_sheet(workdir, step, videos, prompts)
    return {}

  return sample


def write_sheet(workdir: epath.Path, step: int, videos, titles) -> None:
  """Draw videos [B, F, H, W, 3] under their titles; process 0 writes them."""
  if jax.process_index() == 0:
    image = sheets.draw(np.asarray(videos), titles, factor=3)
    formats.write_image(workdir / "samples" / f"step_{step:07d}.png", image)


def _check_settings(config, modules: Modules) -> None:
  """Go through the motions of sampling, without computing anything."""
  recipe = run_config.recipe(config)
  unknown = {row.network for row in recipe.experts} - modules.networks.keys()
  if unknown:
    raise ValueError(
      f"experts must be of networks that are trained, got {sorted(unknown)}"
    )
  branches = modules.system.branches(modules.denoiser.cfg)
  how = sampling.settle(recipe, branches=branches)
  size = recipe.num_frames, recipe.height, recipe.width
  shape = modules.system.latent_shape(modules, *size)
  shift = shifts.factor(how.shift, shape, modules.denoiser.cfg.patch)
  table = schedules.sampling_table(
    how.schedule, how.steps, shift, spacing=how.spacing
  )
  sampler = samplers.make(how.sampler, dict(how.sampler_options))
  run = lambda x, key: sampler(lambda z, row: z, x, table, key)
  noise = jax.ShapeDtypeStruct((1, *shape), np.float32)
  jax.eval_shape(run, noise, jax.random.key(0))
