"""Laws of what a family says of itself: rules that are refused, networks."""

import dataclasses

import numpy as np
import pytest

from vdit_jax import types
from vdit_jax.models import families, system
from vdit_jax.models.t5 import encoder
from vdit_jax.models.vdit import autoencoder, denoiser
from vdit_jax.text import padding


def networks(**other):
  """Our smallest networks, the denoiser with other fields."""
  fields = dict(width=32, depth=1, heads=1, mlp_width=32)
  fields |= dict(latent_channels=8, text_width=128)
  cfg = denoiser.Config(**fields | other)
  return {
    "autoencoder": autoencoder.Autoencoder(autoencoder.VARIANTS["digits"]),
    "text_encoder": encoder.TextEncoder(encoder.VARIANTS["digits"]),
    "denoiser": denoiser.Denoiser(cfg),
  }


def modules(**other):
  return system.Modules(families.OURS, networks(**other))


def test_a_text_rule_is_of_known_kinds():
  for kind in padding.KINDS:
    for null in system.NULLS:
      rule = system.TextRule(kind, null)
      assert (rule.padding, rule.null) == (kind, null)
  with pytest.raises(ValueError, match="padding must .* got 'hidden'"):
    system.TextRule(padding="hidden")
  with pytest.raises(ValueError, match="null must .*'stored'.* got 'zeros'"):
    system.TextRule(null="zeros")


def test_networks_are_found_by_name_and_by_what_they_do():
  found = networks()
  known = system.Modules(families.OURS, found | {"image_encoder": "beside"})
  for name, module in found.items():
    assert known[name] is module
  assert known.denoiser is found["denoiser"]
  assert known.autoencoder is found["autoencoder"]
  assert known.text_encoders == {"text_encoder": found["text_encoder"]}
  with pytest.raises(KeyError, match="vocoder"):
    known["vocoder"]


def test_an_autoencoder_may_be_alone():
  alone = {"autoencoder": networks()["autoencoder"]}
  known = system.Modules(families.OURS, alone)
  assert known.denoiser is None and known.text_encoders == {}


def test_networks_of_other_widths_are_refused():
  system.check_widths(modules(), "here")
  message = "latent channels of denoiser and autoencoder in here .* 16 and 8"
  with pytest.raises(ValueError, match=message):
    system.check_widths(modules(latent_channels=16), "here")
  message = "widths of text of denoiser and text_encoder in here .* 64 and 128"
  with pytest.raises(ValueError, match=message):
    system.check_widths(modules(text_width=64), "here")


def test_patches_divide_the_latents_or_the_nearest_size_is_named():
  known = modules(patch=(2, 2, 2))
  shape = families.OURS.latent_shape
  assert shape(known, 5, 32, 48) == (2, 8, 12, 8)
  for size, message in (
    ((9, 32, 32), "num_frames 9 gives 3 latents.* patches of 2 .*try 13"),
    ((5, 36, 32), "height 36 gives 9 latents.* try 32"),
    ((5, 32, 44), "width 44 gives 11 latents.* try 48"),
  ):
    with pytest.raises(ValueError, match=message):
      shape(known, *size)
  shape(known, 13, 32, 48)  # the remedies are taken


def test_a_system_that_is_told_nothing_refuses_numbers():
  plain = system.System(name="plain", networks=(), places={})
  assert plain.number_cond(None, 2, {"fps": 8.0}, {}) is None
  with pytest.raises(ValueError, match="numbers must be None, got .*'fps'"):
    plain.number_cond(None, 2, {}, {"fps": 8.0})


def test_one_encoders_text_is_the_text():
  text = types.Text(np.zeros((1, 2, 3)), np.ones((1, 2), bool))
  assert families.OURS.join_text({"text_encoder": text}) is text
  with pytest.raises(ValueError, match="unpack"):
    families.OURS.join_text({"one": text, "two": text})


def test_a_systems_nulls_are_those_of_its_rules():
  rules = {
    "one": system.TextRule(null="stored"),
    "two": system.TextRule(null="prompt"),
    "three": system.TextRule(null="prompt"),
  }
  known = dataclasses.replace(families.OURS, text=rules)
  assert known.nulls == {"stored", "prompt"}
  assert known.network("denoiser").module is denoiser.Denoiser
