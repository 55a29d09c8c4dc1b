"""Laws of a released config's fields: filled up, or refused."""

import pytest

from vdit_jax.convert import configs

DEFAULTS = {"width": 8, "depth": None}
FIXED = {"bias": True, "norm": "layer"}


def test_what_is_given_goes_before_the_defaults():
  got = configs.fields({"width": 4}, DEFAULTS, FIXED)
  assert got == {"width": 4, "depth": None}
  assert configs.fields({}, DEFAULTS, FIXED) == DEFAULTS


def test_a_fixed_field_may_be_silent_or_said_as_it_is():
  got = configs.fields({"bias": True, "norm": "layer"}, DEFAULTS, FIXED)
  assert got == DEFAULTS | FIXED


def test_what_the_library_says_of_itself_is_no_field():
  given = {"_class_name": "Net", "_diffusers_version": "0.1", "depth": 2}
  assert configs.fields(given, DEFAULTS, FIXED) == {"width": 8, "depth": 2}


def test_all_that_is_not_honoured_is_listed():
  given = {"_class_name": "Net", "heads": 2, "bias": False, "act": "gelu"}
  with pytest.raises(ValueError, match="config.json of Net") as error:
    configs.fields(given, DEFAULTS, FIXED)
  assert "act, heads, bias=False (only True is supported)" in str(error.value)
  assert "norm" not in str(error.value)


def test_defaults_and_config_are_left_as_they_are():
  defaults, given = dict(DEFAULTS), {"width": 3}
  got = configs.fields(given, defaults, FIXED)
  got["width"] = 5
  assert defaults == DEFAULTS and given == {"width": 3}
