"""Add up what a compiled program does, as often as it does it.

Walks the instructions of `hlo`, each loop as often as it turns: the
compiler's estimated cycles by kind, matmul FLOPs, collectives, Pallas calls.
Whatever is not known is said in `warnings`. The numbers are one device's.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

from vdit_jax.cost import hlo
from vdit_jax.cost.hlo import Computation, Instruction, Program, Shape

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
  "send",
  "recv",
)
KINDS = ("matmuls", "loops", "copies", "other fusions", "others")


_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')

# Targets of custom calls that compute nothing.
_PLUMBING = {
  "AllocateBuffer",
  "AsyncCollectiveDone",
  "AsyncCollectiveStart",
  "ConcatBitcast",
  "Sharding",
  "SPMDFullToShardShape",
  "SPMDShardToFullShape",
  "annotate_device_placement",
  "MoveToDevice",
  "MoveToHost",
  "PinToDevice",
}
_COPIES = {"copy", "transpose", "copy-start", "copy-done"} | {
  f"{op}-{end}"
  for op in ("slice", "dynamic-slice")
  for end in ("start", "done")
}
_FREE = set(
  "parameter constant tuple get-tuple-element bitcast partition-id replica-id "
  "after-all add-dependency opt-barrier async-done async-update domain iota "
  "rng-get-and-update-state infeed outfeed".split()
)
_PLAIN = set(
  "abs add and atan2 broadcast bitcast-convert ceil clamp clz compare complex "
  "concatenate convert cosine count-leading-zeros divide dynamic-slice "
  "dynamic-update-slice erf exponential exponential-minus-one floor gather "
  "imag is-finite log log-plus-one logistic maximum minimum multiply negate "
  "not or pad popcnt power real reduce reduce-precision reduce-window "
  "remainder reshape reverse rng rng-bit-generator round-nearest-afz "
  "round-nearest-even rsqrt scatter select select-and-scatter shift-left "
  "shift-right-arithmetic shift-right-logical sign sine slice sort sqrt cbrt "
  "stochastic-convert subtract tan tanh xor map topk top-k "
  "dynamic-reshape".split()
)


# Of the plain ones, those that are no loop over the elements of the result.
_MANY_TO_ONE = set(
  "reduce reduce-window scatter select-and-scatter sort topk top-k gather "
  "rng-bit-generator rng".split()
)


@dataclasses.dataclass(frozen=True)
class Call:
  """A Pallas kernel and how often it runs.

  Attributes:
    name: that it was given.
    times: how often.
    shapes: of its operands.
    results: shapes of what it makes.
    blocks: queries and keys of a step of its grid, where the text has them.
    heads: side by side in a row of its operands, where the text says so.
  """

  name: str
  times: int
  shapes: tuple[Shape, ...]
  results: tuple[Shape, ...]
  blocks: tuple[int, int] | None
  heads: int | None

  @property
  def nbytes(self) -> int:
    """Bytes of operands and results."""
    return hlo.size(self.shapes + self.results)


@dataclasses.dataclass(frozen=True)
class Item:
  """One instruction's share: all its turns together."""

  cycles: float
  kind: str
  times: int
  instruction: Instruction


@dataclasses.dataclass(frozen=True)
class Measure:
  """What a program does on one device.

  Attributes:
    cycles: estimated by the compiler, by kind, outside Pallas calls.
    flops: of matmuls and convolutions outside Pallas calls.
    collectives: opcode -> (how many, bytes). A gather counts what comes out,
      a reduce-scatter what goes in.
    calls: Pallas calls.
    items: what the cycles consist of, the dearest first.
    warnings: what the reader did not know.
  """

  cycles: dict[str, float]
  flops: int
  collectives: dict[str, tuple[int, int]]
  calls: list[Call]
  items: list[Item]
  warnings: list[str]


def measure(text: str) -> Measure:
  """Add up what the program of a text does."""
  walk = _Walk(hlo.parse(text))
  walk.run(walk.program.entry, 1)
  return walk.result()


class _Walk:
  """A program's instructions in the order of their calls."""

  def __init__(self, program: Program):
    self.program = program
    self.callers: dict[str, tuple[Computation, Instruction]] = {}
    self.items: list[Item] = []
    self.flops = 0
    self.channels: dict[str, tuple[str, int, int]] = {}
    self.calls: list[Call] = []
    self.warnings: collections.Counter[str] = collections.Counter()

  def result(self) -> Measure:
    cycles = dict.fromkeys(KINDS, 0.0)
    for item in self.items:
      cycles[item.kind] += item.cycles
    collectives: dict[str, tuple[int, int]] = {}
    for opcode, times, volume in self.channels.values():
      count, total = collectives.get(opcode, (0, 0))
      collectives[opcode] = count + times, total + times * volume
    return Measure(
      cycles=cycles,
      flops=self.flops,
      collectives=dict(sorted(collectives.items())),
      calls=self.calls,
      items=sorted(self.items, key=lambda item: -item.cycles),
      warnings=[f"{w} ({n} times)" for w, n in self.warnings.items()],
    )

  def run(self, name: str, times: int) -> None:
    """Walk a computation that runs so often."""
    computation = self.program.computations[name]
    for instruction in computation.instructions.values():
      self._step(computation, instruction, times)

  def _step(self, computation, instruction, times):
    opcode = instruction.opcode
    if opcode == "while":
      body = instruction.attribute("body")
      self.callers[body] = computation, instruction
      self.run(body, times * self._trips(computation, instruction))
    elif opcode == "conditional":
      self._dearest(instruction, times)
    elif opcode in ("call", "async-start"):
      callee = instruction.attribute("to_apply") or instruction.attribute(
        "calls"
      )
      self.run(callee, times)
    elif opcode == "custom-call":
      self._custom(computation, instruction, times)
    else:
      self._count(computation, instruction, times)
      self._charge(instruction, times)

  def _charge(self, instruction, times):
    """Put the estimated cycles of an instruction on its kind's account."""
    found = _CYCLES.search(instruction.rest)
    if found:
      kind = self._kind(instruction)
      cycles = int(found[1]) * times
      self.items.append(Item(cycles, kind, times, instruction))
    elif instruction.opcode == "fusion" and self._is_unpriced(instruction):
      self.warnings["a fusion without estimated cycles: charged nothing"] += 1

  def _kind(self, instruction) -> str:
    opcode = instruction.opcode
    if opcode == "fusion":
      inside = {i.opcode for i in self._inside(instruction)}
      if inside & {"convolution", "dot"}:
        return "matmuls"
      if inside <= _FREE | {"copy", "transpose", "reshape"}:
        return "copies"
      looped = instruction.attribute("kind") == "kLoop"
      return "loops" if looped else "other fusions"
    if opcode in ("convolution", "dot"):
      return "matmuls"
    if opcode in _COPIES:
      return "copies"
    return "others" if opcode in _MANY_TO_ONE else "loops"

  def _is_unpriced(self, instruction) -> bool:
    """Whether a fusion computes, beside moving data between devices."""
    inside = {i.opcode for i in self._inside(instruction)}
    return not inside & set(COLLECTIVES) and bool(
      inside - _FREE - {"custom-call"}
    )

  def _inside(self, instruction) -> Iterator[Instruction]:
    """All instructions of a fusion, those of fusions in it too."""
    callee = instruction.attribute("calls")
    for inner in self.program.computations[callee].instructions.values():
      yield inner
      if inner.opcode == "fusion":
        yield from self._inside(inner)

  def _count(self, computation, instruction, times):
    """Count FLOPs and collectives, those inside fusions too."""
    opcode = instruction.opcode
    base = opcode.removesuffix("-start")
    if opcode == "fusion":
      callee = self.program.computations[instruction.attribute("calls")]
      for inner in callee.instructions.values():
        self._count(callee, inner, times)
    elif opcode in ("convolution", "dot"):
      shapes = self._operand_shapes(computation, instruction)
      self.flops += times * hlo.flops(instruction, shapes)
    elif base in COLLECTIVES:
      self._collective(computation, instruction, base, times)
    elif not self._is_known(opcode):
      self.warnings[f"unknown instruction {opcode!r}"] += 1

  def _is_known(self, opcode: str) -> bool:
    known = _FREE | _PLAIN | _COPIES | {"custom-call"}
    return opcode in known or opcode.removesuffix("-done") in COLLECTIVES

  def _collective(self, computation, instruction, opcode, times):
    if computation.name.startswith("all-reduce-scatter"):
      opcode = "reduce-scatter"
    # The steps of one that runs beside matmuls share a channel.
    key = instruction.attribute("channel_id") or instruction.name
    results, operands = (
      instruction.shapes,
      self._operand_shapes(computation, instruction),
    )
    if instruction.opcode.endswith("-start"):
      results = results[-1:]  # with the operands and its own state before it
    volume = max(hlo.size(results), hlo.size(operands))
    old = self.channels.get(key, (opcode, 0, 0))
    self.channels[key] = opcode, max(times, old[1]), max(volume, old[2])

  def _operand_shapes(self, computation, instruction) -> tuple[Shape, ...]:
    found = computation.instructions
    return tuple(s for name in instruction.operands for s in found[name].shapes)

  def _custom(self, computation, instruction, times):
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)[1]
    if target == "tpu_custom_call":
      self.calls.append(
        Call(
          name=_call_name(instruction),
          times=times,
          shapes=self._operand_shapes(computation, instruction),
          results=instruction.shapes,
          blocks=_blocks(instruction.rest),
          heads=_heads(instruction.rest),
        )
      )
    elif target not in _PLUMBING:
      self.warnings[f"unknown custom call {target!r}: charged nothing"] += 1

  def _dearest(self, instruction, times):
    """Walk the branch of a conditional that has most estimated cycles."""
    names = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    branches = (
      hlo.NAMES.findall(names[1])
      if names
      else [
        instruction.attribute(f"{b}_computation") for b in ("true", "false")
      ]
    )

    def cost(branch: str) -> float:
      walk = _Walk(self.program)
      walk.run(branch, 1)
      return sum(item.cycles for item in walk.items) + walk.flops

    self.warnings["a conditional is charged its dearest branch"] += 1
    self.run(max(branches, key=cost), times)

  def _trips(self, computation, loop) -> int:
    """How often a while loop turns."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
      return int(known[1])
    condition = self.program.computations[loop.attribute("condition")]
    test = condition.instructions[condition.root]
    if test.opcode == "fusion":  # of the comparison alone
      inner = self.program.computations[test.attribute("calls")]
      outer = test.operands
      root = inner.instructions[inner.root]
      sides = [self._outside(inner, outer, name) for name in root.operands]
      test = dataclasses.replace(root, operands=())
      condition, operands = condition, sides
    else:
      operands = [(condition, name) for name in test.operands]
    trips = self._compare(computation, loop, test, operands)
    if trips is None:
      self.warnings[f"loop {loop.name} of unknown length: counted once"] += 1
    return 1 if trips is None else trips

  def _outside(self, inner, outer, name):
    """A fusion's parameter is what is passed for it."""
    found = inner.instructions[name]
    condition = next(
      c
      for c in self.program.computations.values()
      if outer[0] in c.instructions
    )
    if found.opcode == "parameter":
      return condition, outer[int(found.operands[0])]
    return inner, name

  def _compare(self, computation, loop, test, operands) -> int | None:
    """Turns of a loop from its test `counter < bound`, or one like it."""
    direction = test.attribute("direction")
    if direction in ("GT", "GE"):
      operands, direction = operands[::-1], {"GT": "LT", "GE": "LE"}[direction]
    if len(operands) != 2 or direction not in ("LT", "LE", "NE"):
      return None
    index = self._index(*operands[0])
    if index is None:
      return None
    bound = self._bound(computation, loop, *operands[1])
    start = self._element(computation, loop, index)
    step = self._increment(loop, index)
    if bound is None or start is None or step is None:
      return None
    return max(-(-(bound + (direction == "LE") - start) // step), 0)

  def _index(self, computation, name) -> int | None:
    """Place in a loop's state that a value is read from."""
    found = _source(computation, name)
    if found.opcode == "get-tuple-element":
      return int(found.attribute("index"))
    return None

  def _bound(self, computation, loop, where, name) -> int | None:
    found = _source(where, name)
    if found.opcode == "constant":
      return _integer(found)
    if found.opcode == "get-tuple-element":
      return self._element(computation, loop, int(found.attribute("index")))
    return None

  def _element(self, computation, loop, index) -> int | None:
    """Integer that a loop's state holds at first, if it is a constant."""
    state = computation.instructions[loop.operands[0]]
    if state.opcode == "tuple":
      found = _source(computation, state.operands[index])
    else:
      return None
    if found.opcode == "constant":
      return _integer(found)
    if found.opcode == "get-tuple-element" and computation.name in self.callers:
      above, outer = self.callers[computation.name]
      return self._element(above, outer, int(found.attribute("index")))
    return None

  def _increment(self, loop, index) -> int | None:
    """What a turn adds to the counter."""
    body = self.program.computations[loop.attribute("body")]
    root = body.instructions[body.root]
    if root.opcode != "tuple":
      return None
    found = _source(body, root.operands[index])
    if found.opcode == "fusion":
      body = self.program.computations[found.attribute("calls")]
      found = _source(body, body.root)
    if found.opcode != "add":
      return None
    sides = [_source(body, name) for name in found.operands]
    return next((_integer(s) for s in sides if s.opcode == "constant"), None)


def _source(computation: Computation, name: str) -> Instruction:
  """Follow copies back to what was copied."""
  found = computation.instructions[name]
  while found.opcode in ("copy", "bitcast", "convert", "opt-barrier"):
    found = computation.instructions[found.operands[0]]
  return found


def _integer(constant: Instruction) -> int | None:
  value = constant.operands[0]
  return int(value) if re.fullmatch(r"-?\d+", value) else None


def _call_name(instruction: Instruction) -> str:
  """Name that a Pallas call was given."""
  parts = instruction.op_name.split("/")
  if parts[-1] == "pallas_call" and len(parts) > 1:
    return parts[-2]
  return re.sub(r"\.\d+$", "", instruction.name)


def _blocks(text: str) -> tuple[int, int] | None:
  """Queries and keys of a grid step, which splash attention notes."""
  found = dict(re.findall(r'(block_[a-z_]+)\\*": (\d+)', text))
  for part in ("", "_dkv", "_dq"):
    names = f"block_q{part}", f"block_kv{part}"
    if all(name in found for name in names):
      return int(found[names[0]]), int(found[names[1]])
  return None


def _heads(text: str) -> int | None:
  """Heads side by side, which our own kernels note."""
  found = re.search(r'heads\\*": (\d+)', text)
  return int(found[1]) if found else None
