"""One command for all: `vdit COMMAND --flags` is `python -m vdit_jax.COMMAND`.

  vdit train --config=digits:vae --workdir=work/vae
  vdit sample --prompt="a red seven moving left" --out=seven.mp4

A --config that has neither a slash nor .py before its colon is the name of a
packaged one. Nothing heavy is imported before the command is known.
"""

import dataclasses
import difflib
import pathlib
import runpy
import sys

import vdit_jax
from vdit_jax import configs

_SHARED = {"__init__", "defaults"}  # files of configs/ that are no config


@dataclasses.dataclass(frozen=True)
class Command:
  """A module that runs by itself, and a line on what it does.

  Attributes:
    module: its dotted name; of a package its __main__ runs.
    line: of `vdit --help`.
    takes_config: whether its --config is a file of configs/.
  """

  module: str
  line: str
  takes_config: bool = False


COMMANDS = {
  "train": Command("vdit_jax.train", "Train an autoencoder or denoiser.", True),
  "sample": Command("vdit_jax.sample", "Sample videos from prompts."),
  "evaluate": Command("vdit_jax.evaluate", "Measure a model on a dataset."),
  "cache": Command("vdit_jax.cache", "Encode a dataset's clips and captions."),
  "convert": Command("vdit_jax.convert", "Convert one released network."),
  "compare": Command("vdit_jax.compare", "Run PyTorch and us side by side."),
  "export": Command("vdit_jax.export", "Write what sampling needs of a run."),
  "aot": Command("vdit_jax.aot", "Compile for a TPU that is not there.", True),
  "data": Command("vdit_jax.data.build", "Build a dataset of video files."),
  "digits": Command("vdit_jax.data.moving_digits", "Build the moving digits."),
  "tokenizer": Command("vdit_jax.data.tokenizer", "Train a tokenizer."),
  "tiny": Command("vdit_jax.tiny", "Make a tiny random released pipeline."),
}


def main(argv: list[str] | None = None) -> None:
  """Run the command of a command line; sys.argv where none is given."""
  _, *arguments = sys.argv if argv is None else argv
  name = arguments[0] if arguments else "--help"
  if name in ("-h", "--help", "help"):
    print(usage())
  elif name == "--version":
    print(f"vdit_jax {vdit_jax.__version__}")
  elif name in COMMANDS:
    _run(name, arguments[1:])
  else:
    _refuse(f"no command {name!r}; {_known(name, list(COMMANDS))}")


def usage() -> str:
  """List the commands."""
  rows = [f"  {name:<10} {row.line}" for name, row in COMMANDS.items()]
  return "\n".join(
    [
      "usage: vdit COMMAND [--flags]",
      "",
      *rows,
      "",
      f"Configs: {', '.join(config_names())}; --config=digits:vae takes one.",
      "vdit COMMAND --help shows a command's flags; --version the version.",
    ]
  )


def config_names() -> list[str]:
  """Name the packaged configs."""
  return sorted({p.stem for p in _folder().glob("*.py")} - _SHARED)


def find_config(value: str) -> str:
  """Give the file of a --config, with what stands behind its colon.

  Args:
    value: of the flag, NAME[:ARG] or FILE[:ARG].

  Raises:
    ValueError: if no packaged config has that name.
  """
  name, colon, rest = value.partition(":")
  if "/" in name or ".py" in name or rest.startswith("//"):
    return value
  if name not in config_names():
    raise ValueError(
      f"no packaged config {name!r}; {_known(name, config_names())}; "
      "a file of your own needs a slash or .py"
    )
  return f"{_folder() / name}.py{colon}{rest}"


def _folder() -> pathlib.Path:
  return pathlib.Path(next(iter(configs.__path__)))


def _known(name: str, names: list[str]) -> str:
  """Say which names there are, and which of them are near."""
  near = difflib.get_close_matches(name, names)
  meant = f"did you mean {' or '.join(near)}? " if near else ""
  return f"{meant}there are {', '.join(names)}"


def _run(name: str, arguments: list[str]) -> None:
  """Run a command as `python -m` would."""
  command = COMMANDS[name]
  if command.takes_config:
    try:
      arguments = _with_files(arguments)
    except ValueError as error:
      _refuse(str(error))
  arguments = ["--help" if a == "-h" else a for a in arguments]
  sys.argv = [f"vdit {name}", *arguments]
  try:
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)
  except SystemExit as end:
    # absl ends with 1 where it was asked for help.
    if not (end.code == 1 and "--help" in arguments):
      raise


def _with_files(arguments: list[str]) -> list[str]:
  """Replace the names of packaged configs in --config by their files."""
  found = list(arguments)
  for i, argument in enumerate(arguments):
    flag, equals, value = argument.partition("=")
    if flag not in ("--config", "-config"):
      continue
    if equals:
      found[i] = f"{flag}={find_config(value)}"
    elif i + 1 < len(arguments):
      found[i + 1] = find_config(arguments[i + 1])
  return found


def _refuse(message: str) -> None:
  print(f"vdit: {message}", file=sys.stderr)
  sys.exit(2)


if __name__ == "__main__":
  main()
