"""The comparison with PyTorch: turns, rows, tables; each row at tiny size."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import machine, race, rows, torch_vs_jax
from benchmarks import torch_vs_jax_sides as sides

ROOT = pathlib.Path(__file__).resolve().parent.parent
ONCE = race.Turns(least=1, most=1, warm=0)


def test_sides_take_turns_and_none_is_always_behind_the_same():
  called = []
  runs = {name: lambda name=name: called.append(name) for name in "abc"}
  turns = race.Turns(least=2, most=2, warm=1)
  found = race.run(runs, turns, lambda result: None)
  assert "".join(called) == "abc" + "abc" + "bca"
  assert {row["times"] for row in found.values()} == {2}


def test_turns_end_with_their_seconds_but_not_before_the_least():
  spent = race.Turns(least=3, most=9, seconds=0.0, warm=0)
  (found,) = race.run({"a": lambda: None}, spent, lambda _: None).values()
  assert found["times"] == 3
  assert found["least"] <= found["median"] <= found["most"]
  assert race.summary([3.0, 1.0, 2.0, 9.0])["median"] == 2.5


CPUINFO = """processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu sse avx avx2 fma avx512f avx512_bf16 amx_tile

processor\t: 1
model name\t: another
"""


def test_processor_is_named_with_its_vector_instructions():
  assert machine.processor(CPUINFO) == {
    "processor": "AMD EPYC, cpu family 25, model 17",
    "vectors": "amx_tile avx avx2 avx512_bf16 avx512f fma",
  }
  assert machine.processor("")["vectors"] == ""


def test_rows_go_on_from_a_file_of_the_same_machine(tmp_path):
  path, about = tmp_path / "results.json", {"processor": "one"}
  kept = rows.Rows(path, about)
  kept.add("good", median=1.0)
  kept.attempt("bad", lambda: 1 // 0)
  again = rows.Rows(path, about)
  assert "good" in again and "bad" not in again
  again.add("bad", median=2.0)
  assert [row["name"] for row in json.loads(path.read_text())["rows"]] == [
    "good",
    "bad",
  ]
  with pytest.raises(ValueError, match=r"another processor.*'one'.*'two'"):
    rows.Rows(path, {"processor": "two"})


def test_shares_are_of_the_better_of_pytorch_two_ways():
  times = dict(least=0.1, most=9.0, times=3)
  medians = dict(ours=1.2, unrolled=0.9, eager=2.0, compiled=1.0)
  row = {k: times | {"median": v} for k, v in medians.items()}
  row |= {"name": "forward-2b-676", "distance": 1e-6, "date": "2026-11-27"}
  failed = {"name": "decode", "error": "MemoryError: 1 TB"}
  text = torch_vs_jax.markdown({"threads": 2}, [failed, row])
  assert "threads 2" in text and "'MemoryError: 1 TB'" in text
  (line,) = (x for x in text.splitlines() if "forward-2b-676" in x)
  assert "| 1200 (100-9000) |" in line
  assert "| 1.20 | 0.90 | 1.00 | 1e-06 | 2026-11-27 |" in line


def test_rows_are_chosen_by_patterns():
  names = [r.name for r in torch_vs_jax.chosen(["train-*", "decode"])]
  assert "decode" in names and "train-2b-676" in names and len(names) > 3
  with pytest.raises(ValueError, match="'sampling'"):
    torch_vs_jax.chosen(["*", "sampling"])


def test_sides_that_differ_are_not_timed():
  runs = {"ours": lambda: np.ones(3), "eager": lambda: np.full(3, 1.01)}
  how = sides.How(ONCE, threads=1)
  with pytest.raises(ValueError, match="eager result by {'ours': 0.0099"):
    sides.compare(runs, how)


ROWS = [
  pytest.param(
    row, id=row.name, marks=[pytest.mark.slow] * (row.name != "matmul")
  )
  for row in torch_vs_jax.ROWS
]


@pytest.mark.parametrize("row", ROWS)
def test_sides_agree_at_tiny_size(row):
  how = dict(turns=ONCE, threads=1, compiled=False, tiny=True)
  found = torch_vs_jax.measure(row, how)
  assert found["distance"] < 1e-4
  ways = {"ours", "unrolled", "eager"} & set(found)
  assert {"ours", "eager"} <= ways
  assert all(found[way]["median"] > 0 for way in ways)


@pytest.mark.slow
def test_command_measures_what_is_missing_and_compiles_pytorch_too(tmp_path):
  def run(*more):
    command = [sys.executable, "-m", "benchmarks.torch_vs_jax", *more]
    command += [f"--out={tmp_path}", "--tiny", "--most=1", "--least=1"]
    done = subprocess.run(
      [*command, "--threads=1"],
      cwd=ROOT,
      env=dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS=""),
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((tmp_path / "results.json").read_text())["rows"]

  (row,) = run("--rows=forward-2b-676")
  assert row["compiled"]["first"] > row["compiled"]["median"] > 0
  assert row["gflop"] > 0
  first, second = run("--rows=forward-2b-676,matmul")
  assert first == row and second["name"] == "matmul"
  assert "| forward-2b-676 |" in (tmp_path / "table.md").read_text()
