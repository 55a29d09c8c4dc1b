"""Commands that can be killed at a moment: tiny ones, and what they make.

  GIVEN --prepare--> inputs      Command --start--> Started --kill, wait--> ...
  a folder --outcome, leftovers--> what is compared

A moment is the Nth change that the command makes to the files of its folder
(a file opened to be written, a renaming, a removal), just before it; or so
many seconds after the first one.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import processes
from vdit_jax import checkpoint
from vdit_jax.media import formats
from vdit_jax.weights import component

# Runs a module, and counts the changes that it makes to files in a folder: the
# number is left in a file, and the process group is killed before the Nth.
_DRIVER = """
import atexit, os, pathlib, runpy, signal, sys
folder, counter, last = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
writes, count = os.O_WRONLY | os.O_RDWR | os.O_CREAT, 0
names = "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"
def look(event, args):
  global count
  if event != "open" and event not in names:
    return
  if event == "open" and not args[2] & writes:
    return
  if not isinstance(args[0], (str, os.PathLike)):
    return
  if not os.path.abspath(args[0]).startswith(folder):
    return
  count += 1
  if count == last:
    os.killpg(0, signal.SIGKILL)
  if count == 1:
    counter.touch()
sys.addaudithook(look)
atexit.register(lambda: counter.write_text(str(count)))
sys.argv = sys.argv[4:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

# Names of what is on its way to become something else.
_TEMPORARY = ".*", "*.tmp", "*.unfinished", "*.incomplete*", "*checkpoint-tmp*"
_LONGEST = 600.0  # seconds of one start
_TIMES = "seconds", "per_second", "wait_share", "goodput", "mfu"  # of metrics

_RUN = (
  "--config.data.name=moving_digits/tiny",
  "--config.data.data_dir={given}/data",
  "--config.batch_size=8",
  "--config.optim.warmup_steps=1",
  "--config.log_every=1",
  "--config.validation.every=0",
  "--config.validation.clips=16",
)
_VAE = (
  "vdit_jax.train",
  "--config=configs/digits.py:vae",
  *_RUN,
  "--config.autoencoder.channels=(8,8,16)",
)
_DIT = (
  "vdit_jax.train",
  "--config=configs/digits.py:dit",
  *_RUN,
  "--config.autoencoder_workdir={given}/vae",
  "--config.denoiser.width=32",
  "--config.denoiser.depth=2",
  "--config.denoiser.heads=2",
  "--config.denoiser.mlp_width=64",
  "--config.denoiser.unroll=1",
  "--config.denoiser.text_width=16",
  "--config.text_encoder.width=16",
  "--config.text_encoder.depth=1",
  "--config.text_encoder.mlp_width=16",
  "--config.samples.every=0",
  "--config.sampling.steps=2",
  "--config.optim.total_steps=2",
  "--config.checkpoint.every=2",
)
_TOKENIZER = (
  "vdit_jax.data.tokenizer",
  "--data=moving_digits/tiny",
  "--data_dir={given}/data",
)

# Inputs by name: the commands that make them, in `given`.
GIVEN = {
  "data": (
    "vdit_jax.data.moving_digits",
    "--config=tiny",
    "--data_dir={given}/data",
  ),
  "vae": (*_VAE, "--workdir={given}/vae", "--config.optim.total_steps=2"),
  "words": (*_TOKENIZER, "--out={given}/dit/tokenizer.model"),
  "dit": (*_DIT, "--workdir={given}/dit"),
  "pipe": ("vdit_jax.tiny", "{given}/pipe"),
}


@dataclasses.dataclass(frozen=True)
class Command:
  """How a command is run, and what is compared of what it makes.

  Attributes:
    arguments: of `python -m`; {out} is its folder, {given} that of inputs.
    needs: names of `GIVEN`, in their order.
    read: gives of {out} what two outcomes are compared by.
    seen: gives what must be so already after a kill, if it is there at all.
    linked: what of {given}/data is seen in {out} too.
  """

  arguments: tuple[str, ...]
  needs: tuple[str, ...]
  read: Callable[[pathlib.Path], Mapping[str, Any]]
  seen: Callable[[pathlib.Path], Mapping[str, Any]] = lambda out: files(out)
  linked: tuple[str, ...] = ()


def files(folder: pathlib.Path) -> dict[str, str]:
  """Give the digest of each file by its name; temporary ones left out."""
  return {
    name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
    for name in sorted(_names(folder))
    if not _is(name, _TEMPORARY)
  }


def leftovers(folder: pathlib.Path) -> list[str]:
  """Name the files and empty folders that should have become others."""
  return sorted(name for name in _names(folder) if _is(name, _TEMPORARY))


def _network(folder: pathlib.Path) -> dict[str, Any]:
  """Read what a conversion to Orbax makes, if it is there."""
  if not (folder / "converted").exists():
    return {}
  loaded = component.load(folder / "converted")
  return {"config": loaded.config} | _leaves(loaded.params)


def _run(folder: pathlib.Path) -> dict[str, Any]:
  """Read a run's last state, and the rows of its metrics without times."""
  work = folder / "work"
  lines = (work / "metrics.jsonl").read_text().splitlines()
  rows = {}
  for row in map(json.loads, lines):
    kept = {k: v for k, v in row.items() if not k.endswith(_TIMES)}
    rows.setdefault(f"step {row['step']}", []).append(kept)
  released = [p for p in work.iterdir() if p.suffix == ".safetensors"]
  state = {
    which: checkpoint.restore_params(work, which) for which in ("params", "ema")
  }
  digests = {
    p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in released
  }
  return rows | digests | _leaves(state)


def _leaves(tree: Any) -> dict[str, str]:
  return {
    jax.tree_util.keystr(path): hashlib.sha256(
      np.asarray(leaf).tobytes()
    ).hexdigest()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


COMMANDS = {
  "train": Command(
    (
      *_VAE,
      "--workdir={out}/work",
      "--config.optim.total_steps=24",
      "--config.checkpoint.every=4",
    ),
    ("data",),
    _run,
    seen=lambda out: {},  # the next start tells
  ),
  "cache": Command(
    (
      "vdit_jax.cache",
      "--autoencoder={given}/vae",
      "--data=moving_digits/tiny",
      "--data_dir={out}",
      "--name=latents/tiny",
    ),
    ("data", "vae"),
    files,
    linked=("moving_digits",),
  ),
  "build": Command(
    (
      "vdit_jax.data.build",
      "--videos={given}/clips",
      "--data_dir={out}",
      "--name=mine/clips",
      "--validation=0.3",  # whole files: libx264 is not the same to the bit
    ),
    (),
    files,
  ),
  "convert": Command(
    ("vdit_jax.convert", "{given}/pipe/transformer", "{out}/converted"),
    ("pipe",),
    _network,
    seen=_network,
  ),
  "evaluate": Command(
    (
      "vdit_jax.evaluate",
      "--checkpoint={given}/dit",
      "--data=moving_digits/tiny",
      "--data_dir={given}/data",
      "--metrics=loss,vae",
      "--num_clips=8",
      "--batch_size=4",
      "--json={out}/scores.json",
    ),
    ("data", "vae", "words", "dit"),
    files,
  ),
  "sample": Command(
    (
      "vdit_jax.sample",
      "--prompt=a red seven moving left",
      "--num_videos=6",
      "--batch_size=2",
      "--steps=2",
      "--out={out}/clip.mp4",
    ),
    (),
    files,
  ),
  "export": Command(
    ("vdit_jax.export", "--checkpoint={given}/dit", "--out={out}/release"),
    ("data", "vae", "words", "dit"),
    files,
  ),
  "tokenizer": Command(
    (*_TOKENIZER, "--out={out}/tokenizer.model"), ("data",), files
  ),
}


@dataclasses.dataclass(frozen=True)
class Moment:
  """When to kill.

  Attributes:
    change: before which change to the files; 0 is before none.
    seconds: after the first change, if `change` is 0.
  """

  change: int = 0
  seconds: float = 0.0

  def __str__(self):
    return f"#{self.change}" if self.change else f"{self.seconds:.2f}s"


@dataclasses.dataclass
class Started:
  """A command that runs.

  Attributes:
    group: its processes, each the leader of a group of its own.
    counter: file that is made at the first change, and at the end has the
      number of changes of the first process.
  """

  group: list[subprocess.Popen]
  counter: pathlib.Path

  def wait(self) -> list[int]:
    """Wait until all have ended; kill what they started, give statuses."""
    try:
      return processes.wait(self.group, _LONGEST)
    finally:
      self.kill()

  def kill(self) -> None:
    """Kill the groups, with whatever else they have started."""
    for process in self.group:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

  def changes(self) -> int:
    """Give the number of changes of a command that has ended."""
    return int(self.counter.read_text())

  def wait_for_change(self) -> None:
    """Wait until the first change, or until a process ends."""
    while not self.counter.exists() and not self.ends_within(0.01):
      pass

  def ends_within(self, seconds: float) -> bool:
    """Wait until a process has ended; False if none has by then."""
    end = time.monotonic() + seconds
    while not any(process.poll() is not None for process in self.group):
      if time.monotonic() > end:
        return False
      time.sleep(0.005)
    return True

  def wait_for_end(self) -> None:
    """Wait until all have ended well, or one badly, which kills the others."""
    self.ends_within(_LONGEST)
    if any(process.poll() for process in self.group):
      self.kill()


def prepare(given: pathlib.Path, names: list[str]) -> None:
  """Make the inputs that commands need."""
  (given / "clips").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(6):
    video = rng.integers(0, 255, (13, 32, 32, 3), np.uint8)
    formats.write(given / "clips" / f"{i}.mp4", video, 8.0)
    (given / "clips" / f"{i}.txt").write_text(f"noise {i}")
  wanted = {need for name in names for need in COMMANDS[name].needs}
  for name, arguments in GIVEN.items():
    if name in wanted:
      finish(start(Command(arguments, (), files), given, given), given)


def empty(command: Command, out: pathlib.Path, given: pathlib.Path) -> None:
  """Make a command's folder as it is before it."""
  shutil.rmtree(out, ignore_errors=True)
  out.mkdir()
  for name in command.linked:
    (out / name).symlink_to(given / "data" / name)


def start(
  command: Command,
  out: pathlib.Path,
  given: pathlib.Path,
  change: int = 0,
  together: int = 1,
) -> Started:
  """Start a command.

  Args:
    command: to run.
    out, given: folders, see `Command`.
    change: before which change to kill its first process; 0 is before none.
    together: processes of the run, if it can be of several.
  """
  counter = out.with_name(f"{out.name}.changes")
  counter.unlink(missing_ok=True)
  arguments = [a.format(out=out, given=given) for a in command.arguments]
  shared = processes.together(together)
  started = Started([], counter)
  with out.with_name(f"{out.name}.log").open("ab") as log:
    for i, flags in enumerate(shared):
      own = counter if i == 0 else f"{counter}{i}"
      driven = [os.fspath(out) + os.sep, own, change if i == 0 else 0]
      line = [sys.executable, "-c", _DRIVER, *map(str, driven)]
      started.group.append(
        subprocess.Popen(
          [*line, *arguments, *flags],
          env=processes.environment() | _compiled(given),
          cwd=processes.ROOT,
          stdout=log,
          stderr=log,
          start_new_session=True,
        )
      )
  return started


def finish(started: Started, out: pathlib.Path) -> None:
  """Wait for a good end; raise what the command said at a bad one."""
  if any(statuses := started.wait()):
    said = out.with_name(f"{out.name}.log").read_text()[-3000:]
    raise RuntimeError(f"{out.name}: exit statuses {statuses}\n{said}")


def _compiled(given: pathlib.Path) -> dict[str, str]:
  """Let what is compiled once be compiled no more."""
  return {
    "JAX_COMPILATION_CACHE_DIR": str(given / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }


def _names(folder: pathlib.Path) -> list[str]:
  """Name the files and empty folders below a folder; links are not followed."""
  found = []
  for parent, folders, names in os.walk(folder):
    empty = [] if folders or names else [parent]
    found += [os.path.join(parent, name) for name in names] + empty
  return [
    os.path.relpath(name, folder) for name in found if name != str(folder)
  ]


def _is(name: str, patterns: tuple[str, ...]) -> bool:
  return any(
    fnmatch.fnmatch(part, pattern)
    for part in pathlib.PurePath(name).parts
    for pattern in patterns
  )
