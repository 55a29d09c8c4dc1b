"""`vdit` lists its commands at once, and runs them as `python -m` would."""

import ast
import importlib.util
import pathlib
import subprocess
import sys
import time

import pytest

import vdit_jax
from vdit_jax import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vdit_jax"
# Run by themselves, but by whoever develops or by other commands.
NOT_COMMANDS = {
  "vdit_jax.cli",
  "vdit_jax.compare.ours",
  "vdit_jax.metrics.weights",
  "vdit_jax.training.batching",
}


def _vdit(*arguments):
  command = [sys.executable, "-m", "vdit_jax.cli", *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _runs(path):
  """Whether a file does something when it is run."""
  return 'if __name__ == "__main__":' in path.read_text()


def _file(module):
  """The file of a module that runs, found without importing it."""
  path = PACKAGE.parent.joinpath(*module.split("."))
  return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_a_module_that_runs(name):
  module = cli.COMMANDS[name].module
  assert importlib.util.find_spec(module) is not None
  assert _runs(_file(module))


def test_every_tool_is_a_command():
  tools = set()
  for path in PACKAGE.rglob("*.py"):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if _runs(path):
      tools.add(".".join(parts[:-1] if parts[-1] == "__main__" else parts))
  commands = {row.module for row in cli.COMMANDS.values()}
  baselines = {t for t in tools if t.endswith(".baseline")}  # of families
  assert tools - NOT_COMMANDS - baselines == commands


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_says_whether_its_config_is_a_file(name):
  command = cli.COMMANDS[name]
  called = {
    ast.unparse(node.func)
    for node in ast.walk(ast.parse(_file(command.module).read_text()))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
  }
  assert ("config_flag.define" in called) == command.takes_config


def test_help_is_quick_and_lists_all():
  began = time.perf_counter()
  done = _vdit("--help")
  seconds = time.perf_counter() - began
  assert done.returncode == 0 and seconds < 2
  for name, row in cli.COMMANDS.items():
    assert f"  {name}" in done.stdout and row.line in done.stdout
  assert max(len(line) for line in done.stdout.splitlines()) <= 80
  assert done.stdout == cli.usage() + "\n"


def test_help_imports_no_jax():
  code = (
    "import sys; from vdit_jax import cli; cli.main(['vdit']); "
    "assert not {'jax', 'numpy', 'absl'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_version(capsys):
  cli.main(["vdit", "--version"])
  assert capsys.readouterr().out == f"vdit_jax {vdit_jax.__version__}\n"


def test_help_of_a_command():
  done = _vdit("tiny", "--help")
  assert done.returncode == 0
  assert "Make a whole pipeline folder" in done.stdout
  assert "--variant" in done.stdout


def test_a_typo_gives_the_nearest_commands(capsys):
  with pytest.raises(SystemExit) as end:
    cli.main(["vdit", "samples"])
  assert end.value.code == 2
  assert "did you mean sample? " in capsys.readouterr().err


def test_packaged_configs_have_names():
  assert {"digits", "vdit", "cogvideox"} <= set(cli.config_names())
  assert not {"defaults", "__init__", "prompts"} & set(cli.config_names())


def test_a_packaged_config_is_found():
  file, _, arg = cli.find_config("digits:vae").partition(":")
  assert arg == "vae"
  assert pathlib.Path(file).samefile(ROOT / "configs" / "digits.py")
  assert cli.find_config("digits").endswith("/digits.py")
  assert cli.find_config("cogvideox:a/b").endswith("/cogvideox.py:a/b")


@pytest.mark.parametrize(
  "value", ["configs/digits.py:vae", "mine.py", "./mine:vae", "gs://b/c.py:d"]
)
def test_files_stay_files(value):
  assert cli.find_config(value) == value


def test_an_unknown_config_gives_the_known_ones(capsys):
  with pytest.raises(ValueError, match="did you mean digits.* there are cogv"):
    cli.find_config("digit:vae")
  with pytest.raises(SystemExit) as end:
    cli.main(["vdit", "train", "--config=digit:vae"])
  assert end.value.code == 2
  assert "digits" in capsys.readouterr().err


@pytest.mark.parametrize(
  "given", [["--config=digits:vae"], ["--config", "digits:vae"]]
)
def test_the_command_is_given_the_file(monkeypatch, given):
  ran = []
  monkeypatch.setattr(sys, "argv", ["vdit"])
  monkeypatch.setattr(
    cli.runpy, "run_module", lambda name, **_: ran.append((name, sys.argv))
  )
  cli.main(["vdit", "train", *given, "--config.optim.lr=1e-3", "--workdir=w"])
  ((module, argv),) = ran
  assert module == "vdit_jax.train"
  assert "digits.py:vae" in " ".join(argv)
  assert argv[-2:] == ["--config.optim.lr=1e-3", "--workdir=w"]


def test_a_config_of_another_kind_stays(monkeypatch):
  ran = []
  monkeypatch.setattr(sys, "argv", ["vdit"])
  monkeypatch.setattr(
    cli.runpy, "run_module", lambda *_, **__: ran.append(sys.argv)
  )
  cli.main(["vdit", "digits", "--config=one"])
  assert ran == [["vdit digits", "--config=one"]]
