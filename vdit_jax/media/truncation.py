"""Tells a file that was cut off, by the sizes that its parts declare.

  mp4, mov    boxes one after another, any kind of them (ISO/IEC 14496-12)
  avi         chunks inside of lists (RIFF)
  mkv, webm   elements inside of a segment (RFC 8794)

The sizes of what encloses all others are not looked at, for they are often not
exact. Where the last part that begins in a file does not end in it, it was cut.
"""

import math
import re
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_HEADERS = {b"moov", b"moof", b"meta"}  # boxes without which nothing is read
_LISTS = (b"movi", b"rec ")  # whose chunks are looked at one by one
_CHUNK = re.compile(rb"RIFF|LIST|JUNK|idx1|ix\d\d|\d\d\w\w|VP8|ALPH|ANMF")


class _Part(NamedTuple):
  """A part of a file: its kind, and how far the next one is."""

  kind: bytes
  length: float


def is_cut(file: BinaryIO) -> bool:
  """Tell whether the end of a file is missing; False where nothing tells."""
  file.seek(0)
  head = file.read(4)
  if head == _EBML:
    return _walk(file, _element)[1] is not None
  if head == b"RIFF":
    cut = _walk(file, _chunk)[1]
    return cut is not None and _CHUNK.match(cut) is not None
  kinds, cut = _walk(file, _box)
  known = kinds & {b"ftyp", b"mdat", *_HEADERS}
  return cut in known or bool(known and not kinds & _HEADERS)


def _walk(
  file: BinaryIO, read: Callable[[bytes], _Part | None]
) -> tuple[set[bytes], bytes | None]:
  """Give the kinds of a file's parts, and that of the one that is cut."""
  num_bytes, begin, kinds = file.seek(0, 2), 0, set()
  while begin < num_bytes:
    file.seek(begin)
    part = read(file.read(16))
    if part is None:
      break
    kinds.add(part.kind)
    begin += part.length
    if num_bytes < begin < math.inf:
      return kinds, part.kind
  return kinds, None


def _box(head: bytes) -> _Part | None:
  """Read the head of a box; one of length 0 reaches to the end."""
  length, kind = int.from_bytes(head[:4], "big"), head[4:8]
  if length == 1:
    length = int.from_bytes(head[8:16], "big")
  if not length and kind.strip(b"\0"):
    return _Part(kind, math.inf)
  return _Part(kind, length) if length >= 8 else None


def _chunk(head: bytes) -> _Part | None:
  """Read the head of a chunk, or go into a list of them."""
  kind, length = head[:4], int.from_bytes(head[4:8], "little")
  if kind == b"RIFF" or (kind == b"LIST" and head[8:12] in _LISTS):
    return _Part(kind, 12)
  return _Part(kind, 8 + length + length % 2) if kind.strip(b"\0") else None


def _element(head: bytes) -> _Part | None:
  """Read the head of an element, or go into one of unknown length.

  Names here have four bytes, and of blocks in a cluster one.
  """
  name = 9 - head[0].bit_length()
  if name not in (1, 4) or len(head) < name + 8 or not head[name]:
    return None
  width = 9 - head[name].bit_length()  # told by the first bit
  length = int.from_bytes(head[name : name + width], "big") - (1 << 7 * width)
  begin = name + width
  if head[:name] == _SEGMENT or length == (1 << 7 * width) - 1:
    return _Part(head[:name], begin)
  return _Part(head[:name], begin + length)
