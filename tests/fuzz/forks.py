"""Runs commands of the package fast, each in a process of its own.

  Forks() --argv--> Ended: status, seconds, memory, what it wrote to stderr

One process imports what every command needs and forks for each run, so that a
run costs what it does and not the imports. It knows no accelerator. Run as a
script this file is that process: a request a line in, an answer a line out.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import resource
import runpy
import signal
import subprocess
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
_MOST_BYTES = 6 * 2**30  # of addresses, beside those of the imports
# Heavy, and no command itself: those define their flags when they are run.
_IMPORTED = (
  "jax",
  "flax.linen",
  "optax",
  "orbax.checkpoint",
  "tensorflow_datasets",
  "vdit_jax.pipeline",
  "vdit_jax.aot.programs",
  "vdit_jax.cache.dataset",
  "vdit_jax.compare.stages",
  "vdit_jax.data.build.dataset",
  "vdit_jax.metrics.lpips",
  "vdit_jax.training.tasks",
  "vdit_jax.training.loop",
  "vdit_jax.weights.tiny",
)


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a run ended.

  Attributes:
    status: of its exit; below 0 the signal that ended it.
    seconds: of a processor, that it took.
    mib: of memory that it took beside the imports.
    stderr: what it said.
  """

  status: int
  seconds: float
  mib: float
  stderr: str


class Forks:
  """Runs commands; `close` ends the process that forks."""

  def __init__(self):
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.fuzz.forks"],
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
    )

  def run(self, module: str, argv: list[str], cwd, seconds: float) -> Ended:
    """Run a module as a command, killed after some seconds."""
    request = [module, argv, os.fspath(cwd), seconds]
    stdin, stdout = self._process.stdin, self._process.stdout
    assert stdin is not None and stdout is not None
    stdin.write(json.dumps(request) + "\n")
    stdin.flush()
    return Ended(*json.loads(stdout.readline()))

  def close(self) -> None:
    """End the process that forks."""
    stdin = self._process.stdin
    assert stdin is not None
    stdin.close()
    self._process.wait()


def _serve() -> None:
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  for name in _IMPORTED:
    importlib.import_module(name)
  for line in sys.stdin:
    answers.write(json.dumps(_fork(*json.loads(line))) + "\n")
    answers.flush()


def _fork(module, argv, cwd, seconds):
  """Run in a child; give what `Ended` holds."""
  said = pathlib.Path(cwd) / ".stderr"
  began = time.monotonic()
  child = os.fork()
  if not child:
    _run(module, argv, cwd, said)
  while True:
    found, status, used = os.wait4(child, os.WNOHANG)
    if found:
      break
    if time.monotonic() - began > seconds:
      os.killpg(child, signal.SIGKILL)
      _, status, used = os.wait4(child, 0)
      break
    time.sleep(0.005)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  mib = (used.ru_maxrss - before) / 1024
  text = said.read_text(errors="replace") if said.exists() else ""
  said.unlink(missing_ok=True)
  code = os.waitstatus_to_exitcode(status)
  # Of a processor: how long others keep it busy is not this command's.
  return code, used.ru_utime + used.ru_stime, max(mib, 0.0), text


def _run(module, argv, cwd, said):
  """Be the command, and end; never return."""
  code = 1
  try:
    os.setsid()
    os.chdir(cwd)
    file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (file, 1), (file, 2)):
      os.dup2(source, target)
    used = resource.getpagesize() * int(
      pathlib.Path("/proc/self/statm").read_text().split()[0]
    )
    most = used + _MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    code = 0
  except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(bool(end.code))
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
  _serve()
