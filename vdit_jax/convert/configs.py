"""What a config may say: fields with their kinds, ranges and defaults.

A config.json or scheduler_config.json of others has a `Table` beside its
reader. `read` checks a file with it before anything is made of the file, and
fills up what it leaves out; `check_held` compares its counts with the tensors
of the files, so that no network is begun of a size that they do not hold. `of`
says the same of a dataclass of ours, by its annotations.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from vdit_jax import schema

REQUIRED = dataclasses.MISSING  # the default of a field without one
_MOST_LAYERS = 1000
_LARGEST = 2**20  # no network has a vocabulary or a width beyond
_LARGEST_FLOAT = 1e9
_LONGEST_TEXT = 10_000  # letters, such as a negative prompt's
_MOST_ITEMS = 256  # of a list, such as the means of latents
_MOST_NAMED = 20  # fields in a message


@dataclasses.dataclass(frozen=True)
class Row:
  """A field of a table.

  Attributes:
    default: its value where a file is silent, or `REQUIRED`.
    field: what it may be.
    counts: what of the network it counts: "layers", or the "size" of an axis
      of a tensor; "" for neither.
  """

  default: Any
  field: schema.Field
  counts: str = ""


def layers(default: Any = REQUIRED) -> Row:
  """Make the row of a number of layers."""
  return Row(default, schema.Field(int, 1, _MOST_LAYERS), "layers")


def size(default: Any = REQUIRED, optional: bool = False) -> Row:
  """Make the row of a number that is, or divides, an axis of a tensor."""
  field = schema.Field(int, 1, _LARGEST, optional=optional)
  return Row(default, field, "size")


def sizes(default: Any, most: int) -> Row:
  """Make the row of a list of at most so many sizes."""
  each = schema.Field(int, 1, _LARGEST)
  return Row(default, schema.Field(list, 1, most, each=each), "size")


def whole(
  default: Any = REQUIRED,
  low: int = 1,
  high: int = 2**14,
  optional: bool = False,
) -> Row:
  """Make the row of a whole number that no tensor shows."""
  return Row(default, schema.Field(int, low, high, optional=optional))


def number(default: Any = REQUIRED, low: float = 0.0, high: float = 1.0) -> Row:
  """Make the row of a number."""
  return Row(default, schema.Field(float, low, high))


def flag(default: bool) -> Row:
  """Make the row of a yes or no."""
  return Row(default, schema.Field(bool))


def word(default: Any, *known: str) -> Row:
  """Make the row of a choice."""
  return Row(default, schema.Field(str, choices=known))


def words(default: Any, most: int) -> Row:
  """Make the row of a list of at most so many texts, or null."""
  each = schema.Field(str, high=100)
  return Row(default, schema.Field(list, 1, most, each=each, optional=True))


def text(default: str | None) -> Row:
  """Make the row of a text, or null."""
  return Row(default, schema.Field(str, high=_LONGEST_TEXT, optional=True))


def unused(default: Any) -> Row:
  """Make the row of a field that nothing looks at: of its default's kind."""
  kind = int if default is None else type(default)
  return Row(default, schema.Field(kind, optional=default is None))


@dataclasses.dataclass(frozen=True)
class Table:
  """What a class's config may say.

  Attributes:
    rows: fields that are honoured.
    fixed: fields that no release sets otherwise, with the one value that is
      honoured.
    strict: whether any other field is refused. transformers' configs have
      dozens that do not concern us.
    products: names of fields whose product is an axis of a tensor.
    remedy: what to do where a file has other fields.
  """

  rows: Mapping[str, Row]
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  strict: bool = True
  products: tuple[tuple[str, ...], ...] = ()
  remedy: str = "use diffusers for this checkpoint"

  @property
  def defaults(self) -> dict[str, Any]:
    """What the fields are where a file is silent."""
    rows = self.rows.items()
    return {k: row.default for k, row in rows if row.default is not REQUIRED}

  @property
  def fields(self) -> dict[str, schema.Field]:
    """What the fields may be."""
    return {name: row.field for name, row in self.rows.items()}


def read(
  where: str, config: Mapping[str, Any], table: Table, group: str = ""
) -> dict[str, Any]:
  """Check a config and fill it up with defaults.

  Args:
    where: path of the file, for errors.
    config: its content.
    table: what it may say.
    group: what the fields' names begin with in errors, "denoiser.".

  Returns:
    The table's fields.

  Raises:
    ValueError: names fields that are unknown, missing, of another kind or
      beyond their range.
  """
  given = {k: v for k, v in config.items() if not k.startswith("_")}
  unknown = given.keys() - table.rows.keys() - table.fixed.keys()
  other = [schema.quote(k) for k in sorted(unknown)] if table.strict else []
  other += [
    f"{k}={schema.quote(given[k])} (only {value!r} is supported)"
    for k, value in table.fixed.items()
    if given.get(k, value) != value
  ]
  if other:
    raise ValueError(
      f"{where}: {group.rstrip('.') or 'it'} has fields that are not honoured: "
      f"{', '.join(other[:_MOST_NAMED])}; {table.remedy}"
    )
  filled = table.defaults | {k: given[k] for k in table.rows if k in given}
  if missing := sorted(table.rows.keys() - filled.keys()):
    names = ", ".join(f"{group}{name}" for name in missing)
    raise ValueError(f"{where}: {names} must be there; fetch the file again")
  named = lambda values: {f"{group}{k}": v for k, v in values.items()}
  schema.check(where, named(filled), named(table.fields))
  return filled


def check_held(
  where: str,
  given: Mapping[str, Any],
  table: Table,
  stored: Mapping[str, Any],
) -> None:
  """Refuse counts beyond what the files hold, before anything is built.

  Args:
    where: path of the config, for errors.
    given: its fields, as `read` gives them.
    table: what it may say.
    stored: what has a shape, by the key of a file or by the path of a param.
  """
  most = held(stored)
  remedy = "the weights beside it are of no more; download both again"
  fields = {
    name: _at_most(row.field, most[row.counts])
    for name, row in table.rows.items()
    if row.counts
  }
  schema.check(where, given, fields, remedy)
  for names in table.products:
    total = math.prod(given[name] for name in names)
    if total > most["size"]:
      raise ValueError(
        f"{where}: {' times '.join(names)} must be at most {most['size']}, "
        f"got {total}; {remedy}"
      )


def held(stored: Mapping[str, Any]) -> dict[str, int]:
  """Bound what a network of these tensors can be of: its layers, its sizes.

  Layers that are not stacked have numbers in their names; stacks are `blocks`.
  """
  numbers = {n for name in stored for n in re.findall(r"\d+", name)}
  stacks = [x.shape[0] for k, x in stored.items() if "blocks/" in k and x.shape]
  axes = [n for x in stored.values() for n in x.shape]
  return {
    "layers": max([len(numbers), *stacks, 1]),
    "size": max([*axes, 1]),
  }


def of(cls: type, **others: schema.Field) -> Table:
  """Say what a dataclass's fields may be, by their annotations and defaults.

  Whole numbers are from 1, others from 0, or from the default if that is less;
  a list of defaults on both sides of 0 has no bounds.

  Args:
    cls: the dataclass.
    others: fields that are to be otherwise, or that are no plain values.
  """
  hints, rows = typing.get_type_hints(cls), {}
  for field in dataclasses.fields(cls):
    may_be = others.get(field.name) or _of(hints[field.name], field.default)
    rows[field.name] = Row(field.default, may_be)
    if field.default_factory is not dataclasses.MISSING:
      rows[field.name] = Row(field.default_factory(), may_be)
  return Table(rows, remedy=f"there are {', '.join(sorted(rows))}")


def _of(hint: Any, default: Any = REQUIRED) -> schema.Field:
  parts, origin = typing.get_args(hint), typing.get_origin(hint)
  if origin in (types.UnionType, typing.Union):
    inner = next(p for p in parts if p is not type(None))
    return dataclasses.replace(_of(inner), optional=True)
  if origin is tuple:
    items = default if isinstance(default, tuple) else ()
    each = _of(parts[0], min(items, default=REQUIRED))
    # Places are counted from the end too, and means are on both sides of 0.
    plain = parts[0] in (int, float)
    if default == () or (plain and min(items, default=0) < 0):
      each = dataclasses.replace(each, low=None)
    length = (0, _MOST_ITEMS) if parts[1:] == (...,) else (len(parts),) * 2
    return schema.Field(list, *length, each=each)
  lowest = [default] if type(default) in (int, float) else []
  if hint is int:
    return schema.Field(int, min([1, *lowest]), _LARGEST)
  if hint is float:
    return schema.Field(float, min([0.0, *lowest]), _LARGEST_FLOAT)
  if hint is bool:
    return schema.Field(bool)
  if hint is str:
    return schema.Field(str, high=_LONGEST_TEXT)
  if dict in (hint, origin):
    return schema.Field(dict)
  raise TypeError(f"{hint} says not what a field may be; give it")


def _at_most(field: schema.Field, most: int) -> schema.Field:
  if field.each:
    return dataclasses.replace(field, each=_at_most(field.each, most))
  return dataclasses.replace(field, high=most)
