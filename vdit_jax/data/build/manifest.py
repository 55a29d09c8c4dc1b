"""What a captions file and a folder say of the files to build a dataset of.

  --captions: .jsonl, .csv, .tsv --rows--> Row   key, captions, scores, line
  --videos: a folder or glob     --scan--> Row   key, path

A row names its file (column file, file_name, filename, path or video) and has
its caption or a list of them (caption, captions, text or prompt; in a table's
cell a list is JSON). Other columns whose every value is a number, or missing,
are scores. A manifest is such a file alone, names being relative to its
folder.

A file's key is its name below the root in Unicode's NFC, whichever form the
folder or the captions use. All that is decided by chance is decided by a hash
of the key: the order of records and their split.
"""

import csv
import dataclasses
import glob
import hashlib
import json
import math
import os
import pathlib
import posixpath
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np

SUFFIXES = (".jsonl", ".csv", ".tsv")

FILE_COLUMNS = ("file", "file_name", "filename", "path", "video")
CAPTION_COLUMNS = ("captions", "caption", "text", "prompt")

# What of a folder is a clip, if its content is.
MEDIA = frozenset(
  ".3gp .apng .asf .avi .avif .bmp .flv .gif .heic .jp2 .jpeg .jpg .m2ts .m4v "
  ".mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .png .tif .tiff .ts .webm .webp "
  ".wmv".split()
)

# Columns that are no scores, since a record has the file's own.
_RECORD = frozenset(
  "mp4 captions caption key fps num_frames height width".split()
)

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_CELL = 2**31 - 1  # Python's csv stops at 131,072 characters
_FEW = 8  # files of validation of a dataset that is small


@dataclasses.dataclass(frozen=True)
class Row:
  """A file, as a folder or a line of the captions file has it.

  Attributes:
    key: of the file.
    path: of the file, as the folder or the line spells it.
    scanned: whether the folder has it; else a line names it.
    captions: of the line.
    scores: of the line, its numbers by column.
    line: of the captions file, counted from 1; 0 of a scanned one.
    error: what is wrong with the line; "" if nothing.
  """

  key: str
  path: str
  scanned: bool = False
  captions: tuple[str, ...] = ()
  scores: dict[str, float] = dataclasses.field(default_factory=dict)
  line: int = 0
  error: str = ""


@dataclasses.dataclass(frozen=True)
class Survey:
  """What all the rows of a captions file have in common.

  Attributes:
    num_rows: lines that name a file.
    scores: columns that hold numbers, sorted.
    digest: SHA-256 of the file.
    quantiles: the least of the keys' draws in [0, 1), ascending, [0.._FEW].
  """

  num_rows: int
  scores: tuple[str, ...]
  digest: str
  quantiles: tuple[float, ...]


def survey(path: pathlib.Path, root: pathlib.Path) -> Survey:
  """Read a captions file once; refuse one of another form."""
  if path.suffix.lower() not in SUFFIXES:
    raise ValueError(
      f"captions must be one of {', '.join(SUFFIXES)}, got {path}; write a "
      "line for each file, with its name and caption"
    )
  count, numeric, other = 0, set(), set()
  least: list[float] = []
  for row, columns in _lines(path, root):
    count += 1
    numeric |= {k for k, v in columns.items() if _number(v) is not None}
    other |= {k for k, v in columns.items() if not _missing_or_number(v)}
    least = sorted([*least, draw(row.key)])[:_FEW]
  if not count:
    raise ValueError(f"captions has no row: {path}; write a line for each file")
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  scores = sorted(name for name in numeric - other if _is_score(name))
  return Survey(count, tuple(scores), digest, tuple(least))


def rows(
  path: pathlib.Path, root: pathlib.Path, scores: tuple[str, ...]
) -> Iterator[Row]:
  """Yield the rows of a captions file, those with an error too.

  Args:
    path: the file.
    root: folder that names are relative to.
    scores: columns to keep.
  """
  for row, columns in _lines(path, root):
    found = {name: _number(columns.get(name)) for name in scores}
    numbers = {k: v for k, v in found.items() if v is not None}
    yield dataclasses.replace(row, scores=numbers)


def scan(videos: str) -> tuple[pathlib.Path, Iterator[Row]]:
  """Find the media files of a folder or glob, hidden ones left out.

  Returns:
    The folder that names are relative to, and a row for each file.
  """
  if os.path.isdir(videos):
    root = pathlib.Path(videos).absolute()
    return root, _scanned(root, _walk(root))
  root = pathlib.Path(_stem(videos)).absolute()
  if not glob.has_magic(videos) or not root.is_dir():
    raise ValueError(
      f"videos must be a folder, a glob or a manifest, got {videos}, which "
      "is not there; give the folder that has the files"
    )
  found = (p for p in glob.iglob(videos, recursive=True) if os.path.isfile(p))
  return root, _scanned(root, map(os.path.abspath, found))


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


def threshold(validation: float, found: Survey) -> float:
  """Give the draw below which a key is for validation.

  As many as `validation`, a share, says; but of a small dataset at least 8
  files, or a quarter of them, for a share of it might well be none.
  """
  least = min(_FEW, math.ceil(found.num_rows / 4))
  if not validation or found.num_rows < 2:
    return validation
  return max(validation, float(np.nextafter(found.quantiles[least - 1], 1)))


def _hash(key: str) -> bytes:
  # Names that are not UTF-8 have surrogates, and are refused later.
  return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _lines(
  path: pathlib.Path, root: pathlib.Path
) -> Iterator[tuple[Row, dict[str, Any]]]:
  """Yield a file's rows without scores, and all the columns of each."""
  read = _jsonl if path.suffix.lower() == ".jsonl" else _table
  for line, columns, error in read(path):
    file = _first(columns, FILE_COLUMNS)
    if not error and not (isinstance(file, str) and file.strip()):
      error = f"names no file; it has {sorted(columns)}, not {FILE_COLUMNS[0]}"
    if error:
      yield Row(f"line {line}", "", line=line, error=error), {}
      continue
    captions, error = _captions(_first(columns, CAPTION_COLUMNS))
    key, name = make_key(file.strip(), root), os.path.join(root, file.strip())
    yield Row(key, name, captions=captions, line=line, error=error), columns


def _jsonl(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any], str]]:
  """Yield each line's number, object and error."""
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        columns = json.loads(line.decode("utf-8-sig"))
      except ValueError as error:
        yield number, {}, f"is not JSON in UTF-8: {error}"
        continue
      if isinstance(columns, dict):
        yield number, columns, ""
      else:
        yield number, {}, f"is no JSON object but {type(columns).__name__}"


def _table(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any], str]]:
  csv.field_size_limit(_LONGEST_CELL)
  delimiter = _DELIMITERS[path.suffix.lower()]
  with path.open(encoding="utf-8-sig", newline="") as file:
    table = csv.DictReader(file, delimiter=delimiter, strict=True)
    _check_header(path, table)
    line = table.line_num
    while True:
      line = table.line_num + 1
      try:
        columns = next(table)
      except StopIteration:
        return
      except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
          f"captions can't be read at line {line}: {error}: {path}; write it "
          "as UTF-8 and double the quotes that are in a caption"
        ) from error
      extra, lacks = None in columns, None in columns.values()
      if extra or lacks:
        wrong = "more" if extra else "fewer"
        yield line, {}, f"has {wrong} cells than the header; quote its commas"
      else:
        yield line, {k: _cell(v) for k, v in columns.items()}, ""


def _check_header(path: pathlib.Path, table: csv.DictReader) -> None:
  names = table.fieldnames or []
  for wanted in (FILE_COLUMNS, CAPTION_COLUMNS):
    if not set(names) & set(wanted):
      raise ValueError(
        f"captions must have a header with one of {', '.join(wanted)}, got "
        f"{names}: {path}; name the column so"
      )


def _cell(text: str) -> Any:
  """Read a cell: JSON's lists of texts, else the text."""
  if not text.lstrip().startswith("["):
    return text
  try:
    values = json.loads(text)
  except ValueError:
    return text  # a caption that begins with a bracket
  texts = all(isinstance(value, str) for value in values)
  return values if texts else text


def _first(columns: dict[str, Any], names: tuple[str, ...]) -> Any:
  found = (columns.get(name) for name in names)
  return next((value for value in found if value is not None), None)


def _captions(value: Any) -> tuple[tuple[str, ...], str]:
  """Give the captions that are not blank, and what is wrong with them."""
  values = value if isinstance(value, list) else [value]
  captions = [text for text in values if text is not None]
  wrong = [text for text in captions if not isinstance(text, str)]
  if wrong:
    return (), f"has a caption that is no text: {wrong[0]!r}"
  captions = [text.strip() for text in captions]
  if not all(_encodes(text) for text in captions):
    return (), "has a caption that is not Unicode"
  return tuple(text for text in captions if text), ""


def _encodes(text: str) -> bool:
  return not any("\ud800" <= letter <= "\udfff" for letter in text)


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
  reserved = _RECORD | set(FILE_COLUMNS) | set(CAPTION_COLUMNS)
  return bool(name) and name.isidentifier() and name not in reserved


def _stem(pattern: str) -> str:
  """Give the folder of a glob that is before its first wildcard."""
  parts = pathlib.PurePath(pattern).parts
  fixed = [glob.has_magic(part) for part in parts]
  return os.path.join(*parts[: fixed.index(True)], "") if any(fixed) else "."


def _walk(root: pathlib.Path) -> Iterator[str]:
  for folder, folders, files in os.walk(root):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    yield from (os.path.join(folder, name) for name in sorted(files))


def _scanned(root: pathlib.Path, paths: Iterator[str]) -> Iterator[Row]:
  for path in paths:
    name = os.path.basename(path)
    if os.path.splitext(name)[1].lower() in MEDIA and name[0] != ".":
      yield Row(make_key(path, root), path, scanned=True)
