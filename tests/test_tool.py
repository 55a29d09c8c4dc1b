"""An error of ours ends a command in one line and status 2."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOL = """
import sys
from absl import app, flags
from vdit_jax import schema, tool, writing

flags.DEFINE_integer("height", 1, "Pixels.")
flags.DEFINE_string("out", "", "File.")
flags.DEFINE_multi_float("scale", None, "Of something.")

def main(argv):
  tool.no_arguments(argv)
  kind = flags.FLAGS.out
  if kind == "ours":
    schema.check("height", {}, {})
    writing.check_file("", "height")
  elif kind == "renamed":
    writing.check_file("")
  elif kind == "theirs":
    import json
    json.loads("{")
  elif kind == "bug":
    schema.near(1, 2)
  elif kind == "full":
    raise OSError(28, "No space left on device", "/a")

tool.run(main, {"path": "--out"})
"""


def _run(*arguments):
  return subprocess.run(
    [sys.executable, "-c", TOOL, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  "arguments, said",
  [
    (["--out=ours"], "--height must be a file's name, got ''"),
    (["--out=renamed"], "--out must be a file's name, got ''"),
    (["--out=full"], "[Errno 28] No space left on device: '/a'"),
    (["--hight=1"], "Unknown command line flag 'hight'"),
    (["--height=x"], "flag --height=x"),
    (["--scale=1", "--scale=nan"], "--scale must be a finite number, got nan"),
    (["extra"], "unexpected arguments: extra"),
  ],
)
def test_what_is_refused_is_one_line(arguments, said):
  ended = _run(*arguments)
  assert ended.returncode == 2
  assert said in ended.stderr
  assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
  "arguments, status",
  [
    (["--out=ours", "--debug"], 1),
    (["--out=theirs"], 1),
    (["--out=bug"], 1),
  ],
)
def test_a_bug_or_debug_shows_where(arguments, status):
  ended = _run(*arguments)
  assert ended.returncode == status
  assert "Traceback" in ended.stderr


def test_a_command_that_goes_well_says_nothing():
  ended = _run()
  assert (ended.returncode, ended.stderr) == (0, "")
