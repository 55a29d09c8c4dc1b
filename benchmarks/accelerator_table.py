"""Lays out what `benchmarks.accelerator` measured as Markdown tables."""

from typing import Any

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
        cells = [_ms(mine), _ms(eager), _ms(fast)]
        cells += [_ratio(mine, eager), _ratio(mine, fast)]
        cells += [_number(x.get("peak_gib"), 1) for x in (mine, eager)]
        cells += [_number(mine.get("distance"), 5)]
        lines.append(f"| {part}, {dtype} | " + " | ".join(cells) + " |")
  head = ["", "ours ms", "eager ms", "compiled ms", "of eager", "of compiled"]
  head += ["ours GiB", "eager GiB", "relative distance"]
  return _table(head, lines)


_HOW = ("eager", "compiled")


def _sizes(results) -> str:
  lines = []
  for item, result in results.items():
    if item.startswith("variant_"):
      for row in result.get("rows", []):
        cells = [_ms(row), _number(row.get("utilisation"), 3)]
        cells += [_number(row.get("model_tflops"), 1)]
        cells += [_number(row.get("peak_gib"), 1), f"{row.get('tokens', '')}"]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
  head = ["", "ms a step", "utilisation", "model TFLOP/s", "GiB", "tokens"]
  return _table(head, lines)


def _attention(results) -> str:
  """Worst errors by kernel and type; times."""
  worst: dict[str, float] = {}
  lines = []
  for row in _rows(results, "attention").values():
    if "tflops" in row:
      rate = _number(row["tflops"], 0)
      lines.append(f"| {row['name']} | {_ms(row)} | {rate} |")
    elif "out" in row:
      key = " ".join(row["name"].split()[:2])
      errors = [row[x] for x in ("out", "dq", "dk", "dv")]
      # A number that is not one is the worst.
      errors = [x if x == x else float("inf") for x in errors]
      worst[key] = max([worst.get(key, 0.0), *errors])
  errors = [f"| {key} | {value:.1e} |" for key, value in worst.items()]
  return _table(["attention", "worst error"], errors) + _table(
    ["attention", "ms", "TFLOP/s"], lines
  )


def _others(results) -> str:
  lines = []
  for item, result in results.items():
    if item.partition("_")[0] in ("digits", "arms", "pipeline"):
      for row in result.get("rows", []):
        values = [f"{k} {_short(v)}" for k, v in row.items() if k != "name"]
        lines.append(f"| {item}: {row['name']} | {', '.join(values)} |")
  return _table(["", "seen"], lines)


def _failed(results) -> str:
  lines = []
  for item, result in results.items():
    if "error" in result:
      said = result["error"].strip().splitlines()
      lines.append(f"| {item} | {said[-1] if said else ''} |")
    for row in result.get("rows", []):
      if "error" in row:
        lines.append(f"| {item}: {row['name']} | {row['error'][:200]!r} |")
  return _table(["failed or not run", "why"], lines)


def _table(head: list[str], lines: list[str]) -> str:
  if not lines:
    return ""
  top = "| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n"
  return top + "\n".join(lines) + "\n"


def _ms(row: dict[str, Any]) -> str:
  if "median" not in row:
    return "-"
  low, high = row["least"] * 1e3, row["most"] * 1e3
  return f"{row['median'] * 1e3:.2f} ({low:.2f}-{high:.2f})"


def _ratio(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
  if "median" not in mine or "median" not in theirs:
    return "-"
  return f"{mine['median'] / theirs['median']:.2f}"


def _number(value: float | None, digits: int) -> str:
  return "-" if value is None else f"{value:.{digits}f}"


def _short(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]
