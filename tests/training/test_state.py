"""The shared step: parts of a batch, and steps that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdit_jax import sharding, types
from vdit_jax.training import state as states

B = 8


def _draw(batch, key):
  return {"keys": jax.random.split(key, batch.weight.shape[0])}


def _terms(params, frozen, batch, drawn):
  x = jax.vmap(lambda key: jax.random.normal(key, (3,)))(drawn["keys"])
  y = jnp.tanh(x @ params["w"]) * frozen
  error = jnp.square(y[:, 0] - batch.captions["text_encoder"].tokens[:, 0])
  return {"loss": error, "size": jnp.abs(y[:, 0])}


LOSS = states.Loss(_draw, _terms)


def _init(key):
  axes = ("embed", None)
  init = sharding.boxed(jax.nn.initializers.normal(1.0), axes)
  return {"w": init(key, (3, 2))}


def _batch(**changed):
  batch = types.Batch(
    video=None,
    captions={
      "text_encoder": types.Captions(
        mask=jnp.ones((B, 1), bool),
        tokens=jnp.arange(B, dtype=jnp.float32)[:, None] / B,
      )
    },
    weight=jnp.array([1.0, 0, 1, 1, 1, 0, 1, 1]),
  )
  return batch.replace(**changed)


def _run(batch, frozen=1.0, shape=None, **options):
  """Make one step from a new state; return states before, after, metrics."""
  shape = sharding.MeshShape() if shape is None else shape
  mesh = sharding.make_mesh(shape)
  tx = optax.adamw(1e-2)
  with jax.set_mesh(mesh):
    state, placed = states.create(_init, tx, mesh, seed=0)
    before = jax.tree.map(np.asarray, state)
    step = states.make_step(
      LOSS, tx, lambda _: 1e-2, seed=0, ema_decay=0.9, **options
    )
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    after, metrics = states.jit_step(step, placed)(state, frozen, batch)
  return before, jax.tree.map(np.asarray, (after, metrics))


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("data", [1, 2])
def test_parts_of_a_batch_change_nothing(accumulate, data):
  shape = sharding.MeshShape(data=data, tensor=8 // data)
  _, (whole, metrics) = _run(_batch(), shape=shape)
  _, (parts, same) = _run(_batch(), shape=shape, accumulate=accumulate)
  for a, b in zip(
    jax.tree.leaves((whole, metrics)),
    jax.tree.leaves((parts, same)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_parts_must_divide_the_batch():
  with pytest.raises(ValueError, match="multiple of accumulate 3"):
    _run(_batch(), accumulate=3)


def test_loss_is_the_mean_under_the_weights():
  batch, key = _batch(), jax.random.key(1)
  params = jax.tree.map(lambda x: x.value, _init(key), is_leaf=_is_box)
  value, metrics = LOSS(params, 1.0, batch, key)
  terms = _terms(params, 1.0, batch, _draw(batch, key))
  wanted = np.average(terms["loss"], weights=batch.weight)
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  wanted = np.average(terms["size"], weights=batch.weight)
  np.testing.assert_allclose(metrics["size"], wanted, rtol=1e-6)


def _is_box(x):
  return hasattr(x, "value")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped(bad):
  before, (after, metrics) = _run(_batch(), frozen=bad, skip_nonfinite=True)
  assert metrics["skipped"] == 1 and after.step == 1
  for name in ("params", "ema", "opt_state"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(before, name), getattr(after, name)
    )


def test_a_finite_step_is_not_skipped():
  _, (plain, _) = _run(_batch())
  before, (after, metrics) = _run(_batch(), skip_nonfinite=True)
  assert metrics["skipped"] == 0
  jax.tree.map(np.testing.assert_array_equal, plain, after)
  assert (before.params["w"] != after.params["w"]).all()


def test_description_is_what_is_created():
  mesh = sharding.make_mesh(sharding.MeshShape(data=8))
  tx = optax.adamw(1e-2)
  with jax.set_mesh(mesh):
    state, placed = states.create(_init, tx, mesh, seed=0)
    described, same = states.describe(_init, tx, mesh)
  assert placed == same
  assert states.abstract(state) == described
