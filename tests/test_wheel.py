"""A wheel, built from the source distribution, holds all that a user needs."""

import configparser
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import vdit_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a build reads of a clone; it writes beside it.
BUILT_OF = ("vdit_jax", "configs", "tests", "benchmarks", "notebooks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """What `python -m build` makes, with the setuptools that is there."""
  folder = tmp_path_factory.mktemp("wheel")
  clone = folder / "clone"
  clone.mkdir()
  for path in ROOT.iterdir():
    if path.is_file() and path.name != ".git":
      shutil.copy(path, clone)
  for name in BUILT_OF:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, clone / name, ignore=ignored)
  source = folder / _build(clone, "build_sdist", folder)
  shutil.unpack_archive(source, folder / "source")
  (unpacked,) = (folder / "source").iterdir()
  return folder / _build(unpacked, "build_wheel", folder)


def _build(clone, what, out):
  """Call the build's backend, which prints a lot, in a process of its own."""
  code = f"from setuptools import build_meta as b; n = b.{what}({str(out)!r})"
  code += f"; open({str(out / 'name')!r}, 'w').write(n)"
  command = [sys.executable, "-c", code]
  subprocess.run(command, cwd=clone, check=True, capture_output=True)
  return (out / "name").read_text()


@pytest.fixture(scope="module")
def installed(wheel):
  """A folder that holds the wheel and nothing of the clone."""
  folder = wheel.parent / "installed"
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder)
  return folder


def _run(installed, *arguments):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=installed.parent,
    env=os.environ | {"PYTHONPATH": str(installed)},
    check=True,
    capture_output=True,
    text=True,
  ).stdout


def _files(folder):
  found = {p for p in folder.rglob("*") if p.is_file()}
  return {
    str(p.relative_to(folder)) for p in found if "__pycache__" not in p.parts
  }


def test_holds_the_package_and_the_configs_and_no_more(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = {n for n in archive.namelist() if ".dist-info/" not in n}
  wanted = {f"vdit_jax/{n}" for n in _files(ROOT / "vdit_jax")}
  wanted |= {f"vdit_jax/configs/{n}" for n in _files(ROOT / "configs")}
  assert names == wanted
  assert {
    "vdit_jax/py.typed",
    "vdit_jax/configs/digits.py",
    "vdit_jax/configs/prompts.txt",
    "vdit_jax/packaged/model.safetensors",
    "vdit_jax/packaged/tokenizer.model",
  } <= names


def test_is_described(installed, wheel):
  (described,) = installed.glob("*.dist-info")
  text = (described / "METADATA").read_text()
  assert f"\nVersion: {vdit_jax.__version__}\n" in text
  for field in ("Author", "License", "Keywords", "Classifier"):
    assert f"\n{field}: " in text
  assert "\nRequires-Python: >=3.11\n" in text
  assert (described / "licenses" / "LICENSE").is_file()
  commands = configparser.ConfigParser()
  commands.read(described / "entry_points.txt")
  assert dict(commands["console_scripts"]) == {"vdit": "vdit_jax.cli:main"}
  assert "py3-none-any" in wheel.name


def test_is_cited_by_its_version():
  text = (ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {vdit_jax.__version__}\n" in text


def test_needs_neither_torch_nor_tensorflow_nor_cuda(installed):
  (described,) = installed.glob("*.dist-info")
  lines = (described / "METADATA").read_text().splitlines()
  needed = [n for n in lines if n.startswith("Requires-Dist: ")]
  needed = [n.lower() for n in needed if "extra ==" not in n]
  assert any("jax<" in n for n in needed)
  for name in ("torch", "tensorflow ", "tensorflow-cpu", "cuda", "nvidia"):
    assert [n for n in needed if name in n] == []


def test_a_config_is_read_outside_the_clone(installed):
  code = (
    "from vdit_jax.configs import digits, defaults; import vdit_jax; "
    "print(digits.get_config('vae').task, defaults.__file__, digits.__file__, "
    "vdit_jax.__file__)"
  )
  task, *files = _run(installed, "-c", code).split()
  assert task == "autoencoder"
  assert all(file.startswith(str(installed)) for file in files)


def test_the_command_finds_packaged_configs(installed):
  code = "from vdit_jax import cli; print(cli.find_config('digits:vae'))"
  found = _run(installed, "-c", code).strip()
  assert found == f"{installed}/vdit_jax/configs/digits.py:vae"


@pytest.mark.slow
def test_samples_outside_the_clone(installed, tmp_path):
  out = tmp_path / "seven.npy"
  prompt = "--prompt=a red seven moving left"
  command = ["-m", "vdit_jax.cli", "sample", prompt, f"--out={out}"]
  _run(installed, *command, "--steps=2")
  assert out.stat().st_size > 9 * 32 * 32 * 3
