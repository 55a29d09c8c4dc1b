"""Training state and the one step that every task shares.

A task is a loss, `loss(params, frozen, batch, key) -> (loss, metrics)`; this
file makes it a jitted step on a mesh, its state donated. `train.py` runs that
step and nothing else.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vdit_jax import optim, sharding, trees, types

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
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

  def boxed() -> TrainState:
    params = init(jax.random.key(seed))
    step = jnp.zeros((), jnp.int32)
    # The average starts as a copy: a donated state may not hold one twice.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(step, params, ema, tx.init(params))

  placed = sharding.shardings(mesh, jax.eval_shape(boxed))
  make = jax.jit(lambda: nn.meta.unbox(boxed()), out_shardings=placed)
  return make(), placed


def begin_from(state: TrainState, params: Any) -> TrainState:
  """Put other params, and an average that equals them, into a new state.

  Raises:
    ValueError: lists the leaves in which params differ from the state's.
  """
  what = "the weights to begin from"
  trees.check_match(state.params, params, what, check_dtype=False)

  def place(old: jax.Array, new: Any) -> jax.Array:
    # A copy: the state is donated, and may share no array with its giver.
    return jax.device_put(np.array(new, old.dtype), old.sharding)

  params, ema = (jax.tree.map(place, state.params, params) for _ in range(2))
  return state.replace(params=params, ema=ema)


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
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Make `step(state, frozen, batch) -> (state, metrics)`, not yet jitted.

  Args:
    loss: the task's; `frozen` are weights that it uses but does not train.
    tx: the optimiser.
    learning_rate: its schedule, to be logged.
    seed: of the run; the step's key is folded in from the state's step.
    ema_decay: of the average of the weights.
  """

  def step(state: TrainState, frozen: Any, batch: types.Batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradient = jax.value_and_grad(loss, has_aux=True)
    (_, metrics), grads = gradient(state.params, frozen, batch, key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
      "grad_norm": optax.global_norm(grads),
      "learning_rate": jnp.asarray(learning_rate(state.step)),
    }
    ema = optim.ema_update(state.ema, params, ema_decay, state.step)
    return TrainState(state.step + 1, params, ema, opt_state), metrics

  return step


def jit_step(step: Callable, placed: Any) -> Callable:
  """Compile a step on the current mesh, its state donated and kept in place."""
  return jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
