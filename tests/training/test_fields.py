"""Every field is looked at before anything else, and the list is complete."""

import copy
import dataclasses
import pathlib

import pytest

from configs import cogvideox, digits, vdit
from vdit_jax import schema
from vdit_jax.models import families
from vdit_jax.training import fields

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

SHIPPED = [
  (digits, "vae"),
  (digits, "dit"),
  *[(vdit, size) for size in ("vae", "s", "2b", "14b")],
  *[(cogvideox, size) for size in ("2b", "5b_i2v", "1_5_5b_i2v")],
]


@pytest.mark.parametrize(
  ("file", "name"), SHIPPED, ids=lambda x: getattr(x, "__name__", x)
)
def test_what_is_shipped_is_right(file, name):
  fields.check(file.get_config(name))


def _leaves(group, above=()):
  for name, field in group.fields.items():
    if isinstance(field, fields.Either):
      yield (*above, name), field.field
    elif isinstance(field, fields.Group):
      yield from _leaves(field, (*above, name))
    else:
      yield (*above, name), field


def _wrong(field):
  """Values that a field must not have, of each kind of mistake."""
  yield object
  if not field.optional:
    yield None
  if field.choices:
    yield "no such choice"
  elif field.kind in (int, float):
    yield from ("1", float("nan"), float("inf"), True)
    yield from ([] if field.low is None else [field.low - 1])
    yield from ([] if field.high is None else [field.high * 10**5])
    if field.kind is int:
      yield 10**12 + 1
  elif field.kind is str:
    yield from (3, ["a"])
  elif field.kind is list:
    yield from ("abc", 7, [object])


@pytest.mark.parametrize("name", ["vae", "dit"])
def test_every_field_refuses_what_is_wrong_by_its_name(name):
  config = fields.run_config.upgrade(digits.get_config(name).to_dict())
  tried = 0
  for path, field in _leaves(fields.of(config)):
    for value in _wrong(field):
      changed = inner = copy.deepcopy(config)
      for part in path[:-1]:
        inner = inner.get(part, {})
      if path[-1] not in inner:
        continue
      inner[path[-1]] = value
      with pytest.raises(ValueError) as error:
        fields.check(changed)
      message = str(error.value)
      assert path[-1] in message and len(message) < 600, message
      tried += 1
  assert tried > 200


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("optim.lr", float("nan"), "optim.lr must be a finite number .* got nan"),
    (
      "batch_size",
      10**12,
      "batch_size must be a whole number from 1 to 10000000",
    ),
    ("validation.levels", (0.1, 1.5), "validation.levels must be a list"),
    ("validation.levels", (), "validation.levels must be"),
    ("validation.clips", 0, "validation.clips must be"),
    ("sampling.steps", 0, "sampling.steps must be"),
    ("sampling.num_frames", 10**12, "sampling.num_frames must be"),
    ("sampling.guidance", float("inf"), "sampling.guidance must be"),
    ("samples.every", -1, "samples.every must be"),
    ("samples.prompts", (1,), "samples.prompts must be"),
    ("denoiser.heads", 0, "denoiser.heads must be a whole number from 1"),
    ("denoiser.depth", 10**9, "denoiser.depth must be"),
    ("denoiser.dtype", "float33", "denoiser.dtype must be one of 'float32'"),
    ("objective.distribution", "normal", "objective.distribution must be one"),
    ("sampling.shift", 0.0, "sampling.shift must be"),
    ("sampling.shift", {"kid": 1}, "config.sampling.shift has no field 'kid'"),
    ("objective.shift", {"side": "x"}, "objective.shift.side must be"),
    ("mesh.fsdp", -2, "mesh.fsdp must be"),
    ("data.crop", "left", "data.crop must be one of"),
    ("checkpoint.keep", 0, "checkpoint.keep must be"),
    ("optim", 3, "config.optim must be a group of fields, got 3"),
    ("optim.learning_rate", 1e-3, "config.optim has no field 'learning_rate'"),
    ("optim.warmup_step", 1, "did you mean warmup_steps"),
    (
      "bach_size",
      4,
      "no field 'bach_size', did you mean batch_size",
    ),
    (
      "denoiser.wdth",
      4,
      "config.denoiser has no field 'wdth', did you mean w",
    ),
    ("denoiser.name", "none", "denoiser.name must be one of"),
    ("task", "vocoder", "task must be one of .*'vocoder'"),
  ],
)
def test_mistakes_that_people_make(path, value, message):
  config = digits.get_config("dit").unlock()
  group, *_, last = config, *path.split(".")
  for part in path.split(".")[:-1]:
    group = group[part]
  with config.ignore_type():
    group[last] = value
  with pytest.raises(ValueError, match=message):
    fields.check(config)


@pytest.mark.parametrize(
  "path", ["optim.lr", "data.name", "task", "seed", "validation.levels"]
)
def test_what_is_lacking_is_named(path):
  config = digits.get_config("dit").to_dict()
  *above, last = path.split(".")
  group = config
  for part in above:
    group = group[part]
  del group[last]
  with pytest.raises(ValueError, match=f"lacks {last}; see docs/fields.md"):
    fields.check(config)


def test_every_field_of_every_family_has_a_kind():
  for network in families.networks():
    group = fields._of(network.config)
    for field in dataclasses.fields(network.config):
      found = group.fields[field.name]
      assert isinstance(found, schema.Field) and found.kind is not object


def test_the_list_in_the_documents_is_that_of_the_code():
  assert fields.table() in (ROOT / "docs" / "fields.md").read_text()
