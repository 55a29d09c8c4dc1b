"""Fields on the command line: what is misspelt is said in a line."""

import os
import sys

import pytest

from vdit_jax import config_flag

FILE = "configs/digits.py:vae"


def _parse(monkeypatch, *arguments, path=FILE):
  monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
  monkeypatch.delitem(sys.modules, "config_config", raising=False)
  return config_flag._Parser("config").parse(path)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.optim.learning_rate=1", "no field 'learning_rate'.* lr, sched"),
    ("--config.optim.warmup_step=1", "did you mean warmup_steps"),
    (
      "--config.optimm.lr=1",
      "config has no field 'optimm', did you mean optim",
    ),
    ("--config.lr=1", "'lr', did you mean --config.optim.lr"),
    ("--config.optim.lr.x=1", "config.optim.lr is no group"),
    ("--noconfig.data.flop", "'flop', did you mean flip"),
    ("-config.data.shapes[0]=1", "mean --config.data.buckets.shapes"),
  ],
)
def test_a_misspelt_field_says_the_nearest_and_where_they_are_listed(
  monkeypatch, argument, message
):
  with pytest.raises(ValueError, match=message) as error:
    _parse(monkeypatch, argument)
  assert "docs/fields.md" in str(error.value)
  assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("configs/digits.py:vea", r"has \['dit', 'vae', .*\], got 'vea'"),
    ("configs/digit.py:vae", "configs/digit.py is no file"),
    ("configs/digits.py", "missing 1 required positional argument"),
  ],
)
def test_what_is_no_config_is_said_without_a_traceback(
  monkeypatch, path, message
):
  with pytest.raises(ValueError, match=message) as error:
    _parse(monkeypatch, path=path)
  assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "has no get_config"),
    (b"\xff\x00\x01", "null bytes|not Python"),
    (b"def get_config(:", "not Python"),
  ],
)
def test_a_file_that_is_none_is_refused(
  tmp_path, monkeypatch, content, message
):
  (tmp_path / "file.py").write_bytes(content)
  with pytest.raises(ValueError, match=message):
    _parse(monkeypatch, path=str(tmp_path / "file.py"))
  os.mkfifo(tmp_path / "pipe.py")
  with pytest.raises(ValueError, match="is no file"):
    _parse(monkeypatch, path=str(tmp_path / "pipe.py"))


def test_fields_that_there_are_pass(monkeypatch):
  config = _parse(
    monkeypatch,
    "--config.optim.lr=1",
    "--noconfig.data.flip",
    "--config.data.shape[0]=3",
    "--workdir=x.y",
  )
  assert config.task == "autoencoder" and config.is_locked
