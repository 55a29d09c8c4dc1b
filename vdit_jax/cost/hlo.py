"""Read the text of a program that XLA compiled for TPU.

`parse` makes instructions of the text, `flops` counts one's; `tally` walks
them as they run.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

Shape = tuple[str, tuple[int, ...]]  # dtype and dims

_BITS = re.compile(r"(?:pred|token|opaque|[a-z]+?(\d+)[a-z0-9]*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_START = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*)$", re.DOTALL)
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\]")
NAMES = re.compile(r"%([^\s,()]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program, or several where it holds newlines.

  Attributes:
    name: unique in the program.
    opcode: what it does.
    shapes: of its results.
    operands: names.
    rest: all that follows the operands.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  rest: str

  def attribute(self, key: str) -> str | None:
    """Name of the computation, or number, that an attribute gives."""
    found = re.search(rf"\b{key}=%?([^\s,{{}}]+)", self.rest)
    return found and found[1]

  @property
  def op_name(self) -> str:
    """Where in the traced function it comes from."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in order; the last one or ROOT is the result."""

  name: str
  instructions: dict[str, Instruction]
  root: str


@dataclasses.dataclass(frozen=True)
class Program:
  """Computations by name."""

  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Program:
  """Read a program, as `compiled.as_text()` gives it.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry = {}, None
  for is_entry, name, statements in _computations(text):
    instructions, root = {}, ""
    for is_root, instruction in map(_instruction, statements):
      instructions[instruction.name] = instruction
      root = instruction.name if is_root or not root else root
    computations[name] = Computation(name, instructions, root)
    entry = name if is_entry else entry
  if entry is None:
    raise ValueError(
      "no ENTRY in the text; pass that of a compiled program, as_text()"
    )
  return Program(computations, entry)


def size(shapes: tuple[Shape, ...]) -> int:
  """Bytes of arrays."""
  return sum(_bits(dtype) * math.prod(dims) for dtype, dims in shapes) // 8


def flops(instruction: Instruction, shapes: tuple[Shape, ...]) -> int:
  """FLOPs of a "dot" or "convolution" with operands of these shapes."""
  if instruction.opcode == "dot":
    return _dot_flops(instruction, shapes)
  return _convolution_flops(instruction, shapes)


def _computations(text: str) -> Iterator[tuple[bool, str, list[str]]]:
  """Cut a text into computations, and those into statements.

  A statement may hold newlines, and lines of it may begin with "}": so a
  computation ends where the next begins.
  """
  header, statements = None, []
  for line in text.splitlines():
    found = _HEADER.match(line)
    if found and not line.startswith("HloModule"):
      if header:
        yield *header, statements
      header, statements = (bool(found[1]), found[2]), []
    elif header and _START.match(line):
      statements.append(line)
    elif header and statements and line.strip() not in ("", "}"):
      statements[-1] += "\n" + line
  if header:
    yield *header, statements


def _instruction(statement: str) -> tuple[bool, Instruction]:
  is_root, name, text = _START.match(statement).groups()
  end = _closing(text) if text.startswith("(") else text.index(" ")
  shape, text = text[:end], text[end:].lstrip()
  begin = text.index("(")
  end = begin + _closing(text[begin:])
  return bool(is_root), Instruction(
    name=name,
    opcode=text[:begin],
    shapes=_shapes(shape),
    operands=_operands(text[:begin], text[begin + 1 : end - 1]),
    rest=text[end:],
  )


def _operands(opcode: str, text: str) -> tuple[str, ...]:
  if opcode in ("constant", "parameter"):
    return (text.strip(),)
  return tuple(NAMES.findall(text))


def _closing(text: str) -> int:
  """Length of the parenthesis that the text begins with."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return i + 1
  raise ValueError(f"a parenthesis is not closed in {text[:80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
  return tuple(
    (dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n))
    for dtype, dims in _SHAPE.findall(text)
  )


def _bits(dtype: str) -> int:
  found = _BITS.match(dtype)
  if not found:
    raise ValueError(f"unknown type {dtype!r}; add it to hlo._BITS")
  return int(found[1] or (8 if dtype == "pred" else 0))


def _dot_flops(instruction: Instruction, shapes: tuple[Shape, ...]) -> int:
  dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
  summed = math.prod(shapes[0][1][int(d)] for d in dims.split(",") if d)
  return 2 * math.prod(instruction.shapes[0][1]) * summed


def _convolution_flops(
  instruction: Instruction, shapes: tuple[Shape, ...]
) -> int:
  """FLOPs of a convolution; of taps that meet padding or dilation, none.

  A batched matmul is a convolution over its batch, of which one tap counts.
  """
  labels = instruction.attribute("dim_labels") or ""
  left, right, out = re.match(r"(.*)_(.*)->(.*)", labels).groups()
  x, kernel, y = shapes[0][1], shapes[1][1], instruction.shapes[0][1]
  found = re.search(r"window=\{([^}]*)\}", instruction.rest)
  window = dict(re.findall(r"(\w+)=(\S+)", found[1] if found else ""))
  total = 2 * y[out.index("b")] * y[out.index("f")] * kernel[right.index("i")]
  for axis in range(sum(label.isdigit() for label in out)):
    label = str(axis)
    field = lambda key, default, axis=axis: (
      window[key].split("x")[axis] if key in window else default
    )
    low = int(field("pad", "0_0").split("_")[0])
    total *= _taps(
      n_in=x[left.index(label)],
      n_out=y[out.index(label)],
      taps=kernel[right.index(label)],
      stride=int(field("stride", "1")),
      low=low,
      spread=int(field("lhs_dilate", "1")),
      dilation=int(field("rhs_dilate", "1")),
    )
  return total


def _taps(n_in, n_out, taps, stride, low, spread, dilation) -> int:
  """Pairs of an output and a tap that meet an input, along one axis."""
  last = (n_in - 1) * spread
  count = 0
  for tap in range(taps):
    places = range(
      tap * dilation - low, tap * dilation - low + n_out * stride, stride
    )
    count += sum(0 <= p <= last and p % spread == 0 for p in places)
  return count
