"""What a dataset's folder says of itself, looked at before TFDS opens it.

TFDS imports whatever module a features.json names, and so runs code that came
with the data. Here the file is JSON first, and may name TFDS's own features and
nothing else, wherever in it: also in JSON that is a text within the JSON.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from vdit_jax import inputs, schema

FEATURES, INFO = "features.json", "dataset_info.json"

_OWN = "tensorflow_datasets.core.features."
_CLASSES = frozenset(
  name
  for name in tfds.features.FeatureConnector._registered_features
  if name.startswith(_OWN)
)
# As protobuf reads them, pythonClassName is python_class_name.
_NAMES_CLASS = ("pythonclassname", "type")
_PROTO = "protocls"
_PROTOS = re.compile(r"tensorflow_datasets\.\w+|")
_INFO = {
  "name": schema.Field(str, 1, 200),
  "version": schema.Field(str, 1, 50),
  "fileFormat": schema.Field(str, high=50),
  "moduleName": schema.Field(str, high=500),
  "splits": schema.Field(list, 0, 1000, each=schema.Field(dict)),
}
_TEMPLATE = re.compile(r"[\w.{}-]*")  # of files in the folder itself


def check(folder: epath.Path) -> None:
  """Refuse a dataset that names code, or files elsewhere.

  Args:
    folder: with its features.json and dataset_info.json.

  Raises:
    ValueError: if a file is damaged or names what it may not.
  """
  _check_features(folder / FEATURES)
  _check_info(folder / INFO)


def _check_features(path: epath.Path) -> None:
  try:
    for key, name in _named(inputs.read_json(path)):
      known = _PROTOS.fullmatch(name) if key == _PROTO else name in _CLASSES
      if not known:
        raise ValueError(
          f"{path}: {key} must be one of TFDS's own features, got "
          f"{schema.quote(name)}; opening it would run code of that name"
        )
  except RecursionError as error:
    raise inputs.damaged(path, "it is nested too deep") from error


def _check_info(path: epath.Path) -> None:
  info = inputs.read_json(path)
  schema.check(str(path), info, _INFO, "build the dataset again")
  for split in info.get("splits", ()):
    for key, value in split.items():
      text = str(value) if _plain(key) == "filepathtemplate" else ""
      if not _TEMPLATE.fullmatch(text):
        raise ValueError(
          f"{path}: {key} must name files in its folder, got "
          f"{schema.quote(value)}; build the dataset again"
        )


def _named(value: Any) -> Iterator[tuple[str, str]]:
  """Go through the names of classes in JSON, with the keys they stand at."""
  if isinstance(value, dict):
    for key, inner in value.items():
      if isinstance(inner, str) and _plain(key) in (*_NAMES_CLASS, _PROTO):
        yield _plain(key), inner
      yield from _named(inner)
  elif isinstance(value, list):
    for inner in value:
      yield from _named(inner)
  elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
    try:
      inner = json.loads(value)
    except ValueError:
      return  # a text that is no JSON
    yield from _named(inner)


def _plain(key: str) -> str:
  return key.replace("_", "").lower()
