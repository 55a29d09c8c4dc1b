"""What training gives of a clip: kinds by their shares, from the clip's key."""

import jax
import numpy as np
import pytest

from vdit_jax.training import given

SHAPE = F, H, W = 9, 4, 6


def _draws(shares, shape=SHAPE, number=400):
  keys = jax.random.split(jax.random.key(0), number)
  return np.asarray(jax.vmap(lambda key: given.draw(key, shares, shape))(keys))


def _alone(kind):
  return given.Shares(**{k: float(k == kind) for k in given.KINDS})


def test_without_shares_nothing_is_given():
  none = given.Shares(**dict.fromkeys(given.KINDS, 0.0))
  assert not _draws(none).any()


@pytest.mark.parametrize("kind", given.KINDS)
def test_each_kind_gives_what_its_name_says(kind):
  known = _draws(_alone(kind))
  frames = known.any((2, 3))
  if kind != "region":
    np.testing.assert_array_equal(known.all((2, 3)), frames)
  count = frames.sum(1)
  first, last = frames[:, 0], frames[:, -1]
  if kind in ("first", "last"):
    assert (count == 1).all() and (first if kind == "first" else last).all()
  elif kind == "ends":
    assert (count == 2).all() and (first & last).all()
  elif kind in ("beginning", "end"):
    assert set(count) == set(range(1, F))
    cuts = np.diff(frames.astype(int), axis=1)
    assert (np.abs(cuts).sum(1) == 1).all()
    assert (first if kind == "beginning" else last).all()
  elif kind == "between":
    assert (first & last).all() and len(set(count)) > 3
  elif kind == "single":
    assert set(count) == set(range(2, 9)) and frames.any(0).all()
  else:
    np.testing.assert_array_equal(known, known[:, :1].repeat(F, 1))
    share = known.mean((1, 2, 3))
    assert share.min() < 0.1 and share.max() > 0.9


def test_shares_are_those_of_the_clips():
  shares = given.Shares()
  known = _draws(shares, number=4_000)
  nothing = 1 - sum(shares.of_kinds)
  empty = ~known.any((1, 2, 3))
  assert abs(empty.mean() - nothing) < 0.04  # some regions are empty too
  only_first = (known.any((2, 3)) == (np.arange(F) == 0)).all(1)
  few = shares.first + shares.beginning / (F - 1)
  assert abs(only_first.mean() - few) < 0.03


def test_a_single_frame_can_be_drawn_too():
  assert _draws(given.Shares(), (1, H, W)).shape[1] == 1


def test_too_large_shares_are_refused():
  with pytest.raises(ValueError, match="at most 1"):
    given.Shares(first=0.9)
