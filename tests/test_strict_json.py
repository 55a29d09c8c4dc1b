"""Files of JSON are JSON: no bare NaN, whatever they hold."""

import ast
import json
import pathlib

import numpy as np
import pytest

from vdit_jax import strict_json

PACKAGE = pathlib.Path(strict_json.__file__).parent


def _refuse(name):
  raise AssertionError(f"a bare {name}")


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (float("nan"), "null"),
    (
      {"a": [1.5, float("inf"), (-float("inf"),)]},
      '{"a": [1.5, null, [null]]}',
    ),
    ({"x": np.float32(2), "n": np.int64(3)}, '{"x": 2.0, "n": 3}'),
    (np.float32("nan"), "null"),
    ([True, None, "NaN"], '[true, null, "NaN"]'),
  ],
)
def test_what_is_not_finite_is_null(value, text):
  assert strict_json.dumps(value) == text
  json.loads(text, parse_constant=_refuse)


def test_options_and_defaults_are_those_of_json():
  text = strict_json.dumps({"b": {1}, "a": 0}, sort_keys=True, default=list)
  assert text == '{"a": 0, "b": [1]}'
  inside = strict_json.dumps({"a": {1}}, default=lambda x: {"n": float("nan")})
  assert inside == '{"a": {"n": null}}'
  with pytest.raises(TypeError):
    strict_json.dumps({1})


# What is no file, or is JSON inside of another format.
_OTHERS = {"processes.py", "resume.py", "files.py", "windows.py", "adapters.py"}


def test_every_file_is_written_so():
  found = set()
  for path in PACKAGE.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and ast.unparse(node) in (
        "json.dumps",
        "json.dump",
      ):
        found.add(path.name)
  assert found - {"strict_json.py"} <= _OTHERS
