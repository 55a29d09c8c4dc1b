"""Curves as inline SVG, for a `page`: a picture that needs no library.

Marks have tooltips, texts take the page's colour, and what the curves are
stands below them.
"""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence

# Okabe and Ito's colours, told apart by colour-blind eyes too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclasses.dataclass(frozen=True)
class _Frame:
  """Of a plot: its size and where its axes stand, in pixels."""

  width: int = 560
  height: int = 300
  left: int = 70
  right: int = 15
  top: int = 30
  bottom: int = 45


def curves(
  title: str,
  x_name: str,
  series: Mapping[str, Sequence[float]],
  *,
  x: Sequence[float] | None = None,
  log: bool = False,
) -> str:
  """Plot curves over one axis as inline SVG.

  Args:
    title: of the plot.
    x_name: what the horizontal axis counts.
    series: values of each curve, all of one length.
    x: where the values stand; None counts from 1.
    log: whether the vertical axis is logarithmic; values that are not positive
      are left out then. Values that are not finite are left out always.

  Raises:
    ValueError: if the curves are not of one length.
  """
  x = list(range(1, _length(series) + 1)) if x is None else list(x)
  if any(len(ys) != len(x) for ys in series.values()):
    lengths = {name: len(ys) for name, ys in series.items()}
    raise ValueError(f"series must have {len(x)} values each, got {lengths}")
  shown = lambda y: math.isfinite(y) and (y > 0 or not log)
  points = {
    name: [(a, float(y)) for a, y in zip(x, ys, strict=True) if shown(y)]
    for name, ys in series.items()
  }
  values = [y for curve in points.values() for _, y in curve] or [1.0]
  frame, places = _Frame(), x or [1.0]
  across = _Scale(min(places), max(places), frame.left, _end(frame)[0], False)
  up = _Scale(*_bounds(values, log), _end(frame)[1], frame.top, log)
  body = [
    f'<text x="{frame.left}" y="18" font-weight="bold">'
    f"{html.escape(title)}</text>",
    *_axes(frame, across, up, x_name),
    *(
      _curve(name, curve, colour, across, up)
      for (name, curve), colour in zip(points.items(), _palette(), strict=False)
    ),
  ]
  size = f'width="{frame.width}" height="{frame.height}"'
  box = f'viewBox="0 0 {frame.width} {frame.height}"'
  plot = f'<svg {size} {box} role="img">\n{"".join(body)}\n</svg>'
  return f"<figure>{plot}{_legend(series)}</figure>"


@dataclasses.dataclass(frozen=True)
class _Scale:
  """From values to pixels along one axis."""

  low: float
  high: float
  first: float
  last: float
  log: bool

  def __call__(self, value: float) -> float:
    low, high, at = (self._plain(v) for v in (self.low, self.high, value))
    share = (at - low) / (high - low) if high > low else 0.5
    return round(self.first + share * (self.last - self.first), 1)

  def ticks(self) -> list[float]:
    """Round values between the bounds."""
    if self.log:
      low, high = round(math.log10(self.low)), round(math.log10(self.high))
      hop = max(1, math.ceil((high - low) / 6))
      return [10.0**n for n in range(low, high + 1, hop)]
    hop = _round_hop((self.high - self.low) / 5)
    first = math.ceil(self.low / hop - 1e-9)
    last = math.floor(self.high / hop + 1e-9)
    return [hop * n for n in range(first, last + 1)]

  def _plain(self, value: float) -> float:
    return math.log10(value) if self.log else value


def _length(series):
  return len(next(iter(series.values()))) if series else 0


def _palette():
  while True:
    yield from _COLOURS


def _end(frame):
  """The pixels at which the axes end, to the right and at the bottom."""
  return frame.width - frame.right, frame.height - frame.bottom


def _bounds(values, log):
  """Bounds that hold all values: powers of ten, or with zero below."""
  low, high = min(values), max(values)
  if log:
    bottom = math.floor(math.log10(low))
    return 10.0**bottom, 10.0 ** max(math.ceil(math.log10(high)), bottom + 1)
  low = min(low, 0.0)
  return low, high if high > low else low + 1.0


def _round_hop(wanted):
  """The least of 1, 2 and 5 times a power of ten that is not below."""
  if wanted <= 0:
    return 1.0
  power = 10.0 ** math.floor(math.log10(wanted))
  return next(n * power for n in (1, 2, 5, 10) if n * power >= 0.999 * wanted)


def _axes(frame, across, up, x_name):
  right, bottom = _end(frame)
  middle = (frame.left + right) / 2
  line = 'stroke="currentColor" stroke-opacity="{}"'
  for y in up.ticks():
    yield (
      f'<line x1="{frame.left}" x2="{right}" y1="{up(y)}" y2="{up(y)}" '
      f"{line.format(0.2)}/>"
      f'<text x="{frame.left - 8}" y="{up(y) + 4}" text-anchor="end">'
      f"{y:.3g}</text>"
    )
  for x in across.ticks():
    yield (
      f'<text x="{across(x)}" y="{bottom + 18}" text-anchor="middle">'
      f"{x:.4g}</text>"
    )
  yield (
    f'<line x1="{frame.left}" x2="{right}" y1="{bottom}" y2="{bottom}" '
    f"{line.format(0.6)}/>"
    f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">'
    f"{html.escape(x_name)}</text>"
  )


def _curve(name, points, colour, across, up):
  places = [(across(x), up(y)) for x, y in points]
  line = " ".join(f"{a},{b}" for a, b in places)
  dots = "".join(
    f'<circle cx="{a}" cy="{b}" r="2.5" fill="{colour}"><title>'
    f"{html.escape(name)}, {x:.4g}: {y:.4g}</title></circle>"
    for (a, b), (x, y) in zip(places, points, strict=True)
  )
  return (
    f'<polyline points="{line}" fill="none" stroke="{colour}" '
    f'stroke-width="1.5"/>{dots}'
  )


def _legend(series):
  items = (
    f'<span style="color:{colour}">●</span> {html.escape(name)}'
    for name, colour in zip(series, _palette(), strict=False)
  )
  return f"<figcaption>{' &emsp; '.join(items)}</figcaption>"
