"""Tables of Markdown, and the cells of what `benchmarks.race` measured."""

from typing import Any


def table(head: list[str], lines: list[list[str]]) -> str:
  """Lay out a table of Markdown; nothing if it has no lines."""
  if not lines:
    return ""
  rows = [head, ["---"] * len(head), *lines]
  return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def milliseconds(times: dict[str, Any], digits: int = 2) -> str:
  """Say a run's median, and its least and most in brackets."""
  if "median" not in times:
    return "-"
  median, low, high = (
    f"{times[key] * 1e3:.{digits}f}" for key in ("median", "least", "most")
  )
  return f"{median} ({low}-{high})"


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
  """Say what share of another run's median a run's is."""
  if "median" not in ours or "median" not in theirs:
    return "-"
  return f"{ours['median'] / theirs['median']:.2f}"


def number(value: float | None, digits: int) -> str:
  """Say a number, or that there is none."""
  return "-" if value is None else f"{value:.{digits}f}"
