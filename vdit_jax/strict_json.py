"""JSON as its standard has it, for every file that this package writes.

JSON has no word for numbers that are not finite, and Python's writer puts a
bare NaN there, which other readers refuse: here they become null.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def dumps(
  value: Any, *, default: Callable[[Any], Any] | None = None, **options: Any
) -> str:
  """Write a value as JSON.

  Args:
    value: of dicts, sequences, texts and numbers, numpy's scalars too.
    default: what else there is -> the same of those.
    options: of `json.dumps`, such as indent and sort_keys.

  Raises:
    TypeError: if there is what JSON has no word for, and no default.
  """
  plain = default and (lambda x: _plain(default(x)))
  return json.dumps(_plain(value), allow_nan=False, default=plain, **options)


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
