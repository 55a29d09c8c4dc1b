"""Laws of the objectives: what is put in can be had back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.diffusion import objectives, schedules

SHAPE = (6, 3, 2, 2, 4)  # B f h w c
SCHEDULES = [schedules.Schedule()] + [
  schedules.Schedule(kind, zero_terminal_snr=zero)
  for kind in ("linear", "scaled_linear", "cosine")
  for zero in (False, True)
]


def label(schedule):
  zero = "zero_snr" if schedules.has_zero_terminal_snr(schedule) else "plain"
  return f"{schedule.kind}-{zero}"


def data():
  x0_key, eps_key = jax.random.split(jax.random.key(0))
  return jax.random.normal(x0_key, SHAPE), jax.random.normal(eps_key, SHAPE)


def allowed(objective, schedule):
  return objective != "eps" or not schedules.has_zero_terminal_snr(schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
@pytest.mark.parametrize("t_shape", (SHAPE[:1], SHAPE[:2]))
def test_x0_comes_back_from_the_target(objective, schedule, t_shape):
  if not allowed(objective, schedule):
    with pytest.raises(ValueError, match="'v' or 'flow'"):
      objectives.check(objective, schedule)
    return
  objectives.check(objective, schedule)
  t = jax.random.uniform(jax.random.key(1), t_shape)
  t = t.at[0].set(0.0).at[1].set(1.0)
  x0, eps = data()
  level = schedules.alpha_sigma(schedule, t)
  x_t = objectives.add_noise(x0, eps, *level)
  output = objectives.target(objective, x0, eps, *level)
  got = objectives.to_x0(objective, output, x_t, *level)
  # eps is divided by alpha, which magnifies the rounding of x_t.
  worst = 1 / float(level[0].min()) if objective == "eps" else 1
  np.testing.assert_allclose(got, x0, atol=2e-6 * worst)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_eps_comes_back_from_x0(schedule):
  x0, eps = data()
  t = jnp.array([0.2, 0.4, 0.6, 0.8, 0.9, 1.0])
  level = schedules.alpha_sigma(schedule, t)
  x_t = objectives.add_noise(x0, eps, *level)
  np.testing.assert_allclose(objectives.to_eps(x_t, x0, *level), eps, atol=2e-5)


def test_a_given_frame_is_its_own_x0_and_has_no_eps():
  x0, eps = data()
  t = jnp.full(SHAPE[:2], 0.7).at[:, 1].set(0.0)
  level = schedules.alpha_sigma(schedules.Schedule(), t)
  x_t = objectives.add_noise(x0, eps, *level)
  np.testing.assert_array_equal(x_t[:, 1], x0[:, 1])
  assert not np.allclose(x_t[:, 0], x0[:, 0], atol=0.1)
  for objective in ("flow", "v"):
    # Whatever the network says of a given frame, the frame stays.
    got = objectives.to_x0(objective, eps, x_t, *level)
    np.testing.assert_array_equal(got[:, 1], x0[:, 1])
  assert np.all(objectives.to_eps(x_t, x0, *level)[:, 1] == 0)


def test_targets_are_the_velocities_of_their_paths():
  x0, eps = data()
  flow, cosine = schedules.Schedule(), schedules.Schedule("cosine")

  def x_t(t):
    return objectives.add_noise(x0, eps, *schedules.alpha_sigma(flow, t))

  _, velocity = jax.jvp(x_t, (0.3,), (1.0,))
  level = schedules.alpha_sigma(flow, 0.3)
  np.testing.assert_allclose(
    objectives.target("flow", x0, eps, *level), velocity, atol=1e-5
  )
  # v is the velocity in the angle whose cosine is alpha (arXiv:2202.00512).
  alpha, sigma = schedules.alpha_sigma(cosine, 0.3)
  _, velocity = jax.jvp(
    lambda a: jnp.cos(a) * x0 + jnp.sin(a) * eps,
    (jnp.arctan2(sigma, alpha),),
    (1.0,),
  )
  np.testing.assert_allclose(
    objectives.target("v", x0, eps, alpha, sigma), velocity, atol=1e-5
  )


def test_bfloat16_outputs_become_float32():
  x0, eps = (a.astype(jnp.bfloat16) for a in data())
  for objective in objectives.OBJECTIVES:
    got = objectives.to_x0(objective, x0, eps, 0.6, 0.8)
    assert got.dtype == jnp.float32
    value = objectives.loss(objective, x0, x0, eps, 0.6, 0.8)
    assert value.dtype == jnp.float32 and value.shape == SHAPE[:1]


def test_unknown_names_are_refused():
  x0, eps = data()
  with pytest.raises(ValueError, match="flow"):
    objectives.check("score", schedules.Schedule())
  with pytest.raises(ValueError, match="flow"):
    objectives.to_x0("score", x0, eps, 0.6, 0.8)
  with pytest.raises(ValueError, match="logit_normal"):
    objectives.sample_t(jax.random.key(0), (4,), distribution="normal")
  with pytest.raises(ValueError, match="std"):
    objectives.sample_t(jax.random.key(0), (4,), std=0.0)


@pytest.mark.parametrize("shape", ((16,), (16, 3)))
def test_uniform_times_take_one_of_each_part(shape):
  for seed in range(3):
    t = objectives.sample_t(jax.random.key(seed), shape)
    assert t.shape == shape and t.dtype == jnp.float32
    parts = np.sort(np.floor(np.asarray(t) * 16), axis=0)
    want = np.broadcast_to(
      np.arange(16).reshape(-1, *[1] * (t.ndim - 1)), shape
    )
    np.testing.assert_array_equal(parts, want)


def test_each_place_of_the_batch_sees_all_times():
  keys = jax.random.split(jax.random.key(0), 4000)
  t = jax.vmap(lambda key: objectives.sample_t(key, (4, 2)))(keys)
  # A uniform's quartiles; 4000 draws put them within 0.03 (4 sigma).
  got = np.quantile(t, (0.25, 0.5, 0.75), axis=0)
  want = np.broadcast_to(np.array([[[0.25]], [[0.5]], [[0.75]]]), got.shape)
  np.testing.assert_allclose(got, want, atol=0.03)
  frames = np.corrcoef(t[:, 0, 0], t[:, 0, 1])[0, 1]
  assert abs(frames) < 0.07


def test_logit_normal_times_have_their_moments():
  t = objectives.sample_t(
    jax.random.key(0), (4096,), distribution="logit_normal", mean=0.5, std=0.8
  )
  logit = np.log(t / (1 - t))
  np.testing.assert_allclose(logit.mean(), 0.5, atol=0.01)
  np.testing.assert_allclose(logit.std(), 0.8, atol=0.01)


def test_shifted_times_are_the_shift_of_the_plain_ones():
  key = jax.random.key(0)
  plain = objectives.sample_t(key, (8,))
  shifted = objectives.sample_t(key, (8,), shift=3.0)
  np.testing.assert_allclose(shifted, schedules.shift(plain, 3.0), rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
def test_min_snr_weighs_the_same_error_of_x0(objective, schedule):
  if not allowed(objective, schedule):
    return
  gamma = 5.0
  # Clear of t = 1, where an x0 error has no output that it comes from.
  t = jnp.linspace(0.05, 0.9, SHAPE[0])
  alpha, sigma = schedules.alpha_sigma(schedule, t)
  x0, eps = data()
  x_t = objectives.add_noise(x0, eps, alpha, sigma)
  output = objectives.target(objective, x0, eps, alpha, sigma) + 0.1
  error = objectives.to_x0(objective, output, x_t, alpha, sigma) - x0
  want = jnp.minimum((alpha / sigma) ** 2, gamma) * jnp.square(error).mean(
    axis=(1, 2, 3, 4)
  )
  weight = objectives.loss_weight(objective, alpha, sigma, gamma)
  got = objectives.loss(objective, output, x0, eps, alpha, sigma, weight)
  np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
def test_min_snr_is_finite_at_both_ends(objective):
  alpha, sigma = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])
  noise, data_end = objectives.loss_weight(objective, alpha, sigma, 5.0)
  # The limits of the formulas as SNR goes to 0 and to infinity.
  want = {"x0": (0, 5), "eps": (1, 0), "v": (0, 0), "flow": (0, 0)}
  assert (noise, data_end) == want[objective]
  plain = objectives.loss_weight(objective, alpha, sigma, None)
  np.testing.assert_array_equal(plain, [1, 1])


def test_loss_counts_the_masked_frames_alone():
  x0, eps = data()
  mask = jnp.ones(SHAPE[:2]).at[:, 0].set(0).at[0].set(0)
  output = objectives.target("flow", x0, eps, 0.5, 0.5)
  output = output.at[:, 0].add(100.0).at[:, 1].add(1.0).at[:, 2].add(3.0)
  weight = jnp.full(SHAPE[:2], 2.0)
  got = objectives.loss("flow", output, x0, eps, 0.5, 0.5, weight, mask)
  np.testing.assert_allclose(got, [0] + [2 * (1 + 9) / 2] * 5, rtol=1e-4)


@pytest.mark.parametrize("shift", (1.0, 5.0))
@pytest.mark.parametrize("distribution", objectives.DISTRIBUTIONS)
def test_times_of_an_interval_are_those_of_all_that_fall_into_it(
  distribution, shift
):
  draw = lambda **fields: np.asarray(
    objectives.sample_t(
      jax.random.key(0),
      (4096,),
      distribution=distribution,
      mean=0.3,
      std=1.2,
      shift=shift,
      **fields,
    )
  )
  whole, few = draw(), draw(interval=(0.6, 0.9))
  assert few.min() >= 0.6 and few.max() <= 0.9
  inside = np.sort(whole[(whole > 0.6) & (whole <= 0.9)])
  shares = np.linspace(0.05, 0.95, 10)
  for a, b in zip(
    np.quantile(inside, shares), np.quantile(few, shares), strict=True
  ):
    assert abs(a - b) < 0.005
  np.testing.assert_array_equal(draw(interval=(0, 1)), whole)
  with pytest.raises(ValueError, match="t_low < t_high <= 1, got .0.9, 0.6"):
    draw(interval=(0.9, 0.6))
