"""Laws of the learning rate, the decay, the clipping and the average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdit_jax.training import optim

CONFIG = optim.Optim(lr=1e-2, warmup_steps=10, total_steps=110)

PARAMS = {
  "norm": {"scale": jnp.ones((2, 3))},  # stacked: the rank of a matrix
  "dense": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
  "tokens": {"embedding": jnp.ones((5, 3))},
}


def _schedule(**changes):
  return optim.make(dataclasses.replace(CONFIG, **changes))[1]


@pytest.mark.parametrize(
  ("schedule", "middle", "last"),
  [
    ("constant", 1.0, 1.0),
    ("cosine", 0.55, 0.1),
    ("linear", 0.55, 0.1),
    ("wsd", 1.0, 0.1),
  ],
)
def test_schedule_warms_up_to_lr_and_ends_at_its_factor(schedule, middle, last):
  rate = _schedule(schedule=schedule, end_lr_factor=0.1, cooldown_steps=20)
  found = [float(rate(n)) / CONFIG.lr for n in (0, 5, 10, 60, 110, 1000)]
  expected = [1 / 11, 6 / 11, 1.0, middle, last, last]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_wsd_is_constant_until_its_cooldown():
  rate = _schedule(schedule="wsd", cooldown_steps=20)
  found = [float(rate(n)) / CONFIG.lr for n in (89, 90, 100, 110)]
  np.testing.assert_allclose(found, [1.0, 1.0, 0.5, 0.0], atol=1e-6)


def test_without_warm_up_the_first_rate_is_the_peak():
  assert float(_schedule(warmup_steps=0)(0)) == pytest.approx(CONFIG.lr)


def test_updates_follow_the_schedule():
  config = dataclasses.replace(CONFIG, clip_norm=0.0)
  tx, schedule = optim.make(config)
  params = {"kernel": jnp.zeros(())}
  state = tx.init(params)
  for step in range(15):  # Adam's update of a constant gradient is the rate
    updates, state = tx.update({"kernel": jnp.ones(())}, state, params)
    np.testing.assert_allclose(-updates["kernel"], schedule(step), rtol=1e-4)


def test_weight_decay_shrinks_kernels_and_embeddings_only():
  tx, schedule = optim.make(dataclasses.replace(CONFIG, weight_decay=0.5))
  grads = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  after = optax.apply_updates(PARAMS, updates)
  shrunk = 1 - 0.5 * float(schedule(0))
  np.testing.assert_allclose(after["dense"]["kernel"], shrunk, rtol=1e-6)
  np.testing.assert_allclose(after["tokens"]["embedding"], shrunk, rtol=1e-6)
  np.testing.assert_array_equal(after["norm"]["scale"], 1.0)
  np.testing.assert_array_equal(after["dense"]["bias"], 1.0)


def _first_moment(scale, clip_norm):
  tx, _ = optim.make(dataclasses.replace(CONFIG, clip_norm=clip_norm))
  grads = {"a": jnp.full(4, 3.0 * scale), "b": jnp.full(4, 4.0 * scale)}
  _, state = tx.update(grads, tx.init(grads), grads)
  moments = optax.tree.get(state, "mu")
  return float(optax.tree.norm(moments)) / (1 - CONFIG.b1)


def test_gradients_are_clipped_by_their_global_norm():
  # The gradient's global norm is 10 times the scale.
  assert _first_moment(1.0, clip_norm=2.0) == pytest.approx(2.0, rel=1e-5)
  assert _first_moment(0.1, clip_norm=2.0) == pytest.approx(1.0, rel=1e-5)
  assert _first_moment(1.0, clip_norm=0.0) == pytest.approx(10.0, rel=1e-5)


@pytest.mark.parametrize(
  ("step", "decay"), [(0, 0.1), (8, 0.5), (890, 0.99), (10**6, 0.99)]
)
def test_ema_decay_warms_up_to_its_limit(step, decay):
  ema = optim.ema_update(
    {"a": jnp.ones(2)}, {"a": jnp.zeros(2)}, 0.99, jnp.int32(step)
  )
  np.testing.assert_allclose(ema["a"], decay, rtol=1e-5)


def test_ema_of_constant_weights_is_them_and_keeps_its_dtype():
  params = {"a": jnp.linspace(0, 1, 7).astype(jnp.bfloat16)}
  ema = optim.ema_update(params, params, 0.9999, jnp.int32(50))
  assert ema["a"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(ema["a"], params["a"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"schedule": "step"}, "schedule must be one of .*'step'"),
    ({"lr": 0.0}, "lr must be positive, got 0.0"),
    ({"warmup_steps": 110}, "got 110 with total_steps 110"),
    ({"warmup_steps": -1}, "got -1 with total_steps 110"),
    ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ({"clip_norm": -1.0}, "clip_norm must not be negative"),
    ({"schedule": "wsd"}, r"\[1, 100\].*got 0; try 20"),
    ({"schedule": "wsd", "cooldown_steps": 101}, "got 101"),
  ],
)
def test_make_refuses_what_cannot_be_meant(changes, message):
  with pytest.raises(ValueError, match=message):
    optim.make(dataclasses.replace(CONFIG, **changes))
