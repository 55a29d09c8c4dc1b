"""Consistency of a video's frames: how alike their features are.

VBench's subject consistency (arXiv:2311.17982) compares each frame with the
one before and with the first, by DINO's features; here they are AlexNet's
(`features.frames`), so values are not VBench's. A still video is perfectly
consistent: read `motion` beside it, and a real video's value.
"""

import numpy as np


def neighbour(features: np.ndarray) -> np.ndarray:
  """Mean cosine of each frame with the one before: [B, F, D] -> [B]."""
  unit = _unit(features)
  return (unit[:, 1:] * unit[:, :-1]).sum(-1).mean(axis=1)


def first(features: np.ndarray) -> np.ndarray:
  """Mean cosine of each later frame with the first: [B, F, D] -> [B]."""
  unit = _unit(features)
  return (unit[:, 1:] * unit[:, :1]).sum(-1).mean(axis=1)


def _unit(features: np.ndarray) -> np.ndarray:
  features = np.asarray(features, np.float64)
  if features.ndim != 3 or features.shape[1] < 2:
    raise ValueError(
      "features must be [B, F, D] of at least two frames, got "
      f"{features.shape}; measure longer clips"
    )
  length = np.linalg.norm(features, axis=-1, keepdims=True)
  return features / np.maximum(length, 1e-12)
