"""Laws of a run's config: an older one is the same run in today's words."""

import copy
import dataclasses
import functools
import itertools
import json
import pathlib
import time

import pytest
from ml_collections import ConfigDict

import vdit_jax
from vdit_jax import checkpoint, types
from vdit_jax.data import buckets, reading
from vdit_jax.models import families, networks
from vdit_jax.models.vdit import autoencoder, denoiser
from vdit_jax.training import learner
from vdit_jax.weights import run_config, workdir

PACKAGED = pathlib.Path(vdit_jax.__file__).parent / "packaged"
# A run of an early version: families by their former names, few groups.
OLD = {
  "task": "denoiser",
  "batch_size": 4,
  "autoencoder": {"name": "causal_vae", "latent_channels": 5},
  "denoiser": {"name": "vdit", "width": 64, "depth": 2, "heads": 2},
  "text_encoder": {"name": "t5", "width": 24},
  "objective": {"objective": "flow", "schedule": {"kind": "rectified_flow"}},
  "optim": {"lr": 0.1},
  "data": {"name": "digits", "fps": 4.0, "buckets": {"max_tokens": 0}},
  "sampling": {
    "sampler": "ddim",
    "steps": 9,
    "shift": 2.0,
    "guidance": 6.0,
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "fps": 8.0,
    "sees_padding": True,
    "dynamic_guidance": True,
  },
}
ONE = (types.Expert(guidance=6.0),)
TWO = (
  types.Expert(0.0, 0.4, guidance=3.0),
  types.Expert(0.4, 1.0, guidance=5.0, network="denoiser_2"),
)


def recipe(experts, **fields):
  defaults = dict(
    objective="v",
    schedule={"kind": "scaled_linear", "zero_terminal_snr": True},
    sampler="ddim",
    steps=20,
    shift=1.0,
    num_frames=5,
    height=16,
    width=32,
    fps=16.0,
  )
  return types.Recipe(experts=experts, **defaults | fields)


def config_of(recipe):
  schedule = dict(recipe.schedule)
  return ConfigDict(
    {
      "objective": {"objective": recipe.objective, "schedule": schedule},
      "sampling": run_config.sampling(recipe),
    }
  )


def test_networks_have_their_names_of_today_and_all_fields():
  new = run_config.upgrade(OLD)
  assert new["autoencoder"]["name"] == "vdit"
  for group, cfg in (
    ("autoencoder", autoencoder.Config(latent_channels=5)),
    ("denoiser", denoiser.Config(width=64, depth=2, heads=2)),
  ):
    assert networks.build_module(new[group], group).cfg == cfg
  old = {"autoencoder": {"name": "cogvideox_vae"}}
  assert run_config.upgrade(old)["autoencoder"]["name"] == "cogvideox"


def test_what_a_run_did_before_a_key_was_is_filled_in():
  new = run_config.upgrade(OLD)
  assert new["data"]["split"] == "train" and new["data"]["fps"] == 4.0
  options = [field.name for field in dataclasses.fields(reading.Options)]
  assert set(options) <= set(new["data"])
  found = buckets.Options(**new["data"]["buckets"])
  assert found == buckets.Options()
  assert new["objective"]["cond_dropout"] == 0.1
  assert (new["steps_a_call"], new["text_encoder_dir"]) == (1, "")
  assert new["init_from"] == ""


def test_sampling_has_the_words_of_today():
  new = run_config.upgrade(OLD)["sampling"]
  assert "sees_padding" not in new and "dynamic_guidance" not in new
  assert new["guidance_kind"] == "dynamic" and new["sampler_options"] == {}
  old = copy.deepcopy(OLD)
  old["sampling"]["dynamic_guidance"] = False
  assert run_config.upgrade(old)["sampling"]["guidance_kind"] == "constant"
  got = run_config.recipe(ConfigDict(run_config.upgrade(OLD)))
  assert got.experts == ONE and got.guidance_kind == "dynamic"
  assert got.spacing is None and got.negative_prompt is None


def test_to_bring_up_to_date_is_done_once_and_leaves_the_old():
  before = copy.deepcopy(OLD)
  new = run_config.upgrade(OLD)
  assert OLD == before
  assert run_config.upgrade(new) == new
  new["data"]["buckets"]["max_tokens"] = 7
  assert run_config.upgrade(OLD)["data"]["buckets"]["max_tokens"] == 0


def test_what_is_of_no_run_is_left_as_it_is():
  other = {"vae": {"name": "causal_vae"}, "steps": 3, "denoiser": "x"}
  got = run_config.upgrade(other)
  assert got.pop("init_from") == got.pop("text_encoder_dir") == ""
  assert (got.pop("frame_encoder_dir"), got.pop("network")) == ("", "denoiser")
  assert got == other
  with pytest.raises(ValueError, match="autoencoder.name .* got 'vqgan'"):
    run_config.upgrade({"autoencoder": {"name": "vqgan"}})


@pytest.mark.parametrize(
  "given",
  [
    recipe(ONE),
    recipe((types.Expert(0.0, 0.6, 3.0, "denoiser_2"),)),
    recipe(TWO),
    recipe(
      TWO,
      rescale=0.7,
      negative_prompt="blurry",
      spacing={"kind": "trailing", "offset": 0, "clean_end": True},
      sampler_options={"eta": 1.0},
      guidance_kind="oscillating",
      image_guidance=2.0,
    ),
  ],
)
def test_a_recipe_goes_through_a_config_and_its_file(given, tmp_path):
  config = config_of(given)
  assert run_config.recipe(config) == given
  checkpoint.prepare_workdir(tmp_path, config)
  assert run_config.recipe(run_config.read(tmp_path)) == given


def test_a_network_goes_through_a_config():
  cfg = denoiser.VARIANTS["digits"]
  known = families.network("vdit", "denoiser")
  group = run_config.network(known, cfg)
  assert group.name == "vdit"
  assert networks.build_module(group, "denoiser").cfg == cfg


def test_the_packaged_config_reads():
  assert checkpoint.read_config(PACKAGED).autoencoder.name == "causal_vae"
  config = run_config.read(PACKAGED)
  modules = networks.build(config)
  assert modules.system is families.OURS
  assert modules.denoiser.cfg.width == 128
  got = run_config.recipe(config)
  assert got.experts == (types.Expert(guidance=7.0),)
  assert (got.sampler, got.steps, got.num_frames) == ("euler", 30, 9)
  assert learner.objective(config).shift == 4.0


def _copy(tmp_path, change):
  config = json.loads((PACKAGED / "config.json").read_text())
  change(config)
  (tmp_path / "config.json").write_text(json.dumps(config))
  return tmp_path


def _set(place, value, config):
  *groups, name = place
  for group in groups:
    config = config[group]
  config[name] = value


GROUPS = ("autoencoder", "denoiser", "text_encoder", "sampling")
BAD = ([[1]], {"a": 1}, "", -1, None, float("nan"), 10**30)


def test_every_field_that_is_read_is_checked(tmp_path):
  packaged = json.loads((PACKAGED / "config.json").read_text())
  fields = [(group, name) for group in GROUPS for name in packaged[group]]
  fields += [("data", "max_length"), ("objective", "objective")]
  for (group, name), value in itertools.product(fields, BAD):
    if value == "" and isinstance(packaged[group][name], str):
      continue
    path = _copy(tmp_path, functools.partial(_set, (group, name), value))
    with pytest.raises(ValueError, match=f"{group}.{name} (must|has)") as error:
      run_config.read(path)
    assert str(error.value).startswith(str(path / "config.json"))
  for name, value in itertools.product(packaged["objective"]["schedule"], BAD):
    if (name, value) != ("kind", ""):
      place = "objective", "schedule", name
      change = functools.partial(_set, place, value)
      with pytest.raises(
        ValueError, match=f"objective.schedule.{name} must be"
      ):
        run_config.read(_copy(tmp_path, change))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: c.pop("sampling"), "sampling must be there"),
    (lambda c: c.update(sampling=[1]), "sampling must be an object"),
    (lambda c: c.update(denoiser="x"), "denoiser must be an object"),
    (lambda c: c["denoiser"].pop("name"), "denoiser.name must be one of"),
    (lambda c: c["denoiser"].update(wdth=3), "'wdth'; there are .*width"),
    (lambda c: c["sampling"].pop("steps"), "sampling.steps must be there"),
    (lambda c: c["sampling"].update(stesp=3), "'stesp'; there are .*steps"),
    (lambda c: c["sampling"].update(experts=[3]), "sampling.experts must be"),
    (
      lambda c: c["sampling"].update(experts=[["x", 1.0, 3.0, "denoiser"]]),
      r"sampling.experts\[0\].t_low must be .* got 'x'",
    ),
    (lambda c: c.update(text_encoder_dir=3), "text_encoder_dir must be a text"),
    (lambda c: c["denoiser"].update(dtype="f12"), "denoiser.dtype must be one"),
  ],
)
def test_a_config_that_is_none_is_refused(tmp_path, change, message):
  with pytest.raises(ValueError, match=f"config.json.*{message}"):
    run_config.read(_copy(tmp_path, change))


@pytest.mark.parametrize(
  ("field", "value"), [("text_encoder", "depth"), ("autoencoder", "blocks")]
)
def test_layers_that_a_release_does_not_hold_are_not_built(
  tmp_path, field, value
):
  for name in ("model.safetensors", "autoencoder.safetensors"):
    (tmp_path / name).symlink_to(PACKAGED / name)
  path = _copy(tmp_path, lambda c: c[field].update({value: 10**5}))
  begun = time.process_time()
  with pytest.raises(ValueError, match=f"{field}.{value} must be .*no more"):
    workdir.load(path)
  assert time.process_time() - begun < 3
