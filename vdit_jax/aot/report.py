"""Compile for a TPU that is not there, and read what comes out.

  lowered --compiled--> program --report--> what it needs, does and takes

Does the program fit? is the compiler's answer, not an estimate. Cycles are its
estimates, and attention kernels, of which it has none, are charged those of
`cost.chips`. Stalls for communication are left out.
"""

import os
import re
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from vdit_jax.aot import programs
from vdit_jax.cost import chips, hlo_cost

_GIB = 2**30
_LABEL = "the compiler's estimate; communication stalls left out"

# libtpu would look for a TPU and ask a server about it.
_QUIET = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


class OutOfMemoryError(Exception):
  """The program does not fit; the compiler's message, read."""

  def __init__(self, message: str):
    """Read how much is needed, how much there is, and for what."""
    sizes = (
      re.search(r"Used (\S+) of (\S+) hbm", message)
      or re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", message)
    )  # fmt: skip
    self.needed, self.available = (
      tuple(_gib(s.rstrip(".")) for s in sizes.groups()) if sizes else (0, 0)
    )
    self.buffers = _buffers(message)
    what = (
      f"does not fit: needs {self.needed:.2f} of {self.available:.2f} GiB"
      if sizes
      else f"does not fit: {message[:2000]}"
    )
    rows = [f"  {size:8.2f} GiB  {text}" for size, text in self.buffers]
    super().__init__(
      "\n".join([what, *(["largest buffers:"] if rows else []), *rows])
    )


def devices(topology: str, num_slices: int = 1) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
  """Return a topology's devices, such as v5e:16x16's.

  Raises:
    ValueError: the compiler is not installed, or does not know the topology.
  """
  kwargs = {"num_slices": num_slices} if num_slices > 1 else {}
  if re.fullmatch(r"[^:]+:1x1(x1)?", topology):
    kwargs["chips_per_host_bounds"] = [1, 1, 1]
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, **kwargs
    )
  except Exception as error:
    text = str(error)
    if "libtpu" in text or "known backends" in text.lower():
      raise ValueError(
        'no compiler for TPU here; pip install "vdit_jax[tpu]"'
      ) from error
    raise ValueError(
      f"topology {topology!r} is not one that libtpu knows ({text}); try "
      "v5e:16x16, v5p:4x4x4, v6e:16x16, v4:4x4x4 or tpu7x:4x4x4"
    ) from error
  return list(found.devices)


def compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
  """Compile, and say in how many seconds.

  Raises:
    OutOfMemoryError: it does not fit.
  """
  started = time.perf_counter()
  try:
    program = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      raise OutOfMemoryError(str(error)) from error
    raise
  return program, time.perf_counter() - started


def report(
  program: jax.stages.Compiled, task: programs.Job, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Read a compiled program: what it needs, does and is estimated to take."""
  device = mesh.devices.flat[0]
  chip = chips.of(device.device_kind, device.num_cores)
  measure = hlo_cost.measure(program.as_text())
  warnings = list(measure.warnings)
  kernels = _kernels(measure.calls, chip, warnings)
  peak = program.memory_analysis().peak_memory_in_bytes
  cycles = sum(measure.cycles.values()) + sum(
    row["cycles"] for row in kernels.values()
  )
  hardware = measure.flops + sum(row["flops"] for row in kernels.values())
  seconds = cycles / chip.hertz
  model = task.model_flops / mesh.size
  return {
    "chip": chip.name,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "clips": task.clips,
    "parameters": task.parameters,
    "run": task.note,
    "peak_gib": peak / _GIB,
    "hbm_gib": chip.hbm_bytes / _GIB,
    "model_flops": model,
    "hardware_flops": hardware,
    "cycles": measure.cycles,
    "kernels": kernels,
    "collectives": {
      name: {"count": count, "bytes": volume}
      for name, (count, volume) in measure.collectives.items()
    },
    "seconds": seconds,
    "utilisation": model / (seconds * chip.peak_flops) if seconds else 0.0,
    "estimate": _LABEL,
    "dearest": _dearest(measure),
    "warnings": warnings,
  }


def table(row: dict[str, Any]) -> str:
  """Write a report in Markdown."""
  outside = sum(row["cycles"].values())
  shapes = " ".join(f"{k} {v}" for k, v in row["mesh"].items() if v > 1)
  share = lambda part, whole: f"{100 * part / max(whole, 1):.1f} %"
  lines = [
    ("chips", f"{row['devices']} {row['chip']}, {shapes or 'one'}"),
    ("one run", f"{row['run']}, {row['clips']} clips"),
    ("parameters", f"{row['parameters']:,}"),
    (
      "peak HBM a chip",
      f"{row['peak_gib']:.2f} of {row['hbm_gib']:.2f} GiB, "
      + share(row["peak_gib"], row["hbm_gib"]),
    ),
    ("compile", f"{row.get('compile_seconds', 0):.0f} s"),
    ("host memory", f"{row.get('host_gib', 0):.1f} GiB"),
    ("model FLOPs a chip", f"{row['model_flops'] / 1e12:,.2f} T"),
    (
      "hardware FLOPs a chip",
      f"{row['hardware_flops'] / 1e12:,.2f} T, "
      f"{row['hardware_flops'] / max(row['model_flops'], 1):.3f} of model's",
    ),
    ("cycles outside kernels *", f"{outside / 1e9:.3f} G"),
  ]
  for kind, cycles in row["cycles"].items():
    lines.append(
      (f"- {kind} *", f"{cycles / 1e9:.3f} G, {share(cycles, outside)}")
    )
  for name, kernel in row["kernels"].items():
    text = f"{kernel['calls']} calls, {kernel['cycles'] / 1e9:.3f} G cycles"
    lines.append((f"kernel {name} *", text))
  for name, some in row["collectives"].items():
    lines.append((name, f"{some['count']}, {some['bytes'] / 1e9:.3f} GB"))
  lines += [
    ("seconds *", f"{row['seconds']:.3f}"),
    ("utilisation *", f"{100 * row['utilisation']:.1f} %"),
  ]
  width = max(len(name) for name, _ in lines)
  text = [f"| {name:{width}} | {value} |" for name, value in lines]
  text.insert(1, f"|{'-' * (width + 2)}|---|")
  text += ["", f"* {row['estimate']}"]
  text += [f"! {warning}" for warning in row["warnings"]]
  return "\n".join(text)


def _kernels(
  calls: list[hlo_cost.Call], chip: chips.Chip, warnings: list[str]
) -> dict[str, dict[str, float]]:
  """Charge each Pallas call; those of one name together."""
  rows: dict[str, dict[str, float]] = {}
  for call in calls:
    row = rows.setdefault(call.name, {"calls": 0, "cycles": 0.0, "flops": 0})
    row["calls"] += call.times
    found = chips.kernel(call.name)
    if isinstance(found, chips.Stream):
      row["cycles"] += call.times * _stream(found, call, chip)
      continue
    arrays = [dims for kind, dims in call.shapes if kind[0] in "bf"]
    arrays = [dims for dims in arrays if len(dims) > 2]
    if found is None or len(arrays) < 2:
      warnings.append(f"kernel {call.name!r} is unknown: charged nothing")
      continue
    q, k = arrays[:2]
    heads = call.heads or 1  # side by side
    sizes = {
      "heads": int(np.prod(q[:-2])) * heads,
      "queries": q[-2],
      "keys": k[-2],
      "head_dim": q[-1] // heads,
    }
    if call.blocks is None:
      warnings.append(f"kernel {call.name!r} says no blocks: 512 x 512 charged")
    block = call.blocks or (512, 512)
    for name, size in zip(("queries", "keys"), block, strict=True):
      sizes[name] += -sizes[name] % size  # it works on whole blocks
    cycles = chips.kernel_cycles(found, chip, block=block, **sizes)
    row["cycles"] += call.times * cycles
    row["flops"] += call.times * chips.kernel_flops(found, **sizes)
  return rows


def _stream(
  found: chips.Stream, call: hlo_cost.Call, chip: chips.Chip
) -> float:
  """Charge a kernel by what it reads and writes."""
  arrays = call.shapes + call.results
  return chips.stream_cycles(
    found,
    chip,
    elements=max(int(np.prod(dims)) for _, dims in arrays),
    nbytes=call.nbytes,
  )


def _dearest(measure: hlo_cost.Measure) -> list[dict[str, Any]]:
  """What is not a matmul and takes most, by where it comes from."""
  return [
    {
      "cycles": item.cycles,
      "kind": item.kind,
      "times": item.times,
      "name": item.instruction.name,
      "from": item.instruction.op_name,
      "makes": " ".join(
        f"{kind}{list(dims)}" for kind, dims in item.instruction.shapes
      ),
    }
    for item in measure.items
    if item.kind != "matmuls"
  ][:100]


def _gib(text: str) -> float:
  """Read the compiler's sizes: 15.75G, 258.00M, 1.5K, 3B."""
  number = float(re.match(r"[\d.]+", text)[0])
  return number * {"T": 2**10, "G": 1, "M": 2**-10, "K": 2**-20}.get(
    text[-1], 2**-30
  )


def _buffers(message: str, most: int = 8) -> list[tuple[float, str]]:
  """Read the largest allocations that the compiler lists."""
  found = []
  for part in re.split(r"\n\s*\d+\. Size: ", message)[1 : most + 1]:
    shape = re.search(r"Shape: (\S+)", part)
    place = re.search(r'op_name="([^"]*)"', part)
    words = [m[1] for m in (shape, place) if m]
    found.append((_gib(part.split()[0]), " ".join(words)))
  return found


def quiet() -> None:
  """Set up jax to compile for TPU on a machine without one."""
  for name, value in _QUIET.items():
    os.environ.setdefault(name, value)
  jax.config.update("jax_platforms", "cpu")
  # A cached program would hide what compiling takes.
  jax.config.update("jax_enable_compilation_cache", False)
