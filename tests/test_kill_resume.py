"""Commands that are killed make what they would have made."""

import pytest

from benchmarks import kill_resume, killing


def test_what_is_on_its_way_is_told_from_what_is_there(tmp_path):
  temporary = [".half.tmp", "1.0.0.unfinished/a", "b/.empty", "7.tmp/deep/c"]
  for name in (*temporary, "whole", "b/whole"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    if name == "b/.empty":
      (tmp_path / name).mkdir()
    else:
      (tmp_path / name).write_text(name)
  assert killing.leftovers(tmp_path) == sorted(temporary)
  assert list(killing.files(tmp_path)) == ["b/whole", "whole"]


@pytest.mark.slow
def test_killed_commands_make_what_unbroken_ones_do():
  rows = kill_resume.run(["tokenizer", "build"], kills=4)
  assert [len(row["moments"]) for row in rows] == [2, 2]
  for row in rows:
    assert kill_resume.is_good(row), row
