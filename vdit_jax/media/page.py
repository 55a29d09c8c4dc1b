"""One HTML page with videos, tables and plots that needs no other file.

Stands at the end of the tools that show what they measured. Every function
returns a piece of HTML, its texts escaped; `write` joins pieces, those of
`plots` too, to a page. Videos are data: URIs, so the page opens from a disk or
an attachment with nothing fetched.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from vdit_jax import writing
from vdit_jax.media import formats

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --faint: #777; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem;
  max-width: 1100px; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
.scroll { overflow-x: auto; }
.grid { display: flex; flex-wrap: wrap; gap: 1rem; }
.grid figure { flex: 1 1 20rem; }
figure { margin: 0; max-width: 100%; }
figcaption { color: var(--faint); font-size: .85rem; max-width: 32rem; }
video { display: block; max-width: 100%; background: #000;
  image-rendering: pixelated; }
svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; font-size: 12px; }
"""


def write(path: epath.PathLike, title: str, pieces: Iterable[str]) -> None:
  """Write a page, whole or not at all.

  Args:
    path: file to write, `.html`.
    title: of the page, its heading too.
    pieces: what the functions of this module return, in order.
  """
  path = epath.Path(path)
  title = html.escape(title)
  text = "\n".join(
    [
      '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
      f"<h1>{title}</h1>",
      *pieces,
      "</body>\n</html>\n",
    ]
  )
  writing.write(path, text)


def heading(text: str) -> str:
  """Begin a section."""
  return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
  """Make a paragraph of plain text."""
  return f"<p>{html.escape(text)}</p>"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """Make a table; floats are written with four digits, None as a dash.

  Args:
    columns: their names.
    rows: as many cells each; the first names the row.

  Raises:
    ValueError: if a row has another number of cells.
  """
  lines = ["".join(f"<th>{html.escape(name)}</th>" for name in columns)]
  for row in rows:
    if len(row) != len(columns):
      raise ValueError(
        f"rows must have {len(columns)} cells, got {len(row)}: {row}"
      )
    lines.append("".join(f"<td>{html.escape(cell(x))}</td>" for x in row))
  body = "\n".join(f"<tr>{line}</tr>" for line in lines)
  return f'<div class="scroll"><table>\n{body}\n</table></div>'


def cell(value: Any) -> str:
  """Write a value as a table shows it."""
  if value is None:
    return "–"
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def video(
  frames: np.ndarray, fps: float, caption: str, *, enlarge: int = 1
) -> str:
  """Show a video that plays in a loop, its caption below.

  Args:
    frames: [F, H, W, 3], float in [-1, 1] or uint8.
    fps: frames a second.
    caption: plain text.
    enlarge: integer factor of nearest-neighbour enlargement.
  """
  data = base64.b64encode(formats.mp4(frames, fps, enlarge=enlarge)).decode()
  width = frames.shape[2] * enlarge
  return (
    f'<figure><video width="{width}" controls autoplay loop muted playsinline '
    f'src="data:video/mp4;base64,{data}"></video>'
    f"<figcaption>{html.escape(caption)}</figcaption></figure>"
  )


def grid(pieces: Iterable[str]) -> str:
  """Put pieces side by side, as many a line as there is room for."""
  return f'<div class="grid">\n{"".join(pieces)}\n</div>'
