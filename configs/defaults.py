"""What the configs share: groups that every run has, how they are made."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from vdit_jax import optim, sharding
from vdit_jax.data import buckets, reading
from vdit_jax.training import guards


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


def module(name: str, config: Any) -> ConfigDict:
  """One network: its file's name and its Config's fields."""
  return ConfigDict({"name": name, **dataclasses.asdict(config)})


def group(value: Any) -> ConfigDict:
  """Turn a dataclass into a group."""
  return ConfigDict(dataclasses.asdict(value))
