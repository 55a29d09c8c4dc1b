"""Laws of the numbers that our denoiser is told: named, in order, or NaN."""

import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import types
from vdit_jax.models.vdit import numbers

FIELDS = ("motion", "size", "fps", "beauty")


def test_size_is_two_numbers():
  names = {"motion", "height", "width", "fps", "beauty"}
  assert numbers.names(FIELDS) == names
  assert numbers.names(("fps",)) == {"fps"} and numbers.names(()) == set()


def test_what_is_told_is_gathered_in_one_order():
  values = dict(width=48, beauty=5.5, fps=8, motion=2, height=32)
  cond = numbers.cond_of(FIELDS, 3, values)
  got = numbers.gather(FIELDS, cond, 3)
  # fps, height, width; then the scores in the order of the fields.
  np.testing.assert_array_equal(got, [[8, 32, 48, 2, 5.5]] * 3)
  assert got.dtype == jnp.float32


def test_what_is_not_told_is_not_known():
  cond = numbers.cond_of(FIELDS, 2, {"height": 32, "beauty": 5})
  got = numbers.gather(FIELDS, cond, 2)
  nan = np.nan
  np.testing.assert_array_equal(got, [[nan, 32, nan, nan, 5]] * 2)
  for nothing in (None, types.Cond(), numbers.cond_of(FIELDS, 2, {})):
    assert np.all(np.isnan(numbers.gather(FIELDS, nothing, 2)))


def test_fields_that_are_not_taken_are_none():
  cond = numbers.cond_of(("fps",), 2, {"fps": 8})
  assert cond.size is None and cond.scores is None
  np.testing.assert_array_equal(cond.fps, [8, 8])
  np.testing.assert_array_equal(numbers.gather(("fps",), cond, 2), [[8], [8]])
  cond = numbers.cond_of(("a",), 1, {"a": 3})
  assert cond.fps is None and cond.size is None
  np.testing.assert_array_equal(numbers.gather(("a",), cond, 1), [[3]])


def test_a_number_of_none_of_the_fields_is_refused():
  with pytest.raises(ValueError, match=r"\['height', 'width'\].*got \['fps'\]"):
    numbers.cond_of(("size",), 1, {"fps": 8, "height": 32})
  with pytest.raises(ValueError, match=r"got \['size'\]"):
    numbers.cond_of(("size",), 1, {"size": 32})


@pytest.mark.parametrize(
  "cond, message",
  [
    (types.Cond(fps=jnp.ones(3)), r"cond.fps must be \(2, 1\), .*got \(3,\)"),
    (types.Cond(size=jnp.ones(2)), r"cond.size must be \(2, 2\)"),
    (types.Cond(scores=jnp.ones((2, 3))), r"cond.scores must be \(2, 2\)"),
  ],
)
def test_numbers_of_another_batch_or_count_are_refused(cond, message):
  with pytest.raises(ValueError, match=message):
    numbers.gather(FIELDS, cond, 2)
