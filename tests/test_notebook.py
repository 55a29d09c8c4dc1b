"""The notebook runs from top to bottom, on a tiny pipeline made on the spot."""

import json
import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("diffusers")

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"
SECONDS = 600  # of one cell


@pytest.fixture(scope="module")
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def _code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_is_valid_and_holds_no_outputs(notebook):
  nbformat.validate(notebook)
  for cell in _code(notebook):
    assert cell.outputs == [] and cell.execution_count is None, cell.id


def test_one_variable_tells_what_needs_a_tpu_or_a_download(notebook):
  sources = {cell.id: cell.source for cell in _code(notebook)}
  assert sources["settings"].startswith("RELEASED = False\n")
  for name, source in sources.items():
    for word in ("hf download", "pip install", "git clone"):
      if word in source:
        before = source[: source.index(word)]
        assert before.startswith("if RELEASED:\n"), name
        assert "\nelse" not in before and "\nelif" not in before, name


@pytest.mark.slow
def test_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
  """In a folder that has what a clone has; what it writes stays there."""
  for name in ("configs", "sample.py", "train.py"):
    (tmp_path / name).symlink_to(ROOT / name)
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  # The commands are processes of their own, each as on one device.
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  client = nbclient.NotebookClient(
    notebook,
    timeout=SECONDS,
    kernel_name="python3",
    resources={"metadata": {"path": str(tmp_path)}},
  )
  done = {cell.id: cell for cell in _code(client.execute(cwd=str(tmp_path)))}
  values = {
    name: output["data"]
    for name, cell in done.items()
    for output in cell.outputs
    if output.output_type == "execute_result"
  }
  text = {name: data["text/plain"] for name, data in values.items()}
  assert "vae_psnr" in text["evaluate"]
  assert "validation_loss" in text["evaluate"]
  assert "'decode'" in text["compare"]
  assert text["tune"].count(",") == 3  # four losses
  assert "pytorch_lora_weights.safetensors" in text["tuned"]
  shown = [
    output["data"]["text/html"]
    for cell in done.values()
    for output in cell.outputs
    if output.output_type == "display_data"
  ]
  assert len(shown) == 3 and all("data:video/mp4" in html for html in shown)
  _check_comparison(tmp_path / "work" / "colab")


def _check_comparison(folder):
  """What `compare` leaves, run as a tool."""
  found = json.loads((folder / "compare.json").read_text())
  for stage in found["stages"]:
    assert 0 < stage["error"]["relative"] < 1e-4, stage
    assert stage["torch_seconds"] > 0 and stage["jax_seconds"] > 0
  assert len(found["steps"]) == 4
  assert all(p["host"] > 2**27 for p in found["peak_bytes"].values())
  text = (folder / "compare" / "index.html").read_text()
  assert text.count("<video") == 3
  assert not re.search(r"https?://", text)
