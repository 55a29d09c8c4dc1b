"""Entries of the JSON, from described clips that are made up."""

import numpy as np
import pytest

from vdit_jax.evaluate import scores


def _described(n, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "frames": rng.uniform(size=(n, 3, 256)),
    "smoothness": rng.uniform(size=n),
    "amount": rng.uniform(size=n),
    "i3d": rng.normal(size=(n, 400)),
  }


def test_dimensions_of_prompts_are_measured_apart():
  made, real = _described(3), _described(4, 1)
  dimensions = [("subject", "motion"), ("motion",), ()]
  rows = scores.consistent(made, real, dimensions)
  assert len(rows) == 4 * 3
  found = [rows[f"motion_amount{e}"] for e in ("", "/motion", "/subject")]
  amount = made["amount"]
  expected = [amount.mean(), amount[:2].mean(), amount[0]]
  np.testing.assert_allclose([row["value"] for row in found], expected)
  assert [row["n"] for row in found] == [3, 2, 1]
  ceilings = [row["ceiling"] for row in found]
  np.testing.assert_allclose(ceilings, real["amount"].mean())


@pytest.mark.parametrize("made, real, n", [(3, 6, 3), (5, 6, 3), (2, 9, 2)])
def test_distances_are_of_sets_of_one_size(made, real, n):
  rows = scores.distances(_described(made), _described(real, 1))
  assert {row["n"] for row in rows.values()} == {n}


def test_distances_from_the_same_and_from_other_clips():
  real = _described(8)
  same = {name: x[:4] for name, x in real.items()}
  for row in scores.distances(same, real).values():
    assert row["value"] < 1e-9 < row["ceiling"]
  far = scores.distances(same | {"i3d": same["i3d"] + 10}, real)["fvd"]
  np.testing.assert_allclose(far["value"], 400 * 100)


def test_too_few_clips_have_no_distance():
  with pytest.raises(ValueError, match="two generated and four real"):
    scores.distances(_described(5), _described(3))
