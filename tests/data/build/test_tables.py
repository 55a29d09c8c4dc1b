"""Captions in every form that people have them, and rows that are broken."""

import json

import pytest

from tests.data import videos
from vdit_jax.data.build import dataset, jobs, layouts, manifest, parts

SAID = {"a.mp4": "a cat", "sub/b.mp4": "two dogs"}
DEEP = "[" * 50_000 + "]" * 50_000


def _lines(rows):
  return "".join(json.dumps(row) + "\n" for row in rows)


def _rows(file, caption, **more):
  return [{file: name, caption: text, **more} for name, text in SAID.items()]


def _csv(file, caption):
  lines = [f"{name},{text}" for name, text in SAID.items()]
  return "\n".join([f"{file},{caption}", *lines, ""])


# What lies beside the clips, what --videos and --captions are.
FORMS = {
  "hugging face's lines": (
    {"metadata.jsonl": _lines(_rows("file_name", "text"))},
    ".",
    "",
  ),
  "hugging face's table": (
    {"metadata.csv": _csv("file_name", "text")},
    ".",
    "",
  ),
  "hugging face's tables in folders": (
    {
      "metadata.csv.txt": "none",
      "sub/metadata.csv": "video_file_name,caption\nb.mp4,two dogs\n",
      "train/metadata.jsonl": '{"file_name": "../a.mp4", "text": "a cat"}',
    },
    ".",
    "",
  ),
  "columns video and prompt": (
    {"metadata.csv": _csv("video", "prompt")},
    "metadata.csv",
    "",
  ),
  "columns in capitals": ({"x.csv": _csv("Path", "Caption")}, ".", "x.csv"),
  "columns image and text": (
    {"m.tsv": _csv("image", "text").replace(",", "\t")},
    ".",
    "m.tsv",
  ),
  "a list with path and cap": (
    {
      "videos2caption.json": json.dumps(
        [
          {"path": name, "cap": [text], "resolution": {"height": 48}}
          for name, text in SAID.items()
        ],
        indent=1,
      )
    },
    ".",
    "videos2caption.json",
  ),
  "a list with file_path and text": (
    {"x.json": json.dumps(_rows("file_path", "text", type="video"))},
    ".",
    "x.json",
  ),
  "metadata.json": ({"metadata.json": json.dumps(SAID)}, ".", ""),
  "captions by file": ({"c.json": json.dumps(SAID)}, ".", "c.json"),
  "columns by file": (
    {"c.json": json.dumps({k: {"caption": v} for k, v in SAID.items()})},
    "c.json",
    "",
  ),
  "lines called json": (
    {"c.json": _lines(_rows("path", "cap"))},
    ".",
    "c.json",
  ),
  "media_path": ({"d.json": json.dumps(_rows("media_path", "caption"))},)
  + (".", "d.json"),
  "texts beside the clips": (
    {"a.txt": "a cat\n", "sub/b.txt": "two dogs", "readme.txt": "no clip's"},
    ".",
    "",
  ),
  "captions beside the clips": (
    {"a.caption": "a cat", "sub/b.caption": "two dogs"},
    ".",
    ".",
  ),
  "texts beside a glob's clips": (
    {"a.txt": "a cat\n", "sub/b.txt": "two dogs"},
    "**/*.mp4",
    "",
  ),
  "a folder of texts": (
    {"texts/a.txt": "a cat", "texts/sub/b.txt": "two dogs"},
    ".",
    "texts",
  ),
  "prompts.txt beside videos.txt": (
    {"videos.txt": "a.mp4\nsub/b.mp4\n", "prompts.txt": "a cat\ntwo dogs\n"},
    ".",
    "",
  ),
  "prompt.txt beside videos.txt, named": (
    {"videos.txt": "a.mp4\r\nsub/b.mp4", "prompt.txt": "a cat\r\ntwo dogs"},
    "videos.txt",
    "prompt.txt",
  ),
  "videos.txt alone": (
    {"videos.txt": "a.mp4\nsub/b.mp4\n\n", "captions.txt": "a cat\ntwo dogs\n"},
    "videos.txt",
    "",
  ),
  "prompts.txt alone": (
    {"videos.txt": "a.mp4\nsub/b.mp4\n", "my.txt": "a cat\ntwo dogs\n"},
    ".",
    "my.txt",
  ),
  "a table of another folder": (
    {"t/all.csv": _csv("path", "text").replace("a.mp4", "../a.mp4", 1)},
    ".",
    "t/all.csv",
  ),
  "backslashes": (
    {"m.jsonl": _lines(_rows("video", "text")).replace("/", "\\\\")},
    "m.jsonl",
    "",
  ),
}


def _lay_out(folder, files, clips=SAID):
  """Write texts, and clips that are empty."""
  for name in (*clips, *files):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
  for name, text in files.items():
    data = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(data)


def _find(folder, videos=".", captions=""):
  videos = str(folder) if videos == "." else str(folder / videos)
  captions = str(folder / captions) if captions else ""
  return layouts.find(videos, captions)


def _join(layout):
  """What a build takes of a layout: files, and what it leaves out."""
  survey = manifest.survey(layout)
  rows = [*manifest.scan(layout), *manifest.rows(layout, survey.scores)]
  by_key = {}
  for row in rows:
    by_key.setdefault(row.key, []).append(row)
  found = [f for key in by_key for f in parts._join(key, by_key[key], False)]
  files = {f.key: f for f in found if isinstance(f, parts.File)}
  return files, [f for f in found if not isinstance(f, parts.File)]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_people_have_is_read(tmp_path, form):
  files, clips, captions = FORMS[form]
  _lay_out(tmp_path, files)
  found, left_out = _join(_find(tmp_path, clips, captions))
  assert {key: f.captions for key, f in found.items()} == {
    key: (text,) for key, text in SAID.items()
  }
  assert not left_out and all(f.line and f.table for f in found.values())
  assert all((tmp_path / key).samefile(found[key].path) for key in SAID)


def test_texts_are_in_labels_of_videos(tmp_path):
  texts = {"labels/1.txt": "a cat", "labels/sub/2.txt": "two dogs"}
  _lay_out(tmp_path, texts, ["videos/1.mp4", "videos/sub/2.mp4"])
  whole, _ = _join(_find(tmp_path))
  inner, _ = _join(_find(tmp_path, "videos"))
  assert [f.captions[0] for f in whole.values()] == ["a cat", "two dogs"]
  assert whole.keys() == {f"videos/{key}" for key in inner}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "txt"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, form, encoding):
  said = {"ü.mp4": "猫 \u2028 and\x85é"}
  text = {
    "csv": "file,caption\r\nü.mp4,{}\r\n".format(*said.values()),
    "jsonl": '{{"file": "ü.mp4", "text": "{}"}}'.format(*said.values()),
    "json": '{{"ü.mp4": "{}"}}'.format(*said.values()),
    "txt": said["ü.mp4"],
  }[form]
  name = "ü.txt" if form == "txt" else f"metadata.{form}"
  _lay_out(tmp_path, {name: text.encode(encoding)}, said)
  found, left_out = _join(_find(tmp_path))
  assert {key: f.captions[0] for key, f in found.items()} == said
  assert not left_out


@pytest.mark.parametrize(
  "name, data, error",
  [
    ("m.csv", "file,caption\na.mp4,café\n".encode("latin-1"), "line 2, is not"),
    ("m.csv", "file,légende\na.mp4,x\n".encode("latin-1"), "line 1, is not"),
    ("m.csv", "file,text\na.mp4,x\n".encode("utf-16-le"), "UTF-16 without"),
    ("m.jsonl", '{"file": "a.mp4"}'.encode("utf-16-be"), "UTF-16 without"),
    ("m.json", '{"a.mp4": "é"}'.encode("latin-1"), "line 1: is not UTF-8"),
    ("m.jsonl", b'{"file": "a.mp4", "text": "\xe9"}', "line 1: is not UTF-8"),
  ],
)
def test_another_encoding_is_refused_by_name(tmp_path, name, data, error):
  _lay_out(tmp_path, {name: data})
  with pytest.raises(ValueError, match=f"{error}.*") as refused:
    manifest.survey(_find(tmp_path, name))
  assert name in str(refused.value) and len(str(refused.value)) < 400


# A line of each file that is wrong, what stands there, and what is said of it.
BROKEN = {
  "NUL in a name": ('{"file": "a\\u0000.mp4", "text": "x"}', "there could be"),
  "surrogate in a name": ('{"file": "\\ud800", "text": "x"}', "not Unicode"),
  "endless name": (json.dumps({"file": "a" * 10**6, "text": "x"}), "could be"),
  "deep": ('{"file": ' + DEEP + ', "text": "x"}', "nested too deep"),
  "deep line": (DEEP, "nested too deep"),
  "bytes": (b'{"file": "a.mp4", "text": "\xff"}', "is not UTF-8"),
  "no object": ('"a.mp4"', "is no JSON object but str"),
  "half": ('{"file": "a.mp4", ', "is not JSON"),
  "huge number": ('{"file": ' + "9" * 5000 + "}", "is not JSON"),
  "file is a number": ('{"file": 1, "text": "x"}', "names no file"),
  "file is a list": ('{"file": ["a.mp4"], "text": "x"}', "names no file"),
  "caption is a number": ('{"file": "a.mp4", "text": 1}', "is no text: 1"),
  "caption is an object": ('{"file": "a.mp4", "text": {}}', "is no text"),
  "caption's surrogate": ('{"file": "a.mp4", "text": "\\udc80"}', "Unicode"),
}
GOOD = '{"file": "sub/b.mp4", "text": "two dogs"}'


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_object_is_a_listed_row(tmp_path, kind, suffix):
  text, error = BROKEN[kind]
  text = text.encode() if isinstance(text, str) else text
  lines = [text, GOOD.encode()]
  data = b"\n".join(lines) + b"\n"
  if suffix == "json":
    data = b"[\n" + b",\n".join(lines[::-1]) + b"\n]"
  _lay_out(tmp_path, {f"m.{suffix}": data})
  found, left_out = _join(_find(tmp_path, f"m.{suffix}"))
  assert list(found) == ["sub/b.mp4"]
  [row] = left_out
  assert row.reason == "bad row" and error in row.detail
  assert row.line == (1 if suffix == "jsonl" else 3)
  assert row.table == f"m.{suffix}" and len(row.detail) < 300


@pytest.mark.parametrize(
  "row, error",
  [
    ("a\0.mp4,x", "there could be"),
    (f'a.mp4,"{"[" * 100_000}"', "nested too deep"),
    ('a.mp4,"he said "so" and left"', "is no row"),
    ('a.mp4,"never closed', "is no row"),
    ("a.mp4", "fewer cells"),
    ("a.mp4,x,y", "more cells"),
    (",x", "names no file"),
    (f"a.mp4,{'x' * (2**24 + 1)}", "is no row"),
    (b"a.mp4,\xe9", "is not UTF-8"),
  ],
)
def test_a_broken_row_of_a_table_is_listed(tmp_path, row, error):
  row = row.encode() if isinstance(row, str) else row
  lines = [b"file,caption", "c.mp4,é".encode(), row, b"d.mp4,x", b""]
  _lay_out(tmp_path, {"m.csv": b"\n".join(lines)}, ["c.mp4", "d.mp4"])
  found, left_out = _join(_find(tmp_path, "m.csv"))
  assert set(found) == {"c.mp4", "d.mp4"}
  [left] = left_out
  assert (left.line, left.reason) == (3, "bad row") and error in left.detail


def test_a_caption_may_begin_with_brackets(tmp_path):
  text = 'file,caption\na.mp4,"[a cat] sits"\nsub/b.mp4,"[""x"", ""y""]"\n'
  _lay_out(tmp_path, {"m.csv": text})
  found, _ = _join(_find(tmp_path, "m.csv"))
  assert found["a.mp4"].captions == ("[a cat] sits",)
  assert found["sub/b.mp4"].captions == ("x", "y")


def test_a_text_that_cannot_be_read_is_listed(tmp_path):
  _lay_out(tmp_path, {"a.txt": b"caf\xe9", "sub/b.txt": "two dogs"})
  found, [left] = _join(_find(tmp_path))
  assert list(found) == ["sub/b.mp4"]
  assert (left.file, left.reason, left.line) == ("a.mp4", "bad row", 1)
  assert "a.txt" in left.detail and "save it as UTF-8" in left.detail


@pytest.mark.parametrize(
  "files, videos, captions, error",
  [
    ({}, ".", "", "captions must be a file, got ''.*a.txt of a.mp4.*beside"),
    ({}, ".", "none.csv", "captions must be a file or folder, got .*not there"),
    (
      {"c.xml": ""},
      ".",
      "c.xml",
      "captions must be one of .jsonl, .json, .csv",
    ),
    ({"c.txt": "x"}, ".", "c.txt", "needs the list of their files.*videos.txt"),
    ({"videos.txt": "a.mp4"}, "videos.txt", "", "write .*prompts.txt"),
    (
      {"metadata.csv": "", "metadata.jsonl": ""},
      ".",
      "",
      "could be any of .*metadata.jsonl, .*metadata.csv; name one",
    ),
    (
      {"videos.txt": "a.mp4\nb.mp4\n", "prompts.txt": "a cat\n"},
      ".",
      "",
      "prompts.txt has 1 lines and .*videos.txt 2",
    ),
    ({"texts/c.txt": "x"}, ".", "texts", "no texts .* lie in .*texts"),
    (
      {},
      "a.mp4",
      "",
      "videos must be a folder, a glob or a manifest, got .*a.mp4",
    ),
  ],
)
def test_what_is_not_there_or_several_is_refused(
  tmp_path, files, videos, captions, error
):
  _lay_out(tmp_path, files)
  with pytest.raises(ValueError, match=error):
    manifest.survey(_find(tmp_path, videos, captions))


@pytest.mark.parametrize("captions", ["m.jsonl", ""])
def test_a_build_goes_on_past_broken_rows(tmp_path, captions):
  """The whole of it, by lines and by texts."""
  for name in ("a.mp4", "b.mp4"):
    videos.write(tmp_path / name, num_frames=3)
  rows = [text for text, _ in BROKEN.values()]
  rows = [x if isinstance(x, bytes) else x.encode() for x in rows]
  good = b'{"file": "b.mp4", "text": "b"}'
  (tmp_path / "m.jsonl").write_bytes(b"\n".join([*rows, good]))
  (tmp_path / "a.txt").write_bytes(b"\xff")
  (tmp_path / "b.txt").write_text("b")
  where = str(tmp_path / captions) if captions else ""
  spec = jobs.Spec(str(tmp_path), where, validation=0.0)
  dataset.build(spec, tmp_path / "data", "mine/clips", workers=0)
  path = tmp_path / "data/mine/clips/1.0.0/rejected.jsonl"
  listed = [json.loads(line) for line in path.read_text().splitlines()]
  # Of the lines, a.mp4's are all broken: it is the file that they are of.
  assert len(listed) == (len(rows) if captions else 1)
  assert {row["table"] for row in listed} == {captions or "a.txt"}
