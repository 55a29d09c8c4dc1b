import json
import pathlib

import pytest

from vdit_jax.data.build import layouts, manifest, parts, probe


def layout_of(path):
  return layouts.find(str(path), "")


def read(path, text, scores=()):
  path.write_text(text, encoding="utf-8")
  return list(manifest.rows(layout_of(path), scores))


def test_tables_and_lines_give_the_same_rows(tmp_path):
  rows = [
    {"file": "a.mp4", "caption": 'red, "quoted"\nsecond line', "score": "0.5"},
    {"file": "b/ü.mp4", "caption": '["one", "two"]', "score": ""},
    {"file": str(tmp_path / "c.mp4"), "caption": "[not a list", "score": "-2"},
  ]
  cells = [
    ",".join('"' + value.replace('"', '""') + '"' for value in row.values())
    for row in rows
  ]
  table = "\ufefffile,caption,score\n" + "\n".join(cells) + "\n"
  tabs = (
    table.replace('","', '"\t"').replace("e,c", "e\tc").replace("n,s", "n\ts")
  )
  rows[1]["caption"] = ["one", "two"]
  lines = "\n".join(json.dumps(row) for row in rows)
  found = [
    read(tmp_path / f"x.{suffix}", text, ("score",))
    for suffix, text in (("csv", table), ("tsv", tabs), ("jsonl", lines))
  ]
  for got in found:
    assert [row.key for row in got] == ["a.mp4", "b/ü.mp4", "c.mp4"]
    assert got[0].captions == ('red, "quoted"\nsecond line',)
    assert got[1].captions == ("one", "two") and not got[1].scores
    assert got[2].captions == ("[not a list",) and got[2].scores["score"] == -2
    assert not any(row.error for row in got)
  assert [row.line for row in found[0]] == [2, 4, 5]


def test_columns_of_numbers_are_scores(tmp_path):
  lines = [
    {"file": "a", "text": "x", "m": 1, "n": "2", "mixed": 1, "width": 3},
    {
      "file": "b",
      "text": "x",
      "m": None,
      "n": "nan",
      "mixed": "a",
      "no-name": 1,
    },
  ]
  path = tmp_path / "x.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)))
  found = manifest.survey(layout_of(path))
  assert found.scores == ("m", "n") and found.num_rows == 2
  rows = list(manifest.rows(layout_of(path), found.scores))
  assert rows[0].scores == {"m": 1, "n": 2} and rows[1].scores == {}


@pytest.mark.parametrize(
  "suffix, text, error",
  [
    ("jsonl", "[1]", "is no JSON object but list"),
    ("jsonl", '{"caption": "x"}', "names no file; it has .'caption'."),
    ("jsonl", '{"file": "a", "caption": [1]}', "caption that is no text: 1"),
    ("jsonl", '{"file": "a", "caption": "\\ud800"}', "not Unicode"),
    ("csv", "file,caption\na,b,c\n", "more cells than the header"),
    ("csv", "file,caption\na\n", "fewer cells than the header"),
  ],
)
def test_bad_rows_say_what_is_wrong(tmp_path, suffix, text, error):
  [row] = read(tmp_path / f"x.{suffix}", text)
  with pytest.raises(ValueError, match=error):
    raise ValueError(row.error)


@pytest.mark.parametrize(
  "name, text, error",
  [
    (
      "x.csv",
      "file;caption\n",
      r"one of file, file_name, .*\['file;caption'\]",
    ),
    ("x.csv", "file,words\n", "one of captions, caption, text, prompt"),
    ("x.csv", 'file,caption\na,"b\n', "can't be read at line 2: is no row"),
    ("x.jsonl", "\n", "captions has no row"),
    ("x.jsonl", '{"a": 1}\n', r"read at line 1: names no file; it has \['a'\]"),
    ("x.json", "[]", "captions has no row"),
    ("x.json", "3", "must hold a JSON list of objects, .*, got '3'"),
  ],
)
def test_captions_of_another_form_are_refused(tmp_path, name, text, error):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=error):
    manifest.survey(layout_of(tmp_path / name))


def test_draws_are_spread_and_independent_of_places():
  keys = [f"{i}.mp4" for i in range(4_000)]
  places = [manifest.place(key) / 2**64 for key in keys]
  draws = [manifest.draw(key) for key in keys]
  for values in (places, draws):
    assert abs(sum(values) / len(values) - 0.5) < 0.02
  first = [d for p, d in zip(places, draws, strict=True) if p < 0.1]
  assert abs(sum(first) / len(first) - 0.5) < 0.06


def test_parts_hold_every_row_once(tmp_path):
  rows = [manifest.Row(f"{i}", f"{i}", captions=("x",)) for i in range(500)]
  rows += [manifest.Row(f"{i}", f"{i}", scanned=True) for i in range(500)]
  keys = []
  for shard in range(3):
    own = parts.of_shard(7, shard, 3)
    assert parts.spool(rows, tmp_path / f"{shard}", own, 7) == sum(
      len(parts.gather(tmp_path / f"{shard}", part, False)[0]) for part in own
    )
    for part in own:
      files, rejected = parts.gather(tmp_path / f"{shard}", part, False)
      assert not rejected
      keys += [file.key for file in files]
  assert keys == sorted((str(i) for i in range(500)), key=manifest.place)


def test_file_that_a_glob_leaves_out_is_not_called_missing(tmp_path):
  path = tmp_path / "a.mp4"
  path.touch()
  row = manifest.Row("a.mp4", str(path), captions=("x",), line=3)
  parts.spool([row], tmp_path / "rows", range(1), 1)
  _, [found] = parts.gather(tmp_path / "rows", 0, unmatched=True)
  assert (found.reason, found.line) == (probe.Reason.UNMATCHED, 3)
  [file], _ = parts.gather(tmp_path / "rows", 0, unmatched=False)
  assert pathlib.Path(file.path) == path
