"""Laws of what a config may say: filled up, or refused by field and value."""

import dataclasses

import numpy as np
import pytest

from vdit_jax import schema
from vdit_jax.convert import configs

FIXED = {"bias": True, "norm": "layer"}
TABLE = configs.Table(
  {
    "width": configs.size(8),
    "heads": configs.size(2),
    "depth": configs.layers(),
    "levels": configs.sizes((4, 8), most=3),
    "eps": configs.number(1e-6),
    "act": configs.word("gelu", "gelu", "silu"),
  },
  FIXED,
  products=(("width", "heads"),),
)


def read(table=TABLE, **given):
  return configs.read("a/config.json", {"depth": 3} | given, table)


def test_what_is_given_goes_before_the_defaults():
  defaults = dict(width=8, heads=2, levels=(4, 8), eps=1e-6, act="gelu")
  assert TABLE.defaults == defaults
  assert read() == defaults | {"depth": 3}
  assert read(width=4, levels=[1]) == defaults | dict(
    depth=3, width=4, levels=[1]
  )


def test_a_fixed_field_may_be_silent_or_said_as_it_is():
  assert read(**FIXED) == read()


def test_what_the_library_says_of_itself_is_no_field():
  assert read(_class_name="Net", _diffusers_version="0.1") == read()


def test_all_that_is_not_honoured_is_listed():
  with pytest.raises(ValueError, match="^a/config.json: it has ") as error:
    read(scale=2, bias=False, axes="gelu")
  said = "'axes', 'scale', bias=False (only True is supported); use diffusers"
  assert said in str(error.value) and "norm" not in str(error.value)
  loose = dataclasses.replace(TABLE, strict=False)
  assert read(loose, scale=2) == read()
  with pytest.raises(ValueError, match="bias=False"):
    read(loose, scale=2, bias=False)


def test_what_has_no_default_must_be_there():
  with pytest.raises(ValueError, match="^a/config.json: depth must be there"):
    configs.read("a/config.json", {}, TABLE)
  with pytest.raises(ValueError, match="a: net.depth must be there"):
    configs.read("a", {}, TABLE, "net.")


@pytest.mark.parametrize(
  "field, value",
  [
    *(("width", x) for x in (0, -1, 10**9, 2.0, True, None, "8", [8])),
    *(("depth", x) for x in (0, 10**9, None)),
    *(("levels", x) for x in ([], [1] * 4, [1, 0], [1, "2"], 3)),
    *(("eps", x) for x in (float("nan"), float("inf"), 2.0, "0.1")),
    *(("act", x) for x in ("relu", None, ["gelu"])),
  ],
)
def test_other_kinds_and_ranges_are_refused(field, value):
  with pytest.raises(ValueError, match=f"^a/config.json: {field} must be "):
    read(**{field: value})


def test_a_group_is_named_in_errors():
  with pytest.raises(ValueError, match="^a: net.width must be .*, got 'x'"):
    configs.read("a", {"depth": 1, "width": "x"}, TABLE, "net.")


def _shapes(**shapes):
  return {k.replace("_", "."): np.zeros(x) for k, x in shapes.items()}


def test_counts_are_at_most_what_the_files_hold():
  stored = _shapes(block_0_a=(4, 16), block_1_a=(4, 16))
  assert configs.held(stored) == {"layers": 2, "size": 16}
  check = lambda **given: configs.check_held("a", read(**given), TABLE, stored)
  check(depth=2)
  for field, value in (("depth", 3), ("width", 17), ("levels", [4, 17])):
    with pytest.raises(ValueError, match=f"{field} must be .*weights beside"):
      check(**{"depth": 2, field: value})
  with pytest.raises(ValueError, match="width times heads must be at most 16"):
    check(depth=2, width=9)
  stacked = {"blocks/mlp/kernel": np.zeros((5, 2, 3))}
  assert configs.held(stacked) == {"layers": 5, "size": 5}


@dataclasses.dataclass(frozen=True)
class Config:
  text: str
  sizes: tuple[int, ...] = (4, 8)
  patch: tuple[tuple[int, int], ...] = ((1, 2),)
  shift: tuple[float, ...] = (0.5, -2.0)
  extra: int = 0
  depth: int = 3
  rate: float = 1e-3
  causal: bool = False
  note: str | None = None
  options: dict[str, int] = dataclasses.field(default_factory=dict)


def test_a_dataclass_says_what_its_fields_may_be():
  table = configs.of(Config)
  assert table.defaults == {
    k: v for k, v in vars(Config("")).items() if k != "text"
  }
  good = dict(text="a", sizes=(1,), shift=(-9, 3), extra=0, note="b")
  assert Config(**configs.read("a", good, table)) == Config(**good)
  for field, value in (
    ("text", 3),
    ("sizes", (0,)),
    ("sizes", (1,) * 1000),
    ("patch", ((1, 2, 3),)),
    ("shift", (float("inf"),)),
    ("extra", -1),
    ("depth", 0),
    ("rate", -1.0),
    ("rate", float("nan")),
    ("causal", 1),
    ("options", []),
  ):
    with pytest.raises(ValueError, match=f"a: {field} must be"):
      configs.read("a", good | {field: value}, table)
  other = configs.of(Config, depth=schema.Field(int, 5, 9))
  with pytest.raises(ValueError, match="depth must be"):
    configs.read("a", good, other)
