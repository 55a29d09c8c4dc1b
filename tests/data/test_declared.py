"""A dataset's folder says what it is, and runs nothing."""

import json
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data.forms import build
from vdit_jax.data import declared, sources

FEATURES = {
  "video": tfds.features.Tensor(
    shape=(2, 8, 8, 3), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
  ),
  "caption": tfds.features.Text(),
  "type": tfds.features.Text(),
  "tags": tfds.features.Sequence(
    {"label": tfds.features.ClassLabel(names="ab")}
  ),
}
EXAMPLE = {
  "video": np.zeros((2, 8, 8, 3), np.uint8),
  "caption": "a",
  "type": "b",
  "tags": [{"label": 0}],
}
SEQUENCE = "tensorflow_datasets.core.features.sequence_feature.Sequence"
TEXT = "tensorflow_datasets.core.features.text_feature.Text"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  path = tmp_path_factory.mktemp("stored")
  name = build(path, FEATURES, [EXAMPLE])
  return path, name


@pytest.fixture
def folder(stored, tmp_path, monkeypatch):
  """A copy, with a module beside it and in the process's folder."""
  shutil.copytree(stored[0], tmp_path / "data")
  found = tmp_path / "data" / stored[1] / "1.0.0"
  for place in (tmp_path, found):
    (place / "hostile.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.syspath_prepend(place)
  monkeypatch.chdir(found)
  return found


def _open(folder):
  return sources.open_source("any_form/form", "train", folder.parents[2])


def _inner(cls, key="pythonClassName"):
  return {key: cls, "text": {}}


def _as_json(feature):
  """A feature within JSON that is a text within JSON."""
  return {
    "pythonClassName": SEQUENCE,
    "jsonFeature": {"json": json.dumps({"feature": feature, "length": None})},
  }


def _legacy(cls):
  return {"type": cls, "content": {"shape": [], "dtype": "string"}}


HOSTILE = "hostile.Feature"
BAD = {
  "class": _inner(HOSTILE),
  "snake": _inner(HOSTILE, "python_class_name"),
  "legacy": _legacy(HOSTILE),
  "sequence": {
    "pythonClassName": SEQUENCE,
    "sequence": {"feature": _inner(HOSTILE), "length": "-1"},
  },
  "json": _as_json(_legacy(HOSTILE)),
  "json in json": _as_json(_as_json(_legacy(HOSTILE))),
  "content": {"type": SEQUENCE, "content": json.dumps(_legacy(HOSTILE))},
  "proto": _legacy(TEXT) | {"proto_cls": "hostile.Proto"},
  "near": _inner(TEXT + "2"),
  "module": _inner("tensorflow_datasets.core.lazy_imports_lib.x"),
  "deep": json.loads('{"a":' * 400 + json.dumps(_inner(HOSTILE)) + "}" * 400),
}


def test_what_tfds_wrote_is_opened(folder):
  source = _open(folder)
  assert source.num_records == 1 and source.kind == "video"
  for cls in (tfds.features.Image, tfds.features.Video, tfds.features.Audio):
    assert f"{cls.__module__}.{cls.__name__}" in declared._CLASSES


@pytest.mark.parametrize("kind", BAD)
def test_a_class_of_others_is_not_imported(folder, kind):
  path = folder / "features.json"
  said = json.loads(path.read_text())
  said["featuresDict"]["features"]["caption"] = BAD[kind]
  path.write_text(json.dumps(said))
  with pytest.raises(ValueError, match="must be one of TFDS's own") as error:
    _open(folder)
  assert str(path) in str(error.value)
  assert "hostile" not in sys.modules


def test_the_whole_may_be_of_no_other_class_either(folder):
  path = folder / "features.json"
  said = json.loads(path.read_text()) | {"pythonClassName": HOSTILE}
  path.write_text(json.dumps(said))
  with pytest.raises(ValueError, match="TFDS's own .* got 'hostile.Feature'"):
    _open(folder)
  assert "hostile" not in sys.modules


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize(
  "text", ["", "{", "[]", "a", '{"a":' * 5000, '{"splits": [3]}', "\0"]
)
def test_damaged_files_are_refused_by_name(folder, name, text):
  (folder / name).write_text(text)
  with pytest.raises(ValueError, match=r"any_form/form/1.0.0") as error:
    _open(folder)
  assert len(str(error.value)) < 600


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("name", 3),
    ("version", None),
    ("splits", {}),
    ("splits", [{"filepathTemplate": "../../{SPLIT}.{FILEFORMAT}"}]),
    ("splits", [{"filepath_template": "/etc/{SPLIT}"}]),
    ("fileFormat", ["x"]),
  ],
)
def test_what_an_info_may_say(folder, field, value):
  path = folder / "dataset_info.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with pytest.raises(ValueError, match="dataset_info.json: .* must "):
    _open(folder)


def test_the_module_of_an_info_is_not_imported(folder):
  path = folder / "dataset_info.json"
  said = json.loads(path.read_text()) | {"moduleName": "hostile"}
  path.write_text(json.dumps(said))
  assert _open(folder).num_records == 1
  assert "hostile" not in sys.modules
