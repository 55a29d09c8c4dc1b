"""PSNR and SSIM against formulas and a direct implementation."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from vdit_jax.metrics import frames


def _pair(seed=0, shape=(3, 2, 20, 24, 3), noise=0.2):
  rng = np.random.default_rng(seed)
  a = ndimage.gaussian_filter(rng.normal(size=shape), (0, 0, 2, 2, 0)) * 4
  b = a + noise * rng.normal(size=shape)
  return (np.clip(x, -1, 1).astype(np.float32) for x in (a, b))


def _direct_ssim(a, b):
  """SSIM of two images [H, W] in [-1, 1] by Gaussian filters, float64."""

  def blur(x):
    return ndimage.gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

  a, b = (np.float64(a) + 1) / 2, (np.float64(b) + 1) / 2
  mean_a, mean_b = blur(a), blur(b)
  var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
  covariance = blur(a * b) - mean_a * mean_b
  upper = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
  lower = (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
  return (upper / lower).mean()


def test_psnr_of_a_constant_error_is_the_formula():
  a = np.zeros((2, 3, 4, 5, 3), np.float32)
  error = np.array([0.02, 0.2], np.float32).reshape(2, 1, 1, 1, 1)
  np.testing.assert_allclose(frames.psnr(a, a + error), [40, 20], rtol=1e-5)


def test_psnr_averages_decibels_over_frames():
  a = np.zeros((1, 2, 4, 4, 3), np.float32)
  error = np.array([0.02, 0.2], np.float32).reshape(1, 2, 1, 1, 1)
  np.testing.assert_allclose(frames.psnr(a, a + error), [30], rtol=1e-5)


def test_psnr_of_equal_videos_is_infinite():
  a, _ = _pair()
  assert np.isposinf(frames.psnr(a, a)).all()


def test_ssim_is_the_direct_implementation():
  a, b = _pair()
  expected = [
    np.mean(
      [
        _direct_ssim(a[i, j, ..., k], b[i, j, ..., k])
        for j in range(a.shape[1])
        for k in range(3)
      ]
    )
    for i in range(len(a))
  ]
  assert 0.2 < expected[0] < 0.9
  np.testing.assert_allclose(frames.ssim(a, b), expected, atol=2e-5)


def test_ssim_of_equal_videos_is_one_and_it_is_symmetric():
  a, b = _pair()
  np.testing.assert_allclose(frames.ssim(a, a), 1, atol=1e-6)
  np.testing.assert_allclose(frames.ssim(a, b), frames.ssim(b, a), atol=1e-6)


@pytest.mark.parametrize("metric", [frames.psnr, frames.ssim])
def test_more_noise_is_less_alike_and_clips_are_independent(metric):
  a, b = _pair(noise=0.05)
  _, c = _pair(noise=0.3)
  assert (np.asarray(metric(a, b)) > np.asarray(metric(a, c))).all()
  np.testing.assert_allclose(metric(a, b)[1:2], metric(a[1:2], b[1:2]), 1e-5)


def test_what_cannot_be_compared_is_refused():
  a = np.zeros((1, 2, 10, 20, 3), np.float32)
  with pytest.raises(ValueError, match="at least 11 x 11.*10 x 20"):
    frames.ssim(a, a)
  with pytest.raises(ValueError, match="one shape"):
    frames.psnr(a, a[:, :1])
  with pytest.raises(ValueError, match="a must be float.*uint8"):
    frames.psnr(a.astype(np.uint8), a)


def test_no_product_of_ssim_is_left_to_a_platforms_default_precision():
  a, b = _pair()
  text = jax.jit(frames.ssim).lower(a, b).as_text()
  assert "convolution" not in text and "dot_general" not in text
