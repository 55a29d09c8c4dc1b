"""A fake gs://, in memory."""

import fsspec
import pytest
from etils import epath
from fsspec.implementations import memory

from tests.models.conftest import randomise  # noqa: F401


class Store(memory.MemoryFileSystem):
  """An object store in memory: nothing can be appended to."""

  protocol = ("gs", "gcs")
  store, pseudo_dirs = {}, [""]
  cachable = False

  def __init__(self, **_):
    super().__init__()

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + str(path).removeprefix("gs://").strip("/")

  def _open(self, path, mode="rb", **kwargs):
    assert "a" not in mode and "+" not in mode, f"{mode} on an object"
    return super()._open(path, mode, **kwargs)


@pytest.fixture
def store():
  """The fake store's class, its store empty."""
  fsspec.register_implementation("gcs", Store, clobber=True)
  Store.store.clear()
  Store.pseudo_dirs[:] = [""]
  return Store


@pytest.fixture
def bucket(store):
  """A folder of the fake store."""
  return epath.Path("gs://bucket/run")
