"""Chips and kernels: what is known of them hangs together."""

import pytest

from vdit_jax.cost import chips
from vdit_jax.kernels import splash

TILE = {"heads": 1, "queries": 512, "keys": 512, "head_dim": 128}


def test_every_chip_that_a_kernel_has_sizes_for_is_known():
  assert set(splash.SIZES) == set(chips.CHIPS)


@pytest.mark.parametrize(
  "kind, gigahertz",
  [("TPU v4", 1.05), ("TPU v5 lite", 1.5), ("TPU v5", 1.75)],
)
def test_the_peak_is_that_of_the_units_at_the_clock(kind, gigahertz):
  assert chips.of(kind).hertz / 1e9 == pytest.approx(gigahertz, rel=0.01)


def test_a_device_that_is_one_core_of_two_has_half():
  whole, half = chips.of("TPU7x"), chips.of("TPU7x", 1)
  assert half.peak_flops * 2 == whole.peak_flops
  assert half.hbm_bytes * 2 == whole.hbm_bytes
  assert half.hertz == whole.hertz


def test_an_unknown_chip_is_refused():
  with pytest.raises(ValueError, match="TPU v99.*TPU v5 lite"):
    chips.of("TPU v99")


@pytest.mark.parametrize(
  "kind, teraflops",
  [
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 757),
    ("NVIDIA H200", 989),
    ("NVIDIA A100-SXM4-40GB", 312),
    ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362),
    ("NVIDIA GeForce RTX 4090", 165),
    ("TPU v5 lite", 197),
  ],
)
def test_peaks_are_found_by_jax_name_of_a_device(kind, teraflops):
  assert chips.peak_flops(kind) == teraflops * 1e12


@pytest.mark.parametrize(
  "kind",
  [
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA L40",
    "NVIDIA A1000",
    "Tesla T4",
    "cpu",
  ],
)
def test_another_card_with_a_like_name_is_not_known(kind):
  assert chips.peak_flops(kind) is None


@pytest.mark.parametrize(
  "name, part",
  [
    ("splash_mha_fwd_residuals", "forward"),
    ("splash_mha_fwd_segmented_no_residuals", "forward"),
    ("splash_mqa_dkv_no_residuals", "dkv"),
    ("splash_mha_dq_segmented_no_residuals", "dq"),
    ("attention_forward", "forward"),
    ("attention_dq", "dq"),
    ("attention_dkv", "dkv"),
    ("attention_dqkv", "dqkv"),
  ],
)
def test_kernels_are_known_by_name(name, part):
  assert chips.kernel(name).part == part


def test_an_unknown_kernel_is_none():
  assert chips.kernel("ring_attention") is None


def test_only_our_backward_kernels_use_both_cores():
  v5p, v5e = chips.of("TPU v5"), chips.of("TPU v5 lite")
  for name, cores in (
    ("splash_mha_fwd", 2),
    ("splash_mha_dkv", 1),
    ("splash_mha_dq", 1),
    ("attention_dkv", 2),
    ("attention_dq", 2),
    ("attention_dqkv", 2),
  ):
    found = chips.kernel(name)
    # One step of the grid for all, so that its loop does not count.
    tiles = TILE | {"block": (2**20, 2**20), "heads": 2}
    ratio = chips.kernel_cycles(found, v5e, **tiles) / chips.kernel_cycles(
      found, v5p, **tiles
    )
    assert ratio == pytest.approx(cores, rel=1e-3), name


def test_matmuls_are_not_faster_than_the_peak():
  found, chip = chips.kernel("attention_dqkv"), chips.of("TPU v5 lite")
  tiles = TILE | {"block": (2**20, 2**20)}
  assert found.bundles[128] < 2560
  assert chips.kernel_cycles(found, chip, **tiles) == 2560


def test_cycles_grow_with_tiles_and_steps():
  found, chip = chips.kernel("splash_mha_fwd"), chips.of("TPU v5 lite")
  one = chips.kernel_cycles(found, chip, **TILE)
  assert one == 1172 + 150
  many = TILE | {"heads": 3, "queries": 1024}
  assert chips.kernel_cycles(found, chip, **many) == 6 * one
  large = chips.kernel_cycles(found, chip, block=(1024, 512), **many)
  assert large == 6 * 1172 + 3 * 150


def test_a_stream_takes_its_code_or_the_memory():
  stream = chips.Stream(bundles=3.0)
  v5e, v5p = chips.of("TPU v5 lite"), chips.of("TPU v5")
  size = {"elements": 1024 * 10_000, "nbytes": 221}
  assert chips.stream_cycles(stream, v5e, **size) == 30_000
  assert chips.stream_cycles(stream, v5p, **size) == 15_000
  size["nbytes"] = 221 * 50_000
  assert chips.stream_cycles(stream, v5e, **size) == 50_000


def test_a_core_of_two_has_half_of_the_memory():
  whole, half = chips.of("TPU7x"), chips.of("TPU7x", 1)
  assert half.bytes_per_cycle * 2 == whole.bytes_per_cycle


def test_flops_are_those_of_the_matmuls():
  found = chips.kernel("splash_mha_dkv")
  assert chips.kernel_flops(found, **TILE) == 4 * 2 * 512 * 512 * 128
