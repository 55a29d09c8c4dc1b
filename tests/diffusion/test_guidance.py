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
