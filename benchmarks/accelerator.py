"""What one GPU does in a few minutes: a queue of items, best worth first.

  python -m benchmarks.accelerator --out=work/accelerator \
    [--budget_seconds=480] [--only=attention,ours_bfloat16] [--tiny]

  attention   parity and time of attention by each kernel that runs here
  weights     of CogVideoX 2b's form, random, for both sides
  torch_*     PyTorch's own code (diffusers), eager and compiled: forward,
              sampling with guidance, decoding; and training steps
  ours_*      the same by ours, beside what theirs gave
  variant_*   our sizes: training step, utilisation of peak, memory
  digits_*    the digits' denoiser: data, steps a call, training, scores
  pipeline    a tiny pipeline, on this device and on the CPU
  arms_*      joint against factorised attention, each trained and evaluated

Each item is a process of its own, so memory is free between them, and what one
fails at costs no other. An item begins only if what it is expected to take is
left. `results.json` is written after each, whole or not at all; run again, what
is there is not run again, and trainings go on from their checkpoints.
`--tiny` runs all at sizes for a CPU, which says that it runs and no more.

`accelerator_pack.sh` makes what travels to a machine without a network.
"""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

from absl import app, flags

from benchmarks import accelerator_table, rows

_OUT = flags.DEFINE_string("out", None, "Folder of results.", required=True)
_BUDGET = flags.DEFINE_float("budget_seconds", 480, "For all items.", 0)
_ONLY = flags.DEFINE_list("only", [], "Items to run; default: all.")
_TINY = flags.DEFINE_bool("tiny", False, "Sizes for a CPU.")

_GRACE = 2.0  # times its expected seconds, after which an item is ended


@dataclasses.dataclass(frozen=True)
class Item:
  """Part of the queue.

  Attributes:
    name: of the item; what stands behind the first _ is its argument.
    side: module `benchmarks.accelerator_<side>` that runs it.
    seconds: that it is expected to take on an H100.
    needs: items without whose result it can't run.
    background: whether it is begun first, on the CPU, beside the others.
  """

  name: str
  side: str
  seconds: float
  needs: tuple[str, ...] = ()
  background: bool = False


_W = ("weights",)
ITEMS = (
  Item("attention", "ours", 70),
  Item("weights", "torch", 30),
  Item("torch_bfloat16", "torch", 60, _W),
  Item("ours_bfloat16", "ours", 75, _W),
  Item("torch_train_bfloat16", "torch", 75, _W),
  Item("ours_train_bfloat16", "ours", 60, _W),
  Item("variant_2b", "ours", 50),
  Item("digits_data", "digits", 60, background=True),
  Item("digits_train", "digits", 80, ("digits_data",)),
  Item("variant_2b_none", "ours", 45),
  Item("variant_l", "ours", 40),
  Item("digits_scores", "digits", 45, ("digits_train",)),
  Item("pipeline", "ours", 40),
  Item("digits_steps", "digits", 200),
  Item("torch_float32", "torch", 45, _W),
  Item("ours_float32", "ours", 50, _W),
  Item("torch_train_float32", "torch", 60, _W),
  Item("ours_train_float32", "ours", 60, _W),
  Item("arms_joint", "digits", 150),
  Item("arms_factorised", "digits", 150, ("arms_joint",)),
  Item("torch_decode", "torch", 90, _W),
)


def main(argv):
  """Run what is missing and print the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  if unknown := set(_ONLY.value) - {item.name for item in ITEMS}:
    raise ValueError(
      f"only must be of {[i.name for i in ITEMS]}, got {sorted(unknown)}"
    )
  ends = time.monotonic() + _BUDGET.value
  out = pathlib.Path(_OUT.value)
  (out / "scratch").mkdir(parents=True, exist_ok=True)
  results = rows.read(out / "results.json")
  wanted = [i for i in ITEMS if not _ONLY.value or i.name in _ONLY.value]
  wanted = [i for i in wanted if not _fine(results.get(i.name))]
  begun = {i.name: _start(i, out) for i in wanted if i.background}
  for item in wanted:
    found = _step(item, results, out, ends, begun.get(item.name))
    results[item.name] = found
    rows.write(out / "results.json", results)
    said = (found.get("error") or "done").strip().splitlines()[-1]
    print(f"{item.name}: {said} ({found.get('seconds', 0):.0f} s)", flush=True)
  text = accelerator_table.markdown(results)
  (out / "table.md").write_text(text)
  print(text)


def _step(item: Item, results, out, ends: float, process) -> dict[str, Any]:
  """Run an item unless it can't be run or no longer fits."""
  left = ends - time.monotonic()
  lacking = [name for name in item.needs if not _fine(results.get(name))]
  if lacking:
    return {"error": f"needs {', '.join(lacking)}"}
  if process is None and left < item.seconds and not _TINY.value:
    return {
      "error": f"{left:.0f} s are left, it is expected to take "
      f"{item.seconds:.0f} s"
    }
  process = process or _start(item, out)
  limit = None if _TINY.value else max(1.0, min(left, _GRACE * item.seconds))
  return _finish(item, out, process, limit)


def _start(item: Item, out: pathlib.Path) -> tuple[subprocess.Popen, float]:
  """Start an item's process."""
  result = out / "scratch" / f"{item.name}.json"
  result.unlink(missing_ok=True)
  command = [
    *(sys.executable, "-m", f"benchmarks.accelerator_{item.side}"),
    f"--item={item.name}",
    f"--scratch={out / 'scratch'}",
    f"--json={result}",
    *(["--tiny"] if _TINY.value else []),
  ]
  with open(out / f"{item.name}.log", "wb") as log:
    process = subprocess.Popen(
      command,
      stdout=log,
      stderr=subprocess.STDOUT,
      env=_environment(out, item.background),
      start_new_session=True,
    )
  return process, time.monotonic()


def _finish(item: Item, out, begun, limit: float | None) -> dict[str, Any]:
  """Wait for an item; its rows, and what went wrong."""
  process, began = begun
  try:
    status = f"exit status {process.wait(limit)}"
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)  # with what it started
    process.wait()
    status = f"ended after {limit:.0f} s"
  # An item writes its rows as it goes: what it had is kept.
  found = rows.read(out / "scratch" / f"{item.name}.json")
  found["seconds"] = round(time.monotonic() - began, 1)
  if not found.get("done"):
    tail = (out / f"{item.name}.log").read_text(errors="replace")[-2000:]
    found["error"] = f"{tail}\n{status}"
  return found


def _environment(out: pathlib.Path, on_cpu: bool) -> dict[str, str]:
  """Memory as it is needed, compiled programs kept for a later try."""
  cache = str((out / "scratch" / "jax").absolute())
  given = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_COMPILATION_CACHE_DIR": cache,
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
  } | dict(os.environ)
  return given | ({"JAX_PLATFORMS": "cpu"} if on_cpu else {})


def _fine(found: dict[str, Any] | None) -> bool:
  return bool(found) and "error" not in found


if __name__ == "__main__":
  app.run(main)
