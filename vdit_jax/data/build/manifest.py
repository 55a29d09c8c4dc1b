"""What captions and a folder say of the files to build a dataset of.

  tables.Line --rows--> Row   key, path, captions, scores, line
  paths of clips --scan--> Row   key, path

A line names its file and has its caption or a list of them, in the columns of
`tables`. Other columns whose every value is a number, or missing, are scores.

A file's key is its name below the root in Unicode's NFC, whichever form the
folder or the captions use. All that is decided by chance is decided by a hash
of the key: the order of records and their split.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from vdit_jax import schema
from vdit_jax.data import text_files
from vdit_jax.data.build import layouts, tables

# Columns that are no scores, since a record has the file's own.
_RECORD = frozenset(
  "mp4 captions caption key fps num_frames height width".split()
)
_LONGEST_NAME = 4096  # letters: a path of Linux


@dataclasses.dataclass(frozen=True)
class Row:
  """A file, as a folder or a line of the captions has it.

  Attributes:
    key: of the file.
    path: of the file, as the folder or the line spells it.
    scanned: whether the folder has it; else a line names it.
    captions: of the line.
    scores: of the line, its numbers by column.
    line: of the captions' file, counted from 1; 0 of a scanned one.
    table: the captions' file, below the root if it is there.
    error: what is wrong with the line; "" if nothing.
  """

  key: str
  path: str
  scanned: bool = False
  captions: tuple[str, ...] = ()
  scores: dict[str, float] = dataclasses.field(default_factory=dict)
  line: int = 0
  table: str = ""
  error: str = ""


@dataclasses.dataclass(frozen=True)
class Survey:
  """What all the rows of the captions have in common.

  Attributes:
    num_rows: lines that name a file.
    scores: columns that hold numbers, sorted.
    digest: SHA-256 of the captions.
  """

  num_rows: int
  scores: tuple[str, ...]
  digest: str


def survey(layout: layouts.Layout) -> Survey:
  """Read the captions once; refuse those of another form."""
  count, good, wrong = 0, 0, ""
  numeric, other = set(), set()
  for table in layout.captions:
    for line in table.lines():
      count += 1
      error = line.error or _file_of(line)[1]
      good += not error
      if error and not wrong:
        wrong = f"line {line.number}: {error}: {_place(table, line)}"
      values = line.columns.items()
      numeric |= {k for k, v in values if _number(v) is not None}
      other |= {k for k, v in values if not _missing_or_number(v)}
  if not good:
    raise ValueError(_nothing(layout, wrong))
  digests = [table.digest() for table in layout.captions]
  digest = digests[0]
  if digests[1:]:
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
  scores = sorted(name for name in numeric - other if _is_score(name))
  return Survey(count, tuple(scores), digest)


def rows(layout: layouts.Layout, scores: Sequence[str]) -> Iterator[Row]:
  """Yield the rows of the captions, those with an error too.

  Args:
    layout: of the captions.
    scores: columns to keep.
  """
  for table in layout.captions:
    for line in table.lines():
      yield _row(layout.root, table, line, scores)


def scan(layout: layouts.Layout) -> Iterator[Row]:
  """Yield a row for each file of the folder."""
  for path in layout.scan():
    yield Row(make_key(path, layout.root), path, scanned=True)


def make_key(name: str, root: pathlib.Path) -> str:
  """Give the key of a file by its name: relative to the root if below it."""
  path = posixpath.normpath(posixpath.join(root.as_posix(), name))
  if path.startswith(f"{root.as_posix()}/"):
    path = path[len(root.as_posix()) + 1 :]
  return unicodedata.normalize("NFC", path)


def place(key: str) -> int:
  """Hash a key to its place in the order of records, in 0..2**64 - 1."""
  return int.from_bytes(_hash(key)[:8], "big")


def draw(key: str) -> float:
  """Draw a number in [0, 1) for a key, independent of its place."""
  return int.from_bytes(_hash(key)[8:14], "big") / 2**48


def _hash(key: str) -> bytes:
  # Names that are not UTF-8 have surrogates, and are refused later.
  return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _row(
  root: pathlib.Path,
  table: tables.Captions,
  line: tables.Line,
  scores: Sequence[str],
) -> Row:
  file, wrong = _file_of(line)
  said, bad = _captions(tables.first(line.columns, tables.CAPTION_COLUMNS))
  error = line.error or wrong or bad
  place = _place(table, line)
  place = os.path.relpath(place, root) if os.path.isabs(place) else place
  row = Row(f"line {line.number}", "", line=line.number, error=error)
  if not error or file:
    path = line.file or _path_of(file, table)
    row = dataclasses.replace(row, key=make_key(path, root), path=path)
  found = {name: _number(line.columns.get(name)) for name in scores}
  numbers = {k: v for k, v in found.items() if v is not None}
  return dataclasses.replace(row, captions=said, scores=numbers, table=place)


def _place(table: tables.Captions, line: tables.Line) -> str:
  """Name the file that a line stands in."""
  return line.place or str(getattr(table, "path", ""))


def _file_of(line: tables.Line) -> tuple[str, str]:
  """Give the file that a line names, and what is wrong with that."""
  if line.file:
    return line.file, ""
  name = tables.first(line.columns, tables.FILE_COLUMNS)
  if not isinstance(name, str) or not name.strip():
    has = schema.quote(sorted(line.columns))
    return "", f"names no file; it has {has}, not {tables.FILE_COLUMNS[0]}"
  name = name.strip()
  if "\0" in name or len(name) > _LONGEST_NAME:
    return "", f"names no file that there could be: {schema.quote(name)}"
  if not text_files.is_text(name):
    return "", f"names a file that is not Unicode: {schema.quote(name)}"
  return name, ""


def _path_of(name: str, table: tables.Table) -> str:
  """Give the path of a file: where there is one, of where it could be."""
  names = [name, name.replace("\\", "/")] if "\\" in name else [name]
  joined = (os.path.join(f, name) for f in table.folders for name in names)
  paths = list(dict.fromkeys(joined))
  if not paths[1:]:
    return paths[0]
  return next(filter(os.path.exists, paths), paths[0])


def _nothing(layout: layouts.Layout, wrong: str) -> str:
  """Say that no captions can be read, and why the first one cannot."""
  first = layout.captions[0]
  if wrong:
    return f"captions can't be read at {wrong}; write it anew"
  if isinstance(first, tables.Texts):
    where = f"in {first.folder}" if first.folder else "beside the clips"
    given = str(first.folder or "")
    return (
      f"captions must be a file, got {given!r}, and no texts (a.txt of a.mp4) "
      f"lie {where} of {layout.clips}; write them, or one line for each file"
    )
  return f"captions has no row: {first.path}; write a line for each file"


def _captions(value: Any) -> tuple[tuple[str, ...], str]:
  """Give the captions that are not blank, and what is wrong with them."""
  values = value if isinstance(value, list) else [value]
  captions = [text for text in values if text is not None]
  wrong = [text for text in captions if not isinstance(text, str)]
  if wrong:
    return (), f"has a caption that is no text: {schema.quote(wrong[0])}"
  captions = [text.strip() for text in captions]
  if not all(map(text_files.is_text, captions)):
    return (), "has a caption that is not Unicode"
  return tuple(text for text in captions if text), ""


def _number(value: Any) -> float | None:
  """Read a number; None of what is none."""
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    return None
  try:
    number = float(value)
  except (ValueError, OverflowError):
    return None
  return number if math.isfinite(number) else None


def _missing_or_number(value: Any) -> bool:
  missing = value is None or value != value
  if isinstance(value, str):
    missing = value.strip().lower() in ("", "nan", "null", "none")
  return missing or _number(value) is not None


def _is_score(name: str | None) -> bool:
  reserved = _RECORD | {*tables.FILE_COLUMNS, *tables.CAPTION_COLUMNS}
  return bool(name) and name.isidentifier() and name.lower() not in reserved
