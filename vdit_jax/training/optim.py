"""The optimiser: clipped AdamW, its learning rate, the average of weights.

Stands between a step's gradients and its new parameters. Params are plain
nested dicts of arrays, out of any flax box.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vdit_jax.schema import Field

# Leaves with these names are matrices and embeddings; see `decay_mask`.
DECAYED = ("kernel", "embedding")

MOST_STEPS = 2 * 10**9  # counted in int32

_SCHEDULES = ("constant", "cosine", "linear", "wsd")

FIELDS = {
  "lr": Field(float, 0),
  "warmup_steps": Field(int, 0, MOST_STEPS),
  "total_steps": Field(int, 1, MOST_STEPS),
  "schedule": Field(str, choices=_SCHEDULES),
  "cooldown_steps": Field(int, 0, MOST_STEPS),
  "end_lr_factor": Field(float, 0),
  "b1": Field(float, 0, 1),
  "b2": Field(float, 0, 1),
  "eps": Field(float, 0),
  "weight_decay": Field(float, 0),
  "clip_norm": Field(float, 0),
}


@dataclasses.dataclass(frozen=True)
class Optim:
  """What `make` needs to know.

  Attributes:
    lr: peak learning rate.
    warmup_steps: updates before the peak; the rate grows linearly, and the
      first update already has lr / (warmup_steps + 1).
    total_steps: updates of the whole run, the warm-up included.
    schedule: what follows the warm-up: "constant"; "cosine" or "linear" decay
      until total_steps; or "wsd" (warm-up, stable, decay), which is constant
      and then decays linearly in the last cooldown_steps.
    cooldown_steps: updates of the decay of "wsd"; no other schedule reads it.
    end_lr_factor: the rate at total_steps over lr; "constant" stays at lr.
    b1, b2, eps: AdamW's (arXiv:1711.05101).
    weight_decay: AdamW's, times the learning rate; 0 is none.
    clip_norm: greatest global norm of a gradient; 0 is no clipping.
  """

  lr: float
  warmup_steps: int
  total_steps: int
  schedule: str = "constant"
  cooldown_steps: int = 0
  end_lr_factor: float = 0.0
  b1: float = 0.9
  b2: float = 0.99
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0


def make(
  config: Optim,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Build the optimiser and its learning rate as a function of the step.

  Returns:
    The gradient transformation, and the schedule that it follows: update n,
    counted from 0, has the rate schedule(n).

  Raises:
    ValueError: if a value of the config cannot be meant.
  """
  _check(config)
  schedule = _schedule(config)
  adamw = optax.adamw(
    schedule,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=decay_mask,
  )
  clip = optax.identity()  # so that the state is the same without clipping
  if config.clip_norm:
    clip = optax.clip_by_global_norm(config.clip_norm)
  return optax.chain(clip, adamw), schedule


def decay_mask(params: Any) -> Any:
  """Mark the leaves that weight decay shrinks: those named in `DECAYED`.

  The name decides and not the rank: layers that are stacked by a scan give a
  norm's scale [D] the shape [layers, D], which has the rank of a matrix.
  """

  def decays(path: tuple[Any, ...], _: Any) -> bool:
    return jax.tree_util.keystr(path[-1:], simple=True) in DECAYED

  return jax.tree_util.tree_map_with_path(decays, params)


def ema_update(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
  """Move the average of the weights towards them: d ema + (1 - d) params.

  d = min(decay, (1 + step) / (10 + step)), so that the first weights, which
  are noise, are soon forgotten. Computed in float32, since with d near 1 the
  increment is below bfloat16's resolution; kept in the dtype of `ema`.

  Args:
    ema: average so far, a tree like params.
    params: weights after the update.
    decay: decay of a long run, in [0, 1).
    step: updates before this one, int32 [].
  """
  step = jnp.asarray(step, jnp.float32)
  rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))

  def mix(old: jax.Array, new: jax.Array) -> jax.Array:
    wide = old.astype(jnp.float32)
    return (wide + rate * (new.astype(jnp.float32) - wide)).astype(old.dtype)

  return jax.tree.map(mix, ema, params)


def _schedule(config: Optim) -> optax.Schedule:
  after = _after_warmup(config)
  if not config.warmup_steps:
    return after
  first = config.lr / (config.warmup_steps + 1)
  warmup = optax.linear_schedule(first, config.lr, config.warmup_steps)
  return optax.join_schedules([warmup, after], [config.warmup_steps])


def _after_warmup(config: Optim) -> optax.Schedule:
  """Return the rate as a function of the steps since the warm-up."""
  steps = config.total_steps - config.warmup_steps
  end_lr = config.lr * config.end_lr_factor
  if config.schedule == "constant":
    return optax.constant_schedule(config.lr)
  if config.schedule == "cosine":
    return optax.cosine_decay_schedule(config.lr, steps, config.end_lr_factor)
  if config.schedule == "linear":
    return optax.linear_schedule(config.lr, end_lr, steps)
  return optax.linear_schedule(
    config.lr,
    end_lr,
    config.cooldown_steps,
    transition_begin=steps - config.cooldown_steps,
  )


def _check(config: Optim) -> None:
  if config.schedule not in _SCHEDULES:
    raise ValueError(
      f"schedule must be one of {', '.join(_SCHEDULES)}, got "
      f"{config.schedule!r}"
    )
  if not config.lr > 0:
    raise ValueError(f"lr must be positive, got {config.lr}; try 1e-4")
  if not 0 <= config.warmup_steps < config.total_steps:
    raise ValueError(
      f"warmup_steps must be in [0, total_steps), got {config.warmup_steps} "
      f"with total_steps {config.total_steps}; lower it or train for longer"
    )
  for name in ("end_lr_factor", "weight_decay", "clip_norm"):
    if not getattr(config, name) >= 0:
      raise ValueError(
        f"{name} must not be negative, got {getattr(config, name)}; 0 is none"
      )
  _check_cooldown(config)


def _check_cooldown(config: Optim) -> None:
  most = config.total_steps - config.warmup_steps
  if config.schedule == "wsd" and not 1 <= config.cooldown_steps <= most:
    raise ValueError(
      f"cooldown_steps of schedule 'wsd' must be in [1, {most}] (total_steps "
      f"- warmup_steps), got {config.cooldown_steps}; try {max(1, most // 5)}"
    )
