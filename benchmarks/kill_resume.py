"""Kills training again and again: does the loss stay that of an unbroken run?

  python -m benchmarks.kill_resume --kills=10 --processes=1 --json=kills.json
  python -m benchmarks.kill_resume --kills=10 --processes=2

A tiny autoencoder (`configs/digits.py:vae`) is trained once without a break.
Then again, with kill -9 of all its processes at random steps and the same
command after each. Equal means equal to the bit: the loss of every step, and
all of the last state.
"""

import contextlib
import json
import pathlib
import random
import sys
import tempfile
import time

import jax
import numpy as np
from absl import app, flags

from benchmarks import processes
from vdit_jax import checkpoint
from vdit_jax.data import moving_digits

_KILLS = flags.DEFINE_integer("kills", 10, "Times to kill.", 1)
_PROCESSES = flags.DEFINE_integer("processes", 1, "Of the run.", 1)
_STEPS = flags.DEFINE_integer("steps", 60, "Of the run.", 2)
_SEED = flags.DEFINE_integer("seed", 0, "Of the steps to be killed at.")
_JSON = flags.DEFINE_string("json", None, "File to write.")

_LONGEST = 600  # seconds of one start


def main(argv):
  """Run both, print a row a kill and whether all is equal."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    moving_digits.MovingDigits(
      config="tiny", data_dir=folder / "data", file_format="array_record"
    ).download_and_prepare()
    _finish(folder, "unbroken")
    kills = _kill(folder, random.Random(_SEED.value))
    _finish(folder, "killed")
    report = _compare(folder) | {
      "processes": _PROCESSES.value,
      "steps": _STEPS.value,
      "kills": kills,
    }
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")
  sys.exit(not (report["losses_equal"] and report["states_equal"]))


def _start(folder: pathlib.Path, name: str, seconds: float):
  return processes.start(
    folder / name,
    folder / "data",
    processes=_PROCESSES.value,
    steps=_STEPS.value,
    seconds=seconds,
  )


def _finish(folder: pathlib.Path, name: str) -> None:
  """Train to the last step."""
  statuses = processes.wait(_start(folder, name, 0.0), _LONGEST)
  if any(statuses):
    log = (folder / name / "log0").read_text()
    raise RuntimeError(f"{name}: exit statuses {statuses}\n{log[-3000:]}")


def _kill(folder: pathlib.Path, rng: random.Random) -> list[dict[str, int]]:
  """Start and kill; each time at a step that the run did not reach before."""
  rows, run = [], folder / "killed"
  last = _STEPS.value - 1
  for n in range(_KILLS.value):
    reached = max(processes.curve(run), default=0)
    # Steps are left for the kills that follow.
    most = reached + max(1, (last - reached) // (_KILLS.value - n))
    started = _start(folder, "killed", 0.1)
    processes.wait_for_step(started, run, rng.randint(reached + 1, most))
    time.sleep(rng.uniform(0, 0.2))
    for process in started:
      process.kill()
    processes.wait(started, _LONGEST)
    steps = processes.checkpoints(run)
    rows.append(
      {
        "kill": n + 1,
        "at_step": max(processes.curve(run), default=0),
        "resumes_from": steps[-1] if steps else 0,
      }
    )
    print("  ".join(f"{key} {value:3d}" for key, value in rows[-1].items()))
  return rows


def _compare(folder: pathlib.Path) -> dict[str, bool]:
  unbroken, killed = (
    processes.curve(folder / n) for n in ("unbroken", "killed")
  )
  states = [
    checkpoint.restore_params(folder / name / "work", which)
    for name in ("unbroken", "killed")
    for which in ("params", "ema")
  ]
  same = [
    np.array_equal(a, b)
    for one, other in zip(states[:2], states[2:], strict=True)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  ]
  report = {"losses_equal": unbroken == killed, "states_equal": all(same)}
  print(f"{len(unbroken)} losses equal: {report['losses_equal']}; ", end="")
  print(f"{len(same)} arrays equal: {report['states_equal']}")
  return report


if __name__ == "__main__":
  app.run(main)
