"""Laws of an encoder's Gaussian: its samples and its divergence."""

import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax.nn import posterior


def test_samples_have_the_mean_and_the_deviation():
  mean, deviation = np.array([[-2.0, 3.0]]), np.array([[0.5, 2.0]])
  shape = 1, 20_000, 2
  x = posterior.sample(
    jnp.broadcast_to(mean, shape),
    jnp.broadcast_to(2 * np.log(deviation), shape),
    jax.random.key(0),
  )
  np.testing.assert_allclose(np.mean(x, (0, 1)), mean[0], atol=0.06)
  np.testing.assert_allclose(np.std(x, (0, 1)), deviation[0], rtol=0.03)
  pair = np.corrcoef(np.asarray(x)[0].T)[0, 1]
  assert abs(pair) < 0.03


def test_a_key_a_clip_gives_each_clip_its_own_sample():
  mean, logvar = jnp.zeros((3, 4, 5)), jnp.full((3, 4, 5), 0.7)
  keys = jax.random.split(jax.random.key(1), 3)
  whole = posterior.sample(mean, logvar, keys)
  for row in range(3):
    rows = slice(row, row + 1)
    alone = posterior.sample(mean[rows], logvar[rows], keys[rows])
    np.testing.assert_array_equal(whole[rows], alone)
  turned = posterior.sample(mean, logvar, keys[::-1])
  np.testing.assert_array_equal(turned, whole[::-1])


def test_one_key_gives_clips_of_a_batch_different_samples():
  zeros = jnp.zeros((2, 6))
  key = jax.random.key(2)
  one, two = posterior.sample(zeros, zeros, key)
  assert np.all(one != two)
  split = posterior.sample(zeros, zeros, jax.random.split(key, 2))
  np.testing.assert_array_equal(split, [one, two])


def test_without_spread_a_sample_is_the_mean():
  mean = jnp.linspace(-3, 3, 12).reshape(2, 6)
  sample = posterior.sample(mean, jnp.full((2, 6), -200.0), jax.random.key(0))
  np.testing.assert_array_equal(sample, mean)


def test_kl_is_zero_at_the_standard_normal_and_nowhere_else():
  assert posterior.kl(jnp.zeros(()), jnp.zeros(())) == 0
  grid = jnp.array([-1.0, -0.1, 0.1, 1.0])
  assert np.all(posterior.kl(grid, jnp.zeros(4)) > 0)
  assert np.all(posterior.kl(jnp.zeros(4), grid) > 0)


def test_kl_is_the_integral():
  x = np.linspace(-25, 25, 200_001)
  for mean, logvar in ((0.0, 1.0), (1.5, -1.0), (-2.0, 0.5)):
    log_q = -0.5 * ((x - mean) ** 2 / np.exp(logvar) + logvar)
    log_p = -0.5 * x**2
    density = np.exp(log_q) / np.sqrt(2 * np.pi)
    want = np.sum(density * (log_q - log_p)) * (x[1] - x[0])
    got = posterior.kl(jnp.float32(mean), jnp.float32(logvar))
    np.testing.assert_allclose(got, want, rtol=1e-5)
