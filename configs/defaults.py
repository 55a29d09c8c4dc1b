"""What the configs share: groups that every run has, how they are made."""

import dataclasses
from typing import Any

from etils import epath
from ml_collections import ConfigDict, config_dict

from vdit_jax import sharding, types
from vdit_jax.data import buckets, reading
from vdit_jax.models import networks
from vdit_jax.models import system as systems
from vdit_jax.nn import lora
from vdit_jax.training import denoiser as goals
from vdit_jax.training import guards, optim
from vdit_jax.weights import autoencoder as autoencoders
from vdit_jax.weights import base_model, diffusers_folder, run_config
from vdit_jax.weights import frame_encoder as frame_encoders
from vdit_jax.weights import text_encoder as text_encoders


def run(steps: int, batch_size: int, lr: float) -> ConfigDict:
  """Groups that both tasks have, as small runs want them."""
  rate = optim.Optim(
    lr=lr,
    warmup_steps=100,
    total_steps=steps,
    schedule="cosine",
    end_lr_factor=0.02,
    weight_decay=0.01,
  )
  return ConfigDict(
    {
      "seed": 0,
      "batch_size": batch_size,
      "accumulate": 1,
      "steps_a_call": 1,  # of one program; more spare small models launches
      "data": {
        "name": "moving_digits/one",
        "split": "train",  # or a part of it, "train[:95%]"
        "data_dir": "work/data",
        "max_length": 16,
        "shape": (),  # frames, height, width of clips; (): the records' own
        "buckets": dataclasses.asdict(buckets.Options()),
        **dataclasses.asdict(reading.Options()),
        "workers": 0,
        "threads": 2,
      },
      "mesh": dataclasses.asdict(sharding.MeshShape()),
      "optim": dataclasses.asdict(rate),
      "ema_decay": 0.999,
      "log_every": 50,
      "checkpoint": {"every": 500, "keep": 2, "keep_every": 0},
      "guard": dataclasses.asdict(guards.Guard()),
      "profile": {"steps": ""},  # "10:13" traces steps 10, 11 and 12
      "validation": {"split": "validation", "every": 1_000, "clips": 256},
    }
  )


def tune(
  system: systems.System,
  folder: str,
  *,
  denoiser: ConfigDict,
  autoencoder: ConfigDict,
  recipe: types.Recipe,
  network: str = "denoiser",
  **encoders: ConfigDict,
) -> ConfigDict:
  """Fine-tune a released system on 64 chips and more, each of them one clip.

  Args:
    system: of the family.
    folder: of the released pipeline.
    denoiser, autoencoder, encoders: groups of its networks.
    recipe: the published one.
    network: which denoiser of a pipeline with several.
  """
  config = run(steps=2_000, batch_size=256, lr=2e-5)
  config.task = "denoiser"
  config.init_from, config.network = folder, network
  # They follow init_from where that is set.
  config.autoencoder_workdir = config.get_oneway_ref("init_from")
  config.text_encoder_dir = config.get_oneway_ref("init_from")
  if frame_encoders.names(encoders, system):
    config.frame_encoder_dir = config.get_oneway_ref("init_from")
  config.autoencoder, config.denoiser = autoencoder, denoiser
  for name, encoder in encoders.items():
    config[name] = encoder
  config.denoiser.remat = "full"
  config.lora = group(lora.Lora(targets=system.adapters.targets))
  config.lora.alpha = config_dict.placeholder(float)  # None, but may be given
  cfg = networks.build_module(denoiser, "denoiser").cfg
  if system.needs(cfg):
    config.image = group(system.image)
  config.objective = group(goals.Objective(objective=recipe.objective))
  config.objective.schedule = dict(recipe.schedule)
  config.data.max_length = max(system.max_lengths(cfg).values())
  config.data.name, config.data.data_dir = "latents/mine", "work/data"
  config.mesh.fsdp = 64
  config.optim.schedule = "constant"
  config.optim.b2 = 0.95
  config.optim.weight_decay = 1e-4
  config.validation.levels = (0.1, 0.3, 0.5, 0.7, 0.9)
  config.samples = ConfigDict({"every": 500, "prompts": ()})
  config.sampling = run_config.sampling(recipe)
  return config


def tune_folder(
  system: systems.System, folder: str, network: str = "denoiser"
) -> ConfigDict:
  """Fine-tune what lies in a pipeline's folder; see `tune`."""
  known, cfg = base_model.describe(folder, "bfloat16", network)
  text = {
    name: run_config.network(*text_encoders.describe(folder, "bfloat16", name))
    for name in system.text
  }
  held = diffusers_folder.read(folder).networks
  frames = {
    name: run_config.network(*frame_encoders.describe(folder, name, "bfloat16"))
    for name in frame_encoders.names(held, system)
  }
  return tune(
    system,
    folder,
    denoiser=run_config.network(known, cfg),
    autoencoder=autoencoders.read_config(folder, "bfloat16"),
    recipe=_of_one(system.recipe(cfg, epath.Path(folder)), network),
    network=network,
    **text,
    **frames,
  )


def _of_one(recipe: types.Recipe, network: str) -> types.Recipe:
  """Let the denoiser that a run trains denoise at all times."""
  own = [row for row in recipe.experts if row.network == network]
  if len(own) == len(recipe.experts):
    return recipe
  alone = types.Expert(guidance=own[0].guidance)
  return dataclasses.replace(recipe, experts=(alone,))


def module(name: str, config: Any) -> ConfigDict:
  """One network: its family's name and its Config's fields."""
  return ConfigDict({"name": name, **dataclasses.asdict(config)})


def group(value: Any) -> ConfigDict:
  """Turn a dataclass into a group."""
  return ConfigDict(dataclasses.asdict(value))
