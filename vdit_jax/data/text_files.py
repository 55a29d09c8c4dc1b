"""Text files as people have them: how they are encoded, and what a line is.

  prompts, captions, tables --read, opened--> text --lines--> lines

A byte-order mark says UTF-8, UTF-16 or UTF-32, and is no part of the text.
Without one a text is UTF-8; nothing is guessed. Lines end as they do in an
editor, in \\n, \\r\\n or \\r: a form feed, U+0085 or U+2028 ends none.
"""

import codecs
import re
from typing import TextIO

from etils import epath

from vdit_jax import inputs

# UTF-32's mark in little-endian order begins with UTF-16's.
_MARKS = (
  (codecs.BOM_UTF32_LE, "utf-32"),
  (codecs.BOM_UTF32_BE, "utf-32"),
  (codecs.BOM_UTF8, "utf-8-sig"),
  (codecs.BOM_UTF16_LE, "utf-16"),
  (codecs.BOM_UTF16_BE, "utf-16"),
)
_LINE_END = re.compile(r"\r\n|\r|\n")
_LOOKED_AT = 1024  # bytes, to tell UTF-16 by its zeros
_REMEDY = "save it as UTF-8"


def read(path: epath.PathLike, name: str) -> str:
  """Read a text file whole.

  Args:
    path: of the file.
    name: what it is called where it comes from.

  Raises:
    ValueError: if it is not there, or is not in an encoding that it names.
  """
  path = epath.Path(path)
  if not path.exists() or path.is_dir():
    raise ValueError(f"{name} {path} does not exist; name a text file")
  with inputs.naming(name):
    data = inputs.check_file(path).read_bytes()
  try:
    return data.decode(_encoding(data, path, name))
  except UnicodeDecodeError as error:
    line = len(lines(data[: error.start].decode("latin-1") + "x"))
    raise ValueError(f"{name} {path}, {_wrong(error, line)}") from error


def opened(path: epath.PathLike, name: str) -> TextIO:
  """Open a text file to read its lines, which keep their ends.

  Bytes that are not UTF-8 become lone surrogates, by which `is_text` tells
  the lines that have some.
  """
  with inputs.naming(name):
    inputs.check_file(path)
  with epath.Path(path).open("rb") as file:
    encoding = _encoding(file.read(_LOOKED_AT), path, name)
  utf8 = encoding.startswith("utf-8")
  return open(  # noqa: SIM115
    path,
    encoding=encoding,
    errors="surrogateescape" if utf8 else "surrogatepass",
    newline="",
  )


def lines(text: str) -> list[str]:
  """Split a text into its lines, which lose their ends."""
  found = _LINE_END.split(text)
  return found if found[-1] else found[:-1]


def is_text(text: str) -> bool:
  """Tell whether a text is Unicode: has no lone surrogate."""
  return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _encoding(data: bytes, path: epath.PathLike, name: str) -> str:
  """Tell a file's encoding by its first bytes."""
  for mark, encoding in _MARKS:
    if data.startswith(mark):
      return encoding
  head = data[:_LOOKED_AT]
  for zeros in (head[::2].count(0), head[1::2].count(0)):
    # Of UTF-16 mostly one parity is zeros; a text in UTF-8 has hardly any.
    if zeros == head.count(0) > len(head) // 4:
      raise ValueError(
        f"{name} {path} is UTF-16 without a byte-order mark; {_REMEDY}"
      )
  return "utf-8"


def _wrong(error: UnicodeDecodeError, line: int) -> str:
  byte = error.object[error.start]
  return f"line {line}, is not {error.encoding} (byte 0x{byte:02x}); {_REMEDY}"
