"""What a value from outside must be: a table of fields, checked before use.

  config.json, scheduler, adapter's metadata, a run's config --check--> readers

Beside each reader stands a table of its fields: of which kind, from where to
where. What is not as the table says is refused by file, field and value, before
anything is computed or allocated, so that no reader checks a field by itself.
"""

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

_LONGEST = 80  # letters of a value that a message quotes
_MOST_NAMES = 40  # that a message lists
_ONE = {
  int: "a whole number",
  float: "a finite number",
  bool: "true or false",
  str: "a text",
  list: "a list",
  dict: "an object",
}
_MANY = {int: "whole numbers", float: "finite numbers", str: "texts"}


@dataclasses.dataclass(frozen=True)
class Field:
  """What a value must be.

  Attributes:
    kind: int, float, bool, str, list or dict. A bool is no int, an int is a
      float, a tuple is a list, and a float is finite.
    low: least value; of a list, a dict or a str the least length.
    high: greatest value or length.
    choices: if given, the value is one of these.
    each: of a list's items, or of a dict's values.
    optional: whether it may be None.
  """

  kind: type
  low: float | None = None
  high: float | None = None
  choices: tuple[Any, ...] = ()
  each: "Field | None" = None
  optional: bool = False

  def fits(self, value: Any) -> bool:
    """Whether a value is as it must be."""
    if value is None:
      return self.optional
    if self.choices:
      return any(type(c) is type(value) and c == value for c in self.choices)
    if not _is(value, self.kind):
      return False
    size = value if self.kind in (int, float, bool) else len(value)
    if self.low is not None and size < self.low:
      return False
    if self.high is not None and size > self.high:
      return False
    items = value.values() if self.kind is dict else value
    return self.each is None or all(map(self.each.fits, items))

  def __str__(self) -> str:
    """Say in words what a value must be."""
    if self.choices:
      said = f"one of {', '.join(map(repr, self.choices))}"
    elif self.kind in (list, dict) and self.each is not None:
      said = f"{_ONE[self.kind]} of {self._items()}"
    elif self.kind in (list, dict, str):
      unit = "letters" if self.kind is str else "items"
      said = _ONE[self.kind] + _bounds(" of", self.low, self.high, unit)
    else:
      said = _ONE[self.kind] + _bounds("", self.low, self.high, "")
    return f"{said} or null" if self.optional else said

  def _items(self) -> str:
    """Say how many items there are, and what each must be."""
    each = self.each
    count = _bounds("", self.low, self.high, "").lstrip()
    if each is None or each.choices or each.kind not in _MANY:
      return f"{count} items, each {each}".lstrip()
    measured = (" of", "letters") if each.kind is str else ("", "")
    bounds = _bounds(measured[0], each.low, each.high, measured[1])
    return f"{count} {_MANY[each.kind]}{bounds}".lstrip()


def check(
  where: str,
  values: Mapping[str, Any],
  fields: Mapping[str, Field],
  remedy: str = "",
) -> None:
  """Refuse values that are not what a table says.

  Args:
    where: they come from, as the user knows it: a file, a flag.
    values: by name; names that the table does not have are not looked at.
    fields: the table.
    remedy: what to do about it.

  Raises:
    ValueError: names the place, the field, its value and what it must be.
  """
  for name, field in fields.items():
    if name in values and not field.fits(values[name]):
      tail = f"; {remedy}" if remedy else ""
      raise ValueError(
        f"{where}: {name} must be {field}, got {quote(values[name])}{tail}"
      )


def quote(value: Any, limit: int = _LONGEST) -> str:
  """Quote a value in a message: its repr, cut in the middle if it is long.

  It takes no time or memory that grows with the value.
  """
  return _Quoted(limit).repr(value)


def near(name: str, known: Iterable[str]) -> str:
  """Say which names there are, and first which of them are like one."""
  names = [str(x) for x in known]
  close = difflib.get_close_matches(str(name)[:_LONGEST], names)
  meant = f"did you mean {' or '.join(close)}? " if close else ""
  more = f" and {len(names) - _MOST_NAMES} more" * (len(names) > _MOST_NAMES)
  return f"{meant}there are {', '.join(names[:_MOST_NAMES]) or 'none'}{more}"


class _Quoted(reprlib.Repr):
  """A repr of limited length, whatever is inside of what."""

  def __init__(self, limit: int):
    super().__init__()
    self.maxlevel, self.maxother = 3, limit
    self.maxstring = self.maxlong = limit
    self._limit = limit

  def repr(self, x: Any) -> str:
    said = super().repr(x)
    half = self._limit // 2
    too_long = len(said) > self._limit + len("'...'")
    return f"{said[:half]}...{said[-half:]}" if too_long else said

  def repr_int(self, x: int, level: int) -> str:
    if x.bit_length() > 4 * self._limit:
      return f"a whole number of {x.bit_length()} bits"
    return super().repr_int(x, level)

  def repr_bytes(self, x: bytes, level: int) -> str:
    del level
    return repr(x[: self._limit]) + "..." * (len(x) > self._limit)


def _is(value: Any, kind: type) -> bool:
  if kind is float:
    number = type(value) in (int, float)
    return number and abs(value) < 1e300 and math.isfinite(value)
  if kind is list:
    return isinstance(value, list | tuple)
  return isinstance(value, Mapping) if kind is dict else type(value) is kind


def _bounds(
  before: str, low: float | None, high: float | None, unit: str
) -> str:
  unit = f" {unit}" if unit else ""
  if low is None and high is None:
    return ""
  if low == high:
    return f"{before} {_number(low)}{unit}"
  if high is None:
    return f"{before} from {_number(low)}{unit} up"
  if low is None:
    return f"{before} up to {_number(high)}{unit}"
  return f"{before} from {_number(low)} to {_number(high)}{unit}"


def _number(x: float) -> str:
  return f"{x:g}" if x != x // 1 or abs(x) >= 1e15 else str(int(x))
