"""Lays out what `benchmarks.accelerator` measured as Markdown tables."""

from typing import Any

from benchmarks import tables

_PARTS = ("forward", "train", "sample", "decode")


def markdown(results: dict[str, Any]) -> str:
  """Make the tables of all items; what failed is listed last."""
  parts = [_about(results), _against(results), _sizes(results)]
  parts += [_attention(results), _others(results), _failed(results)]
  return "\n".join(part for part in parts if part)


def _about(results) -> str:
  found = {}
  for result in results.values():
    found |= result.get("about", {})
  return ", ".join(f"{k} {v}" for k, v in sorted(found.items())) + "\n"


def _rows(results, item: str) -> dict[str, dict[str, Any]]:
  rows = results.get(item, {}).get("rows", [])
  return {row["name"]: row for row in rows}


def _against(results) -> str:
  """Ours beside PyTorch, eager and compiled: medians, milliseconds."""
  lines = []
  for dtype in ("bfloat16", "float32"):
    ours, theirs = (_rows(results, f"{x}_{dtype}") for x in ("ours", "torch"))
    ours |= _rows(results, f"ours_train_{dtype}")
    theirs |= _rows(results, f"torch_train_{dtype}")
    theirs |= _rows(results, "torch_decode") if dtype == "bfloat16" else {}
    for part in _PARTS:
      mine = ours.get(part, {})
      eager, fast = (theirs.get(f"{part} {how}", {}) for how in _HOW)
      if mine or eager:
        cells = [tables.milliseconds(x) for x in (mine, eager, fast)]
        cells += [tables.ratio(mine, eager), tables.ratio(mine, fast)]
        cells += [tables.number(x.get("peak_gib"), 1) for x in (mine, eager)]
        cells += [tables.number(mine.get("distance"), 5)]
        lines.append([f"{part}, {dtype}", *cells])
  head = ["", "ours ms", "eager ms", "compiled ms", "of eager", "of compiled"]
  head += ["ours GiB", "eager GiB", "relative distance"]
  return tables.table(head, lines)


_HOW = ("eager", "compiled")
# What is said of a size beside its time, with that many decimals.
_OF_A_SIZE = (
  ("utilisation", 3),
  ("model_tflops", 1),
  ("peak_gib", 1),
  ("tokens", 0),
)


def _sizes(results) -> str:
  lines = []
  for item, result in results.items():
    if item.startswith("variant_"):
      for row in result.get("rows", []):
        cells = [tables.milliseconds(row)]
        for key, digits in _OF_A_SIZE:
          cells.append(tables.number(row.get(key), digits))
        lines.append([row["name"], *cells])
  head = ["", "ms a step", "utilisation", "model TFLOP/s", "GiB", "tokens"]
  return tables.table(head, lines)


def _attention(results) -> str:
  """Worst errors by kernel and type; times."""
  worst: dict[str, float] = {}
  lines = []
  for row in _rows(results, "attention").values():
    if "tflops" in row:
      rate = tables.number(row["tflops"], 0)
      lines.append([row["name"], tables.milliseconds(row), rate])
    elif "out" in row:
      key = " ".join(row["name"].split()[:2])
      errors = [row[x] for x in ("out", "dq", "dk", "dv")]
      # A number that is not one is the worst.
      errors = [x if x == x else float("inf") for x in errors]
      worst[key] = max([worst.get(key, 0.0), *errors])
  errors = [[key, f"{value:.1e}"] for key, value in worst.items()]
  return tables.table(["attention", "worst error"], errors) + tables.table(
    ["attention", "ms", "TFLOP/s"], lines
  )


def _others(results) -> str:
  lines = []
  for item, result in results.items():
    if item.partition("_")[0] in ("digits", "arms", "pipeline"):
      for row in result.get("rows", []):
        values = [f"{k} {_short(v)}" for k, v in row.items() if k != "name"]
        lines.append([f"{item}: {row['name']}", ", ".join(values)])
  return tables.table(["", "seen"], lines)


def _failed(results) -> str:
  lines = []
  for item, result in results.items():
    if "error" in result:
      said = result["error"].strip().splitlines()
      lines.append([item, said[-1] if said else ""])
    for row in result.get("rows", []):
      if "error" in row:
        lines.append([f"{item}: {row['name']}", repr(row["error"][:200])])
  return tables.table(["failed or not run", "why"], lines)


def _short(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]
