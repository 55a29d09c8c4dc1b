"""Small configs compile for real topologies, without a TPU.

In processes of their own: the tests' fake CPU devices are set up at the start
of one, and so is libtpu.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from vdit_jax.aot import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPTH, WIDTH, TEXT, M = 2, 256, 128, 16
TOKENS = 3 * 4 * 4
CLIPS = 4

SMALL = [
  "--config=configs/vdit.py:s",
  "--config.mesh.fsdp=2",
  f"--config.batch_size={CLIPS}",
  f"--config.data.max_length={M}",
  f"--config.denoiser.depth={DEPTH}",
  f"--config.denoiser.width={WIDTH}",
  "--config.denoiser.heads=2",
  "--config.denoiser.mlp_width=512",
  f"--config.denoiser.text_width={TEXT}",
  f"--config.text_encoder.width={TEXT}",
  "--num_frames=9",
  "--height=64",
  "--width=64",
]


def run(*arguments):
  """Run the command: exit status, and all that it printed."""
  # The tests' own flags are for their CPU devices.
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-m", "vdit_jax.aot", *arguments],
    cwd=ROOT,
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )
  return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_training_step_compiles(topology, tmp_path):
  out = tmp_path / "row.json"
  status, text = run(*SMALL, f"--topology={topology}", f"--json={out}")
  assert status == 0, text
  row = json.loads(out.read_text())
  assert (
    row["chip"] == topology.split(":")[0]
    and row["devices"] == 4
    and row["fits"]
  )
  assert 0 < row["peak_gib"] < row["hbm_gib"]
  assert row["mesh"] == {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}
  assert row["warnings"] == [], text
  check_kernels(row["kernels"])
  # By hand: matmuls of a block, a clip's tokens, then all three times.
  tokens = 4 * WIDTH**2 + 2 * WIDTH**2 + 2 * WIDTH * 512
  keys = 2 * TEXT * WIDTH * M + 2 * (TOKENS + M) * TOKENS * WIDTH
  forward = DEPTH * 2 * (tokens * TOKENS + keys)
  assert row["model_flops"] == pytest.approx(3 * forward * CLIPS / 4, rel=0.1)
  assert row["hardware_flops"] > row["model_flops"]
  assert row["collectives"]["all-gather"]["bytes"] > 0
  assert 0 < row["utilisation"] < 1
  assert "communication stalls left out" in text


def check_kernels(kernels):
  """Self-attention's forward runs once a layer, the text's twice."""
  assert all(row["cycles"] > 0 for row in kernels.values())
  assert {name: row["calls"] for name, row in kernels.items()} == {
    "attention_forward": 3 * DEPTH,
    "attention_delta": 2 * DEPTH,
    "attention_dqkv": 2 * DEPTH,
    # Projections of the video to itself and to the text, and of the text.
    "heads_cut": 2 * 3 * DEPTH,
    "heads_join": 3 * DEPTH,
    # Three a block and the last layer's.
    "norm_modulate": 2 * 3 * DEPTH + 1,
    "norm_gradient": 3 * DEPTH + 1,
  }
  streams = {"attention_delta", *(n for n in kernels if n[0] in "hn")}
  for name, row in kernels.items():
    assert (row["flops"] == 0) == (name in streams)


@pytest.mark.slow
def test_what_does_not_fit_is_said(tmp_path):
  out = tmp_path / "row.json"
  status, text = run(
    "--config=configs/vdit.py:5b",
    "--config.mesh.fsdp=1",
    "--config.batch_size=1",
    "--topology=v5e:1x1",
    "--num_frames=1",
    "--height=64",
    "--width=64",
    f"--json={out}",
  )
  assert status == 1, text
  assert "does not fit: needs" in text
  assert "of 15.75 GiB" in text
  assert json.loads(out.read_text())["needed_gib"] > 5.1e9 * 16 / 2**30


def test_an_unknown_topology_is_refused():
  status, text = run(*SMALL, "--topology=v5e:3x7")
  assert status != 0
  assert "v5e:3x7" in text


@pytest.mark.parametrize(
  "message, needed, available",
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
      "for HLO temporaries (33.54G) exceeds available HBM (15.75G).",
      33.54,
      15.75,
    ),
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory "
      "in memory space hbm. Used 53.93G of 15.75G hbm. Exceeded hbm capacity.",
      53.93,
      15.75,
    ),
  ],
)
def test_the_compilers_message_is_read(message, needed, available):
  error = report.OutOfMemoryError(message)
  assert (error.needed, error.available) == (needed, available)
  assert f"needs {needed} of {available} GiB" in str(error)


def test_the_largest_buffers_are_read():
  message = """RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm.
  Largest program allocations in hbm:

  1. Size: 9.00G
     Operator: op_name="jit(step)/blocks/mlp"
     Shape: bf16[32,17550,3072]{2,1,0}
  2. Size: 512.00M
     Shape: f32[128]{0}
"""
  assert report.OutOfMemoryError(message).buffers == [
    (9.0, "bf16[32,17550,3072]{2,1,0} jit(step)/blocks/mlp"),
    (0.5, "f32[128]{0}"),
  ]
