"""The queue of `benchmarks.accelerator` at tiny sizes, and what travels."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import accelerator_table, rows

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACK = ROOT / "benchmarks" / "accelerator_pack.sh"


def _queue(out, *more):
  command = [sys.executable, "-m", "benchmarks.accelerator", f"--out={out}"]
  environment = dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS="")
  done = subprocess.run(
    [*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads((out / "results.json").read_text()), done.stdout


@pytest.mark.slow
def test_an_item_is_run_once_and_one_without_what_it_needs_says_so(tmp_path):
  only = "--only=variant_2b,ours_bfloat16"
  results, said = _queue(tmp_path, "--tiny", only)
  (row,) = results["variant_2b"]["rows"]
  assert row["median"] > 0 and row["model_tflops"] > 0
  assert results["ours_bfloat16"]["error"] == "needs weights"
  assert "| 2b |" in said and "needs weights" in said
  again, _ = _queue(tmp_path, "--tiny", only)
  assert again["variant_2b"] == results["variant_2b"]


def test_what_does_not_fit_is_not_begun(tmp_path):
  results, _ = _queue(tmp_path, "--budget_seconds=1", "--only=attention")
  assert re.search("0 s are left|1 s are left", results["attention"]["error"])


def test_rows_survive_what_fails_and_the_table_lists_it(tmp_path):
  kept = rows.Rows(tmp_path / "item.json", {"device": "a card"})
  kept.add("forward", median=0.5, least=0.4, most=0.6, times=3)

  def fail():
    raise MemoryError("120 GiB")

  kept.attempt("train", fail)
  found = json.loads((tmp_path / "item.json").read_text())
  assert "done" not in found and len(found["rows"]) == 2
  text = accelerator_table.markdown({"ours_bfloat16": found})
  assert "500.00 (400.00-600.00)" in text and "120 GiB" in text


def test_what_is_packed_is_all_that_the_code_needs_and_is_small():
  """The wheels and the machine's packages are those of setup.cfg."""
  text = (ROOT / "setup.cfg").read_text()
  block = text.split("install_requires =")[1].split("[options")[0]
  names = {re.split(r"[\[<>=]", line.strip())[0] for line in block.split("\n")}
  packed = set(re.findall(r"([\w-]+)==", PACK.read_text()))
  same = lambda name: name.lower().replace("_", "-")
  there = "absl-py etils flax jax ml-dtypes numpy optax orbax-checkpoint pillow"
  there += " protobuf safetensors sentencepiece tensorstore tokenizers tqdm"
  wanted = {same(name) for name in names if name}
  assert wanted <= {same(name) for name in packed} | set(there.split())


@pytest.mark.slow
def test_the_whole_queue_runs_at_tiny_sizes(tmp_path):
  results, _ = _queue(tmp_path, "--tiny")
  failed = {name for name, found in results.items() if "error" in found}
  assert not failed
  rows = [row for found in results.values() for row in found["rows"]]
  assert not [row for row in rows if "error" in row]
