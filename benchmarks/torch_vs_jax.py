"""CogVideoX on the CPU against PyTorch's: in turns, the same weights.

  python -m benchmarks.torch_vs_jax --out=work/torch_vs_jax \
    [--rows='forward-*,decode'] [--again] [--threads=2]

Both sides have the same random weights and inputs, float32 and as many
threads. Theirs is diffusers' and transformers' code, run eagerly and compiled
by torch.compile; ours is compiled by XLA, layers as one loop, as configs have
it, and unrolled, as theirs are. Each network is small but has a release's
structure: heads of 64 dimensions, 226 tokens of text 4,096 wide, an
autoencoder of four levels and three blocks. Before it is timed, what all give
is compared.

  matmul      of 2,048 rows and columns, to know the machine by
  forward-*   one call of the denoiser
  train-*     loss, gradients and an AdamW step
  sample-*    8 DDIM steps with guidance; theirs by CogVideoXPipeline
  text        two texts through two layers of T5 XXL
  encode      25 frames of 64x96 to latents
  decode      and back
  train-autoencoder  a training step of both, 9 frames of 64x64
  pipeline    prompt to mp4 by whole pipelines with 2b's widths

Each row is a process of its own, and in it the sides take turns, so that what
else the machine does hits both alike. `results.json` in the folder is written
after each row and `table.md` from it; run again, rows that are there are not
measured again, unless `--again` asks for those of `--rows`. GLIBC_TUNABLES are
the Makefile's unless the environment has others.
"""

import concurrent.futures
import dataclasses
import datetime
import fnmatch
import importlib
import multiprocessing
import os
from typing import Any

from absl import app, flags

from benchmarks import machine, race, rows, tables
from vdit_jax import writing

_PACKAGES = "jax", "jaxlib", "flax", "torch", "diffusers", "transformers"
# As the Makefile's demo: neither side asks the system for memory again.
_TUNABLES = ":".join(
  f"glibc.malloc.{setting}"
  for setting in (
    "hugetlb=1",
    "arena_max=1",
    "mmap_max=0",
    "trim_threshold=17179869184",
  )
)
_OURS, _THEIRS = ("ours", "unrolled"), ("eager", "compiled")


@dataclasses.dataclass(frozen=True)
class Row:
  """A row: what is measured, and the most of PyTorch's best that it may be.

  Attributes:
    name: of the row.
    part: module `benchmarks.torch_vs_jax_<part>` that measures it.
    function: of the module; called with the arguments and how to measure.
    arguments: of the function.
    aim: share of PyTorch's best time; None has none.
  """

  name: str
  part: str
  function: str = "run"
  arguments: tuple[str, ...] = ()
  aim: float | None = 1.0


def _of_denoiser(what: str, case: str) -> Row:
  return Row(f"{what}-{case}", "denoiser", arguments=(what, case))


ROWS = (
  Row("matmul", "denoiser", "matmul", aim=None),
  _of_denoiser("forward", "2b-676"),
  _of_denoiser("train", "2b-676"),
  _of_denoiser("sample", "2b-676"),
  _of_denoiser("forward", "5b-1576"),
  _of_denoiser("train", "5b-1576"),
  _of_denoiser("forward", "5b-wide"),
  _of_denoiser("train", "5b-wide"),
  Row("text", "text"),
  Row("encode", "autoencoder", arguments=("encode",), aim=1.1),
  Row("decode", "autoencoder", arguments=("decode",), aim=1.1),
  Row("train-autoencoder", "autoencoder", arguments=("train",), aim=1.1),
  Row("pipeline", "pipeline"),
)


def main(argv):
  """Measure what is missing and print the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  cpus = sorted(os.sched_getaffinity(0))
  if flags.FLAGS.threads > len(cpus):
    raise ValueError(f"threads must be at most {len(cpus)}, the CPUs there are")
  wanted = chosen(flags.FLAGS.rows)
  # Processes take both over: XLA has a thread for each CPU that it may run on.
  os.sched_setaffinity(0, cpus[: flags.FLAGS.threads])
  os.environ.setdefault("GLIBC_TUNABLES", _TUNABLES)
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  turns = race.Turns(
    flags.FLAGS.least, flags.FLAGS.most, flags.FLAGS.seconds, warm=0
  )
  about = machine.about(flags.FLAGS.threads, _PACKAGES)
  about |= {"tiny": flags.FLAGS.tiny}
  out = writing.check_folder(flags.FLAGS.out, "out", free=False)
  kept = rows.Rows(out / "results.json", about)
  for row in wanted:
    if flags.FLAGS.again or row.name not in kept:
      kept.attempt(row.name, lambda row=row: _measure(row, turns))
  text = markdown(about, kept.rows)
  writing.write(out / "table.md", text)
  print(text)
  if failed := [row["name"] for row in kept.rows if "error" in row]:
    raise SystemExit(f"failed: {', '.join(failed)}")


def chosen(patterns: list[str]) -> list[Row]:
  """Choose the rows that fit a pattern; refuse a pattern that fits none."""
  names = [row.name for row in ROWS]
  fits = {p: fnmatch.filter(names, p) for p in patterns}
  if idle := [p for p, found in fits.items() if not found]:
    raise ValueError(f"rows must fit some of {names}, got {idle}")
  return [row for row in ROWS if any(row.name in f for f in fits.values())]


def _measure(row: Row, turns: race.Turns) -> dict[str, Any]:
  """Measure a row in a process of its own."""
  context = multiprocessing.get_context("spawn")
  how = dict(
    turns=turns,
    threads=flags.FLAGS.threads,
    compiled=flags.FLAGS.compiled,
    tiny=flags.FLAGS.tiny,
  )
  with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
    found = pool.submit(measure, row, how).result()
  return {"date": f"{datetime.date.today()}"} | found


def measure(row: Row, how: dict[str, Any]) -> dict[str, Any]:
  """Measure a row in this process; `how` has the fields of `sides.How`."""
  # Only here, for nothing of the main process is to take memory or threads.
  sides = importlib.import_module("benchmarks.torch_vs_jax_sides")
  part = importlib.import_module(f"benchmarks.torch_vs_jax_{row.part}")
  settled = sides.How(**how)
  sides.settle(settled)
  return getattr(part, row.function)(*row.arguments, settled)


def markdown(about: dict[str, Any], found: list[dict[str, Any]]) -> str:
  """Lay out the machine, the rows and what failed."""
  measured = {row["name"]: row for row in found if "error" not in row}
  lines = [
    _cells(row, measured[row.name]) for row in ROWS if row.name in measured
  ]
  failed = [[r["name"], repr(r["error"])] for r in found if "error" in r]
  head = ["milliseconds: median (least-most)", *_OURS, *_THEIRS]
  head += ["ours, of the best", "unrolled", "aim", "distance", "date"]
  return "\n".join(
    part
    for part in (
      "; ".join(f"{k} {v}" for k, v in about.items()) + "\n",
      tables.table(head, lines),
      tables.table(["failed", "why"], failed),
    )
    if part
  )


def _cells(row: Row, found: dict[str, Any]) -> list[str]:
  """A row's times, and what shares of PyTorch's best ours are."""
  times = [found.get(way, {}) for way in (*_OURS, *_THEIRS)]
  best = min((t for t in times[2:] if t), key=lambda t: t["median"])
  return [
    row.name,
    *(tables.milliseconds(t, 0) for t in times),
    *(tables.ratio(t, best) for t in times[:2]),
    tables.number(row.aim, 2),
    f"{found['distance']:.0e}",
    found["date"],
  ]


if __name__ == "__main__":
  flags.DEFINE_string("out", None, "Folder of results.", required=True)
  flags.DEFINE_list("rows", ["*"], "Patterns of rows to measure.")
  flags.DEFINE_bool("again", False, "Also rows that are there.")
  flags.DEFINE_integer("threads", 2, "Of each side.", 1)
  flags.DEFINE_integer("least", 3, "Turns of each row at least.", 1)
  flags.DEFINE_integer("most", 9, "Turns of each row at most.", 1)
  flags.DEFINE_float(
    "seconds", 45, "After which no turn begins behind the least.", 0
  )
  flags.DEFINE_bool("compiled", True, "PyTorch compiled too.")
  flags.DEFINE_bool("tiny", False, "Sizes that show that all runs.")
  app.run(main)
