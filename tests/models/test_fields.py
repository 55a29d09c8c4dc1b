"""Laws of every network's config: a bad field is refused, by name, at once.

The tables are those beside the readers, so a new class is driven too.
"""

import itertools
import json
import shutil
import time
import tracemalloc

import numpy as np
import pytest

from vdit_jax.convert import configs, folders, schedulers
from vdit_jax.models import families, networks
from vdit_jax.weights import component, tiny

DEEP = []
for _ in range(10_000):
  DEEP = [DEEP]
BAD = (
  *(None, True, "", "x", "y" * 10**6, [], {}, {"a": 1}, [1] * 10**5, DEEP),
  *(-1, 0, 1.5, 10**9, 10**30, -(10**5000), float("nan"), float("inf"), 1e308),
)
CLASSES = {
  name: known.classes[name]
  for known in families.networks()
  for name in known.classes
}
SCHEDULERS = schedulers.FLOW_EULER | {
  name: row
  for system in families.SYSTEMS.values()
  for name, row in system.schedulers.items()
}
PARTS = ("transformer", "vae", "text_encoder")


class Watched:
  """Ends in a failure where what it watches is slow or takes much memory."""

  def __init__(self, seconds, megabytes):
    self.seconds, self.megabytes = seconds, megabytes

  def __enter__(self):
    tracemalloc.start()
    self.begun = time.process_time()

  def __exit__(self, *error):
    seconds = time.process_time() - self.begun
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < self.seconds and peak < self.megabytes * 2**20


def _silent(table):
  """A config that says what it must, and no more."""
  rows = table.rows.items()
  must = {k: row.field for k, row in rows if row.default is configs.REQUIRED}
  return {
    name: field.choices[0] if field.choices else max(field.low, 1)
    for name, field in must.items()
  }


def _refused(read, table, given):
  """Drive a reader with every bad value of every field."""
  read(given)
  for (name, row), value in itertools.product(table.rows.items(), BAD):
    if row.field.fits(value):
      continue
    with pytest.raises(ValueError, match=f"^a/config.json: .*{name}") as error:
      read(given | {name: value})
    assert " must be " in str(error.value) and len(str(error.value)) < 500
  for name, value in itertools.product(table.fixed, BAD):
    if table.fixed[name] != value:
      with pytest.raises(ValueError, match=f"^a/config.json: .*{name}="):
        read(given | {name: value})


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_every_class(name):
  known = CLASSES[name]
  read = lambda config: known.describe(config, np.dtype("f4"), "a/config.json")
  with Watched(seconds=2, megabytes=50):
    _refused(read, known.fields, _silent(known.fields))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_field_of_every_scheduler(name):
  read = lambda config: schedulers.recipe_fields(
    {"_class_name": name} | config, SCHEDULERS, "a/config.json"
  )
  with Watched(seconds=2, megabytes=50):
    _refused(read, SCHEDULERS[name].fields, {})


@pytest.mark.parametrize(
  ("family", "kind"), [(n.family, n.kind) for n in families.networks()]
)
def test_every_field_of_every_config_of_ours(family, kind):
  known = families.network(family, kind)
  read = lambda fields: networks.read_group(
    {"name": family} | fields, kind, "a/config.json"
  )
  with Watched(seconds=2, megabytes=50):
    _refused(read, configs.of(known.config), {})
  for name in (*BAD, "Config"):
    with pytest.raises(ValueError, match=f"{kind}.name must be one of"):
      read({"name": name})
  with pytest.raises(ValueError, match=f"{kind} has .* 'wdth'; there are"):
    read({"wdth": 3})


@pytest.mark.parametrize("name", ["_class_name", "architectures", "model_type"])
def test_every_way_to_say_a_class(name):
  for value in BAD:
    with Watched(2, 50), pytest.raises(ValueError, match=r"^a/con") as error:
      component._component({name: value}, "a/config.json")
    assert len(str(error.value)) < 500


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  path = tmp_path_factory.mktemp("released") / "pipe"
  tiny.write(path, "2b")
  return path


@pytest.mark.parametrize("part", PARTS)
def test_a_size_that_the_files_do_not_hold_is_not_built(
  part, released, tmp_path
):
  """The largest that the table would let through, and one too many."""
  folder = tmp_path / part
  shutil.copytree(released / part, folder)
  path = folder / folders.CONFIG
  config = json.loads(path.read_text())
  table = component._component(config, path).fields
  for name, row in table.rows.items():
    if row.counts:
      high = (row.field.each or row.field).high
      value = [int(high)] * 4 if row.field.each else int(high)
      path.write_text(json.dumps(config | {name: value}))
      with Watched(2, 100), pytest.raises(ValueError) as error:
        component.check(folder)
      said = str(error.value)
      assert said.startswith(str(path)) and f"{name} must be" in said
      assert "the weights beside it are of no more" in said
  products = table.products
  for names in products:
    most = configs.held(folders.read_tensors(folder))["size"]
    path.write_text(json.dumps(config | dict.fromkeys(names, most)))
    with Watched(2, 100), pytest.raises(ValueError, match="times .* at most"):
      component.check(folder)
