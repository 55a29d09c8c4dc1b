"""How every command ends: what it refuses is one line, and exit status 2.

  main --run--> 0, or "vdit sample: --height must be ..." and 2

An error is ours if this package raised it to say what the user can do; with
--debug its traceback is shown. Any other is a bug and shows it always.
"""

import functools
import math
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

import ml_collections
from absl import app, flags

REFUSED = 2  # exit status, that of a wrong command line
_KINDS = (ValueError, FloatingPointError, ImportError)  # of ours
_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def run(
  main: Callable[[list[str]], None], names: Mapping[str, str] | None = None
) -> None:
  """Parse flags and run a command's main.

  Args:
    main: takes the arguments that are no flags, the program first.
    names: flags by inner argument, where an error calls it otherwise; None is
      none.
  """
  if "debug" not in flags.FLAGS:
    flags.DEFINE_bool("debug", False, "Show where an error was raised.")
  app.run(functools.partial(_guarded, main, names or {}), flags_parser=_parse)


def no_arguments(argv: list[str]) -> None:
  """Refuse arguments that are no flags."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")


def _parse(argv: list[str]) -> list[str]:
  try:
    arguments = flags.FLAGS(argv)
  except (flags.Error, *_KINDS, OSError) as error:
    _end(f"{_first_line(error)}; --help lists the flags")
  for name, value in flags.FLAGS.flag_values_dict().items():
    for each in value if isinstance(value, list) else [value]:
      if isinstance(each, float) and not math.isfinite(each):
        _end(f"--{name} must be a finite number, got {each}")
  return arguments


def _guarded(
  main: Callable[[list[str]], None], names: Mapping[str, str], argv: list[str]
) -> None:
  try:
    main(argv)
  except app.UsageError as error:
    _end(f"{error}; --help lists the flags")
  except (*_KINDS, OSError) as error:
    if flags.FLAGS.debug or not is_ours(error):
      raise
    _end(_with_flag(str(error), names))


def is_ours(error: Exception) -> bool:
  """Whether the package raised it, or the file system did."""
  if isinstance(error, OSError):
    return error.errno is not None
  frames = traceback.extract_tb(error.__traceback__)
  return bool(frames) and frames[-1].filename.startswith(_PACKAGE)


def _with_flag(message: str, names: Mapping[str, str]) -> str:
  """Call the argument that a message begins with as its flag is called."""
  found = re.match(r"\w+(\.\w+)*", message)
  name = found.group() if found else ""
  if name in names:
    flag = names[name]
  elif name in flags.FLAGS:
    flag = f"--{name}"
  else:
    flag = f"--config.{name}" if _is_of_config(name) else name
  return flag + message[len(name) :]


def _is_of_config(name: str) -> bool:
  """Whether a command has a --config that has a field of a dotted name."""
  value = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
  for part in name.split("."):
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
      return False
    if part not in value:
      return False
    value = value[part]
  return True


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]


def _end(message: str) -> NoReturn:
  """Say why the command ends, and end it."""
  print(f"{_program()}: {message}", file=sys.stderr)
  sys.exit(REFUSED)


def _program() -> str:
  path = pathlib.Path(sys.argv[0])
  return path.parent.name if path.stem == "__main__" else path.stem
