"""Laws of classifier-free guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.diffusion import guidance, objectives, samplers, schedules

SHAPE = (2, 3, 2, 2, 4)  # B f h w c


def pair():
  cond_key, uncond_key = jax.random.split(jax.random.key(0))
  return jax.random.normal(cond_key, SHAPE), jax.random.normal(
    uncond_key, SHAPE
  )


def network_of(cond, uncond):
  """Return a network that answers by the half of the batch, null first."""

  def network(x2, row):
    assert x2.shape == (2 * SHAPE[0], *SHAPE[1:])
    return jnp.concatenate([uncond, cond]) + 0 * x2

  return network


def row_at(t):
  return schedules.Table(*map(jnp.float32, (1 - t, t, t)))


def test_scale_one_is_conditional_and_zero_unconditional():
  cond, uncond = pair()
  np.testing.assert_array_equal(guidance.combine(cond, uncond, 1.0), cond)
  np.testing.assert_allclose(
    guidance.combine(cond, uncond, 0.0), uncond, atol=1e-6
  )
  np.testing.assert_allclose(
    guidance.combine(cond, uncond, 3.0), uncond + 3 * (cond - uncond), atol=1e-5
  )


def test_full_rescale_restores_each_samples_spread():
  cond, uncond = pair()
  cond = cond * jnp.array([1.0, 5.0]).reshape(2, 1, 1, 1, 1)

  def std(x):
    return np.std(x, axis=(1, 2, 3, 4))

  plain = guidance.combine(cond, uncond, 6.0)
  full = guidance.combine(cond, uncond, 6.0, 1.0)
  half = guidance.combine(cond, uncond, 6.0, 0.5)
  assert np.all(std(plain) > 1.5 * std(cond))
  np.testing.assert_allclose(std(full), std(cond), rtol=1e-5)
  np.testing.assert_allclose(half, (plain + full) / 2, atol=1e-5)


def test_rescale_of_constant_latents_is_finite():
  flat = jnp.ones(SHAPE)
  np.testing.assert_array_equal(guidance.combine(flat, flat, 6.0, 1.0), 0)


def test_guided_network_sees_the_null_branch_first():
  cond, uncond = pair()
  denoise = guidance.guide(network_of(cond, uncond), 4.0)
  got = denoise(jnp.zeros(SHAPE), row_at(0.5))
  np.testing.assert_array_equal(got, guidance.combine(cond, uncond, 4.0))


@pytest.mark.parametrize("rescale", (0.0, 0.7))
def test_outside_the_interval_is_conditional(rescale):
  cond, uncond = pair()
  denoise = guidance.guide(
    network_of(cond, uncond), 4.0, rescale, interval=(0.25, 0.75)
  )
  want = guidance.combine(cond, uncond, 4.0, rescale)
  for t in (0.25, 0.5, 0.75):
    got = denoise(jnp.zeros(SHAPE), row_at(t))
    np.testing.assert_allclose(got, want, rtol=1e-6)
  for t in (0.0, 0.2, 0.8, 1.0):
    np.testing.assert_array_equal(denoise(jnp.zeros(SHAPE), row_at(t)), cond)


def test_scale_may_be_an_array_of_the_program():
  cond, uncond = pair()

  @jax.jit
  def guided(scale):
    denoise = guidance.guide(network_of(cond, uncond), scale)
    return denoise(jnp.zeros(SHAPE), row_at(0.5))

  for scale in (1.0, 4.0):
    np.testing.assert_allclose(
      guided(jnp.float32(scale)),
      guidance.combine(cond, uncond, scale),
      atol=1e-5,
    )


@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
def test_guidance_on_x0_is_guidance_on_the_output(objective):
  cond, uncond = pair()
  x_t = jax.random.normal(jax.random.key(1), SHAPE)

  def to_x0(output):
    return objectives.to_x0(objective, output, x_t, 0.6, 0.8)

  np.testing.assert_allclose(
    guidance.combine(to_x0(cond), to_x0(uncond), 5.0),
    to_x0(uncond + 5.0 * (cond - uncond)),
    atol=2e-5,
  )


def test_a_sampler_runs_a_guided_denoiser():
  cond, uncond = pair()
  table = schedules.sampling_table(schedules.Schedule(), 4)
  denoise = guidance.guide(network_of(cond, uncond), 4.0)
  got = samplers.dpmpp_2m(denoise, jnp.ones(SHAPE), table)
  np.testing.assert_allclose(
    got, guidance.combine(cond, uncond, 4.0), atol=1e-5
  )


def test_bad_arguments_are_refused():
  cond, uncond = pair()
  for interval in ((0.5, 0.4), (-0.1, 1.0), (0.0, 1.1)):
    with pytest.raises(ValueError, match="t_low"):
      guidance.guide(network_of(cond, uncond), 4.0, interval=interval)
  with pytest.raises(ValueError, match="rescale"):
    guidance.combine(cond, uncond, 4.0, 1.5)


def three():
  keys = jax.random.split(jax.random.key(2), 3)
  return [jax.random.normal(key, SHAPE) for key in keys]


def test_three_branches_are_the_formula():
  """Equation 3 of arXiv:2211.09800, and `guide` is in that order."""
  hidden, uncond, cond = three()
  want = hidden + 1.5 * (uncond - hidden) + 7.0 * (cond - uncond)
  got = guidance.join((hidden, uncond, cond), (1.5, 7.0))
  np.testing.assert_allclose(got, want, atol=1e-5)

  def network(x, row):
    assert x.shape == (3 * SHAPE[0], *SHAPE[1:])
    return jnp.concatenate([hidden, uncond, cond])

  denoise = guidance.guide(network, (1.5, 7.0))
  np.testing.assert_allclose(denoise(cond, row_at(0.5)), want, atol=1e-5)


def test_scales_of_one_are_the_last_branch_to_the_bit():
  branches = three()
  got = guidance.join(branches, (1.0, 1.0))
  np.testing.assert_array_equal(got, branches[-1])
  got = guidance.join(branches[1:], (1.0,), 0.0)
  np.testing.assert_array_equal(got, branches[-1])


def test_of_equal_scales_the_branch_between_has_no_say():
  hidden, uncond, cond = three()
  got = guidance.join((hidden, uncond, cond), (4.0, 4.0))
  np.testing.assert_allclose(
    got, guidance.combine(cond, hidden, 4.0), atol=1e-5
  )


def along(course, scale, steps=16, frames=1):
  """The scale at each of a run's steps."""
  times = schedules.sampling_table(schedules.Schedule(), steps).t[:-1]
  at = guidance.scale_of(course, scale, times, frames=frames)
  return [np.asarray(at(row_at(float(t)))).squeeze() for t in times]


@pytest.mark.parametrize("steady, rest", [(10, 1.0), (3, 2.5)])
def test_an_oscillating_scale_rests_at_odd_steps(steady, rest):
  course = guidance.Course("oscillating", steady, rest)
  rests = [i for i in range(steady, 16) if i % 2]
  want = [rest if step in rests else 6.0 for step in range(16)]
  assert along(course, 6.0) == want


@pytest.mark.parametrize("falls_to, parts", [("data", 16), ("step", 15)])
@pytest.mark.parametrize("kind", ("constant", "oscillating"))
def test_a_scale_may_rise_over_the_frames(kind, falls_to, parts):
  """Open-Sora 2.0's, and 1.3's, whose last step has the floor alone."""
  course = guidance.Course(kind, rises=True, falls_to=falls_to)
  got = along(course, 5.0, frames=4)
  for i, found in enumerate(got):
    want = np.linspace(1.0, np.linspace(5.0, 1.0, parts + 1)[i], 4)
    if kind == "oscillating" and i in (11, 13, 15):
      want = np.ones(4)
    np.testing.assert_allclose(found, want, atol=1e-5)
  assert np.all(got[-1] == 1.0) == (falls_to == "step" or kind != "constant")


def test_what_rises_is_above_the_floor_and_of_several_frames():
  course = guidance.Course(rises=True, floor=2.0)
  np.testing.assert_allclose(along(course, 1.5, frames=3), 1.5)
  np.testing.assert_allclose(along(course, 5.0), 2.0)  # a picture
  assert np.ptp(along(course, 5.0, frames=3)[0]) == 3.0


def test_a_scale_of_frames_guides_each_by_its_own():
  cond, uncond = pair()
  frames = SHAPE[1]
  course = guidance.Course(rises=True)
  scale = guidance.scale_of(course, 4.0, jnp.array([1.0, 0.5]), frames=frames)
  got = guidance.guide(network_of(cond, uncond), scale)(cond, row_at(1.0))
  for f, s in enumerate(np.linspace(1.0, 4.0, frames)):
    want = guidance.combine(cond, uncond, s)[:, f]
    np.testing.assert_allclose(got[:, f], want, atol=1e-5)


def test_kinds_of_scales():
  times = jnp.array([0.9, 0.5, 0.1])
  assert guidance.scale_of(guidance.Course(), 6.0, times) == 6.0
  found = guidance.scale_of(guidance.Course("dynamic"), 6.0, times, 10)
  want = guidance.dynamic(6.0, 3, 10)
  for t in (0.9, 0.5, 0.1):
    assert float(found(row_at(t))) == float(want(row_at(t)))
  for fields, message in (
    ({"kind": "linear"}, "guidance_kind .*'dynamic'.* 'linear'"),
    ({"falls_to": "end"}, "falls_to must be one of .* got 'end'"),
    ({"steady": -1}, "steady must be at least 0, got -1"),
  ):
    with pytest.raises(ValueError, match=message):
      guidance.Course(**fields)


def test_a_scale_may_go_with_the_steps():
  cond, uncond = pair()
  scale = lambda row: 10 * row.t
  denoise = guidance.guide(network_of(cond, uncond), scale)
  for t in (0.1, 0.5):
    got = denoise(jnp.zeros(SHAPE), row_at(t))
    want = guidance.combine(cond, uncond, 10 * t)
    np.testing.assert_allclose(got, want, atol=1e-5)
