"""Training state and the one step that every task shares.

A task is a `Loss`; this file makes it a jitted step on a mesh, its state
donated. `train.py` runs that step and nothing else, and `vdit_jax.aot`
compiles it.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vdit_jax import sharding, trees, types
from vdit_jax.training import optim


@dataclasses.dataclass(frozen=True)
class Loss:
  """What a task minimises, each clip's share apart.

  Random numbers are drawn for the whole batch before it is cut into parts
  (`make_step`'s `accumulate`), so that the parts change nothing but memory.

  Attributes:
    draw: (batch, key) -> what is random about each clip, a tree of [B, ...].
    terms: (params, frozen, batch, drawn) -> values of each clip, by name,
      [B]; "loss" is minimised. `frozen` are weights used but not trained.
  """

  draw: Callable[[types.Batch, jax.Array], Any]
  terms: Callable[..., dict[str, jax.Array]]

  def __call__(
    self, params: Any, frozen: Any, batch: types.Batch, key: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of a batch under its weights, and all means."""
    return self.mean(params, frozen, batch, self.draw(batch, key))

  def mean(
    self,
    params: Any,
    frozen: Any,
    batch: types.Batch,
    drawn: Any,
    total: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Average what was drawn for; `total` weight is the batch's if None."""
    total = jnp.sum(batch.weight) if total is None else total
    scale = 1 / jnp.maximum(total, 1e-9)
    values = self.terms(params, frozen, batch, drawn)
    means = {k: jnp.sum(v * batch.weight) * scale for k, v in values.items()}
    return means["loss"], means


class TrainState(flax.struct.PyTreeNode):
  """What a checkpoint holds.

  Attributes:
    step: updates made, int32 []. With the run's seed it gives every random
      number and every batch that follow, so nothing else needs keeping.
    params: trained weights, float32.
    ema: their exponential moving average.
    opt_state: the optimiser's.
  """

  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any


def create(
  init: Callable[[jax.Array], Any],
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  seed: int,
) -> tuple[TrainState, Any]:
  """Initialise a state in place on the mesh.

  Args:
    init: key -> params, boxed with their logical axes.
    tx: the optimiser.
    mesh: where the state lives.
    seed: of the parameters.

  Returns:
    The state, and its tree of shardings.
  """

  boxed = lambda: _initial(init, tx, seed)
  placed = sharding.shardings(mesh, jax.eval_shape(boxed))
  make = jax.jit(lambda: nn.meta.unbox(boxed()), out_shardings=placed)
  return make(), placed


def describe(
  init: Callable[[jax.Array], Any],
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> tuple[TrainState, Any]:
  """Return what `create` would, with ShapeDtypeStructs for the arrays."""
  boxed = jax.eval_shape(lambda: _initial(init, tx, 0))
  state = sharding.place(mesh, boxed)
  return state, jax.tree.map(lambda x: x.sharding, state)


def check_memory(described: TrainState) -> None:
  """Refuse a state that no device could hold, before any of it is made.

  Args:
    described: ShapeDtypeStructs with shardings; see `describe`.
  """
  leaves = jax.tree.leaves(described)
  needed = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in leaves
  )
  if needed > (has := _memory()):
    raise ValueError(
      f"the state takes {needed / 2**30:,.1f} GiB of every device, which has "
      f"{has / 2**30:,.1f}: parameters, their average and the optimiser; take "
      "a smaller network, or spread it by a larger mesh.fsdp or mesh.tensor"
    )


def _memory() -> float:
  """Bytes of a device; of a CPU's its share of the machine's."""
  device = jax.local_devices()[0]
  limit = (device.memory_stats() or {}).get("bytes_limit")
  if limit is not None:
    return limit
  whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  share = whole / jax.local_device_count()
  return share if device.platform == "cpu" else math.inf


def _initial(init, tx, seed: int) -> TrainState:
  params = init(jax.random.key(seed))
  # The average starts as a copy: a donated state may not hold one twice.
  ema = jax.tree.map(jnp.copy, params)
  return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params))


def begin_from(state: TrainState, params: Any) -> TrainState:
  """Put other params, and an average that equals them, into a new state.

  Raises:
    ValueError: lists the leaves in which params differ from the state's.
  """
  what = "the weights to begin from"
  trees.check_match(state.params, params, what, check_dtype=False)

  def place(old: jax.Array, new: Any) -> jax.Array:
    # A copy: the state is donated, and may share no array with its giver.
    if isinstance(new, jax.Array):  # on devices, perhaps of several processes
      return _copy(new, old.dtype, old.sharding)
    return jax.device_put(np.array(new, old.dtype), old.sharding)

  params, ema = (jax.tree.map(place, state.params, params) for _ in range(2))
  return state.replace(params=params, ema=ema)


@functools.partial(jax.jit, static_argnames=("dtype", "place"))
def _copy(x: jax.Array, dtype: Any, place: Any) -> jax.Array:
  return jax.lax.with_sharding_constraint(jnp.copy(x).astype(dtype), place)


def abstract(state: TrainState) -> Any:
  """Describe a state's arrays, for restoring into their places."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def make_step(
  loss: Loss,
  tx: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  *,
  seed: int,
  ema_decay: float,
  accumulate: int = 1,
  skip_nonfinite: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Make `step(state, frozen, batch) -> (state, metrics)`, not yet jitted.

  Args:
    loss: the task's.
    tx: the optimiser.
    learning_rate: its schedule, to be logged.
    seed: of the run; the step's key is folded in from the state's step.
    ema_decay: of the average of the weights.
    accumulate: parts of the batch, one after another, whose gradients are
      summed before the update; the memory of activations falls with it.
    skip_nonfinite: leave weights, average and optimiser as they were where
      loss or gradient is not finite; the metric "skipped" is then 1.
  """
  if accumulate < 1:
    raise ValueError(f"accumulate must be at least 1, got {accumulate}")

  def step(state: TrainState, frozen: Any, batch: types.Batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    drawn = loss.draw(batch, key)
    grads, metrics = _gradient(
      loss, accumulate, state.params, frozen, batch, drawn
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optim.ema_update(state.ema, params, ema_decay, state.step)
    norm = optax.global_norm(grads)
    metrics |= {
      "grad_norm": norm,
      "learning_rate": jnp.asarray(learning_rate(state.step)),
    }
    new = TrainState(state.step + 1, params, ema, opt_state)
    if skip_nonfinite:
      fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
      metrics["skipped"] = 1.0 - fine
      kept = state.replace(step=new.step)
      new = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, kept)
    return new, metrics

  return step


def _gradient(loss, accumulate, params, frozen, batch, drawn):
  """Gradient and means of the batch, taken in `accumulate` parts."""
  B = batch.weight.shape[0]
  if B % accumulate:
    raise ValueError(
      f"batch_size {B} must be a multiple of accumulate {accumulate}; try "
      f"accumulate={math.gcd(B, accumulate)}"
    )
  total = jnp.sum(batch.weight)
  differentiate = jax.grad(loss.mean, has_aux=True)
  if accumulate == 1:
    return differentiate(params, frozen, batch, drawn, total)

  def part(x: jax.Array) -> jax.Array:
    # Every n-th clip: each device then holds its share of every part.
    x = jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)
    return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

  def add(sums, some):
    return jax.tree.map(
      jnp.add, sums, differentiate(params, frozen, *some, total)
    ), None

  parts = jax.tree.map(part, (batch, drawn))
  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(differentiate, params, frozen, *first, total)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  sums, _ = jax.lax.scan(add, zeros, parts)
  return sums


def jit_step(step: Callable, placed: Any) -> Callable:
  """Compile a step on the current mesh, its state donated and kept in place."""
  return jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
