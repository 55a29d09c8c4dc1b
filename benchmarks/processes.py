"""Runs `train.py` as real processes that can be killed, at a tiny size."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent

# train.py itself, its steps slow enough to be killed at a chosen one.
_SCRIPT = """
import sys, time
from absl import app
from vdit_jax import train
from vdit_jax.training import state as states
seconds, jit_step = float(sys.argv.pop(1)), states.jit_step
def slow(*args):
  step = jit_step(*args)
  return lambda *args: time.sleep(seconds) or step(*args)
states.jit_step = slow
app.run(train.main)
"""

_TINY = {
  "data.name": "moving_digits/tiny",
  "batch_size": 8,
  "optim.warmup_steps": 1,
  "log_every": 1,
  "validation.every": 0,
  "validation.clips": 16,
  "autoencoder.channels": "(8,8,16)",
}


def start(
  folder: pathlib.Path,
  data_dir: pathlib.Path,
  *,
  processes: int,
  steps: int,
  seconds: float = 0.0,
  checkpoint_every: int = 4,
  own: Sequence[Mapping[str, Any]] = (),
) -> list[subprocess.Popen]:
  """Start training, or take it up again, in `folder/work`.

  Each process writes to `folder/log<i>`; compiled programs are kept beside
  the data.

  Args:
    folder: of the run.
    data_dir: with moving_digits/tiny.
    processes: of the run, two CPU devices each; 1 starts without the others.
    steps: of the whole run.
    seconds: to sleep before each step.
    checkpoint_every: steps between checkpoints.
    own: fields of the config of each process alone.
  """
  folder.mkdir(parents=True, exist_ok=True)
  config = _TINY | {
    "data.data_dir": data_dir,
    "optim.total_steps": steps,
    "checkpoint.every": checkpoint_every,
  }
  command = [sys.executable, "-c", _SCRIPT, str(seconds)]
  command += ["--config=configs/digits.py:vae", f"--workdir={folder / 'work'}"]
  command += [f"--compilation_cache={data_dir / 'compiled'}"]
  command += [f"--config.{name}={value}" for name, value in config.items()]
  alone = [[f"--config.{k}={v}" for k, v in fields.items()] for fields in own]
  alone += [[]] * (processes - len(alone))
  return [
    _start([*command, *alone[i], *flags], folder / f"log{i}")
    for i, flags in enumerate(together(processes))
  ]


def together(processes: int) -> list[list[str]]:
  """Give the flags of each process of a run; of a single one there are none."""
  if processes == 1:
    return [[]]
  shared = [f"--num_processes={processes}", f"--coordinator={_address()}"]
  return [[*shared, f"--process_id={i}"] for i in range(processes)]


def environment() -> dict[str, str]:
  """Give the environment of a process: two CPU devices, quick to compile."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 "
    "--xla_backend_optimization_level=0",
  }


def wait(started: list[subprocess.Popen], seconds: float) -> list[int]:
  """Wait until all have ended, kill what has not; return their statuses."""
  deadline = time.monotonic() + seconds
  try:
    return [p.wait(max(0.1, deadline - time.monotonic())) for p in started]
  finally:
    for process in started:
      if process.poll() is None:
        process.kill()


def wait_for_step(
  started: list[subprocess.Popen], folder: pathlib.Path, step: int
) -> None:
  """Wait until the metrics have a row of that step, or a process ends."""
  while max(curve(folder), default=0) < step:
    if any(process.poll() is not None for process in started):
      return
    time.sleep(0.01)


def curve(folder: pathlib.Path) -> dict[int, float]:
  """Read the loss of each step; the last row of a step counts."""
  path = folder / "work" / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  rows = [json.loads(line) for line in lines]
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def checkpoints(folder: pathlib.Path) -> list[int]:
  """List the steps of the checkpoints that are whole, in order."""
  found = (folder / "work" / "checkpoints").glob("*")
  return sorted(int(path.name) for path in found if path.name.isdigit())


def _start(command: list[str], log: pathlib.Path) -> subprocess.Popen:
  with log.open("ab") as file:
    return subprocess.Popen(
      command, env=environment(), cwd=ROOT, stdout=file, stderr=file
    )


def _address() -> str:
  """An address of this machine whose port is free."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"
