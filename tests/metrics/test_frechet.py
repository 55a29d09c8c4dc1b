"""Laws of the Frechet distance."""

import numpy as np
import pytest
import scipy.linalg

from vdit_jax.metrics import frechet


def _sample(mean, covariance, n, seed):
  """Draw n samples whose mean and covariance are exactly these."""
  z = np.random.default_rng(seed).normal(size=(n, len(mean)))
  z -= z.mean(0)
  z = z @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(z.T)))).T
  return mean + z @ np.linalg.cholesky(covariance).T


def _gaussian(D, seed):
  rng = np.random.default_rng(seed)
  root = rng.normal(size=(D, D))
  return rng.normal(size=D), root @ root.T + 0.1 * np.eye(D)


def test_distance_is_that_of_gaussians():
  (m1, S1), (m2, S2) = _gaussian(6, 0), _gaussian(6, 1)
  root = scipy.linalg.sqrtm(S1 @ S2).real
  expected = np.square(m1 - m2).sum() + np.trace(S1 + S2 - 2 * root)
  a, b = _sample(m1, S1, 40, 2), _sample(m2, S2, 70, 3)
  np.testing.assert_allclose(frechet.distance(a, b), expected, rtol=1e-9)


def test_one_dimension_is_the_closed_form():
  a, b = _sample([1.0], [[4.0]], 9, 0), _sample([-2.0], [[0.25]], 5, 1)
  np.testing.assert_allclose(frechet.distance(a, b), 9 + 1.5**2)


def test_fewer_samples_than_features():
  """Covariances of rank 4 in 50 dimensions, rotated from 8 dimensions."""
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(5, 8)), rng.normal(size=(5, 8)) + 1
  turn, _ = np.linalg.qr(rng.normal(size=(50, 8)))
  few = frechet.distance(a, b)
  np.testing.assert_allclose(frechet.distance(a @ turn.T, b @ turn.T), few)
  S1, S2 = np.cov(a.T), np.cov(b.T)
  eigenvalues = np.linalg.eigvals(S1 @ S2).real.clip(0)
  expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(S1 + S2)
  expected -= 2 * np.sqrt(eigenvalues).sum()
  np.testing.assert_allclose(few, expected, rtol=1e-6)


def test_a_set_has_no_distance_from_itself():
  a = np.random.default_rng(0).normal(size=(20, 100)) * 1e3
  assert frechet.distance(a, a) < 1e-6 * np.square(a).sum() / len(a)


def test_a_shift_is_its_length_squared_and_order_does_not_matter():
  a = np.random.default_rng(0).normal(size=(30, 12))
  b = np.random.default_rng(1).normal(size=(25, 12))
  shift = np.arange(12.0)
  shifted = frechet.distance(a, a[::-1] + shift)
  np.testing.assert_allclose(shifted, np.square(shift).sum())
  np.testing.assert_allclose(frechet.distance(a, b), frechet.distance(b, a))


@pytest.mark.parametrize(
  "a, b, words",
  [
    (np.zeros((1, 3)), np.zeros((4, 3)), "at least two"),
    (np.zeros((4, 3)), np.zeros((4, 2)), "features"),
    (np.zeros(4), np.zeros(4), "features"),
    (np.zeros((4, 3)), np.full((4, 3), np.nan), "finite"),
  ],
)
def test_what_has_no_distance_is_refused(a, b, words):
  with pytest.raises(ValueError, match=words):
    frechet.distance(a, b)
