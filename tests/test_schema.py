"""A table says what a value must be, and a message says it in words."""

import re
import tracemalloc

import pytest

from vdit_jax import schema

COUNT = schema.Field(int, 1, 512)
RATE = schema.Field(float, 0)
NAMES = schema.Field(list, 1, 3, each=schema.Field(str))
NESTED = {"a": [[[[["deep"] * 99] * 99] * 99] * 99]}


@pytest.mark.parametrize(
  "field, fitting, unfit",
  [
    (COUNT, [1, 512], [0, 513, True, 1.0, "1", None, [1], float("nan")]),
    (RATE, [0, 1.5, 3], [-1, float("nan"), float("inf"), True, "1", 10**400]),
    (schema.Field(bool), [True, False], [0, 1, "true", None]),
    (schema.Field(str, 1, 3), ["a", "abc"], ["", "abcd", b"a", 1]),
    (schema.Field(str, choices=("a", "b")), ["a"], ["c", ["a"], 1, None]),
    (schema.Field(int, choices=(1, 2)), [1], [True, 1.0, 3]),
    (NAMES, [["a"], ("a", "b")], [[], list("abcd"), [1], "abc", {"a": 1}]),
    (schema.Field(dict, each=COUNT), [{}, {"a": 1}], [[], {"a": 0}, "a"]),
    (schema.Field(int, optional=True), [None, 1], ["", False]),
  ],
)
def test_what_fits(field, fitting, unfit):
  assert [x for x in fitting if not field.fits(x)] == []
  assert [x for x in unfit if field.fits(x)] == []


@pytest.mark.parametrize(
  "field, said",
  [
    (COUNT, "a whole number from 1 to 512"),
    (RATE, "a finite number from 0 up"),
    (NAMES, "a list of from 1 to 3 texts"),
    (schema.Field(list, 2, 2, each=COUNT), "a list of 2 whole numbers from 1"),
    (schema.Field(dict), "an object"),
    (schema.Field(str, choices=("a", "b")), "one of 'a', 'b'"),
    (schema.Field(bool, optional=True), "true or false or null"),
  ],
)
def test_a_field_in_words(field, said):
  assert str(field).startswith(said)


def test_a_refusal_names_place_field_value_and_remedy():
  schema.check("a/config.json", {"rate": 2, "other": "x"}, {"rate": RATE})
  with pytest.raises(
    ValueError,
    match=r"a/config\.json: rate must be a finite number from 0 up, got 'x'; "
    "fetch it again",
  ):
    schema.check(
      "a/config.json", {"rate": "x"}, {"rate": RATE}, "fetch it again"
    )


@pytest.mark.parametrize(
  "make",
  [
    lambda: "x" * 10**8,
    lambda: 10**50_000,
    lambda: [0] * 10**7,
    lambda: NESTED,
    lambda: b"x" * 10**8,
  ],
)
def test_a_quoted_value_is_short_and_costs_nothing(make):
  value = make()
  tracemalloc.start()
  said = schema.quote(value)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert 0 < len(said) < 120
  assert peak < 10**6


def test_a_short_value_is_quoted_whole():
  for value in ("a", 12, [1, 2], {"a": None}, 1.5, True, "a\x1b[2J"):
    assert schema.quote(value) == repr(value)


def test_the_nearest_names_come_first():
  said = schema.near("learning_rate", ["steps", "lr", "learn_rate"])
  assert re.match("did you mean learn_rate.* there are steps, lr, learn", said)
  assert schema.near("x", []) == "there are none"
  assert len(schema.near("x" * 10**6, map(str, range(10**4)))) < 300
