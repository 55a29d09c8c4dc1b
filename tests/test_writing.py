"""What is written is whole or not there, and what was there stays."""

import os
import stat
import subprocess
import sys

import pytest

from vdit_jax import writing


def _names(folder):
  return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_with_its_folders(tmp_path):
  writing.write(tmp_path / "new" / "deep" / "a", "é")
  assert (tmp_path / "new" / "deep" / "a").read_bytes() == "é".encode()
  writing.write(tmp_path / "new" / "deep" / "a", b"2")
  assert (tmp_path / "new" / "deep" / "a").read_bytes() == b"2"
  assert _names(tmp_path / "new" / "deep") == ["a"]


def test_a_file_is_readable_as_any_other(tmp_path):
  (tmp_path / "plain").write_text("")
  writing.write(tmp_path / "ours", "")
  modes = [stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()]
  assert len(set(modes)) == 1


@pytest.mark.parametrize("broken", ["body", "fsync", "replace"])
def test_a_failure_leaves_the_old_and_nothing_else(
  tmp_path, monkeypatch, broken
):
  (tmp_path / "a").write_text("old")

  def fail(*_):
    raise OSError(28, "No space left on device")

  if broken != "body":
    monkeypatch.setattr(os, broken, fail)
  with pytest.raises(OSError), writing.opened(tmp_path / "a") as file:
    file.write(b"new")
    if broken == "body":
      fail()
  assert (tmp_path / "a").read_text() == "old"
  assert _names(tmp_path) == ["a"]


def test_a_folder_replaces_another_as_a_whole(tmp_path):
  old = tmp_path / "out"
  (old / "mine").mkdir(parents=True)
  (old / "a").write_text("old")
  (old / "mine" / "notes").write_text("kept")
  with writing.folder(old, over=True) as folder:
    (folder / "a").write_text("new")
    assert (old / "a").read_text() == "old"
  assert (old / "a").read_text() == "new"
  assert (old / "mine" / "notes").read_text() == "kept"
  assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("fails_at", range(1, 4))
def test_a_folder_is_all_old_when_any_renaming_fails(
  tmp_path, monkeypatch, fails_at
):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "a").write_text("old")
  calls, rename = [], os.rename

  def failing(*args, **kwargs):
    calls.append(args)
    if len(calls) == fails_at:
      raise OSError(28, "No space left on device")
    rename(*args, **kwargs)

  monkeypatch.setattr(os, "rename", failing)
  try:
    with writing.folder(tmp_path / "out", over=True) as folder:
      (folder / "a").write_text("new")
  except OSError:
    assert (tmp_path / "out" / "a").read_text() == "old"
  else:
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert len(calls) < fails_at
  assert _names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_taken_over(tmp_path):
  code = (
    "with writing.folder(sys.argv[1]) as f:\n"
    "  (f / 'half').write_text('x')\n  os.kill(os.getpid(), 9)"
  )
  _killed(code, tmp_path / "out")
  assert _names(tmp_path) == [".out.unfinished"]
  with writing.folder(tmp_path / "out") as folder:
    (folder / "whole").write_text("x")
  assert _names(tmp_path) == ["out"]
  assert _names(tmp_path / "out") == ["whole"]


def _killed(code, *args):
  """Run code of a process that kills itself."""
  code = f"import os, sys\nfrom vdit_jax import writing\n{code}"
  ended = subprocess.run([sys.executable, "-c", code, *map(str, args)])
  assert ended.returncode == -9


def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path):
  code = (
    "with writing.opened(sys.argv[1]) as f:\n"
    "  f.write(b'half')\n  f.flush()\n  os.kill(os.getpid(), 9)"
  )
  _killed(code, tmp_path / "a")
  [left] = _names(tmp_path)
  writing.write(tmp_path / "b", "other")
  assert _names(tmp_path) == [left, "b"]
  with writing.opened(tmp_path / "a") as held:
    assert left not in _names(tmp_path)
    # A writer that lives keeps its own.
    writing.check_file(tmp_path / "a")
    writing.write(tmp_path / "a", "first")
    assert (tmp_path / "a").read_text() == "first"
    held.write(b"last")
  assert (tmp_path / "a").read_text() == "last"
  assert _names(tmp_path) == ["a", "b"]


def test_a_check_that_is_killed_leaves_nothing(tmp_path):
  code = (
    "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
    "writing.check_file(sys.argv[1])"
  )
  _killed(code, tmp_path / "a")
  assert _names(tmp_path) == []


@pytest.mark.parametrize(
  "name, call", [("rename", 1), ("rename", 2), ("rmdir", 1)]
)
def test_a_folder_whose_replacing_was_killed_is_whole_again(
  tmp_path, name, call
):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "notes").write_text("kept")
  code = (
    "name, call, inner = sys.argv[2], int(sys.argv[3]), {}\n"
    "def killing(*args, **kwargs):\n"
    "  inner['calls'] = inner.get('calls', 0) + 1\n"
    "  if inner['calls'] == call: os.kill(os.getpid(), 9)\n"
    "  inner['own'](*args, **kwargs)\n"
    "inner['own'] = getattr(os, name)\n"
    "setattr(os, name, killing)\n"
    "with writing.folder(sys.argv[1], over=True) as f:\n"
    "  (f / 'a').write_text('half')"
  )
  _killed(code, tmp_path / "out", name, call)
  assert _names(tmp_path) != ["out"]
  with writing.folder(tmp_path / "out", over=True) as folder:
    (folder / "a").write_text("whole")
  assert _names(tmp_path) == ["out"]
  assert _names(tmp_path / "out") == ["a", "notes"]
  assert (tmp_path / "out" / "a").read_text() == "whole"


def test_two_writers_of_a_folder_do_not_meet(tmp_path):
  with writing.folder(tmp_path / "out") as folder:
    (folder / "a").write_text("first")
    with pytest.raises(ValueError, match="out is being written; wait"):
      with writing.folder(tmp_path / "out"):
        raise AssertionError
  assert (tmp_path / "out" / "a").read_text() == "first"


@pytest.mark.parametrize(
  "path, said",
  [
    ("", "must be a file's name"),
    ("new/", "must be a file's name"),
    ("folder", "is a folder; name a file"),
    ("pipe", "is a device or pipe"),
    ("file/a", "a file stands where a folder should"),
    ("file/deeper/a", "a file stands where a folder should"),
    ("x" * 300, "File name too long"),
    ("x" * 300 + "/a", "File name too long"),
    ("a\0b", "null (byte|character)"),
    ("/proc/self/a", "cannot be written"),
  ],
)
def test_a_path_that_no_file_can_have(tmp_path, monkeypatch, path, said):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "folder").mkdir()
  (tmp_path / "file").write_text("")
  os.mkfifo(tmp_path / "pipe")
  before = _names(tmp_path)
  with pytest.raises(ValueError, match=said) as refused:
    writing.check_file(path, "out")
  assert str(refused.value).startswith("out ")
  assert len(str(refused.value)) < 600
  assert _names(tmp_path) == before


def test_a_path_that_a_file_can_have_is_left_alone(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert writing.check_file("new/a") == tmp_path / "new" / "a"
  (tmp_path / "a").write_text("1")
  writing.check_file("a")
  writing.check_folder("new/deep")
  assert _names(tmp_path) == ["a"]


def test_a_store_that_is_not_known():
  with pytest.raises(ValueError, match="unknown store; known is gs://"):
    writing.absolute("nothing://bucket/a")


def test_a_path_that_no_folder_can_have(tmp_path):
  (tmp_path / "file").write_text("")
  for path, said in (
    ("file", "is a file; name a folder"),
    (".", "not an empty folder; remove it"),
    ("file/a", "a file stands where a folder should"),
  ):
    with pytest.raises(ValueError, match=said):
      writing.check_folder(tmp_path / path)
  writing.check_folder(tmp_path, free=False)
