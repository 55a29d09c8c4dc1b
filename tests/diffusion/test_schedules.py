"""Laws of the noise schedules and of the sampling tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.diffusion import schedules

VP_KINDS = ("linear", "scaled_linear", "cosine")
SCHEDULES = [schedules.Schedule()] + [
  schedules.Schedule(kind, zero_terminal_snr=zero, snr_shift=snr_shift)
  for kind in VP_KINDS
  for zero in (False, True)
  for snr_shift in (1.0, 3.0)
]
VP = SCHEDULES[1:]


def label(schedule):
  zero = "zero_snr" if schedules.has_zero_terminal_snr(schedule) else "plain"
  return f"{schedule.kind}-{zero}-{schedule.snr_shift}"


def times(schedule):
  n = schedule.num_timesteps
  return np.arange(n, dtype=np.float32) / n


def log_snr(schedule, t):
  alpha, sigma = schedules.alpha_sigma(schedule, t)
  alpha, sigma = np.float64(alpha), np.float64(sigma)
  with np.errstate(divide="ignore"):
    return 2 * (np.log(alpha) - np.log(sigma))


@pytest.mark.parametrize("schedule", VP, ids=label)
def test_variance_is_preserved(schedule):
  alpha, sigma = schedules.alpha_sigma(schedule, times(schedule))
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_snr_strictly_decreases(schedule):
  t = np.append(times(schedule)[1:], [] if schedule.kind != "cosine" else 1)
  if not schedules.has_zero_terminal_snr(schedule):
    t = t[t < 1]
  assert np.all(np.diff(log_snr(schedule, t)) < 0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_terminal_snr_is_zero_exactly_where_claimed(schedule):
  alpha, sigma = schedules.alpha_sigma(schedule, 1.0)
  if schedules.has_zero_terminal_snr(schedule):
    assert alpha == 0 and sigma == 1
  else:
    assert alpha > 0 and sigma < 1


def test_data_end_of_continuous_kinds_is_exact():
  for schedule in SCHEDULES:
    if schedule.kind in ("rectified_flow", "cosine"):
      alpha, sigma = schedules.alpha_sigma(schedule, 0.0)
      np.testing.assert_allclose(alpha, 1, rtol=1e-6)
      assert sigma == 0


def test_zero_snr_rescale_keeps_the_first_level():
  plain = schedules.Schedule("scaled_linear")
  rescaled = schedules.Schedule("scaled_linear", zero_terminal_snr=True)
  np.testing.assert_allclose(
    schedules.alpha_sigma(plain, 0.0)[0],
    schedules.alpha_sigma(rescaled, 0.0)[0],
    rtol=1e-6,
  )


@pytest.mark.parametrize("kind", VP_KINDS)
def test_snr_shift_divides_the_snr(kind):
  t = np.linspace(0.1, 0.9, 9, dtype=np.float32)
  plain = log_snr(schedules.Schedule(kind), t)
  shifted = log_snr(schedules.Schedule(kind, snr_shift=3.0), t)
  np.testing.assert_allclose(plain - shifted, np.log(3), atol=1e-5)


def test_snr_shift_comes_before_the_zero_snr_rescale():
  kind, factor = "scaled_linear", 3.0
  first, middle, last = 0.0, 0.5, 0.999
  a = [
    float(
      schedules.alpha_sigma(schedules.Schedule(kind, snr_shift=factor), t)[0]
    )
    for t in (first, middle, last)
  ]
  both = schedules.Schedule(kind, snr_shift=factor, zero_terminal_snr=True)
  want = (a[1] - a[2]) * a[0] / (a[0] - a[2])
  np.testing.assert_allclose(
    schedules.alpha_sigma(both, middle)[0], want, rtol=1e-5
  )


def test_discrete_table_is_the_product_of_the_betas():
  schedule = schedules.Schedule("scaled_linear", num_timesteps=4)
  ends = np.sqrt([schedule.beta_start, schedule.beta_end])
  abar, got = 1.0, schedules.alpha_sigma(schedule, np.arange(4) / 4)[0]
  for n in range(4):
    root = ends[0] + (ends[1] - ends[0]) * n / 3
    abar *= 1 - root**2
    np.testing.assert_allclose(got[n], np.sqrt(abar), rtol=1e-6)


def test_every_training_timestep_is_found_again():
  schedule = schedules.Schedule("linear")
  alpha, _ = schedules.alpha_sigma(schedule, times(schedule))
  assert len(np.unique(alpha)) == schedule.num_timesteps
  inside = schedules.alpha_sigma(schedule, np.float32(1.0))[0]
  assert inside == alpha[-1]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_levels_keep_the_shape_of_t_and_jit(schedule):
  t = jax.random.uniform(jax.random.key(0), (2, 3))
  # Static: the schedule chooses the program.
  jitted = jax.jit(schedules.alpha_sigma, static_argnums=0)(schedule, t)
  for got, want in zip(jitted, schedules.alpha_sigma(schedule, t), strict=True):
    assert got.shape == t.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_bad_schedules_are_refused():
  for kwargs, word in (
    ({"kind": "karras"}, "scaled_linear"),
    ({"num_timesteps": 1}, "num_timesteps"),
    ({"beta_start": 0.1, "beta_end": 0.01}, "beta_start"),
    ({"kind": "linear", "snr_shift": 0.0}, "snr_shift"),
    ({"snr_shift": 3.0}, "schedules.shift"),
  ):
    with pytest.raises(ValueError, match=word):
      schedules.Schedule(**kwargs)


def test_shift_fixes_the_ends_and_keeps_the_order():
  t = jnp.linspace(0, 1, 33)
  np.testing.assert_array_equal(schedules.shift(t, 1.0), t)
  for factor in (0.3, 3.0, 12.0):
    shifted = schedules.shift(t, factor)
    np.testing.assert_allclose(shifted[jnp.array([0, -1])], [0, 1])
    assert np.all(np.diff(shifted) > 0)
    assert np.all((shifted[1:-1] > t[1:-1]) == (factor > 1))


def test_shift_of_time_is_a_shift_of_snr():
  t, flow = np.linspace(0.1, 0.9, 9), schedules.Schedule()
  change = log_snr(flow, t) - log_snr(flow, schedules.shift(t, 3.0))
  np.testing.assert_allclose(change, np.log(3.0**2), rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
@pytest.mark.parametrize("factor", (1.0, 3.0))
@pytest.mark.parametrize("t_start", (1.0, 0.6))
def test_table_descends_to_data(schedule, factor, t_start):
  table = schedules.sampling_table(schedule, 7, factor, t_start)
  assert table.alpha.shape == table.sigma.shape == table.t.shape == (8,)
  assert (table.alpha[-1], table.sigma[-1], table.t[-1]) == (1, 0, 0)
  assert np.all(np.diff(table.sigma) < 0) and np.all(np.diff(table.t) < 0)
  # What the network is shown is the level that it was trained at.
  alpha, sigma = schedules.alpha_sigma(schedule, table.t[:-1])
  np.testing.assert_allclose(table.alpha[:-1], alpha, atol=1e-6)
  np.testing.assert_allclose(table.sigma[:-1], sigma, atol=1e-6)
  if t_start == 1:
    terminal = schedules.alpha_sigma(schedule, 1.0)
    assert (table.alpha[0], table.sigma[0]) == terminal


def test_table_of_flow_is_evenly_spaced_and_shifted():
  flow = schedules.Schedule()
  plain = schedules.sampling_table(flow, 4, t_start=0.8)
  np.testing.assert_allclose(plain.t, [0.8, 0.6, 0.4, 0.2, 0], atol=1e-7)
  shifted = schedules.sampling_table(flow, 4, shift=3.0, t_start=0.8)
  np.testing.assert_allclose(
    shifted.t, schedules.shift(plain.t, 3.0), atol=1e-7
  )


def test_table_of_discrete_kinds_is_trailing():
  schedule = schedules.Schedule("scaled_linear")
  for steps, first in ((50, [999, 979, 959]), (16, [999, 937, 874])):
    table = schedules.sampling_table(schedule, steps)
    np.testing.assert_allclose(table.t[:3] * 1000, first, rtol=1e-6)
  whole = schedules.sampling_table(schedule, 1000)
  np.testing.assert_array_equal(whole.t[:-1], times(schedule)[::-1])


def test_table_shows_no_time_past_the_last_level():
  for kind in VP_KINDS:
    table = schedules.sampling_table(schedules.Schedule(kind), 5, shift=3.0)
    np.testing.assert_allclose(table.t[0], 0.999, rtol=1e-6)


def test_table_is_the_same_inside_jit():
  schedule = schedules.Schedule("cosine", zero_terminal_snr=True)
  inside = jax.jit(lambda: schedules.sampling_table(schedule, 5))()
  outside = schedules.sampling_table(schedule, 5)
  jax.tree.map(np.testing.assert_array_equal, inside, outside)


def test_bad_tables_are_refused():
  flow, discrete = schedules.Schedule(), schedules.Schedule("linear")
  for schedule, kwargs, word in (
    (flow, {"steps": 0}, "steps"),
    (flow, {"steps": 4, "t_start": 0.0}, "t_start"),
    (flow, {"steps": 4, "shift": 0.0}, "shift"),
    (discrete, {"steps": 1001}, "fewer steps"),
    (discrete, {"steps": 500, "shift": 12.0}, "smaller shift"),
  ):
    with pytest.raises(ValueError, match=word):
      schedules.sampling_table(schedule, **kwargs)


def test_expand_broadcasts_leading_axes():
  x = jnp.zeros((2, 3, 4, 4, 1))
  assert schedules.expand(1.0, x).shape == (1, 1, 1, 1, 1)
  assert schedules.expand(jnp.zeros(2), x).shape == (2, 1, 1, 1, 1)
  assert schedules.expand(jnp.zeros((2, 3)), x).shape == (2, 3, 1, 1, 1)
  with pytest.raises(ValueError, match="\\[B, f\\]"):
    schedules.expand(jnp.zeros(3), x)
