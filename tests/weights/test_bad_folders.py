"""Folders of models whose files are cut, or are something else.

Each file of a released pipeline and of a release of ours is harmed in every
way; loading must refuse it, name it, and be quick about it.
"""

import json
import os
import pathlib
import random
import shutil
import time

import pytest

from vdit_jax import pipeline
from vdit_jax.weights import tiny

NOISE = random.Random(0).randbytes(5000)
DEEP = b'{"a":' * 50_000
CUTS = (0, 1, 9, 0.3, 0.7, -2)


def _cut(data, at):
  end = int(at * len(data)) if isinstance(at, float) else at
  return data[:end]


def _into(kind):
  """Put something else in a file's place."""

  def put(path):
    path.unlink()
    if kind == "folder":
      path.mkdir()
    elif kind == "pipe":
      os.mkfifo(path)
    else:
      path.symlink_to(path.parent / "nowhere")

  return put


def _write(change):
  return lambda path: path.write_bytes(change(path.read_bytes()))


HARMS = {
  **{f"cut {at}": _write(lambda x, at=at: _cut(x, at)) for at in CUTS},
  **{kind: _into(kind) for kind in ("folder", "pipe", "link")},
  "noise": _write(lambda x: NOISE),
  "text": _write(lambda x: b"a text\n"),
  "list": _write(lambda x: b"[1, 2]"),
  "number": _write(lambda x: b"3"),
  "null": _write(lambda x: b"null"),
  "utf-16": _write(lambda x: '{"a": "é"}'.encode("utf-16")),
  "deep": _write(lambda x: DEEP),
  "empty": _write(lambda x: b"{}"),
  "digits": _write(lambda x: b'{"a": ' + b"9" * 10_000 + b"}"),
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  path = tmp_path_factory.mktemp("released") / "pipe"
  tiny.write(path, "2b")
  return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
  path = tmp_path_factory.mktemp("ours") / "release"
  shutil.copytree(pipeline.RELEASE, path)
  return path


def _refuses(folder, tmp_path, file, harm):
  """Load a copy of a folder whose file is harmed."""
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  HARMS[harm](copy / file)
  begun = time.process_time()
  with pytest.raises(ValueError) as error:
    pipeline.load(copy)
  said = str(error.value)
  assert time.process_time() - begun < 3  # 2 of a free processor
  assert str(copy) in said and len(said) < 3000
  # A file that is not there may be any of several.
  folder, name = file.parent.name, file.name
  assert harm == "link" or name in said or folder in said


RELEASED = (
  "model_index.json",
  "scheduler/scheduler_config.json",
  "text_encoder/config.json",
  "text_encoder/model.safetensors",
  "tokenizer/spiece.model",
  "tokenizer/tokenizer_config.json",
  "transformer/config.json",
  "transformer/diffusion_pytorch_model.safetensors",
  "vae/config.json",
  "vae/diffusion_pytorch_model.safetensors",
)
OURS = (
  "config.json",
  "tokenizer.model",
  "autoencoder.safetensors",
  "model.safetensors",
)


def test_no_file_is_left_out(released, ours):
  files = {str(p.relative_to(released)) for p in released.rglob("*.*")}
  assert files == set(RELEASED)
  assert {p.name for p in ours.iterdir()} >= set(OURS)


# What is no harm: a file that may be silent, or of which little is read.
HARMLESS = {
  "tokenizer/tokenizer_config.json": ("empty", "link", "utf-16"),
  "scheduler/scheduler_config.json": ("empty",),
}
QUICK = ("cut 0.7", "folder", "noise", "list")


def _cases(files):
  """All harms of all files, the common ones alone but for the slow run."""
  return [
    pytest.param(
      pathlib.Path(file),
      harm,
      id=f"{file}-{harm}",
      marks=[] if harm in QUICK else pytest.mark.slow,
    )
    for file in files
    for harm in HARMS
    if harm not in HARMLESS.get(file, ())
  ]


@pytest.mark.parametrize(("file", "harm"), _cases(RELEASED))
def test_a_released_pipeline_with_a_bad_file(released, tmp_path, file, harm):
  _refuses(released, tmp_path, file, harm)


@pytest.mark.parametrize(("file", "harm"), _cases(OURS))
def test_a_release_of_ours_with_a_bad_file(ours, tmp_path, file, harm):
  _refuses(ours, tmp_path, file, harm)


def test_a_config_far_too_large_is_not_read(released, tmp_path):
  shutil.copytree(released, tmp_path / "copy")
  config = tmp_path / "copy" / "vae" / "config.json"
  with config.open("ab") as file:
    file.truncate(10**11)  # no bytes of the disk
  with pytest.raises(ValueError, match="config.json must have at most"):
    pipeline.load(tmp_path / "copy")


def test_a_key_of_the_header_is_quoted_short(released, tmp_path):
  shutil.copytree(released, tmp_path / "copy")
  path = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
  for entry in ("x" * 10**7, {"dtype": "x" * 10**7}, [0] * 10**6):
    for header in ({"a" * 10**6: entry}, {"__metadata__": entry, "a": entry}):
      text = json.dumps(header).encode()
      path.write_bytes(len(text).to_bytes(8, "little") + text)
      with pytest.raises(ValueError, match="vae") as error:
        pipeline.load(tmp_path / "copy")
      assert len(str(error.value)) < 1000
