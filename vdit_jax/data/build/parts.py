"""Divides the files of a build into parts that fit into memory.

  manifest.Row --spool--> WORK/rows-I-of-N/PART.jsonl --gather--> File, Rejected

The keys' places are cut into parts of equal width, so that all rows of a key
are in one part, parts one after another give the order of records, and each
of several machines has some parts of its own.
"""

import collections
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from vdit_jax import strict_json
from vdit_jax.data import text_files
from vdit_jax.data.build import manifest, probe

FILES = 2**14  # of a part, about
_BUFFER = 2**16  # rows that are kept until they are written


@dataclasses.dataclass(frozen=True)
class File:
  """A file that is to be a record, if its content is a clip.

  Attributes:
    key, path: of the file.
    line, table: where its captions stand.
    captions: one or more.
    scores: by name, those there are.
  """

  key: str
  path: str
  line: int
  table: str
  captions: tuple[str, ...]
  scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Rejected:
  """A file or line that is left out, as rejected.jsonl lists it.

  Attributes:
    file: its key; "line N" of a line without one.
    line: of the captions' file; 0 if none names the file.
    table: the captions' file, below the root of names; "" if none names it.
    reason, detail: see `probe.Reject`.
  """

  file: str
  line: int
  table: str
  reason: probe.Reason
  detail: str


def make_file(fields: dict[str, Any]) -> File:
  """Make a file of its fields as JSON has them."""
  return File(**(fields | {"captions": tuple(fields["captions"])}))


def reject(file: File, why: probe.Reject) -> Rejected:
  """Say that a file with a caption is left out."""
  return Rejected(file.key, file.line, file.table, why.reason, why.detail)


def of_shard(num_parts: int, shard: int, num_shards: int) -> range:
  """Give the parts that one of several machines builds."""
  begin, end = (num_parts * i // num_shards for i in (shard, shard + 1))
  return range(begin, end)


def path(folder: epath.Path, part: int) -> epath.Path:
  """Give the file that has a part's rows."""
  return folder / f"{part:05d}.jsonl"


def spool(
  rows: Iterable[manifest.Row], folder: epath.Path, own: range, num_parts: int
) -> int:
  """Write the rows of some parts to their files, unless that is done.

  Args:
    rows: of all parts.
    folder: to write; it appears whole or not at all.
    own: parts to write.
    num_parts: of all.

  Returns:
    How many of those parts' rows are lines of the captions.
  """
  count = folder / "count"
  if folder.exists():
    return int(count.read_text())
  staged = folder.with_name(f".{os.getpid()}.{folder.name}")
  staged.mkdir(parents=True)
  for part in own:
    path(staged, part).write_text("")
  total, rows = 0, iter(rows)
  while chunk := list(itertools.islice(rows, _BUFFER)):
    lines = collections.defaultdict(list)
    for row in chunk:
      part = manifest.place(row.key) * num_parts >> 64
      if part in own:
        lines[part].append(strict_json.dumps(dataclasses.asdict(row)) + "\n")
        total += not row.scanned
    for part, texts in lines.items():
      with path(staged, part).open("a") as file:
        file.write("".join(texts))
  (staged / count.name).write_text(f"{total}")
  staged.rename(folder)
  return total


def gather(
  folder: epath.Path, part: int, unmatched: bool
) -> tuple[list[File], list[Rejected]]:
  """Join what the folder and the captions say of each file of a part.

  Args:
    folder: that `spool` wrote.
    part: to read.
    unmatched: whether a file that is there, but was not found, is left out:
      one beside a glob.

  Returns:
    The files that have a caption, in the order of their places, and the rest.
  """
  rows = collections.defaultdict(list)
  with path(folder, part).open() as file:
    for line in file:
      fields = json.loads(line)
      fields["captions"] = tuple(fields["captions"])
      rows[fields["key"]].append(manifest.Row(**fields))
  files, rejected = [], []
  for key in sorted(rows, key=lambda key: (manifest.place(key), key)):
    for found in _join(key, rows[key], unmatched):
      (files if isinstance(found, File) else rejected).append(found)
  return files, rejected


def _join(
  key: str, rows: list[manifest.Row], unmatched: bool
) -> Iterator[File | Rejected]:
  """Give the file of a key, and what is wrong with its rows."""
  scanned = sorted(row.path for row in rows if row.scanned)
  lines = sorted((row for row in rows if not row.scanned), key=_line)
  good = [row for row in lines if not row.error]
  for row in lines:
    if row.error:
      yield _rejected(row, probe.Reason.ROW, row.error)
  for path in scanned[1:]:
    detail = f"{path} and {scanned[0]} are one name in Unicode's NFC"
    yield Rejected(key, 0, "", probe.Reason.DUPLICATE, detail)
  for row in good[1:]:
    where = f"line {good[0].line} of {good[0].table}"
    detail = f"{where} names it too, and is taken"
    yield _rejected(row, probe.Reason.DUPLICATE, detail)
  if not lines:
    detail = "no line or text is of it"
    yield Rejected(key, 0, "", probe.Reason.CAPTION, detail)
  elif good:
    yield _file(good[0], scanned, unmatched)


def _rejected(row: manifest.Row, reason: probe.Reason, detail: str) -> Rejected:
  return Rejected(row.key, row.line, row.table, reason, detail)


def _line(row: manifest.Row) -> tuple[str, int]:
  return row.table, row.line


def _file(
  row: manifest.Row, scanned: list[str], unmatched: bool
) -> File | Rejected:
  path = scanned[0] if scanned else row.path
  reason, detail = None, ""
  if not row.captions:
    reason, detail = probe.Reason.CAPTION, "its line has none"
  elif not text_files.is_text(row.key):
    reason, detail = probe.Reason.NAME, "its name is not Unicode"
  elif not scanned and unmatched and os.path.exists(path):
    reason, detail = probe.Reason.UNMATCHED, "there, but --videos leaves it out"
  if reason:
    return _rejected(row, reason, detail)
  return File(row.key, path, row.line, row.table, row.captions, row.scores)
