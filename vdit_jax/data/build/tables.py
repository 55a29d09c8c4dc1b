"""The forms in which captions come, read to lines of columns.

  .jsonl  an object a line          .csv, .tsv  a header, then rows
  .json   a list of objects; or an object that gives each file its caption or
          its columns
  prompts.txt beside videos.txt     line N of one is the caption of line N
  a.txt beside a.mp4                a text for each clip; or in a folder of
          texts; or in folder "labels" where the clip is in folder "videos"

Each becomes `Line`s, in order and without being held in memory but for .json.
A line that cannot be read says why and does not end the reading.
"""

import collections
import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vdit_jax import schema
from vdit_jax.data import text_files

# Names of columns in any case, those that come first before others.
FILE_COLUMNS = (
  "file file_name filename path file_path filepath video video_path video_file "
  "video_file_name media_path image image_path image_file image_file_name"
).split()
CAPTION_COLUMNS = (
  "captions caption text prompt cap texts prompts caps video_caption "
  "image_caption long_caption short_caption long_prompt short_prompt "
  "description descriptions"
).split()

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
TEXT_SUFFIXES = (".txt", ".caption")
# Where texts are whose clips are in a folder "videos", as others have them.
_VIDEOS, _LABELS = "videos", "labels"

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_CELL = 2**24  # letters; Python's csv stops at 131,072
_TOO_DEEP = "is JSON nested too deep"
_NOT_UTF8 = "is not UTF-8"
# A string, or what divides JSON: what is between them is of no interest here.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Line:
  """What stands in a line of captions.

  Attributes:
    number: of the line, from 1.
    columns: by name, values as JSON has them.
    error: what is wrong with it; "" if nothing.
    file: that a text is of; else the columns name one.
    place: the text's file.
  """

  number: int
  columns: dict[str, Any]
  error: str = ""
  file: str = ""
  place: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
  """A file of captions.

  Attributes:
    path: of the file.
    folders: that its names of files are relative to: the first in which there
      is such a file.
    files: list of the files' names, if `path` is a list of captions.
  """

  path: pathlib.Path
  folders: tuple[pathlib.Path, ...]
  files: pathlib.Path | None = None

  def lines(self) -> Iterator[Line]:
    """Read it, line by line."""
    if self.files is not None:
      return _lists(self.files, self.path)
    readers = {".jsonl": _json_lines, ".json": _json}
    return readers.get(self.path.suffix.lower(), _rows)(self.path)

  def digest(self) -> str:
    """SHA-256 of it, and of the list beside it."""
    found = hashlib.sha256()
    for path in filter(None, (self.path, self.files)):
      with path.open("rb") as file:
        while data := file.read(2**20):
          found.update(data)
    return found.hexdigest()


@dataclasses.dataclass(frozen=True)
class Texts:
  """A text for each clip.

  Attributes:
    clips: gives the paths of the clips, each time the same.
    root: of the clips.
    folder: of the texts, which lie in it as the clips do in `root`; None is
      beside the clips.
  """

  clips: Callable[[], Iterator[str]]
  root: pathlib.Path
  folder: pathlib.Path | None = None

  def lines(self) -> Iterator[Line]:
    """Read the text of each clip that has one."""
    for clip in self.clips():
      path = self._find(clip)
      if path is None:
        continue
      place = os.path.relpath(path, self.folder or self.root)
      columns, error = {}, ""
      try:
        columns = {"caption": text_files.read(path, "text")}
      except (ValueError, OSError) as problem:
        error = f"cannot be read: {problem}"
      yield Line(1, columns, error, clip, place)

  def digest(self) -> str:
    """SHA-256 of all texts."""
    found = hashlib.sha256()
    for line in self.lines():
      found.update(repr((line.place, line.columns, line.error)).encode())
    return found.hexdigest()

  def _find(self, clip: str) -> pathlib.Path | None:
    path = pathlib.Path(clip)
    places = [path]
    if self.folder is not None:
      places = [self.folder / os.path.relpath(path, self.root)]
    elif _VIDEOS in path.parent.parts:
      parts = list(path.parts)
      last = len(parts) - 1 - parts[::-1].index(_VIDEOS, 1)
      places.append(pathlib.Path(*parts[:last], _LABELS, *parts[last + 1 :]))
    texts = (p.with_suffix(suffix) for p in places for suffix in TEXT_SUFFIXES)
    return next(filter(os.path.isfile, texts), None)


Captions = Table | Texts


def first(columns: dict[str, Any], names: Iterable[str]) -> Any:
  """Give the first of some columns that has a value; None if there is none."""
  lower = {name.strip().lower(): value for name, value in columns.items()}
  found = (lower.get(name) for name in names)
  return next((x for x in found if x is not None and x != ""), None)


def _json_lines(path: pathlib.Path) -> Iterator[Line]:
  with text_files.opened(path, "captions") as file:
    for number, text in enumerate(file, 1):
      if text.strip():
        yield _object(number, text)


def _object(number: int, text: str) -> Line:
  """Read a text that should be a JSON object."""
  value, error = _parse(text)
  if not error and not isinstance(value, dict):
    error = f"is no JSON object but {type(value).__name__}"
  return Line(number, {}, error) if error else Line(number, value)


def _parse(text: str) -> tuple[Any, str]:
  """Read JSON; give the value, and what is wrong."""
  if not text_files.is_text(text):
    return None, _NOT_UTF8
  try:
    return json.loads(text), ""
  except RecursionError:
    return None, _TOO_DEEP
  except ValueError as error:
    return None, f"is not JSON: {error}"


def _json(path: pathlib.Path) -> Iterator[Line]:
  """Read a list of objects, an object by file, or objects in lines."""
  with text_files.opened(path, "captions") as file:
    text = file.read()
  begin = text.lstrip()[:1]
  if begin == "{":
    head = _object(1, text.lstrip().partition("\n")[0])
    if not head.error and first(head.columns, FILE_COLUMNS) is not None:
      yield from _json_lines(path)
      return
  elif begin != "[":
    raise ValueError(
      f"captions {path} must hold a JSON list of objects, or an object that "
      f"gives each file its caption, got {schema.quote(text[:80])}"
    )
  for number, element in _elements(text):
    if begin == "[":
      yield _object(number, element)
    else:
      yield _by_name(_object(number, f"{{{element}}}"))


def _by_name(line: Line) -> Line:
  """Read a file's name and what an object has for it."""
  columns = {}
  for name, value in line.columns.items():
    own = value if isinstance(value, dict) else {"caption": value}
    columns = {FILE_COLUMNS[0]: name} | own
  return dataclasses.replace(line, columns=columns)


def _elements(text: str) -> Iterator[tuple[int, str]]:
  """Divide a JSON list or object: the line and the text of each element."""
  line, counted = 1, 0
  for begin, end in _spans(text):
    piece = text[begin:end].lstrip()
    line += len(text_files.lines(f"{text[counted : end - len(piece)]}x")) - 1
    counted = end - len(piece)
    if piece:
      yield line, piece


def _spans(text: str) -> Iterator[tuple[int, int]]:
  """Yield where each element begins and ends.

  Only strings and brackets are looked at, so that what is wrong inside of an
  element is found when that one is read.
  """
  depth, begin = 0, 0
  for token in _TOKEN.finditer(text):
    kind, outer = token.group(), depth
    depth += (kind in "[{") - (kind in "]}")
    if not outer:
      begin = token.end()
    elif outer == 1 and kind in ",]}":
      yield begin, token.start()
      begin = token.end()
    if not depth:
      return
  yield begin, len(text)  # it is broken off


def _lists(files: pathlib.Path, captions: pathlib.Path) -> Iterator[Line]:
  """Read two lists, line by line."""
  names, said = (
    text_files.lines(text_files.read(path, "captions").rstrip("\r\n"))
    for path in (files, captions)
  )
  if len(names) != len(said):
    raise ValueError(
      f"captions {captions} has {len(said)} lines and {files} {len(names)}; "
      "write a line in each for a clip"
    )
  for number, (name, text) in enumerate(zip(names, said, strict=True), 1):
    if name.strip() or text.strip():
      yield Line(number, {FILE_COLUMNS[0]: name, "caption": text})


class _Again(Iterator[str]):
  """Lines of a table, those of its last row to be read again if it's broken."""

  def __init__(self, lines: Iterable[str]):
    self._lines, self._back = iter(lines), collections.deque()
    self.taken: list[str] = []
    self.number = 0

  def __next__(self) -> str:
    line = self._back.popleft() if self._back else next(self._lines)
    self.taken.append(line)
    self.number += 1
    return line

  def put_back(self) -> None:
    """Give all lines of the row but the first once more."""
    again = self.taken[1:]
    self._back.extendleft(reversed(again))
    self.number -= len(again)


def _rows(path: pathlib.Path) -> Iterator[Line]:
  """Read a table by its header."""
  header: list[str] = []
  foreign = False  # whether a row had letters beyond ASCII, in UTF-8
  with text_files.opened(path, "captions") as file:
    for number, text, cells, error in _cells(file, path.suffix.lower()):
      if not text_files.is_text(text):
        error = _NOT_UTF8
        if not foreign:  # what it is in nobody says: not one row's mistake
          raise ValueError(
            f"captions {path}, line {number}, {error}; save it as UTF-8"
          )
      foreign = foreign or not text.isascii()
      if not header and not error:
        header = _header(path, cells)
      elif not header:
        raise ValueError(f"captions {path}, line {number}, {error}")
      else:
        yield Line(number, {}, error) if error else _row(number, header, cells)
  if not header:
    _header(path, [])


def _cells(
  file: Iterable[str], suffix: str
) -> Iterator[tuple[int, str, list[str], str]]:
  """Yield each row's line, text, cells and error; blank ones are left out."""
  csv.field_size_limit(_LONGEST_CELL)
  lines, table = _Again(file), None
  while True:
    table = table or csv.reader(
      lines, delimiter=_DELIMITERS[suffix], strict=True
    )
    lines.taken.clear()
    begin, error, cells = lines.number + 1, "", []
    try:
      cells = next(table)
    except StopIteration:
      return
    except csv.Error as problem:
      error, table = f"is no row ({problem}); double the quotes in it", None
      lines.put_back()
      del lines.taken[1:]
    if error or any(map(str.strip, cells)):
      yield begin, "".join(lines.taken), cells, error


def _header(path: pathlib.Path, cells: list[str]) -> list[str]:
  known = {cell.strip().lower() for cell in cells}
  for wanted in (FILE_COLUMNS, CAPTION_COLUMNS):
    if not known & set(wanted):
      raise ValueError(
        f"captions must have a header with one of {', '.join(wanted)}, got "
        f"{schema.quote(cells)}: {path}; name the column so"
      )
  return cells


def _row(number: int, header: list[str], cells: list[str]) -> Line:
  if len(cells) != len(header):
    wrong = "more" if len(cells) > len(header) else "fewer"
    error = f"has {wrong} cells than the header; quote its commas"
    return Line(number, {}, error)
  columns: dict[str, Any] = dict(zip(header, cells, strict=True))
  for name, cell in columns.items():
    if name.strip().lower() in CAPTION_COLUMNS:
      columns[name], error = _cell(cell)
      if error:
        return Line(number, {}, error)
  return Line(number, columns)


def _cell(text: str) -> tuple[Any, str]:
  """Read a cell: JSON's lists of texts, else the text."""
  if not text.lstrip().startswith("["):
    return text, ""
  values, error = _parse(text)
  if error == _TOO_DEEP:
    return text, f"has a caption that {error}"
  texts = isinstance(values, list) and all(isinstance(v, str) for v in values)
  return (values if texts else text), ""
