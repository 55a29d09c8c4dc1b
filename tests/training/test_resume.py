"""What may change in a run that goes on, and what its record keeps."""

import json
import pathlib

import jax.numpy as jnp
import ml_collections
import pytest

from configs import digits
from vdit_jax import checkpoint
from vdit_jax.training import fields, resume
from vdit_jax.weights import run_config

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

FREE = {
  "optim.lr": 1e-9,
  "optim.total_steps": 7,
  "optim.schedule": "constant",
  "optim.weight_decay": 0.5,
  "optim.clip_norm": 0.0,
  "batch_size": 3,
  "accumulate": 3,
  "steps_a_call": 5,
  "sampling.steps": 2,
  "sampling.guidance": 1.0,
  "validation.levels": (0.5,),
  "validation.split": "test",
  "samples.prompts": ("a",),
  "log_every": 1,
  "checkpoint.every": 1,
  "guard.nonfinite": "skip",
  "denoiser.kernel": "xla",
  "denoiser.remat": "full",
  "denoiser.dtype": "bfloat16",
  "mesh.fsdp": 2,
  "data.data_dir": "elsewhere",
  "data.shape": (9, 32, 32),
}
FIXED = {
  "seed": 1,
  "ema_decay": 0.5,
  "data.name": "moving_digits/two",
  "data.split": "test",
  "data.max_length": 3,
  "objective.shift": 1.0,
  "objective.schedule.kind": "cosine",
  "denoiser.depth": 3,
  "denoiser.attention": "factorised",
  "text_encoder.width": 64,
  "autoencoder.channels": (8,),
  "init_from": "other",
}


def _config(**changed):
  config = digits.get_config("dit").unlock()
  with config.ignore_type():
    config.update_from_flattened_dict(changed)
  return ml_collections.ConfigDict(run_config.upgrade(config.to_dict()))


def _changes(**changed):
  old, new = _config().to_dict(), _config(**changed).to_dict()
  return resume.changes(old, new, "workdir w")


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_make_the_result_wrong_may_change(name):
  found = _changes(**{name: FREE[name]})
  (old, new) = found.pop(name)
  assert old != new and not found


@pytest.mark.parametrize("name", FIXED)
def test_the_rest_is_refused_with_both_values_and_a_remedy(name):
  with pytest.raises(ValueError) as error:
    _changes(**{name: FIXED[name], "optim.lr": 3.0})
  message = str(error.value)
  assert f"{name}: " in message and " there, " in message
  assert resume.rule_of(name).why in message
  assert "use another workdir" in message and "optim.lr" not in message


def test_every_field_has_a_rule():
  for line in fields.table().splitlines()[2:]:
    name = line.split("`")[1]
    assert resume.rule_of(name).why
  # A field that is new stays until it is said that it may not.
  assert not resume.rule_of("novelty.of_tomorrow").may_change


def test_a_release_may_lie_elsewhere_and_weights_of_ours_may_not():
  old = {"init_from": "a", "init_fingerprint": "1"}
  moved = {"init_from": "b", "init_fingerprint": "1"}
  assert resume.changes(old, moved, "w") == {"init_from": ("a", "b")}
  for other in (
    {"init_from": "b", "init_fingerprint": "2"},
    {"init_from": "b", "init_fingerprint": ""},
  ):
    with pytest.raises(ValueError, match="init_from: 'a' there, 'b' given"):
      resume.changes(old, other, "w")
  with pytest.raises(ValueError, match="init_from"):
    resume.changes(old | {"init_fingerprint": ""}, other, "w")


def _save(workdir, step=2):
  with checkpoint.manager(workdir) as manager:
    checkpoint.save(manager, step, {"a": jnp.ones(1)})
    checkpoint.wait(manager)


def test_a_workdir_without_a_checkpoint_takes_another_config(tmp_path):
  checkpoint.prepare_workdir(tmp_path, _config())
  assert resume.check(tmp_path, _config(seed=3), {}) == {}
  _save(tmp_path)
  with pytest.raises(ValueError, match="seed: 0 there, 3 given"):
    resume.check(tmp_path, _config(seed=3), {})


def test_the_record_keeps_every_start(tmp_path):
  stands = {"records": "48"}
  resume.write(tmp_path, 0, {}, stands, "code 1")
  checkpoint.prepare_workdir(tmp_path, _config())
  _save(tmp_path)
  changed = _config(**{"optim.lr": 1e-4, "batch_size": 2})
  found = resume.check(tmp_path, changed, stands)
  assert [line.split(" (")[0] for line in resume.lines(found, 2)] == [
    "from step 2 on, batch_size: 32 -> 2",
    "from step 2 on, optim.lr: 0.002 -> 0.0001",
  ]
  resume.write(tmp_path, 2, found, stands, "code 2")
  checkpoint.prepare_workdir(tmp_path, changed)
  first, second = json.loads((tmp_path / resume.FILE).read_text())
  assert first["step"] == 0 and first["changed"] == {}
  assert second["step"] == 2 and second["code"] == "code 2"
  assert second["changed"] == {"batch_size": [32, 2], "optim.lr": [0.002, 1e-4]}
  assert checkpoint.read_config(tmp_path).optim.lr == 1e-4
  assert resume.check(tmp_path, changed, stands) == {}


def test_other_data_under_the_same_name_are_refused(tmp_path):
  resume.write(tmp_path, 0, {}, {"records": "48", "tokenizer": "a"}, "code")
  checkpoint.prepare_workdir(tmp_path, _config())
  now = {"records": "16", "tokenizer": "a"}
  assert resume.check(tmp_path, _config(), now) == {}
  _save(tmp_path)
  with pytest.raises(ValueError, match="records: 48 there, 16 now") as error:
    resume.check(tmp_path, _config(), now)
  assert "tokenizer" not in str(error.value)
  assert f"init_from={tmp_path}" in str(error.value)
  (tmp_path / resume.FILE).unlink()  # of an earlier version
  assert resume.check(tmp_path, _config(), now) == {}


@pytest.mark.parametrize(
  "text", ["", "{", "{}", "[1]", '[{"stands_on": {"records": 3}}]']
)
def test_a_record_that_is_none_is_named(tmp_path, text):
  checkpoint.prepare_workdir(tmp_path, _config())
  _save(tmp_path)
  (tmp_path / resume.FILE).write_text(text)
  with pytest.raises(ValueError, match="history.json is not the record"):
    resume.check(tmp_path, _config(), {})


def test_processes_compare_all_but_where_things_lie():
  held = resume.flat(_config())
  assert held["config.optim.lr"] == "0.002"
  assert not [name for name in held if "_dir" in name or "init_from" in name]


def test_the_table_in_the_documents_is_that_of_the_code():
  assert resume.table() in (ROOT / "docs" / "training.md").read_text()
