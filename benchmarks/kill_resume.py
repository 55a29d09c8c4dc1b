"""Kills commands again and again: is what they make that of an unbroken run?

  python -m benchmarks.kill_resume --kills=30 --json=kills.json
  python -m benchmarks.kill_resume --commands=train --kills=10 --processes=2

Each command of `killing.COMMANDS` runs once without a break. Then again, with
kill -9 of its processes at random moments, by turns before one of its changes
to files and some seconds after the first, and the same command after each,
until it ends well. Equal means equal to the bit: files; of a run its
parameters, their average and all rows of metrics; of an Orbax folder its
arrays. What is visible after a kill must be whole, and nothing temporary may be
there at the end.
"""

import json
import pathlib
import random
import signal
import sys
import tempfile
import time
from typing import Any

import jax
from absl import app, flags

from benchmarks import killing
from vdit_jax import writing

_SEVERAL = "train", "cache"  # can be of several processes


def main(argv: list[str]) -> None:
  """Kill each command, print a row for it, and end with 1 if one is wrong."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  jax.config.update("jax_platforms", "cpu")  # as all that it starts
  rows = run(
    flags.FLAGS.commands,
    flags.FLAGS.kills,
    flags.FLAGS.seed,
    flags.FLAGS.processes,
  )
  if flags.FLAGS.json:
    writing.write(flags.FLAGS.json, json.dumps(rows, indent=2) + "\n")
  sys.exit(not all(map(is_good, rows)))


def run(
  names: list[str], kills: int, seed: int = 0, processes: int = 1
) -> list[dict[str, Any]]:
  """Kill commands, and give a row for each.

  Args:
    names: of `killing.COMMANDS`.
    kills: of all together; the first ones have what does not divide.
    seed: of the moments.
    processes: of a command that can be of several.
  """
  if unknown := set(names) - set(killing.COMMANDS):
    raise ValueError(
      f"commands must be of {', '.join(killing.COMMANDS)}, got {unknown}"
    )
  rows = []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    killing.prepare(folder / "given", names)
    print(_line("command", "kills", "equal", "half-written", "left over"))
    for i, name in enumerate(names):
      share = kills // len(names) + (i < kills % len(names))
      together = processes if name in _SEVERAL else 1
      rng = random.Random(f"{seed} {name}")
      rows.append(Trial(folder, name, rng, together).run(share))
      _print(rows[-1])
  return rows


def is_good(row: dict[str, Any]) -> bool:
  """Tell whether nothing was wrong with a command."""
  return row["equal"] and not row["half_written"] and not row["left_over"]


class Trial:
  """A command that is killed, compared with what it made unbroken."""

  def __init__(
    self,
    folder: pathlib.Path,
    name: str,
    rng: random.Random,
    processes: int,
  ):
    self._command = killing.COMMANDS[name]
    # One place for both, as some outcomes say where they are.
    self._given, self._out = folder / "given", folder / name
    self._rng, self._processes = rng, processes
    self._row = {
      "command": name,
      "processes": processes,
      "changes": 0,  # that it makes to files when it is not broken off
      "seconds": 0.0,  # from the first of them to the end
      "moments": [],
      "differs": [],  # names of what is not as the unbroken one made it
      "half_written": [],
      "left_over": [],
    }

  def run(self, kills: int) -> dict[str, Any]:
    """Run it once, then kill it so many times; begin anew where it ends.

    A run that ends badly by itself is the end, and in the row as "failed".
    """
    row = self._row
    try:
      self._run_unbroken()
      while len(row["moments"]) < kills:
        self._kill(self._draw())
      killing.finish(self._start(), self._out)
      self._check()
    except RuntimeError as error:
      row["failed"] = str(error)
    return row | {"equal": not row["differs"] and "failed" not in row}

  def _run_unbroken(self) -> None:
    killing.empty(self._command, self._out, self._given)
    started = self._start()
    started.wait_for_change()
    begin = time.monotonic()
    killing.finish(started, self._out)
    self._row["seconds"] = round(time.monotonic() - begin, 2)
    self._row["changes"] = started.changes()
    self._unbroken = self._command.read(self._out)
    killing.empty(self._command, self._out, self._given)

  def _start(self, change: int = 0) -> killing.Started:
    return killing.start(
      self._command, self._out, self._given, change, self._processes
    )

  def _draw(self) -> killing.Moment:
    """Draw the moment of the next kill."""
    if len(self._row["moments"]) % 2:
      seconds = self._rng.uniform(0, self._row["seconds"])
      return killing.Moment(seconds=seconds)
    return killing.Moment(change=self._rng.randint(1, self._row["changes"]))

  def _kill(self, moment: killing.Moment) -> None:
    """Start and kill; if it ends well before, it begins anew the next time."""
    started = self._start(moment.change)
    if not moment.change:
      started.wait_for_change()
      begin = time.monotonic()
      if not started.ends_within(moment.seconds):
        started.kill()
    started.wait_for_end()
    if -signal.SIGKILL in started.wait():
      self._row["moments"].append(str(moment))
      self._row["half_written"] += self._half_written()
      return
    killing.finish(started, self._out)
    self._check()
    killing.empty(self._command, self._out, self._given)
    if not moment.change:  # what was compiled before is compiled no more
      self._row["seconds"] = round(time.monotonic() - begin, 2)

  def _half_written(self) -> list[str]:
    """Name what is seen after a kill, and is not what it will be."""
    return self._differences(self._command.seen(self._out), whole=False)

  def _check(self) -> None:
    """Compare an outcome with the unbroken one."""
    self._row["differs"] += self._differences(self._command.read(self._out))
    self._row["left_over"] += killing.leftovers(self._out)

  def _differences(self, made, whole: bool = True) -> list[str]:
    """Name what is not as it was made unbroken, or, of a whole, lacks."""
    names = sorted({*made, *(self._unbroken if whole else ())})
    return [n for n in names if made.get(n) != self._unbroken.get(n)]


def _print(row: dict[str, Any]) -> None:
  wrong = [len(row[name]) for name in ("half_written", "left_over")]
  moments = row["moments"]
  equal = "yes" if row["equal"] else "no"
  print(
    _line(row["command"], len(moments), equal, *wrong), *moments, flush=True
  )
  for name in ("differs", "half_written", "left_over"):
    for found in row[name]:
      print(f"  {name}: {found}")
  print(row.get("failed", ""), end="", flush=True)


def _line(command, kills, equal, half_written, left_over) -> str:
  return (
    f"{command:<10} {kills:>5}  {equal:<5}  {half_written:>12}  {left_over:>9} "
  )


if __name__ == "__main__":
  flags.DEFINE_integer("kills", 30, "In all, shared by commands.", 1)
  flags.DEFINE_list("commands", list(killing.COMMANDS), "Which are killed.")
  flags.DEFINE_integer("processes", 1, "Of train and cache.", 1)
  flags.DEFINE_integer("seed", 0, "Of the moments.")
  flags.DEFINE_string("json", None, "File to write.")
  app.run(main)
