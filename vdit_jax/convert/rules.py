"""Where each tensor of a PyTorch checkpoint goes in our params, as data.

A family's table is a list of rules, each from checkpoint keys to a path in
the params. The params that a module wants say, through its rules, which keys
a checkpoint must have: `keys` makes that list. It serves both directions.
Reading compares it with what there is (`check`); writing writes it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax import inputs, trees
from vdit_jax.convert import configs

# A key's regex outside of its groups: a character that stands for itself (a
# dot for a dot), or an escaped one. Inside a group: anything but a group.
_TOKEN = re.compile(r"([\w.-]|\\[^\w])|\((?!\?)((?:[^()\\]|\\.)+)\)")
_REFERENCE = re.compile(r"\\([1-9])")


@dataclasses.dataclass(frozen=True)
class Transform:
  """A change of layout; `inverse` undoes `forward` to the bit.

  Attributes:
    forward: torch's array to ours.
    inverse: ours to torch's.
  """

  forward: Callable[[np.ndarray], np.ndarray]
  inverse: Callable[[np.ndarray], np.ndarray]


def transpose(*axes: int) -> Transform:
  """Make the transform whose `forward` is a transpose."""
  inverse = tuple(int(i) for i in np.argsort(axes))
  return Transform(lambda x: x.transpose(axes), lambda x: x.transpose(inverse))


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = transpose(1, 0)  # [out, in] -> [in, out]
CONV2D = transpose(2, 3, 1, 0)  # [o, i, h, w] -> [h, w, i, o]
CONV3D = transpose(2, 3, 4, 1, 0)  # [o, i, t, h, w] -> [t, h, w, i, o]


@dataclasses.dataclass(frozen=True)
class Rule:
  r"""From checkpoint keys to a param, one to one.

  Attributes:
    key: regex that matches a checkpoint key wholly. Since it is also what
      keys are made from, it is literal characters (`.` or `\.` for a dot)
      and groups `(...)`; groups do not nest, and nothing is optional or
      repeated outside of them.
    path: of the param, such as `blocks/norm/scale`. It has every group of
      `key`, as `\1`, but for `layer`'s.
    transform: of each tensor.
    layer: number of the group of `key` that counts the layers of a stacked
      param: the tensor is the row of that index, along the leading axis.
    optional: whether the module may be without this param.
  """

  key: str
  path: str
  transform: Transform = SAME
  layer: int | None = None
  optional: bool = False

  def __post_init__(self):
    _, groups = _pieces(self.key)
    used = {int(n) for n in _REFERENCE.findall(self.path)}
    wanted = set(range(1, len(groups) + 1)) - {self.layer}
    if self.layer is not None and not 1 <= self.layer <= len(groups):
      raise ValueError(
        f"layer {self.layer} of {self.key!r} is not one of its "
        f"{len(groups)} groups"
      )
    if used != wanted or "\\" in _REFERENCE.sub("", self.path):
      raise ValueError(
        f"path {self.path!r} has groups {sorted(used)}, but must have "
        f"{sorted(wanted)}: all of {self.key!r} but its layer's, as \\1"
      )


ONE = Transform(lambda x: x[0], lambda x: x[None])  # [1, ...] <-> [...]
# A convolution of one place is a matrix: [o, i, 1, 1, 1] <-> [i, o].
POINT = Transform(
  lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T[..., None, None, None]
)


def dense(theirs: str, ours: str, bias: bool = True) -> list["Rule"]:
  """Rules of a dense layer."""
  table = [Rule(f"{theirs}.weight", f"{ours}/kernel", LINEAR)]
  return table + [Rule(f"{theirs}.bias", f"{ours}/bias")] * bias


def norm(theirs: str, ours: str, bias: bool = True) -> list["Rule"]:
  """Rules of a norm's scale, and its bias if it has one."""
  table = [Rule(f"{theirs}.weight", f"{ours}/scale")]
  return table + [Rule(f"{theirs}.bias", f"{ours}/bias")] * bias


def conv(theirs: str, ours: str, transform: Transform = CONV3D) -> list["Rule"]:
  """Rules of a convolution; `transform` is of its weight."""
  return [
    Rule(f"{theirs}.weight", f"{ours}/kernel", transform),
    Rule(f"{theirs}.bias", f"{ours}/bias"),
  ]


def in_blocks(
  table: Sequence["Rule"],
  theirs: str = "transformer_blocks",
  ours: str = "blocks",
) -> list["Rule"]:
  """Put a block's rules below the name of a stack, its index the layer."""
  below = lambda path: _REFERENCE.sub(lambda n: f"\\{int(n[1]) + 1}", path)
  return [
    dataclasses.replace(
      rule,
      key=rf"{theirs}.(\d+).{rule.key}",
      path=f"{ours}/{below(rule.path)}",
      layer=1,
    )
    for rule in table
  ]


@dataclasses.dataclass(frozen=True)
class Component:
  """What is known of one class of network, by its `_class_name`.

  Attributes:
    module: class of network, of its Config.
    fields: what its config.json may say.
    config: (those fields, compute dtype as np.dtype) -> Config.
    example: Config -> inputs of the smallest call, which initialise it.
    rules: module -> its table.
    ignored: regexes of keys that hold nothing that is needed; they are not
      written back.
    copies: second names of tensors, each with the key that the rules know;
      a copy is read where that key is not there.
    prefix: of all keys in files of other versions; it is not written back.
  """

  module: type[nn.Module]
  fields: configs.Table
  config: Callable[[dict[str, Any], Any], Any]
  example: Callable[[Any], tuple[Any, ...]]
  rules: Callable[[nn.Module], tuple[Rule, ...]]
  ignored: tuple[str, ...] = ()
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  prefix: str = ""

  def describe(
    self, config: Mapping[str, Any], dtype: Any, where: str = "config.json"
  ) -> Any:
    """Read a config.json: the network's Config.

    Args:
      config: the file's content.
      dtype: compute type.
      where: path of the file, for errors.

    Raises:
      ValueError: names the file, and the field that it refuses.
    """
    given = configs.read(where, config, self.fields)
    with inputs.naming(where):
      return self.config(given, dtype)

  def build(
    self, config: Mapping[str, Any], dtype: Any, where: str = "config.json"
  ) -> nn.Module:
    """Build the network that a config.json describes; see `describe`."""
    return self.module(self.describe(config, dtype, where))

  def abstract(self, module: nn.Module) -> Any:
    """Shapes of a network's params, boxed with their logical axes."""

    def init():
      return module.init(jax.random.key(0), *self.example(module.cfg))

    # One small example does not divide over the devices of a mesh.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
      return jax.eval_shape(init)["params"]


@dataclasses.dataclass(frozen=True)
class Slot:
  """The place of one tensor: all of the param at `path`, or one row of it."""

  key: str
  path: str
  row: int | None
  transform: Transform

  def __str__(self):
    return self.path if self.row is None else f"{self.path}[{self.row}]"


def keys(table: Sequence[Rule], params: Mapping[str, Any]) -> dict[str, Slot]:
  """Make the keys that a checkpoint of these params has, in the table's order.

  Args:
    table: the rules.
    params: what has a shape, by path.

  Raises:
    ValueError: if a row of a param has no key or several, a key is made
      twice, or a rule has no param and is not optional: the table is wrong.
  """
  slots = [slot for rule in table for slot in _slots(rule, params)]
  problems = [
    f"rule without a param: {rule.key} -> {rule.path}"
    for rule in table
    if not rule.optional and not any(True for _ in _slots(rule, params))
  ]
  problems += _repeated("key", [slot.key for slot in slots])
  problems += _repeated("param", _places(slots, params))
  filled = {(slot.path, slot.row) for slot in slots}
  problems += [
    f"param without a rule: {path}{'' if row is None else f'[{row}]'}"
    for path, row in sorted(_unfilled(filled, params))
  ]
  trees.raise_listed("the table of rules does not fit the module", problems)
  return {slot.key: slot for slot in slots}


def check(
  table: Sequence[Rule],
  params: Mapping[str, Any],
  tensors: Mapping[str, Any],
  *,
  ignored: Sequence[str] = (),
  mixed: bool = False,
  what: str = "checkpoint",
) -> dict[str, Slot]:
  """Match tensors with params, strictly; nothing is read.

  Args:
    table: the rules.
    params: what has a shape and a dtype, by path.
    tensors: the same, by checkpoint key.
    ignored: regexes of keys that may be there beside.
    mixed: whether rows of one param may be of several dtypes.
    what: subject of the error.

  Returns:
    The slot of each key, in the table's order.

  Raises:
    ValueError: one that lists all keys that are missing or left over, and
      all tensors of a wrong shape or dtype.
  """
  slots = keys(table, params)
  extra = [
    key
    for key in tensors
    if key not in slots and not any(re.fullmatch(p, key) for p in ignored)
  ]
  problems = [
    f"missing: {key} (for {slot})"
    for key, slot in slots.items()
    if key not in tensors
  ]
  problems += [f"left over: {key} {tuple(tensors[key].shape)}" for key in extra]
  present = {key: slot for key, slot in slots.items() if key in tensors}
  for key, slot in present.items():
    problems += _misfit(slot, params[slot.path], tensors[key])
  if not mixed:
    problems += _mixed(present, tensors)
  trees.raise_listed(f"{what} does not fit its config.json", problems)
  return slots


def by_path(slots: Mapping[str, Slot]) -> dict[str, list[Slot]]:
  """Gather the slots of each param."""
  groups: dict[str, list[Slot]] = {}
  for slot in slots.values():
    groups.setdefault(slot.path, []).append(slot)
  return groups


def shape(
  transform: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]
) -> tuple[int, ...] | None:
  """Shape that one direction of a transform makes; None if it refuses."""
  empty = np.broadcast_to(np.zeros((), np.uint8), tuple(shape))
  try:
    return transform(empty).shape
  except (ValueError, IndexError):
    return None


def _pieces(key: str) -> tuple[list[str], list[str]]:
  """Split a key's regex into its literals and, between them, its groups."""
  literals, groups, end = [""], [], 0
  while token := _TOKEN.match(key, end):
    literal, group = token.groups()
    if group is None:
      literals[-1] += literal[-1]
    else:
      groups.append(group)
      literals.append("")
    end = token.end()
  if end != len(key):
    raise ValueError(
      f"key {key!r} cannot be written back: from {key[end:]!r} on it is not "
      "literal characters and groups that do not nest"
    )
  return literals, groups


def _path_regex(path: str, groups: Sequence[str]) -> re.Pattern[str]:
  """Regex of the paths that a template makes; its groups are g1, g2, ..."""
  parts, seen = [], set()
  for i, part in enumerate(_REFERENCE.split(path)):
    if i % 2 == 0:
      parts.append(re.escape(part))
    elif part in seen:
      parts.append(f"(?P=g{part})")
    else:
      parts.append(f"(?P<g{part}>{groups[int(part) - 1]})")
      seen.add(part)
  return re.compile("".join(parts))


def _slots(rule: Rule, params: Mapping[str, Any]):
  """Yield the slots of one rule."""
  literals, groups = _pieces(rule.key)
  regex = _path_regex(rule.path, groups)
  for path, param in params.items():
    found = regex.fullmatch(path)
    if not found:
      continue
    for row in _rows(rule, param, groups):
      values = [
        str(row) if n == rule.layer else found[f"g{n}"]
        for n in range(1, len(groups) + 1)
      ]
      ends = zip(values, literals[1:], strict=True)
      key = literals[0] + "".join(v + literal for v, literal in ends)
      yield Slot(key, path, row, rule.transform)


def _rows(rule: Rule, param: Any, groups: Sequence[str]) -> list[int | None]:
  if rule.layer is None:
    return [None]
  if not param.shape:
    raise ValueError(f"{rule.path} is a scalar, but {rule.key!r} has a layer")
  layer = re.compile(groups[rule.layer - 1])
  return [i for i in range(param.shape[0]) if layer.fullmatch(str(i))]


def _places(slots: Sequence[Slot], params: Mapping[str, Any]) -> list[str]:
  """Name each row that is filled; a param filled whole fills all its rows."""
  stacked = {slot.path for slot in slots if slot.row is not None}
  return [
    str(dataclasses.replace(slot, row=row))
    for slot in slots
    for row in (
      range(params[slot.path].shape[0])
      if slot.row is None and slot.path in stacked
      else [slot.row]
    )
  ]


def _unfilled(filled: set, params: Mapping[str, Any]) -> list[tuple]:
  stacked = {path for path, row in filled if row is not None}
  return [
    (path, row)
    for path, param in params.items()
    if (path, None) not in filled
    for row in (range(param.shape[0]) if path in stacked else [None])
    if (path, row) not in filled
  ]


def _repeated(what: str, names: Sequence[str]) -> list[str]:
  seen, again = set(), set()
  for name in names:
    (again if name in seen else seen).add(name)
  return [f"{what} of several rules: {name}" for name in sorted(again)]


def _misfit(slot: Slot, param: Any, tensor: Any) -> list[str]:
  lines = []
  wanted = tuple(param.shape if slot.row is None else param.shape[1:])
  torch = shape(slot.transform.inverse, wanted)
  if tuple(tensor.shape) != torch:
    lines.append(
      f"wrong shape: {slot.key} {tuple(tensor.shape)}, {slot} wants {torch}"
    )
  if not _castable(tensor.dtype, param.dtype):
    lines.append(
      f"wrong dtype: {slot.key} {tensor.dtype}, {slot} wants "
      f"{'a float' if _floating(param.dtype) else param.dtype}"
    )
  return lines


def _mixed(slots: Mapping[str, Slot], tensors: Mapping[str, Any]) -> list[str]:
  dtypes: dict[str, set[str]] = {}
  for key, slot in slots.items():
    dtypes.setdefault(slot.path, set()).add(str(tensors[key].dtype))
  return [
    f"several dtypes: the layers of {path} are {', '.join(sorted(names))}; "
    "give a param_dtype"
    for path, names in dtypes.items()
    if len(names) > 1
  ]


def _floating(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, jnp.floating)


def _castable(found: Any, wanted: Any) -> bool:
  """Whether a stored dtype may serve: any float for a float, else the same."""
  if _floating(wanted):
    return _floating(found)
  return np.dtype(found) == np.dtype(wanted)
