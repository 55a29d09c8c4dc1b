"""What a TPU chip has, and what our kernels take on it; peaks of GPUs.

Nothing here was measured on a chip. Peaks and cores are Google's, from
https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. The memory is what
libtpu 0.0.42 lets a program have: it refuses more with RESOURCE_EXHAUSTED.
Cycles of kernels are bundles of the code that libtpu 0.0.42 makes.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, or the part of one that jax calls a device.

  Attributes:
    name: Google's.
    cores: TensorCores.
    hbm_bytes: memory that a program may have.
    peak_flops: bfloat16 FLOPs a second.
    flops_per_cycle: what all matrix units do in a cycle.
    bytes_per_cycle: that memory reads and writes, as the compiler estimates a
      loop over a large array: some 40 % of what Google says.
  """

  name: str
  cores: int
  hbm_bytes: int
  peak_flops: float
  flops_per_cycle: int
  bytes_per_cycle: float

  @property
  def hertz(self) -> float:
    """Clock that the peak implies."""
    return self.peak_flops / self.flops_per_cycle


def _mxus(count: int, side: int) -> int:
  """FLOPs a cycle of square matrix units."""
  return 2 * count * side * side


_GIB = 2**30

# By jax' device_kind. v4, v5e, v5p: four units of 128 x 128 a core, so 1.05,
# 1.5 and 1.75 GHz. v6e and 7x: Google's pages say two and four units of 256 x
# 256 a core; the compiler gives a matmul of 8192^3 369,000 and 422,000 FLOPs a
# cycle, which only four can do: 1.75 and 2.2 GHz.
CHIPS = {
  "TPU v4": Chip("v4", 2, int(30.5 * _GIB), 275e12, 2 * _mxus(4, 128), 450),
  "TPU v5 lite": Chip("v5e", 1, int(15.75 * _GIB), 197e12, _mxus(4, 128), 221),
  "TPU v5": Chip("v5p", 2, int(95.74 * _GIB), 459e12, 2 * _mxus(4, 128), 571),
  "TPU v6 lite": Chip("v6e", 1, int(31.25 * _GIB), 918e12, _mxus(4, 256), 377),
  "TPU7x": Chip(
    "tpu7x", 2, int(189.5 * _GIB), 2307e12, 2 * _mxus(4, 256), 1258
  ),
}


# bfloat16 FLOPs a second of an NVIDIA card, dense, sums in float32, by what
# jax' device_kind begins with; the first that fits. From NVIDIA's data sheets,
# halved where they count a sparsity that no matmul here has, and, of GeForce
# and RTX cards, its papers on the Ampere (GA102), Ada and Blackwell designs.
GPU_PEAKS = {
  "NVIDIA B200": 2250e12,
  "NVIDIA H200 NVL": 836e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H100 PCIe": 757e12,
  "NVIDIA H100 NVL": 836e12,
  "NVIDIA H100": 989e12,
  "NVIDIA A100": 312e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA L4": 121e12,
  "NVIDIA RTX A6000": 155e12,
  "NVIDIA GeForce RTX 5090": 209e12,
  "NVIDIA GeForce RTX 4090": 165e12,
  "NVIDIA GeForce RTX 3090": 71e12,
}
_OTHERS = (" D", " Ti", " Laptop", " MIG")  # behind a name: another card


def peak_flops(device_kind: str, cores: int | None = None) -> float | None:
  """Peak bfloat16 FLOPs a second of a TPU or GPU; None if it is not known.

  Args:
    device_kind: as jax says it.
    cores: see `of`.
  """
  if device_kind in CHIPS:
    return of(device_kind, cores).peak_flops
  for card, peak in GPU_PEAKS.items():
    rest = device_kind.removeprefix(card)
    if rest != device_kind and (not rest or rest[0] in " -"):
      return None if rest.startswith(_OTHERS) else peak
  return None


def of(device_kind: str, cores: int | None = None) -> Chip:
  """Look up a device.

  Args:
    device_kind: as jax says it.
    cores: of the device, as jax says it; where a device is one core of a
      chip's two, memory and peak are its share. None is a whole chip.
  """
  if device_kind not in CHIPS:
    raise ValueError(
      f"nothing is known of {device_kind!r}, only of {sorted(CHIPS)}; add a "
      "row to chips.CHIPS"
    )
  chip = CHIPS[device_kind]
  cores = cores or chip.cores
  return dataclasses.replace(
    chip,
    cores=cores,
    hbm_bytes=chip.hbm_bytes * cores // chip.cores,
    peak_flops=chip.peak_flops * cores / chip.cores,
    flops_per_cycle=chip.flops_per_cycle * cores // chip.cores,
    bytes_per_cycle=chip.bytes_per_cycle * cores / chip.cores,
  )


@dataclasses.dataclass(frozen=True)
class Kernel:
  """An attention kernel.

  Attributes:
    part: of attention: "forward", "dkv", "dq" or "dqkv".
    matmuls: a tile: each takes 2 x queries x keys x head_dim FLOPs.
    bundles: cycles of a tile of 512 x 512 of one head, by head_dim, on a v5e
      and all but the same on a v5p.
    one_core: whether it leaves the second core of a chip idle.
  """

  part: str
  matmuls: int
  bundles: dict[int, int]
  one_core: bool = False


# By what a Pallas call's name begins with; the first that fits. The library's
# backward kernels mark every axis of their grid "arbitrary" and so run on one
# core of a v4 or v5p. Our forward one is charged what it takes in blocks of
# 640; in those of 768 it takes 1085. Our dq and dkv at a head_dim of 64 are
# charged what they take at 128.
KERNELS = {
  "splash_m[hq]a_fwd": Kernel("forward", 2, {64: 1188, 128: 1172}),
  "splash_m[hq]a_dkv": Kernel("dkv", 4, {64: 1813, 128: 2001}, one_core=True),
  "splash_m[hq]a_dq": Kernel("dq", 3, {64: 1523, 128: 1498}, one_core=True),
  "attention_forward": Kernel("forward", 2, {64: 1121, 128: 1121}),
  "attention_dkv": Kernel("dkv", 4, {128: 1867}),
  "attention_dqkv": Kernel("dqkv", 5, {64: 2296, 128: 2302}),
  "attention_dq": Kernel("dq", 3, {128: 1468}),
}


@dataclasses.dataclass(frozen=True)
class Stream:
  """A kernel that reads arrays once and writes arrays once.

  Attributes:
    bundles: cycles for 8 x 128 numbers of its largest array, loop included.
  """

  bundles: float


# Memory is slower than the code of all of these.
STREAMS = {
  "heads_cut": Stream(6.0),
  "heads_join": Stream(8.8),
  "rotate_pairs": Stream(6.0),  # not looked up: as heads_cut
  "norm_modulate": Stream(5.6),
  "norm_gradient": Stream(12.7),
  "attention_delta": Stream(3.5),
}

# A v6e or 7x core multiplies 256 x 256 at a time, four units as a v5e has: at
# a head_dim of 128 half of a unit has nothing to do in the two matmuls of
# three that sum over it. Not looked up in a dump: the v5e's cycles are
# charged, which is too much.
_LOOP = {"v5p": 270}  # cycles of a step of the grid beside its tile
_OTHER_LOOP = 150
_TILE = 512 * 512


def kernel(name: str) -> Kernel | Stream | None:
  """Look up a Pallas call by its name; None if it is in no table."""
  known = (STREAMS | KERNELS).items()
  return next((k for pattern, k in known if re.match(pattern, name)), None)


def stream_cycles(
  found: Stream, chip: Chip, *, elements: int, nbytes: int
) -> float:
  """Charge one call of a stream its code, or memory where that is slower.

  Args:
    found: of `STREAMS`.
    chip: on which it runs.
    elements: of its largest array.
    nbytes: of all that it reads and writes.
  """
  code = elements / (8 * 128) * found.bundles / chip.cores
  return max(code, nbytes / chip.bytes_per_cycle)


def kernel_cycles(
  found: Kernel,
  chip: Chip,
  *,
  heads: int,
  queries: int,
  keys: int,
  head_dim: int,
  block: tuple[int, int] = (512, 512),
) -> float:
  """Charge one call of a kernel its cycles: its code's, or its matmuls'.

  A unit cannot multiply faster than its peak, however short the code.

  Args:
    found: of `KERNELS`.
    chip: on which it runs.
    heads: of all clips.
    queries: with their padding.
    keys: with their padding.
    head_dim: 64 or 128; others are charged by the nearest.
    block: queries and keys of a step of the grid.
  """
  nearest = min(found.bundles, key=lambda known: abs(known - head_dim))
  tile = found.bundles[nearest] * max(head_dim / nearest, 1)
  steps = heads * queries * keys / (block[0] * block[1])
  loop = _LOOP.get(chip.name, _OTHER_LOOP)
  cycles = heads * queries * keys / _TILE * tile + steps * loop
  size = {"heads": heads, "queries": queries, "keys": keys}
  matmuls = kernel_flops(found, **size, head_dim=head_dim)
  least = matmuls / (chip.flops_per_cycle / chip.cores)
  return max(cycles, least) / (1 if found.one_core else chip.cores)


def kernel_flops(
  found: Kernel, *, heads: int, queries: int, keys: int, head_dim: int
) -> int:
  """FLOPs of one call, its padding included."""
  return 2 * found.matmuls * heads * queries * keys * head_dim
