"""Frechet distance of two sets of features, each taken for a Gaussian.

  d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

Dowson and Landau, "The Frechet distance between multivariate normal
distributions" (J. Multivariate Analysis 12, 1982); of the features of I3D it
is FVD (arXiv:1812.01717), which, like FID, means the square. It is biased: few
samples give large distances, so compare sets of one size only.
"""

from typing import Any

import numpy as np


def distance(a: np.ndarray, b: np.ndarray) -> float:
  """Compute the squared Frechet distance of two samples.

  The trace of (S1 S2)^(1/2) is the sum of the singular values of X1 X2^T,
  X being centred features with S = X^T X. So no root of a matrix is taken,
  which fails for covariances of fewer samples than features; of X only the
  triangular factor of its QR decomposition is needed.

  Args:
    a, b: features [n, D] and [m, D], n and m at least 2.

  Returns:
    the square of the distance, from 0 up.
  """
  for name, x in (("a", a), ("b", b)):
    if np.ndim(x) != 2 or len(x) < 2 or np.shape(x)[1] != np.shape(a)[-1]:
      raise ValueError(
        f"a and b must be features [n, D] of at least two samples, got "
        f"{np.shape(a)} and {np.shape(b)}; measure more clips"
      )
    if not np.isfinite(x).all():
      raise ValueError(f"{name} must be finite, got NaN or inf")
  (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
  shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
  spread = np.square(root_a).sum() + np.square(root_b).sum()
  apart = np.square(mean_a - mean_b).sum() + spread - 2 * shared
  return max(float(apart), 0.0)


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean [D] and a root R of the covariance R^T R, [min(n, D), D]."""
  x = np.asarray(x, np.float64)
  mean = x.mean(axis=0)
  root: Any = np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r")
  return mean, root
